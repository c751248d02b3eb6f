"""Rotary positions and causal attention with grouped heads."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Float[Array, "L half"], Float[Array, "L half"]]:
    """Cosine and sine of position times frequency, float32; frequencies fall from 1 to about 1/theta.

    Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864, computed in float64.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def rotate(x_NLHd: Float[Array, "N L heads d"], tables: tuple[Array, Array]) -> Float[Array, "N L heads d"]:
    """Turn the two halves of every head against each other by the position's angle."""
    cosine, sine = (table[None, :, None, :] for table in tables)
    first, second = jnp.split(x_NLHd, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def causal_attention(
    query_NLHd: Float[Array, "N L H d"],
    key_NLGd: Float[Array, "N L G d"],
    value_NLGd: Float[Array, "N L G d"],
    dtype: jnp.dtype,
) -> Float[Array, "N L H d"]:
    """Softmax attention to this token and those before it; query head h reads key/value head h // (H / G).

    Matmul inputs are rounded to ``dtype``; scores, softmax and sums are float32.
    """
    windows, length, heads, head_dim = query_NLHd.shape
    groups = key_NLGd.shape[2]
    query = query_NLHd.reshape(windows, length, groups, heads // groups, head_dim) * head_dim**-0.5
    scores = jnp.einsum(
        "nqgrd,nkgd->ngrqk", query.astype(dtype), key_NLGd.astype(dtype), preferred_element_type=jnp.float32
    )
    visible = jnp.tril(jnp.ones((1, 1, 1, length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum(
        "ngrqk,nkgd->nqgrd", weights.astype(dtype), value_NLGd.astype(dtype), preferred_element_type=jnp.float32
    )
    return mixed.reshape(windows, length, heads, head_dim)
