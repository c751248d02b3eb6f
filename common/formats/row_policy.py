"""Which tokens become training rows: no padding, no special tokens, no chosen positions, no attention sinks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32


@dataclass(frozen=True)
class RowPolicy:
    """The rule behind the ``keep`` array of an activation store; an SAE carries it to its evaluation."""

    special_ids: tuple[int, ...] = ()  # token ids that are never rows
    positions: tuple[int, ...] = ()  # positions in the window that are never rows
    norm_limits: Mapping[str, float] | None = None  # tap -> largest norm of a row; None: no limit

    def keep(
        self,
        tokens_NL: Int32[np.ndarray, "N L"],
        padding_NL: Bool[np.ndarray, "N L"],
        norms: Mapping[str, Float32[np.ndarray, "N L"]],
    ) -> Bool[np.ndarray, "N L"]:
        """True for the tokens that are rows; ``norms`` holds the Euclidean norm at each limited tap."""
        keep_NL = ~padding_NL & ~np.isin(tokens_NL, self.special_ids)
        keep_NL[:, list(self.positions)] = False
        for tap, limit in (self.norm_limits or {}).items():
            keep_NL &= norms[tap] <= limit
        return keep_NL

    def outliers(
        self,
        tokens_NL: Int32[np.ndarray, "N L"],
        padding_NL: Bool[np.ndarray, "N L"],
        norms: Mapping[str, Float32[np.ndarray, "N L"]],
    ) -> dict[str, Bool[np.ndarray, "N L"]]:
        """For each limited tap the tokens beyond its limit that nothing but limits keeps from being rows."""
        rows_NL = replace(self, norm_limits=None).keep(tokens_NL, padding_NL, {})
        return {tap: rows_NL & ~(norms[tap] <= limit) for tap, limit in (self.norm_limits or {}).items()}

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RowPolicy":
        """Inverse of ``to_json``."""
        return RowPolicy(tuple(value["special_ids"]), tuple(value["positions"]), value["norm_limits"])
