"""A trained SAE as it is kept: in units of the raw activations, with what it came from."""

from typing import Any

from saex_pipe.common.formats.checkpoint import SavedSae
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.folding import fold
from saex_pipe.common.sae.rounding import in_float32
from saex_pipe.common.sae.saelens import hook_name, to_saelens
from saex_pipe.common.sae.train_step import TrainState
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.devices import Devices
from saex_pipe.stages.train.rows import Rows


def exported(
    config: Config, store: Rows, variant: Variant, state: TrainState, taps: tuple[str, ...], devices: Devices
) -> SavedSae:
    """The files of the SAE, on ``devices`` so far; the moving averages of its parameters where they were kept."""
    source = store.info.source
    metadata = {
        "model_name": source.get("model"),
        "hook_name": hook_name(taps[0]),
        "context_size": store.info.window_length,
    }
    if len(taps) > 1:
        metadata["hook_name_out"] = hook_name(taps[1])
    folded = fold(variant, in_float32(state.averages or state.params), state.normalisers)
    params: dict[str, Any] = {name: devices.on_host(leaf) for name, leaf in folded.items()}
    cfg, tensors = to_saelens(variant, params, metadata)
    saex = {
        "tap": taps[0],
        "target_tap": taps[-1],
        "row_policy": store.info.row_policy.to_json(),
        "source": dict(source),
        "store_digest": store.digest,
        "config": config.result_fields(),
    }
    return SavedSae(cfg, tensors, saex)
