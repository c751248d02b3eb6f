"""Sums over the rows of a batch, in one pass over the codes, and what has them for its gradient."""

from collections.abc import Callable
from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

PARTS = 16  # of the rows, which are added to each other first


def over_batch(of: Callable[..., Array], *values_BF: Num[Array, "B F"]) -> Num[Array, " F"]:
    """``of`` the values, entry by entry, summed over rows.

    XLA's CPU compiler goes down the columns of what is summed over the first axis: 131 ms for 2,048 x 24,576 numbers.
    Parts of the rows that are added to each other, and parts of their sum once more, are one pass of 5.
    """

    def plain(*values_BF: Array) -> Array:
        return jnp.sum(of(*values_BF), axis=0)

    def in_parts(*values_BF: Array) -> Array:
        sum_BF = _added(of, *values_BF)
        while sum_BF.shape[0] % PARTS == 0:
            sum_BF = _added(lambda values_BF: values_BF, sum_BF)
        return jnp.sum(sum_BF, axis=0)

    # Parts of rows that lie over several devices would have to be sent to and fro.
    if values_BF[0].shape[0] % PARTS or jax.device_count() > 1:
        return plain(*values_BF)
    found: Array = jax.lax.platform_dependent(*values_BF, cpu=in_parts, default=plain)
    return found


def _added(of: Callable[..., Array], *values_BF: Array) -> Array:
    rows = values_BF[0].shape[0] // PARTS
    starts = range(0, rows * PARTS, rows)
    return reduce(add, (of(*(each[start : start + rows] for each in values_BF)) for start in starts))


@jax.custom_vjp
def summed(values_BF: Float[Array, "B F"]) -> Float[Array, " F"]:
    """The sum over rows.

    A product with ones is one pass: 2.3 ms for 2,048 x 9,216 numbers, parts of the rows 3.0, and 6 in a training step,
    where XLA's CPU compiler takes the sum of the parts apart.
    """
    if jax.device_count() > 1:
        return jnp.sum(values_BF, axis=0)
    found: Array = jax.lax.platform_dependent(values_BF, cpu=_times_ones, default=partial(jnp.sum, axis=0))
    return found


def _times_ones(values_BF: Array) -> Array:
    return jnp.matmul(jnp.ones(values_BF.shape[0]), values_BF, precision="highest")


def _summed_forward(values_BF: Array) -> tuple[Array, int]:
    return summed(values_BF), values_BF.shape[0]


def _summed_backward(rows: int, out_F: Array) -> tuple[Array]:
    return (jnp.broadcast_to(out_F[None], (rows, out_F.shape[0])),)


summed.defvjp(_summed_forward, _summed_backward)


@jax.custom_vjp
def shifted(values_BF: Float[Array, "B F"], by_F: Float[Array, " F"]) -> Float[Array, "B F"]:
    """``values_BF + by_F``."""
    return values_BF + by_F[None]


def _shifted_forward(values_BF: Array, by_F: Array) -> tuple[Array, None]:
    return shifted(values_BF, by_F), None


def _shifted_backward(saved: None, out_BF: Array) -> tuple[Array, Array]:
    del saved
    return out_BF, summed(out_BF)


shifted.defvjp(_shifted_forward, _shifted_backward)


@jax.custom_vjp
def scaled(values_BF: Float[Array, "B F"], by_F: Float[Array, " F"]) -> Float[Array, "B F"]:
    """``values_BF * by_F``."""
    return values_BF * by_F[None]


def _scaled_forward(values_BF: Array, by_F: Array) -> tuple[Array, tuple[Array, Array]]:
    return scaled(values_BF, by_F), (values_BF, by_F)


def _scaled_backward(saved: tuple[Array, Array], out_BF: Array) -> tuple[Array, Array]:
    values_BF, by_F = saved
    return out_BF * by_F[None], over_batch(jnp.multiply, out_BF, values_BF)


scaled.defvjp(_scaled_forward, _scaled_backward)


def rows_above_zero(codes_BF: Float[Array, "B F"]) -> Int[Array, " F"]:
    """On how many rows each latent is active."""
    return over_batch(lambda codes_BF: (codes_BF > 0).astype(jnp.int32), codes_BF)
