"""The units of training: how rows are normalised, and what is known of them in those units before the first step."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers, whitening
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.rows import Rows, Sides, first_rows, joined

_BY_ROWS = ("whitening_pca", "whitening_zca", "layer_norm", "clipped")  # the statistics of a store do not suffice


class Units(NamedTuple):
    """Of the training of one SAE."""

    normalisers: Normalisers
    stats: DataStats  # in units of training


def units_of(config: Config, store: Rows, sides: Sides, *, with_rows: bool, resumed: bool) -> Units:
    """Normalisers and statistics.

    Args:
        config: ``normalise`` and what belongs to it.
        store: what is trained on.
        sides: taps of input and target.
        with_rows: statistics hold a sample of rows.
        resumed: what follows from a sample will be replaced by what was saved: no rows are read, they count as 0.

    Raises:
        InputError: there are no rows, all are zero, or they cannot be normalised like that.
    """
    if store.rows == 0:
        raise InputError(f"{config.store} has no training rows", "harvest again with more text or fewer drop_* rules")
    alike = sides.input == sides.target
    if config.normalise == "layer_norm" and not alike:
        raise InputError(
            "train.normalise = layer_norm: a reconstruction gets back the mean and spread of its own row, and a "
            "transcoder does not see the target's",
            "set it to mean_square",
        )
    sample: Mapping[str, np.ndarray] | None = None
    if with_rows or config.normalise in _BY_ROWS:
        sample = first_rows(config, store, sides.taps, resumed=resumed)
    found = [_side(config, store, taps, sample) for taps in (sides.input, *([] if alike else [sides.target]))]
    normalisers, means, rows = zip(*(found * 2 if alike else found), strict=True)
    return Units(Normalisers(*normalisers), DataStats(*means, *(rows if with_rows else ())))


def _side(
    config: Config, store: Rows, taps: Sequence[str], sample: Mapping[str, np.ndarray] | None
) -> tuple[Normaliser, Float[Array, " D"], Float[Array, "N D"] | None]:
    """Normaliser of the rows of ``taps``; their mean, and the sample, in its units."""
    widths = tuple(store.info.taps[tap] for tap in taps)
    scale_D = np.repeat([_scale(config, store, tap) for tap in taps], widths)
    whitened = None
    if config.normalise in ("whitening_pca", "whitening_zca"):
        assert sample is not None
        whitened = whitening([sample[tap] for tap in taps], config.normalise)
    normaliser = Normaliser(
        jnp.asarray(scale_D, jnp.float32),
        whitening=whitened,
        longest=config.clip_multiple if config.normalise == "clipped" else None,
        decay=config.ema_decay if config.normalise == "ema" else None,
        per_row=config.normalise == "layer_norm",
        tap_widths=widths if len(widths) > 1 else (),
    )
    if sample is None:
        mean_D = np.concatenate([store.statistics(tap).mean_D for tap in taps])
        return normaliser, normaliser.apply(jnp.asarray(mean_D[None], jnp.float32))[0], None
    rows_ND = normaliser.apply(jnp.asarray(joined(sample, taps)))
    return normaliser, jnp.mean(rows_ND, axis=0), rows_ND


def _scale(config: Config, store: Rows, tap: str) -> float:
    found, width = store.statistics(tap), store.info.taps[tap]
    if found.mean_square_norm == 0:
        raise InputError(f"every row of {tap} in {config.store} is zero", "harvest another tap")
    match config.normalise:
        case "mean_square" | "ema":
            return float(np.sqrt(width / found.mean_square_norm))
        case "expected_norm" | "clipped":
            return float(np.sqrt(width)) / _mean_norm(found)
        case _:
            return 1.0


def _mean_norm(found: ActivationStatistics) -> float:
    """E||x|| from the histogram of norms, where a row counts as the middle of its bin: 2.2 % off at most."""
    norms, counts = found.norms()
    return float(norms @ counts / counts.sum())
