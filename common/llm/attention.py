"""Rotary positions, and causal attention with grouped heads, in memory that grows linearly with the window."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saex_pipe.common.llm.rope import Rope

# Queries and keys to a block: a matmul of some size, and scores that stay in the cache of a core.
_BLOCK = 128
# Below every score: what a query that has seen no key yet takes as its maximum.
_NOTHING = -1e30


def rotary_tables(rope: Rope, length: int) -> tuple[Float[Array, "L half"], Float[Array, "L half"]]:
    """Cosine and sine of position times frequency (float32, computed in float64), times the rope's magnitude."""
    angle = np.arange(length, dtype=np.float64)[:, None] * rope.frequencies(length)
    return (
        jnp.asarray(np.cos(angle) * rope.magnitude, jnp.float32),
        jnp.asarray(np.sin(angle) * rope.magnitude, jnp.float32),
    )


def rotate(x_NLGrd: Float[Array, "N L G r d"], tables: tuple[Array, Array]) -> Float[Array, "N L G r d"]:
    """Turn the two halves of every head's leading dimensions against each other by the position's angle."""
    cosine, sine = (table[None, :, None, None, :] for table in tables)
    half = cosine.shape[-1]
    first, second, rest = jnp.split(x_NLGrd, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def causal_attention(
    query_NLGrd: Float[Array, "N L G r d"],
    key_NLGd: Float[Array, "N L G d"],
    value_NLGd: Float[Array, "N L G d"],
    *,
    scale: float,
    cap: float,
    window: Int[Array, ""] | int | None,
    dtype: jnp.dtype,
) -> Float[Array, "N L G r d"]:
    """Softmax attention of the r queries of each key/value head to this token and those before it.

    Longer windows than a block go through the online softmax of Milakov and Gimelshein 2018
    (https://arxiv.org/abs/1805.02867) block by block, as FlashAttention does (Dao et al. 2022,
    https://arxiv.org/abs/2205.14135): scores exist for one pair of blocks at a time, and pairs that the mask hides
    are left out.

    Args:
        query_NLGrd, key_NLGd, value_NLGd: heads, positions applied.
        scale: factor on the scores.
        cap: scores s become cap * tanh(s / cap); 0 for none.
        window: tokens that a query sees, itself included; None for all before it.
        dtype: that matmul inputs are rounded to; scores, softmax and sums are float32.
    """
    windows, length, groups, repeats, head_dim = query_NLGrd.shape
    block = min(_BLOCK, length)
    blocks = -(-length // block)

    def cut(x: Array) -> Array:
        """[N, L, G, ...] to [blocks, N, G, ..., block, d], zeros at the end."""
        x = jnp.pad(x, [(0, 0), (0, blocks * block - length)] + [(0, 0)] * (x.ndim - 2)).astype(dtype)
        x = x.reshape(windows, blocks, block, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 2, -2), 1, 0)

    mixed = _mix(cap, cut(query_NLGrd * scale), cut(key_NLGd), cut(value_NLGd), window)
    mixed = jnp.moveaxis(jnp.moveaxis(mixed, 0, 1), -2, 2)  # [N, blocks, block, G, r, d]
    return mixed.reshape(windows, blocks * block, groups, repeats, head_dim)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(cap: float, queries: Array, keys: Array, values: Array, window: Int[Array, ""] | int | None) -> Array:
    """Attention block by block: queries [blocks, N, G, r, block, d], keys and values [blocks, N, G, block, d].

    The gradient is spelled out because a loop whose bounds are computed has none.
    """
    pairs, blocks = _Pairs(keys, values, cap, window), queries.shape[0]
    if blocks == 1:
        return _attend(pairs, jnp.int32(0), queries[0])[None]
    return jax.lax.map(lambda args: _attend(pairs, *args), (jnp.arange(blocks, dtype=jnp.int32), queries))


def _mix_forward(cap: float, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    return _mix(cap, *inputs), inputs


def _mix_backward(cap: float, inputs: tuple[Any, ...], out: Array) -> tuple[Any, ...]:
    """From the same blocks in loops of fixed bounds, which meet the hidden pairs, too; computed again, not kept."""
    *arrays, window = inputs
    blocks = arrays[0].shape[0]

    def mixed(queries: Array, keys: Array, values: Array) -> Array:
        pairs = _Pairs(keys, values, cap, window)

        @jax.checkpoint
        def attend(args: tuple[Array, Array]) -> Array:
            number, query = args

            def meet(running: _Running, other: Array) -> tuple[_Running, None]:
                return _meet(pairs, number, query, other, running), None

            others = jnp.arange(blocks, dtype=jnp.int32)
            running, _ = jax.lax.scan(jax.checkpoint(meet), _nothing_met(query), others)
            return running.mixed / running.total[..., None]

        return jax.lax.map(attend, (jnp.arange(blocks, dtype=jnp.int32), queries))

    gradients = jax.vjp(mixed, *arrays)[1](out)
    no_gradient = None if window is None else np.zeros(np.shape(window), jax.dtypes.float0)
    return *gradients, no_gradient


_mix.defvjp(_mix_forward, _mix_backward)


class _Pairs(NamedTuple):
    """What a block of queries meets: all keys and values, cut into blocks, and the mask."""

    keys: Float[Array, "blocks N G block d"]
    values: Float[Array, "blocks N G block d"]
    cap: float
    window: Int[Array, ""] | int | None

    @property
    def block(self) -> int:
        """Tokens to a block."""
        return self.keys.shape[-2]


class _Running(NamedTuple):
    """The online softmax of a block of queries over the keys it has met."""

    maximum: Float[Array, "N G r block"]
    total: Float[Array, "N G r block"]
    mixed: Float[Array, "N G r block d"]  # not yet divided by the total


def _attend(pairs: _Pairs, number: Int[Array, ""], query: Float[Array, "N G r block d"]) -> Array:
    """One block of queries over the keys that it may see."""
    start = _nothing_met(query)
    if pairs.keys.shape[0] == 1:
        running = _meet(pairs, number, query, number, start)
    else:
        first = jnp.int32(0)
        if pairs.window is not None:
            first = jnp.maximum((number * pairs.block - pairs.window + 1) // pairs.block, 0).astype(jnp.int32)
        running = jax.lax.fori_loop(first, number.astype(jnp.int32) + 1, partial(_meet, pairs, number, query), start)
    return running.mixed / running.total[..., None]


def _nothing_met(query: Array) -> _Running:
    rows = query.shape[:-1]
    return _Running(jnp.full(rows, _NOTHING), jnp.zeros(rows), jnp.zeros(query.shape, jnp.float32))


def _meet(pairs: _Pairs, number: Int[Array, ""], query: Array, other: Int[Array, ""], running: _Running) -> _Running:
    """Take one block of keys and values into the running softmax."""
    key, value = pairs.keys[other], pairs.values[other]
    scores = jnp.einsum("ngrqd,ngkd->ngrqk", query, key, preferred_element_type=jnp.float32)
    if pairs.cap:
        scores = pairs.cap * jnp.tanh(scores / pairs.cap)
    within = jnp.arange(pairs.block)
    distance = (number - other) * pairs.block + within[:, None] - within[None, :]
    visible = distance >= 0
    if pairs.window is not None:
        visible &= distance < pairs.window
    scores = jnp.where(visible[None, None, None], scores, _NOTHING)
    maximum = jnp.maximum(running.maximum, scores.max(axis=-1))
    weights = jnp.where(visible[None, None, None], jnp.exp(scores - maximum[..., None]), 0.0)
    kept = jnp.exp(running.maximum - maximum)
    mixed = jnp.einsum("ngrqk,ngkd->ngrqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return _Running(maximum, running.total * kept + weights.sum(axis=-1), running.mixed * kept[..., None] + mixed)
