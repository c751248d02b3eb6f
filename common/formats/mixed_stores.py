"""Several activation stores read as one, mixed by weight: every batch holds the same share of each."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from typing import Self

import numpy as np
from jaxtyping import Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.formats.statistics import ActivationStatistics


class MixedStores:
    """Finished stores with the same taps; ``weights`` are relative, and where there are none the stores' rows are."""

    def __init__(self, stores: Sequence[ActivationStore], taps: Sequence[str], weights: Sequence[float] = ()) -> None:
        if weights and len(weights) != len(stores):
            raise InputError(f"{len(weights)} weights for {len(stores)} stores", "give one weight for each store")
        first = stores[0]
        for store in stores[1:]:
            for tap in taps:
                if store.require_tap(tap) != first.info.taps[tap]:
                    raise InputError(
                        f"{tap} is {store.info.taps[tap]} wide in {store.uri}, {first.info.taps[tap]} in {first.uri}",
                        "mix stores of one model",
                    )
        relative = [Fraction(weight).limit_denominator(10**6) for weight in weights or [s.rows for s in stores]]
        if min(relative) <= 0:
            raise InputError(f"weights {list(weights)} are not all positive", "leave out what is not to be read")
        self.stores = tuple(stores)
        self.weights = tuple(weight / sum(relative) for weight in relative)
        self.info = first.info
        self.uri = first.uri
        self.rows = sum(store.rows for store in stores)
        self.digest = "+".join(store.digest for store in stores)

    def statistics(self, tap: str) -> ActivationStatistics:
        """Statistics of the mixture's rows: sums are those of ``rows`` rows drawn by weight."""
        parts = [store.statistics(tap) for store in self.stores]
        scales = [
            float(weight) * self.rows / max(part.count, 1) for weight, part in zip(self.weights, parts, strict=True)
        ]
        return ActivationStatistics(
            count=self.rows,
            sum_D=np.sum([s * part.sum_D for s, part in zip(scales, parts, strict=True)], axis=0),
            sum_square_D=np.sum([s * part.sum_square_D for s, part in zip(scales, parts, strict=True)], axis=0),
            norm_histogram=np.rint(
                np.sum([s * part.norm_histogram for s, part in zip(scales, parts, strict=True)], axis=0)
            ).astype(np.int64),
        )


class MixedReader:
    """Batches from several stores, the rows of each store one behind the other; see ``RowReader``."""

    def __init__(
        self, mixture: MixedStores, taps: Sequence[str], *, seed: int, batch_rows: int, pool_bytes: int
    ) -> None:
        self._weights, self._batch_rows, self._taps = mixture.weights, batch_rows, tuple(dict.fromkeys(taps))
        # This store takes what the others leave, which is never less than nothing where its share is large enough.
        self._rest = max(range(len(self._weights)), key=self._weights.__getitem__)
        if batch_rows * self._weights[self._rest] < len(self._weights) - 1:
            raise InputError(
                f"train.batch_rows = {batch_rows} is too few for {len(self._weights)} stores", "raise train.batch_rows"
            )
        dtypes = [{store.info.decoded_dtype(tap) for store in mixture.stores} for tap in self._taps]
        self._dtypes = [found.pop() if len(found) == 1 else np.dtype(np.float32) for found in dtypes]
        self._widths = [mixture.info.taps[tap] for tap in self._taps]
        self._readers = [
            RowReader(store, self._taps, seed=seed, batch_rows=1, pool_bytes=int(pool_bytes * weight))
            for store, weight in zip(mixture.stores, self._weights, strict=True)
        ]

    @property
    def waiting_seconds(self) -> float:
        """Seconds spent waiting for rows to arrive."""
        return sum(reader.waiting_seconds for reader in self._readers)

    def batch(
        self, step: int, part: slice = slice(None), out: Mapping[str, np.ndarray] | None = None
    ) -> Mapping[str, Float[np.ndarray, "B D"]]:
        """The rows of ``step``, by tap, as ``RowReader.batch`` gives them; float32 where the stores' dtypes differ."""
        start, stop, _ = part.indices(self._batch_rows)
        if out is None:
            shapes = zip(self._taps, self._widths, self._dtypes, strict=True)
            out = {tap: np.empty((stop - start, width), dtype) for tap, width, dtype in shapes}
        place = 0
        for reader, before, after in zip(self._readers, self._taken(step), self._taken(step + 1), strict=True):
            first, last = max(start - place, 0), min(stop - place, after - before)
            if first < last:
                rows = reader.rows(before, after, slice(first, last))
                for tap in self._taps:
                    out[tap][place + first - start : place + last - start] = rows[tap]
            place += after - before
        return out

    def _taken(self, step: int) -> list[int]:
        """How many rows of each store the batches before ``step`` hold."""
        total = step * self._batch_rows
        taken = [int(total * weight) for weight in self._weights]
        taken[self._rest] = total - sum(taken[: self._rest] + taken[self._rest + 1 :])
        return taken

    def __enter__(self) -> Self:
        self._open = ExitStack()
        for reader in self._readers:
            self._open.enter_context(reader)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
