"""The forward pass of a decoder: a pure function with taps, edits and early exit.

Runs of blocks that no tap and no edit touches are one ``lax.scan`` over the stacked weights, so compile time grows
with the number of touched blocks and not with depth. Matmuls take inputs in the dtype of the weights and give float32;
the residual stream, norms, softmax and rotary positions are float32.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.attention import causal_attention, rotary_tables, rotate
from saex_pipe.common.llm.params import LanguageModel

# Gets the value at its tap and the requested taps computed before it; returns the value to go on with.
Edit = Callable[[Array, Mapping[str, Array]], Array]


class Output(NamedTuple):
    """``logits_NLV`` (float32) where asked for, and every requested tap by name (float32, [N, L, width])."""

    logits_NLV: Float[Array, "N L V"] | None
    taps: dict[str, Array]


def apply(
    model: LanguageModel,
    tokens_NL: Int[Array, "N L"],
    *,
    taps: Sequence[str] = (),
    edits: Mapping[str, Edit] | None = None,
    logits: bool = True,
    resume_from: tuple[str, Float[Array, "N L D"]] | None = None,
) -> Output:
    """Run the decoder on windows of tokens. Pure, and made to be called inside ``jax.jit``.

    A token sees the tokens before it in its window and itself. Without ``logits`` the computation ends at the
    last tap: what lies above is neither computed nor needs to be loaded.

    Args:
        model: the decoder; under jit pass it as an argument, or its weights become constants.
        tokens_NL: token ids.
        taps: names of the activations to return, see ``llm.taps``. A tap holds the value that the model went on
            with, that is, after an edit at the same place.
        edits: by tap, a function ``edit(value, captured)`` that returns the value to go on with, where
            ``captured`` holds the requested taps computed before it.
        logits: whether to return logits.
        resume_from: a ``resid_pre`` or ``resid_post`` tap and its value, to start there rather than at the
            embedding; an edit or tap at that place still applies, places before it are refused.

    Raises:
        InputError: a name that the model lacks, one that this call never reaches, or a block that was not loaded.
    """
    architecture = model.architecture
    architecture.check_window_length(tokens_NL.shape[1])
    edits = edits or {}
    wanted = tap_names.validate(taps, architecture)
    places = {**wanted, **tap_names.validate(edits, architecture)}
    start = tap_names.Tap(-1, 0) if resume_from is None else _resume_place(resume_from[0], model)
    end = tap_names.Tap(architecture.layers, 1) if logits else max(wanted.values(), default=tap_names.Tap(-1, 0))
    _check_reached(places, start, end)
    _check_loaded(model, end, logits)

    captured: dict[str, Array] = {}

    def visit(name: str, value: Array) -> Array:
        if name in edits:
            value = edits[name](value, captured).astype(value.dtype)
        if name in wanted:
            captured[name] = value
        return value

    if resume_from is None:
        resid_NLD = visit(tap_names.EMBED, model.params.embed[...][tokens_NL].astype(jnp.float32))
        first = 0
    else:
        resid_NLD = resume_from[1].astype(jnp.float32)
        first = start.layer
        if tap_names.SITES[start.site] == "resid_post":
            resid_NLD = visit(resume_from[0], resid_NLD)
            first += 1
    resid_NLD = _run_blocks(model, resid_NLD, first, end, {place.layer for place in places.values()}, visit)
    if end.layer < architecture.layers:
        return Output(None, captured)
    final_NLD = rms_norm(resid_NLD, model.params.final_norm[...], architecture.norm_epsilon)
    final_NLD = visit(tap_names.FINAL_NORM, final_NLD)
    return Output(unembed(model, final_NLD) if logits else None, captured)


def unembed(model: LanguageModel, final_NLD: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Logits (float32) of normalised final activations, the value of the tap ``final_norm``."""
    if not model.with_unembedding:
        raise InputError("logits of a model loaded without its unembedding", "load it with with_unembedding=True")
    weights = model.params.embed if model.params.unembed is None else model.params.unembed
    w_VD = weights[...]
    return jnp.einsum("...d,vd->...v", final_NLD.astype(w_VD.dtype), w_VD, preferred_element_type=jnp.float32)


def rms_norm(x_NLD: Float[Array, "*rows D"], scale_D: Float[Array, " D"], epsilon: float) -> Float[Array, "*rows D"]:
    """Root-mean-square norm, in float32."""
    mean_square = jnp.mean(jnp.square(x_NLD), axis=-1, keepdims=True)
    return x_NLD * jax.lax.rsqrt(mean_square + epsilon) * jnp.expand_dims(scale_D, range(x_NLD.ndim - 1))


def _run_blocks(
    model: LanguageModel,
    resid_NLD: Array,
    first: int,
    end: tap_names.Tap,
    touched: set[int],
    visit: Callable[[str, Array], Array],
) -> Array:
    """Blocks from ``first`` up to the last that ``end`` needs: touched ones unrolled, runs between them scanned."""
    rope = rotary_tables(resid_NLD.shape[1], model.architecture.head_dim, model.architecture.rope_theta)
    stop = min(end.layer + 1, model.architecture.layers)
    layer = first
    while layer < stop:
        if layer in touched:
            resid_NLD = visit(f"blocks.{layer}.resid_pre", resid_NLD)
            if end == tap_names.Tap(layer, 0):
                break
            resid_NLD = _block(model, layer, resid_NLD, rope, partial(_visit_block, visit, layer))
            layer += 1
        else:
            run_end = min([t for t in touched if t > layer] + [stop])
            # Over layer numbers, not over a slice of the weights, which would be copied at every call.
            resid_NLD, _ = jax.lax.scan(
                lambda x_NLD, number: (_block(model, number, x_NLD, rope, _untouched), None),
                resid_NLD,
                jnp.arange(layer, run_end),
            )
            layer = run_end
    return resid_NLD


def _block(
    model: LanguageModel,
    layer: int | Int[Array, ""],
    resid_NLD: Array,
    rope: tuple[Array, Array],
    visit: Callable[[str, Array], Array],
) -> Array:
    """One block, from after ``resid_pre`` to ``resid_post``."""
    a = model.architecture
    block = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), model.params.blocks)
    windows, length, _ = resid_NLD.shape
    attn_in_NLD = visit("attn_in", rms_norm(resid_NLD, block.attn_norm[...], a.norm_epsilon))
    qkv = _matmul(attn_in_NLD, block.w_qkv).reshape(windows, length, a.query_heads + 2 * a.kv_heads, a.head_dim)
    query, key, value = jnp.split(qkv, [a.query_heads, a.query_heads + a.kv_heads], axis=2)
    z_NLHd = causal_attention(rotate(query, rope), rotate(key, rope), value, block.w_qkv.dtype)
    z = visit("attn_z", z_NLHd.reshape(windows, length, a.query_heads * a.head_dim))
    attn_out_NLD = visit("attn_out", _matmul(z, block.w_attn_out))
    resid_NLD = visit("resid_mid", resid_NLD + attn_out_NLD)
    mlp_in_NLD = visit("mlp_in", rms_norm(resid_NLD, block.mlp_norm[...], a.norm_epsilon))
    gate, up = jnp.split(_matmul(mlp_in_NLD, block.w_gate_up), 2, axis=-1)
    mlp_out_NLD = visit("mlp_out", _matmul(jax.nn.silu(gate) * up, block.w_down))
    return visit("resid_post", resid_NLD + mlp_out_NLD)


def _visit_block(visit: Callable[[str, Array], Array], layer: int, site: str, value: Array) -> Array:
    return visit(f"blocks.{layer}.{site}", value)


def _untouched(site: str, value: Array) -> Array:
    return value


def _matmul(x: Array, weights: nnx.Param) -> Array:
    """Inputs in the dtype of the weights, sums and output in float32."""
    w = weights[...]
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def _resume_place(name: str, model: LanguageModel) -> tap_names.Tap:
    place = tap_names.parse(name, model.architecture)
    if not name.endswith((".resid_pre", ".resid_post")):
        raise InputError(f"cannot resume from '{name}'", "resume from a resid_pre or resid_post tap")
    return place


def _check_reached(places: Mapping[str, tap_names.Tap], start: tap_names.Tap, end: tap_names.Tap) -> None:
    for name, place in places.items():
        if place < start:
            raise InputError(f"'{name}' lies before the place the run resumes from", "resume from an earlier place")
        if place > end:
            raise InputError(f"the edit at '{name}' lies after the last tap", "ask for logits or a later tap")


def _check_loaded(model: LanguageModel, end: tap_names.Tap, logits: bool) -> None:
    needed = min(end.layer + (tap_names.SITES[end.site] != "resid_pre"), model.architecture.layers)
    loaded = model.params.blocks.layers
    if needed > loaded:
        raise InputError(
            f"the run needs blocks 0 to {needed - 1}, {loaded} were loaded", "load the model with a higher last_layer"
        )
    if logits and not model.with_unembedding:
        raise InputError("logits of a model loaded without its unembedding", "load it with with_unembedding=True")
