"""Codes that are counted in each step, to go by the active ones alone where they are few.

Few are at most rows F / share, for one of the ``SHARES`` that are compiled for. The count goes over all codes, so that
a sample of their rows tells first whether they may be few. On a mesh each device counts its own part of the codes, and
decides for itself; the SAEs of a stack decide together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from saex_pipe.common.sae.bit_words import WORD, counts, entries, words
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.crossover import Product, Sizes, gathers_pay
from saex_pipe.common.sae.stack import largest_of_stack

# Latents per active one; each is compiled for, and the first that holds all active codes runs.
SHARES = (512, 256, 128, 64)
TPU_SHARES = (16384, 4096)
# Counting goes over all codes; every n-th row tells whether it is worth it.
SAMPLED_ROWS = 64
SURELY_MANY = 32  # where one of so many is active in the sample; twice what the largest share holds


class Entries(NamedTuple):
    """Entries of a matrix of codes, by row."""

    rows_P: Int[Array, " P"]
    latents_P: Int[Array, " P"]
    there_P: Bool[Array, " P"]  # what is not, is padding and has row and latent 0

    def of(self, values_BF: Float[Array, "B F"]) -> Float[Array, " P"]:
        """The values at these entries, 0 for padding."""
        return jnp.where(self.there_P, values_BF[self.rows_P, self.latents_P], 0.0)


def nonzero(values_BF: Shaped[Array, "B F"]) -> UInt32[Array, "B W"]:
    """Which entries are not 0, as ``bit_words``; all of them where a sample of the rows has far too many to be few."""

    def of(values_BF: Array) -> Array:
        return words(values_BF, lambda part: part != jnp.zeros((), part.dtype))

    sample_BF = values_BF[::SAMPLED_ROWS]
    found = jnp.sum(counts(of(sample_BF)), dtype=jnp.int32)
    may_be_few = largest_of_stack((found <= sample_BF.size // SURELY_MANY).astype(jnp.int32))

    def everything(values_BF: Array) -> Array:
        return jnp.full((values_BF.shape[0], -(-values_BF.shape[1] // WORD)), ~jnp.uint32(0))

    result: Array = jax.lax.cond(may_be_few > 0, of, everything, values_BF)
    return result


def switch(
    words_BW: Array,
    shape: tuple[int, ...],
    width: int,
    products: Sequence[Product],
    compute: Compute,
    dense: Callable[[], Any],
    sparse: Callable[[Entries], Any],
) -> Any:
    """``sparse`` of the entries in ``words_BW`` if they are few, else ``dense``; both compute ``products``."""
    sizes = limits(shape, width, products, compute)
    if not sizes:
        return dense()
    branch = jnp.sum(jnp.sum(counts(words_BW), dtype=jnp.int32) > jnp.array(sizes), dtype=jnp.int32)
    found = [partial(lambda most: sparse(Entries(*entries(words_BW, most))), most) for most in sizes]
    return jax.lax.switch(largest_of_stack(branch), [*found, dense])


def limits(shape: tuple[int, ...], width: int, products: Sequence[Product], compute: Compute) -> list[int]:
    """Numbers of entries of one device's codes [B, F] that are compiled for; none where only the dense way is."""
    rows, latents = shape
    if rows * latents >= 1 << 31:  # more than are counted here
        return []
    shares = SHARES if compute.tpu is None else TPU_SHARES
    sizes = [Sizes(rows, width, latents, latents // share) for share in shares if share <= latents]
    return [rows * each.active for each in sizes if gathers_pay(products, each, compute)]
