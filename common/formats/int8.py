"""Activations in one byte: channels standardised, every row scaled to its largest channel, levels denser near zero.

``x ~ mean_D + std_D * scale * sign(q) |q|^1.5`` with ``q`` int8 and one float32 ``scale`` a row.

Without the first step a few large channels take all levels. Even levels then add ``absmax^2 / (12 * 127^2)`` of the
variance, 6e-5 for residual streams, whose largest channel lies 3.5 spreads out, but 1.2e-4 at the heavy tails of
``attn_z``; with the power of 1.5, which puts more levels where the values are, a third less: below 1e-4 everywhere.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int8

from saex_pipe.common.formats.statistics import ActivationStatistics, floats_from_text, floats_to_text

LEVELS = 127
MOST_ADDED_ERROR = 1e-4  # of the variance, that a store should have
_POWER = 1.5
_LEVELS = np.sign(np.arange(-128, 128)) * np.abs(np.arange(-128.0, 128)) ** _POWER
_BY_BYTE = np.roll(_LEVELS, 128).astype(np.float32)  # the level of each q, by its byte taken as unsigned


def warn_of_added_error(uri: str, added_error: Mapping[str, float]) -> None:
    """Print a line on stderr for each tap of a finished store that one byte a value is too little for.

    Args:
        uri: of the store.
        added_error: by tap, as a share of the variance.
    """
    for tap, error in added_error.items():
        if not error <= MOST_ADDED_ERROR:
            print(
                f"warning: {uri}: int8 adds {error:.2g} of the variance to {tap}, more than {MOST_ADDED_ERROR:g}; "
                f"store it as bfloat16 (--set harvest.tap_dtypes={tap}=bfloat16)",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Channels:
    """Mean and spread of every channel, from the first windows; fixed for the whole store."""

    mean_D: Float32[np.ndarray, " D"]
    std_D: Float32[np.ndarray, " D"]

    @staticmethod
    def of(statistics: ActivationStatistics) -> "Channels":
        """Of rows with these statistics; a channel that never changes counts as one of spread 1."""
        std_D = np.sqrt(statistics.variance_D)
        return Channels(statistics.mean_D.astype(np.float32), np.where(std_D > 0, std_D, 1).astype(np.float32))

    def encode(self, rows_BD: Float[np.ndarray, "*B D"]) -> tuple[Int8[np.ndarray, "*B D"], Float32[np.ndarray, "*B"]]:
        """Values and scales; a row with a value that is not finite gets the scale NaN."""
        values_BD = rows_BD.astype(np.float32)
        values_BD -= self.mean_D
        values_BD /= self.std_D
        largest_B = np.abs(values_BD).max(axis=-1)
        largest_B = np.where(largest_B == 0, 1, largest_B)
        with np.errstate(invalid="ignore"):  # infinity by infinity
            values_BD /= largest_B[..., None]
        signs_BD = np.sign(values_BD)
        np.square(values_BD, out=values_BD)
        np.cbrt(values_BD, out=values_BD)  # |x|^(1 / 1.5)
        values_BD *= signs_BD
        values_BD *= LEVELS
        scale_B = np.where(np.isfinite(largest_B), largest_B / LEVELS**_POWER, np.nan).astype(np.float32)
        return np.rint(np.nan_to_num(values_BD, copy=False)).astype(np.int8), scale_B

    def decode(
        self, values_BD: Int8[np.ndarray, "*B D"], scale_B: Float32[np.ndarray, "*B"]
    ) -> Float32[np.ndarray, "*B D"]:
        """The rows, in float32."""
        rows_BD = np.take(_BY_BYTE, values_BD.view(np.uint8))
        rows_BD *= scale_B[..., None]
        rows_BD *= self.std_D
        rows_BD += self.mean_D
        return rows_BD

    def to_json(self) -> dict[str, Any]:
        """As JSON values, every bit kept."""
        return {"mean": floats_to_text(self.mean_D), "std": floats_to_text(self.std_D)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Channels":
        """Inverse of ``to_json``."""
        mean_D, std_D = (floats_from_text(value[name]).astype(np.float32) for name in ("mean", "std"))
        return Channels(mean_D, std_D)
