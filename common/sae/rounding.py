"""Weights kept in bfloat16: updates are added in float32 and the sums rounded stochastically.

Revisiting BFloat16 Training. Pedram Zamirai, Jian Zhang, Christopher R. Aberger, Christopher De Sa. 2020.
https://arxiv.org/abs/2010.06192

Rounded to the nearest, a weight stays where it is under every update below 1/512 of it, which most are. Here it goes
to either neighbour with the probability that makes it right on average. A bfloat16 is the upper half of a float32, so
that random bits added to the lower half carry with just that probability.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int, PRNGKeyArray

WeightDtype = Literal["float32", "bfloat16"]


def round_stochastically(x: Float32[Array, "..."], key: PRNGKeyArray) -> BFloat16[Array, "..."]:
    """``x`` as bfloat16 with expectation ``x``; what bfloat16 can represent stays as it is."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def in_float32(params: dict[str, Array]) -> dict[str, Array]:
    """Parameters to compute with."""
    return {name: leaf.astype(jnp.float32) for name, leaf in params.items()}


def stored(params: dict[str, Array], dtype: WeightDtype, step: Int[Array, ""]) -> dict[str, Array]:
    """Float32 parameters as they are kept after ``step``: matrices in ``dtype``, biases and thresholds in float32."""
    if dtype == "float32":
        return params
    key = jax.random.fold_in(jax.random.key(0), step)
    return {
        name: round_stochastically(leaf, jax.random.fold_in(key, number)) if is_weight(name) else leaf
        for number, (name, leaf) in enumerate(sorted(params.items()))
    }


def is_weight(name: str) -> bool:
    """Whether the parameter of that name is a matrix."""
    return name.startswith("w_")
