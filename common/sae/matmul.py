"""Matrix products in a chosen input precision, always accumulated in float32."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex_pipe.common.sae.compute import ComputeDtype
from saex_pipe.common.sae.int8 import int8_product


def _product(a: Array, b: Array, contract: tuple[int, int], compute_dtype: ComputeDtype) -> Array:
    dimension_numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a.astype(compute_dtype), b.astype(compute_dtype), dimension_numbers, preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    a_MN: Float[Array, "M N"], b_NP: Float[Array, "N P"], compute_dtype: ComputeDtype = "float32"
) -> Float[Array, "M P"]:
    """``a_MN @ b_NP`` in float32, reading both as ``compute_dtype``.

    The gradients of an int8 product are those of the product that it stands for (straight through the rounding), read
    as bfloat16: gradients spread too widely for 127 levels.

    The gradient is spelled out because autodiff would multiply the float32 cotangent with the bfloat16
    operand, which no backend does at bfloat16 speed.
    """
    if compute_dtype == "int8":
        return int8_product(a_MN, b_NP)
    return _product(a_MN, b_NP, (1, 0), compute_dtype)


def _forward(a_MN: Array, b_NP: Array, compute_dtype: ComputeDtype) -> tuple[Array, tuple[Array, Array]]:
    return matmul(a_MN, b_NP, compute_dtype), (a_MN, b_NP)


def _backward(compute_dtype: ComputeDtype, saved: tuple[Array, Array], out_MP: Array) -> tuple[Array, Array]:
    a_MN, b_NP = saved
    dtype: ComputeDtype = "bfloat16" if compute_dtype == "int8" else compute_dtype
    return _product(out_MP, b_NP, (1, 1), dtype), _product(a_MN, out_MP, (0, 0), dtype)


matmul.defvjp(_forward, _backward)
