"""What the first windows decide for the whole store and all workers: limits on norms, channels of int8 taps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import CALIBRATION
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.int8 import Channels
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.formats.store_info import DTYPES
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.stages.harvest.config import Config
from saex_pipe.stages.harvest.forward import Forward
from saex_pipe.stages.harvest.shard import copy_rows

_WINDOWS = 64


@dataclass(frozen=True)
class Calibration:
    """Largest norm of a row by tap, None where there is no limit; channels by int8 tap."""

    norm_limits: Mapping[str, float] | None = None
    channels: Mapping[str, Channels] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """As an object of the store; every bit is kept."""
        channels = {tap: found.to_json() for tap, found in self.channels.items()}
        return json.dumps({"norm_limits": self.norm_limits, "channels": channels}, sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> "Calibration":
        """Inverse of ``to_json``."""
        found = json.loads(data)
        channels = {tap: Channels.from_json(value) for tap, value in found["channels"].items()}
        return Calibration(found["norm_limits"], channels)


def row_policy(config: Config, corpus: TokenStore) -> RowPolicy:
    """The rule for rows before any limit on norms."""
    special = tuple(corpus.info.tokenizer["special_ids"]) if config.drop_special_tokens else ()
    return RowPolicy(special, config.drop_positions)


def calibrate(
    config: Config, corpus: TokenStore, dtypes: Mapping[str, str], forward: Forward, folder: Folder
) -> Calibration:
    """The calibration in ``folder``: that of whichever worker came first, measured here where none has."""
    if not config.drop_norm_multiple and "int8" not in dtypes.values():
        return Calibration()
    kept = folder.read_stamped(CALIBRATION)
    if kept.data is not None:
        return Calibration.from_json(kept.data)
    found = _measure(config, corpus, dtypes, forward)
    if folder.write_if(CALIBRATION, found.to_json(), kept.generation) is None:
        return Calibration.from_json(folder.read(CALIBRATION) or b"")
    return found


def _measure(config: Config, corpus: TokenStore, dtypes: Mapping[str, str], forward: Forward) -> Calibration:
    policy = row_policy(config, corpus)
    windows = range(min(_WINDOWS, corpus.info.train_windows))
    tokens_NL, padding_NL = corpus.tokens(windows), corpus.documents(windows) < 0
    keep_NL = policy.keep(tokens_NL, padding_NL, {})
    if not keep_NL.any():
        raise InputError(
            f"{config.tokens}: the first {len(windows)} windows have no row that the drop_* settings keep",
            "drop fewer positions or give other text",
        )
    norms = {tap: np.empty(tokens_NL.shape, np.float32) for tap in dtypes}
    acts: dict[str, Float[np.ndarray, "N L D"]] = {}
    for start in range(0, len(windows), config.batch_windows):
        rows = slice(start, start + config.batch_windows)
        found = forward(tokens_NL[rows])
        for tap in dtypes:
            copy_rows(found.norms[tap], norms[tap][rows])
            if dtypes[tap] == "int8":
                width = found.acts[tap].shape[-1]
                acts.setdefault(tap, np.empty((*tokens_NL.shape, width), DTYPES["bfloat16"]))
                copy_rows(found.acts[tap], acts[tap][rows])
    limits = None
    if config.drop_norm_multiple:
        limits = {tap: float(config.drop_norm_multiple * np.median(norms[tap][keep_NL])) for tap in dtypes}
        keep_NL = replace(policy, norm_limits=limits).keep(tokens_NL, padding_NL, norms)
    return Calibration(limits, {tap: _channels(acts_NLD, keep_NL) for tap, acts_NLD in acts.items()})


def _channels(acts_NLD: Float[np.ndarray, "N L D"], keep_NL: Bool[np.ndarray, "N L"]) -> Channels:
    return Channels.of(ActivationStatistics.of_rows(acts_NLD, keep_NL))
