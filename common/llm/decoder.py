"""The forward pass of a decoder: a pure function with taps, edits and early exit.

Neighbouring blocks with the same taps are one ``lax.scan`` over the stacked weights, so compile time does not grow
with depth. Matmuls take inputs in the dtype of the weights and give float32; the residual stream, norms, softmax and
positions are float32.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.block import Positions, Visit, block_input, norm, positions, run_block
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.llm.taps import SITES, Tap
from saex_pipe.common.mesh import DATA, MODEL

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
    last tap: what lies above is neither computed nor needs to be loaded. On a mesh, windows are cut over its data
    axis, heads, MLP and vocabulary over its model axis.

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
    start = Tap(-1, 0) if resume_from is None else _resume_place(resume_from[0], model)
    end = Tap(architecture.layers, 1) if logits else max(wanted.values(), default=Tap(-1, 0))
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
        resid_NLD = block_input(model, visit(tap_names.EMBED, _embed(model, tokens_NL)))
        first = 0
    else:
        resid_NLD = resume_from[1].astype(jnp.float32)
        first = start.layer
        if SITES[start.site] == "resid_post":
            resid_NLD = visit(resume_from[0], resid_NLD)
            first += 1
    resid_NLD = _run_blocks(model, resid_NLD, (first, end), wanted, edits, captured, visit)
    if end.layer < architecture.layers:
        return Output(None, captured)
    outside = model.outside
    final_NLD = visit(tap_names.FINAL_NORM, norm(architecture, resid_NLD, outside.final_norm, outside.final_norm_bias))
    return Output(unembed(model, final_NLD) if logits else None, captured)


def unembed(model: LanguageModel, final_NLD: Float[Array, "N *rows D"]) -> Float[Array, "N *rows V"]:
    """Logits (float32) of normalised final activations, the value of the tap ``final_norm``."""
    if not model.with_unembedding:
        raise InputError("logits of a model loaded without its unembedding", "load it with with_unembedding=True")
    a = model.architecture
    weights = model.outside.embed if model.outside.unembed is None else model.outside.unembed
    w_VD = weights[...]
    logits = jnp.einsum("...d,vd->...v", final_NLD.astype(w_VD.dtype), w_VD, preferred_element_type=jnp.float32)
    logits = model.cut(logits, DATA, *[None] * (logits.ndim - 2), MODEL)[..., : a.vocabulary]
    return a.logit_cap * jnp.tanh(logits / a.logit_cap) if a.logit_cap else logits


def _embed(model: LanguageModel, tokens_NL: Int[Array, "N L"]) -> Float[Array, "N L D"]:
    embed_NLD = model.outside.embed[...][tokens_NL].astype(jnp.float32) * model.architecture.embedding_scale
    return model.cut(embed_NLD, DATA)


def _run_blocks(
    model: LanguageModel,
    resid_NLD: Array,
    span: tuple[int, Tap],
    wanted: Collection[str],
    edited: Collection[str],
    captured: dict[str, Array],
    visit: Visit,
) -> Array:
    """The blocks of ``span``: from a first one up to the last that its end needs, and the ``resid_pre`` there."""
    layer, end = span
    layers = model.architecture.layers
    ends_before_block = SITES[end.site] == "resid_pre" and end.layer < layers
    stop = end.layer if ends_before_block else min(end.layer + 1, layers)
    tables = positions(model.architecture, resid_NLD.shape[1])
    while layer < stop:
        sites, run = _next_run(layer, stop, wanted, edited)
        if sites is None:
            resid_NLD = run_block(model, layer, resid_NLD, tables, partial(_visit_in, visit, layer))
        else:
            if not sites:
                resid_NLD = visit(f"blocks.{layer}.resid_pre", resid_NLD)
            body = partial(_scanned_block, model, tables, sites)
            # Over layer numbers, not over a slice of the weights, which would be copied at every call.
            resid_NLD, stacked = jax.lax.scan(body, resid_NLD, jnp.arange(layer, layer + run))
            for place in range(run):
                captured |= {f"blocks.{layer + place}.{site}": values[place] for site, values in stacked.items()}
            if not sites:
                resid_NLD = visit(f"blocks.{layer + run - 1}.resid_post", resid_NLD)
        layer += run
    return visit(f"blocks.{stop}.resid_pre", resid_NLD) if ends_before_block else resid_NLD


def _scanned_block(
    model: LanguageModel, tables: Positions, sites: frozenset[str], resid_NLD: Array, layer: Int[Array, ""]
) -> tuple[Array, dict[str, Array]]:
    """One of several equal blocks: what it passes on, and its values at ``sites``."""
    seen: dict[str, Array] = {}

    def visit(site: str, value: Array) -> Array:
        if site in sites:
            seen[site] = value
        return value

    return run_block(model, layer, resid_NLD, tables, visit), seen


def _visit_in(visit: Visit, layer: int, site: str, value: Array) -> Array:
    return visit(f"blocks.{layer}.{site}", value)


def _next_run(
    layer: int, stop: int, wanted: Collection[str], edited: Collection[str]
) -> tuple[frozenset[str] | None, int]:
    """How many blocks from ``layer`` on are one scan, and the taps inside each; None for a block by itself.

    Blocks with the same taps are one scan. So are those that nothing touches but before the first of them and after
    the last, which is done outside the scan.
    """

    def touched(layer: int) -> frozenset[str]:
        return _sites(layer, wanted) | _sites(layer, edited)

    def run_of(same: Callable[[int], bool]) -> int:
        return next((other for other in range(layer + 1, stop) if not same(other)), stop) - layer

    sites = _sites(layer, wanted)
    if sites and (run := run_of(lambda other: _sites(other, wanted) == sites and not _sites(other, edited))) > 1:
        return (sites, run) if not _sites(layer, edited) else (None, 1)
    if "resid_post" in touched(layer) and touched(layer) <= {"resid_pre", "resid_post"}:
        return frozenset(), 1
    if not touched(layer) <= {"resid_pre"}:
        return None, 1
    run = run_of(lambda other: not touched(other))
    ends_tapped = layer + run < stop and touched(layer + run) == {"resid_post"}
    return frozenset(), run + ends_tapped


def _sites(layer: int, names: Collection[str]) -> frozenset[str]:
    start = f"blocks.{layer}."
    return frozenset(name.removeprefix(start) for name in names if name.startswith(start))


def _resume_place(name: str, model: LanguageModel) -> Tap:
    place = tap_names.parse(name, model.architecture)
    if not name.endswith((".resid_pre", ".resid_post")):
        raise InputError(f"cannot resume from '{name}'", "resume from a resid_pre or resid_post tap")
    return place


def _check_reached(places: Mapping[str, Tap], start: Tap, end: Tap) -> None:
    for name, place in places.items():
        if place < start:
            raise InputError(f"'{name}' lies before the place the run resumes from", "resume from an earlier place")
        if place > end:
            raise InputError(f"the edit at '{name}' lies after the last tap", "ask for logits or a later tap")


def _check_loaded(model: LanguageModel, end: Tap, logits: bool) -> None:
    needed = min(end.layer + (SITES[end.site] != "resid_pre"), model.architecture.layers)
    loaded = model.blocks.layers
    if needed > loaded:
        raise InputError(
            f"the run needs blocks 0 to {needed - 1}, {loaded} were loaded", "load the model with a higher last_layer"
        )
    if logits and not model.with_unembedding:
        raise InputError("logits of a model loaded without its unembedding", "load it with with_unembedding=True")
