"""What a decoder looks like: the numbers that a configuration file fixes, whatever the file calls them."""

import math
from dataclasses import dataclass
from typing import get_type_hints

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.rope import Rope

# Names in configuration files, to those of jax.nn (see decoder.activate).
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape and constants of a decoder-only transformer. Hashable, so that jit can take it as a static value."""

    family: str
    layers: int
    width: int  # of the residual stream (D)
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int  # rows of the embedding (V)
    max_positions: int  # the longest window the model was trained for, tokens
    norm_epsilon: float
    tied_embeddings: bool

    activation: str  # of the MLP, a value of ACTIVATIONS
    gated: bool  # the MLP multiplies the activated gate with a second projection
    layer_norms: bool  # mean removed, with a bias; else root-mean-square norms
    parallel: bool  # attention and MLP both read the block's input
    post_norms: bool  # norms also on what attention and MLP add
    qk_norms: bool  # norms on every query and key head
    qkv_bias: bool
    attn_out_bias: bool
    mlp_bias: bool
    scales_embedding: bool  # by the square root of the width

    rope: Rope | None  # None: learned positions
    local_rope: Rope | None = None  # of sliding layers, where it is another
    sliding_window: int = 0  # tokens that a sliding layer sees, this one included; 0: none slides
    sliding: tuple[bool, ...] = ()  # by layer; empty: none
    query_scalar: float = 0.0  # scores are divided by its square root; 0: head_dim
    attention_cap: float = 0.0  # scores s become cap * tanh(s / cap); 0: no cap
    logit_cap: float = 0.0

    @property
    def query_scale(self) -> float:
        """The factor on attention scores."""
        return (self.query_scalar or self.head_dim) ** -0.5

    @property
    def embedding_scale(self) -> float:
        """The factor on token embeddings."""
        return math.sqrt(self.width) if self.scales_embedding else 1.0

    def check_largest_id(self, largest_id: int) -> None:
        """Raise an ``InputError`` where a token id has no row in the embedding."""
        if largest_id >= self.vocabulary:
            raise InputError(
                f"the tokenizer's largest id {largest_id} does not fit the model's {self.vocabulary} embeddings",
                "use the model's own tokenizer",
            )

    def check_window_length(self, length: int) -> None:
        """Raise an ``InputError`` where a window of ``length`` tokens is longer than the model knows positions for."""
        if length > self.max_positions:
            raise InputError(
                f"window length {length} is above the {self.max_positions} positions of the model",
                f"use windows of at most {self.max_positions} tokens",
            )


def build(family: str, values: dict[str, object], names: dict[str, str], where: str) -> Architecture:
    """An ``Architecture`` from the values that a file states, checked.

    Args:
        family: its name.
        values: by field of ``Architecture``.
        names: what the file calls a field, for messages.
        where: the file, for messages.
    """
    values = {name: value for name, value in values.items() if value is not None}
    if isinstance(heads := values.get("query_heads"), int) and isinstance(width := values.get("width"), int):
        values.setdefault("kv_heads", heads)
        values.setdefault("head_dim", width // max(heads, 1))
    hints = get_type_hints(Architecture)
    for field, kind in hints.items():
        if field in values and kind in (int, float, bool):
            values[field] = _checked(field, values[field], kind, f"{where}: {names.get(field, field)}")
    required = [field for field in hints if field not in {"family", *Architecture.__dict__}]
    if missing := [field for field in required if field not in values and field != "rope"]:
        raise InputError(
            f"{where}: '{names.get(missing[0], missing[0])}' is missing", "get an intact copy of the model"
        )
    activation = values["activation"]
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{where}: {names.get('activation', 'activation')} = {activation!r} is not run by this version",
            f"known ones are {', '.join(ACTIVATIONS)}",
        )
    values["activation"] = ACTIVATIONS[str(activation)]
    values.setdefault("rope", None)
    sliding = values.get("sliding")
    if not (isinstance(sliding, tuple) and any(sliding)):  # said in one way, so that equal models are equal
        values |= {"sliding": (), "sliding_window": 0}
    architecture = Architecture(family=family, **values)  # type: ignore[arg-type]
    _check_heads(architecture, where)
    return architecture


_MAY_BE_ZERO = {"sliding_window", "query_scalar", "attention_cap", "logit_cap"}


def _checked(field: str, value: object, kind: type, name: str) -> object:
    if kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{name} = {value!r}", "it must be true or false")
        return value
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not (value > 0 or (value == 0 and field in _MAY_BE_ZERO)):  # type: ignore[operator]
        raise InputError(f"{name} = {value!r}", f"it must be a {'whole number' if kind is int else 'number'} above 0")
    return kind(value)


def _check_heads(a: Architecture, where: str) -> None:
    if a.query_heads % a.kv_heads:
        raise InputError(
            f"{where}: {a.query_heads} query heads do not divide over {a.kv_heads} key/value heads",
            "get an intact copy of the model",
        )
    for rope in (a.rope, a.local_rope):
        if rope is not None and (rope.dims % 2 or not 0 < rope.dims <= a.head_dim):
            raise InputError(
                f"{where}: rotary positions over {rope.dims} of head_dim {a.head_dim} dimensions",
                "they take an even number of them",
            )
