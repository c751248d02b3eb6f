"""Statistics of activations, gathered a shard at a time and merged exactly.

All sums are float64 and added in shard order, so the merged figures do not depend on who wrote which shard.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

_BINS_PER_OCTAVE = 16
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -16, 32
_BINS = (_HIGHEST_OCTAVE - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE


@dataclass(frozen=True)
class ActivationStatistics:
    """Over the kept rows of one tap. Norms are Euclidean, in the units of the activations."""

    count: int
    sum_D: Float64[np.ndarray, " D"]
    sum_square_D: Float64[np.ndarray, " D"]
    norm_histogram: Int64[np.ndarray, " bins"]  # 16 bins an octave from 2^-16 to 2^32

    @staticmethod
    def of_rows(rows_BD: Float[np.ndarray, "B D"]) -> "ActivationStatistics":
        """The statistics of these rows."""
        rows_BD = rows_BD.astype(np.float32)
        square_BD = np.square(rows_BD)
        norm_B = np.sqrt(square_BD.sum(axis=1, dtype=np.float64))
        octave_B = np.log2(np.maximum(norm_B, 2.0**_LOWEST_OCTAVE)) - _LOWEST_OCTAVE
        bin_B = np.clip((octave_B * _BINS_PER_OCTAVE).astype(np.int64), 0, _BINS - 1)
        return ActivationStatistics(
            count=len(rows_BD),
            sum_D=rows_BD.sum(axis=0, dtype=np.float64),
            sum_square_D=square_BD.sum(axis=0, dtype=np.float64),
            norm_histogram=np.bincount(bin_B, minlength=_BINS),
        )

    @staticmethod
    def merge(parts: "list[ActivationStatistics]") -> "ActivationStatistics":
        """The statistics of all the rows of ``parts``, which are added in the order given."""
        return ActivationStatistics(
            count=sum(part.count for part in parts),
            sum_D=np.sum([part.sum_D for part in parts], axis=0),
            sum_square_D=np.sum([part.sum_square_D for part in parts], axis=0),
            norm_histogram=np.sum([part.norm_histogram for part in parts], axis=0),
        )

    @property
    def mean_D(self) -> Float64[np.ndarray, " D"]:
        """Mean row."""
        return self.sum_D / max(self.count, 1)

    @property
    def mean_square_norm(self) -> float:
        """Mean of the squared norm of a row."""
        return float(self.sum_square_D.sum() / max(self.count, 1))

    def norm_quantile(self, share: float) -> float:
        """The norm below which ``share`` of the rows lie, to the width of a histogram bin (4.4 %)."""
        cumulative = np.cumsum(self.norm_histogram)
        bin_index = int(np.searchsorted(cumulative, share * self.count, side="left"))
        return float(2.0 ** (_LOWEST_OCTAVE + (min(bin_index, _BINS - 1) + 0.5) / _BINS_PER_OCTAVE))

    def to_json(self) -> dict[str, Any]:
        """Exact JSON form: floats survive the round trip bit for bit; empty histogram bins are left out."""
        filled = np.flatnonzero(self.norm_histogram)
        return {
            "count": self.count,
            "sum": self.sum_D.tolist(),
            "sum_square": self.sum_square_D.tolist(),
            "norm_histogram": {str(i): int(self.norm_histogram[i]) for i in filled},
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "ActivationStatistics":
        """Inverse of ``to_json``."""
        histogram = np.zeros(_BINS, np.int64)
        for index, number in value["norm_histogram"].items():
            histogram[int(index)] = number
        return ActivationStatistics(
            value["count"], np.asarray(value["sum"], np.float64), np.asarray(value["sum_square"], np.float64), histogram
        )
