"""The scores of an SAE, one definition each. NumPy in, float64 out."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass
class Reconstruction:
    """Running sums over batches of rows, in float64: ``l0``, ``fvu`` and ``dead_fraction`` of all rows so far.

    The sum of squares about the mean is merged batch by batch (Chan, Golub and LeVeque 1983), which stays exact to
    rounding where the mean is much larger than the spread; a plain difference of moments would not.
    """

    rows: int = 0
    active: int = 0  # active latents, summed over rows
    squared_error: float = 0.0
    squared_deviation: float = 0.0  # sum of ||x - mean||^2
    mean_D: Float[np.ndarray, " D"] = field(default_factory=lambda: np.zeros(0))
    fired_F: Bool[np.ndarray, " F"] = field(default_factory=lambda: np.zeros(0, bool))

    def add(
        self,
        target_BD: Float[np.ndarray, "B D"],
        recon_BD: Float[np.ndarray, "B D"],
        active_B: Int[np.ndarray, " B"],
        fired_F: Bool[np.ndarray, " F"],
    ) -> None:
        """Count one batch: targets, their reconstructions, active latents per row, latents that fired in the batch."""
        if target_BD.shape[0] == 0:
            return
        target_BD = np.asarray(target_BD, np.float64)
        mean_D = target_BD.mean(axis=0)
        self.include(
            Reconstruction(
                rows=target_BD.shape[0],
                active=int(np.sum(active_B, dtype=np.int64)),
                squared_error=float(np.square(target_BD - recon_BD).sum()),
                squared_deviation=float(np.square(target_BD - mean_D).sum()),
                mean_D=mean_D,
                fired_F=np.asarray(fired_F, bool),
            )
        )

    def include(self, other: "Reconstruction") -> None:
        """Count the rows that ``other`` has counted."""
        if other.rows == 0:
            return
        if self.rows == 0:
            self.mean_D, self.fired_F = np.zeros_like(other.mean_D), np.zeros_like(other.fired_F)
        shift_D = other.mean_D - self.mean_D
        total = self.rows + other.rows
        self.squared_error += other.squared_error
        self.squared_deviation += other.squared_deviation
        self.squared_deviation += float(np.square(shift_D).sum()) * self.rows * other.rows / total
        self.mean_D = self.mean_D + shift_D * (other.rows / total)
        self.active += other.active
        self.fired_F = self.fired_F | other.fired_F
        self.rows = total

    def to_json(self) -> dict[str, Any]:
        """JSON values that ``from_json`` turns back into the same bits."""
        fired = np.flatnonzero(self.fired_F).tolist()
        return asdict(self) | {"mean_D": self.mean_D.tolist(), "fired_F": fired, "latents": len(self.fired_F)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Reconstruction":
        """Inverse of ``to_json``."""
        fired_F = np.zeros(value["latents"], bool)
        fired_F[value["fired_F"]] = True
        known = {name: value[name] for name in ("rows", "active", "squared_error", "squared_deviation")}
        return Reconstruction(**known, mean_D=np.asarray(value["mean_D"], np.float64), fired_F=fired_F)

    @property
    def l0(self) -> float:
        """Active latents per row: mean number of codes above 0. NaN before the first row."""
        return self.active / self.rows if self.rows else float("nan")

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, the mean over all rows counted.

        No unit: 0 is perfect, 1 is as good as the mean. NaN where there is no variance.
        """
        return self.squared_error / self.squared_deviation if self.squared_deviation > 0 else float("nan")

    @property
    def dead_fraction(self) -> float:
        """Share of latents, 0 to 1, that fired on none of the rows counted. NaN before the first row."""
        return 1.0 - float(self.fired_F.mean()) if self.rows else float("nan")


def ce_recovered(ce_clean: float, ce_sae: float, ce_zero: float) -> float:
    """Share of the cross-entropy recovered: (ce_zero - ce_sae) / (ce_zero - ce_clean), all three in nats per token.

    ``ce_clean`` is the model's own, ``ce_sae`` with the activation replaced by its reconstruction, ``ce_zero`` with it
    replaced by 0. 1 is lossless, 0 as bad as 0, negative worse. NaN where zeroing changes nothing.
    """
    gap = ce_zero - ce_clean
    return (ce_zero - ce_sae) / gap if gap != 0 else float("nan")


class DictionaryMatch(NamedTuple):
    """How well learned directions match true ones; cosines, -1 to 1."""

    mean_max_cosine_true: float  # mean over true features of the best cosine among the learned
    mean_max_cosine_learned: float  # mean over learned features of the best cosine among the true
    recovered_fraction: float  # share of true features whose best cosine is at least the threshold


def mean_max_cosine(true_FD: Float[np.ndarray, "F D"], learned_FD: Float[np.ndarray, "G D"]) -> float:
    """Mean over the rows of ``true_FD`` of the largest cosine with a row of ``learned_FD``, -1 to 1.

    Swap the arguments for the other direction. A row of zeros has cosine 0 with everything.
    """
    return float(_max_cosines(true_FD, learned_FD).mean())


def match_dictionary(
    true_FD: Float[np.ndarray, "F D"], learned_FD: Float[np.ndarray, "G D"], threshold: float = 0.9
) -> DictionaryMatch:
    """Both directions of ``mean_max_cosine`` and the share of true features recovered at ``threshold``."""
    best_F = _max_cosines(true_FD, learned_FD)
    return DictionaryMatch(
        mean_max_cosine_true=float(best_F.mean()),
        mean_max_cosine_learned=mean_max_cosine(learned_FD, true_FD),
        recovered_fraction=float((best_F >= threshold).mean()),
    )


def _max_cosines(from_FD: np.ndarray, to_GD: np.ndarray) -> np.ndarray:
    return (_unit_rows(from_FD) @ _unit_rows(to_GD).T).max(axis=1)


def _unit_rows(w_FD: np.ndarray) -> np.ndarray:
    w_FD = np.asarray(w_FD, np.float64)
    norms_F1 = np.linalg.norm(w_FD, axis=1, keepdims=True)
    return w_FD / np.where(norms_F1 > 0, norms_F1, 1.0)
