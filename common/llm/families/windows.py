"""Which layers see a sliding window only."""

from collections.abc import Callable, Mapping
from typing import Any

from saex_pipe.common.errors import InputError

_SLIDING = {"sliding_attention": True, "full_attention": False}


def from_layer_types(config: Mapping[str, Any], window: int, slides: Callable[[int], bool]) -> dict[str, Any]:
    """``sliding_window`` and, by layer, ``sliding``, out of ``layer_types`` or else by the family's rule."""
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is None:
        sliding = tuple(slides(layer) for layer in range(layers))
    elif len(kinds) != layers or not set(kinds) <= set(_SLIDING):
        raise InputError(
            f"layer_types = {kinds!r} for {layers} layers", f"it takes one of {' and '.join(_SLIDING)} for each layer"
        )
    else:
        sliding = tuple(_SLIDING[kind] for kind in kinds)
    if any(sliding) and not window:
        raise InputError(
            "layer_types names sliding layers, but there is no sliding_window", "get an intact config.json"
        )
    return {"sliding_window": window if any(sliding) else 0, "sliding": sliding}
