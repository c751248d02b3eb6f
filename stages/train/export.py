"""A trained SAE as it is kept: in units of the raw activations, with what it came from."""

from typing import Any

from saex_pipe.common.formats.checkpoint import SavedSae
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.folding import fold
from saex_pipe.common.sae.saelens import hook_name, to_saelens
from saex_pipe.common.sae.train_step import TrainState
from saex_pipe.stages.train.calibration import trained_params
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.devices import Devices
from saex_pipe.stages.train.rows import Rows, Sides


def exported(
    config: Config, store: Rows, variant: Variant, state: TrainState, sides: Sides, devices: Devices
) -> SavedSae:
    """The files of the SAE, on ``devices`` so far; the moving averages of its parameters where they were kept."""
    source = store.info.source
    metadata: dict[str, Any] = {"model_name": source.get("model"), "context_size": store.info.window_length}
    if len(sides.input) > 1:
        taps: dict[str, Any] = {"taps": list(sides.input)}
        metadata["hook_names"] = [hook_name(tap) for tap in sides.input]
    else:
        taps = {"tap": sides.input[0], "target_tap": sides.target[0]}
        metadata["hook_name"] = hook_name(sides.input[0])
    if sides.input != sides.target:
        metadata["hook_name_out"] = hook_name(sides.target[0])
    trained = trained_params(config, store, variant, state, sides, devices)
    folded = fold(variant, trained, state.normalisers)
    params: dict[str, Any] = {name: devices.on_host(leaf) for name, leaf in folded.items()}
    cfg, tensors = to_saelens(variant, params, metadata, row_norm=state.normalisers.input.per_row)
    saex = taps | {
        "row_policy": store.info.row_policy.to_json(),
        "source": dict(source),
        "store_digest": store.digest,
        "config": config.result_fields(),
    }
    return SavedSae(cfg, tensors, saex)
