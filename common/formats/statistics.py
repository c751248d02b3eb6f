"""Statistics of activations, gathered a shard at a time and merged exactly.

All sums are float64 and added in shard order, so the merged figures do not depend on who wrote which shard.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

_BINS_PER_OCTAVE = 16
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -16, 32
_BINS = (_HIGHEST_OCTAVE - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE
_BLOCK_ROWS = 128  # at a time: they stay in the cache between the sums


@dataclass(frozen=True)
class ActivationStatistics:
    """Over the kept rows of one tap. Norms are Euclidean, in the units of the activations."""

    count: int
    sum_D: Float64[np.ndarray, " D"]
    sum_square_D: Float64[np.ndarray, " D"]
    norm_histogram: Int64[np.ndarray, " bins"]  # 16 bins an octave from 2^-16 to 2^32

    @staticmethod
    def of_rows(
        rows_BD: Float[np.ndarray, "*B D"], keep_B: Bool[np.ndarray, "*B"] | None = None
    ) -> "ActivationStatistics":
        """The statistics of these rows, or of those to keep."""
        width = rows_BD.shape[-1]
        rows_BD = rows_BD.reshape(-1, width)
        keep_B = np.ones(len(rows_BD), bool) if keep_B is None else keep_B.reshape(-1)
        # So few values of 8 or 11 bits add up in float32 almost exactly; those of 24 bits do not.
        precise = np.float64 if rows_BD.dtype.itemsize > 2 else np.float32
        sum_D, sum_square_D = np.zeros(width), np.zeros(width)
        norm_histogram = np.zeros(_BINS, np.int64)
        for start in range(0, len(rows_BD), _BLOCK_ROWS):
            keep = keep_B[start : start + _BLOCK_ROWS]
            block_BD = _as_float32(rows_BD[start : start + _BLOCK_ROWS])
            block_BD[~keep] = 0
            sum_D += block_BD.sum(axis=0, dtype=precise)
            np.square(block_BD, out=block_BD)
            sum_square_D += block_BD.sum(axis=0, dtype=precise)
            norm_histogram += _norm_histogram(np.sqrt(block_BD @ np.ones(width, np.float32))[keep])
        return ActivationStatistics(int(keep_B.sum()), sum_D, sum_square_D, norm_histogram)

    @staticmethod
    def merge(parts: "Sequence[ActivationStatistics]") -> "ActivationStatistics":
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
    def variance_D(self) -> Float64[np.ndarray, " D"]:
        """Variance of every dimension."""
        return np.maximum(self.sum_square_D / max(self.count, 1) - np.square(self.mean_D), 0)

    @property
    def mean_square_norm(self) -> float:
        """Mean of the squared norm of a row."""
        return float(self.sum_square_D.sum() / max(self.count, 1))

    @property
    def mean_to_spread(self) -> float:
        """Norm of the mean row in units of the spread around it; 0 where all rows are alike.

        An SAE that starts far off the mean spends its latents on it: a ratio well above 1 predicts dead latents unless
        the decoder bias starts at the mean.
        """
        spread = float(self.variance_D.sum())
        return float(np.linalg.norm(self.mean_D) / np.sqrt(spread)) if spread > 0 else 0.0

    def norm_quantile(self, share: float) -> float:
        """The norm below which ``share`` of the rows lie, to the width of a histogram bin (4.4 %)."""
        cumulative = np.cumsum(self.norm_histogram)
        bin_index = int(np.searchsorted(cumulative, share * self.count, side="left"))
        return float(2.0 ** (_LOWEST_OCTAVE + (min(bin_index, _BINS - 1) + 0.5) / _BINS_PER_OCTAVE))

    def norms(self) -> tuple[Float64[np.ndarray, " filled"], Int64[np.ndarray, " filled"]]:
        """The middles of the histogram's bins that are not empty, and how many rows lie in each."""
        filled = np.flatnonzero(self.norm_histogram)
        return 2.0 ** (_LOWEST_OCTAVE + (filled + 0.5) / _BINS_PER_OCTAVE), self.norm_histogram[filled]

    def to_json(self) -> dict[str, Any]:
        """Exact JSON form: floats keep every bit; empty histogram bins are left out."""
        filled = np.flatnonzero(self.norm_histogram)
        return {
            "count": self.count,
            "sum": floats_to_text(self.sum_D),
            "sum_square": floats_to_text(self.sum_square_D),
            "norm_histogram": {str(i): int(self.norm_histogram[i]) for i in filled},
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "ActivationStatistics":
        """Inverse of ``to_json``."""
        histogram = np.zeros(_BINS, np.int64)
        for index, number in value["norm_histogram"].items():
            histogram[int(index)] = number
        return ActivationStatistics(
            value["count"], floats_from_text(value["sum"]), floats_from_text(value["sum_square"]), histogram
        )


def floats_to_text(values: Float[np.ndarray, " n"]) -> str:
    """Little-endian float64 in base64: every bit, in a third of the room that digits take."""
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def floats_from_text(text: str) -> Float64[np.ndarray, " n"]:
    """Inverse of ``floats_to_text``."""
    return np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64)


def _as_float32(rows_BD: np.ndarray) -> np.ndarray:
    """A copy; of bfloat16 by its bits, which is five times as fast as converting it."""
    if rows_BD.dtype == ml_dtypes.bfloat16:
        wide_BD = rows_BD.view(np.uint16).astype(np.uint32)
        return np.left_shift(wide_BD, 16, out=wide_BD).view(np.float32)
    return rows_BD.astype(np.float32)


def _norm_histogram(norm_B: np.ndarray) -> np.ndarray:
    octave_B = np.log2(np.clip(norm_B, 2.0**_LOWEST_OCTAVE, 2.0**_HIGHEST_OCTAVE)) - _LOWEST_OCTAVE
    bin_B = np.clip((np.nan_to_num(octave_B) * _BINS_PER_OCTAVE).astype(np.int64), 0, _BINS - 1)
    return np.bincount(bin_B, minlength=_BINS)
