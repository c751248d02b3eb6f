"""One block of a decoder, and what it shares with the others: positions, norms, projections."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.attention import causal_attention, rotary_tables, rotate
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.mesh import DATA, MODEL

# Gets the name of a site and its value; returns the value to go on with.
Visit = Callable[[str, Array], Array]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Positions(NamedTuple):
    """What blocks know of positions: by kind of layer (full, sliding) the rotary tables, by layer the windows."""

    rotary: tuple[tuple[Array, Array], ...]  # none where positions are learned
    is_sliding: np.ndarray | None  # [layers], where kinds differ
    window: int | None  # of sliding layers, where it is shorter than the windows of tokens

    def tables(self, layer: int | Int[Array, ""]) -> tuple[Array, Array] | None:
        """Cosine and sine [L, half] of a layer."""
        if len(self.rotary) < 2:
            return self.rotary[0] if self.rotary else None
        sliding = jnp.asarray(self.is_sliding)[layer]
        full, local = self.rotary
        return jnp.where(sliding, local[0], full[0]), jnp.where(sliding, local[1], full[1])

    def visible(self, layer: int | Int[Array, ""], length: int) -> int | Int[Array, ""] | None:
        """How many tokens a query of a layer sees; None for all before it."""
        if self.window is None:
            return None
        if self.is_sliding is None:
            return self.window
        return jnp.where(jnp.asarray(self.is_sliding)[layer], jnp.int32(self.window), jnp.int32(length))


def positions(a: Architecture, length: int) -> Positions:
    """For windows of ``length`` tokens."""
    mixed = any(a.sliding) and not all(a.sliding)
    ropes = [a.rope, a.local_rope if mixed else None]
    if a.local_rope is not None and a.sliding and all(a.sliding):
        ropes = [a.local_rope]
    window = a.sliding_window if any(a.sliding) and a.sliding_window < length else None
    tables = tuple(rotary_tables(rope, length) for rope in ropes if rope is not None)
    return Positions(tables, np.asarray(a.sliding) if mixed else None, window)


def block_input(model: LanguageModel, embed_NLD: Float[Array, "N L D"]) -> Float[Array, "N L D"]:
    """What enters the first block: the embedding, and learned positions where the family has them."""
    if model.outside.positions is None:
        return embed_NLD
    return embed_NLD + model.outside.positions[...][None, : embed_NLD.shape[1]]


def run_block(
    model: LanguageModel,
    layer: int | Int[Array, ""],
    resid_NLD: Float[Array, "N L D"],
    places: Positions,
    visit: Visit,
) -> Float[Array, "N L D"]:
    """One block, from ``resid_pre`` to ``resid_post``, with a visit at every site between."""
    a = model.architecture
    block = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), model.blocks)
    resid_NLD = visit("resid_pre", resid_NLD)
    attn_in_NLD = visit("attn_in", norm(a, resid_NLD, block.attn_norm, block.attn_norm_bias))
    z_NLd = visit("attn_z", _attention(model, block, layer, attn_in_NLD, places))
    attn_out_NLD = _project(z_NLd, block.w_attn_out, block.b_attn_out)
    if block.post_attn_norm is not None:
        attn_out_NLD = norm(a, attn_out_NLD, block.post_attn_norm)
    attn_out_NLD = visit("attn_out", model.cut(attn_out_NLD, DATA))
    mid_NLD = visit("resid_mid", resid_NLD + attn_out_NLD)
    mlp_read_NLD = resid_NLD if a.parallel else mid_NLD
    mlp_in_NLD = visit("mlp_in", norm(a, mlp_read_NLD, block.mlp_norm, block.mlp_norm_bias))
    mlp_out_NLD = _project(_mlp_hidden(model, block, mlp_in_NLD), block.w_down, block.b_down)
    if block.post_mlp_norm is not None:
        mlp_out_NLD = norm(a, mlp_out_NLD, block.post_mlp_norm)
    mlp_out_NLD = visit("mlp_out", model.cut(mlp_out_NLD, DATA))
    return visit("resid_post", mid_NLD + mlp_out_NLD)


def norm(
    a: Architecture, x: Float[Array, "*rows D"], scale: nnx.Param, bias: nnx.Param | None = None
) -> Float[Array, "*rows D"]:
    """The family's norm over the last axis, in float32: layer norm with its bias, or root-mean-square norm."""
    if a.layer_norms:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + a.norm_epsilon) * _row(scale, x.ndim)
    return x if bias is None else x + _row(bias, x.ndim)


def _attention(
    model: LanguageModel, block: Any, layer: int | Int[Array, ""], attn_in_NLD: Array, places: Positions
) -> Float[Array, "N L heads"]:
    """The outputs of all heads side by side."""
    a = model.architecture
    windows, length, _ = attn_in_NLD.shape
    qkv = _project(attn_in_NLD, block.w_qkv, block.b_qkv)  # [N, L, G, r + 2, head_dim]
    qkv = model.cut(qkv, DATA, None, MODEL)
    query, key, value = jnp.split(qkv, [qkv.shape[3] - 2, qkv.shape[3] - 1], axis=3)
    if block.query_norm is not None:
        query, key = norm(a, query, block.query_norm), norm(a, key, block.key_norm)
    tables = places.tables(layer)
    if tables is not None:
        query, key = rotate(query, tables), rotate(key, tables)
    z = causal_attention(
        query,
        key[:, :, :, 0],
        value[:, :, :, 0],
        scale=a.query_scale,
        cap=a.attention_cap,
        window=places.visible(layer, length),
        dtype=block.w_qkv.dtype,
    )
    return z.reshape(windows, length, a.query_heads * a.head_dim)


def _mlp_hidden(model: LanguageModel, block: Any, mlp_in_NLD: Array) -> Float[Array, "N L M"]:
    """The MLP's hidden activations: activated, and multiplied with the second projection where it is gated."""
    inputs = model.cut(_project(mlp_in_NLD, block.w_in, block.b_in), DATA, None, None, MODEL)
    hidden = _ACTIVATIONS[model.architecture.activation](inputs[:, :, 0])
    return hidden * inputs[:, :, 1] if model.architecture.gated else hidden


def _project(x_NLI: Float[Array, "N L I"], weights: nnx.Param, bias: nnx.Param | None) -> Float[Array, "N L *out"]:
    """Inputs in the dtype of the weights [I, *out], sums and output in float32."""
    w = weights[...]
    out = jax.lax.dot_general(
        x_NLI.astype(w.dtype), w, (((x_NLI.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return out if bias is None else out + _row(bias, out.ndim)


def _row(weights: nnx.Param, dimensions: int) -> Array:
    """Leading axes of size 1, as strict promotion asks for."""
    w = weights[...]
    return jnp.expand_dims(w, range(dimensions - w.ndim))
