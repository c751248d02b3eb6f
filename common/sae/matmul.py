"""Matrix products in a chosen input precision, always accumulated in float32."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from saex_pipe.common.sae.batch_sums import summed
from saex_pipe.common.sae.compute import ComputeDtype, gradient_dtype
from saex_pipe.common.sae.int8 import int8_product


def _product(a: Array, b: Array, contract: tuple[int, int], compute_dtype: ComputeDtype) -> Array:
    dimension_numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a.astype(compute_dtype), b.astype(compute_dtype), dimension_numbers, preferred_element_type=jnp.float32
    )


def by_transposed(
    a_MP: Float[Array, "M P"], b_NP: Float[Array, "N P"], compute_dtype: ComputeDtype
) -> Float[Array, "M N"]:
    """``a_MP @ b_NP.T`` in float32, reading both as ``compute_dtype``: the encoder's product, and the gradient of what
    a weight multiplies."""
    if compute_dtype == "int8":
        return int8_product(a_MP, b_NP.T)
    return _product(a_MP, b_NP, (1, 1), compute_dtype)


def over_rows(a_MN: Float[Array, "M N"], b_MP: Float[Array, "M P"], compute_dtype: ComputeDtype) -> Float[Array, "N P"]:
    """``a_MN.T @ b_MP`` in float32: the gradient of a weight, which sums over the rows of a batch."""
    sides = a_MN.astype(compute_dtype), b_MP.astype(compute_dtype)
    if jax.device_count() > 1:  # what is cut over devices a layout of one's own would gather
        return _over_rows(*sides)
    return jax.lax.platform_dependent(*sides, cpu=_over_rows_on_cpu, default=_over_rows)


def _over_rows(a_MN: Array, b_MP: Array) -> Array:
    return jax.lax.dot_general(a_MN, b_MP, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _over_rows_on_cpu(a_MN: Array, b_MP: Array) -> Array:
    """XLA's CPU compiler has no bfloat16 product that reads its left side by columns: it goes through float32, at less
    than half the speed. So the narrower side is written out transposed and put on the left."""
    if a_MN.shape[1] > b_MP.shape[1]:
        return _row_major(_over_rows_on_cpu(b_MP, a_MN)).T
    product = jax.lax.dot_general(
        _row_major(a_MN.T), b_MP, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return _row_major(product)


def _row_major(a: Array) -> Array:
    """The same, laid out as it reads, so that the compiler does not take a transpose back by a layout of its own."""
    return with_layout_constraint(a, Layout(major_to_minor=tuple(range(a.ndim))))


def written_out(a_MN: Float[Array, "M N"]) -> Float[Array, "M N"]:
    """The same, computed before what reads it; XLA's CPU compiler would compute it again for every sum over rows."""
    return a_MN if jax.device_count() > 1 else _row_major(a_MN)


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
    dtype = gradient_dtype(compute_dtype)
    return by_transposed(out_MP, b_NP, dtype), over_rows(a_MN, out_MP, dtype)


matmul.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def centred_matmul(
    x_BD: Float[Array, "B D"],
    b_pre_D: Float[Array, " D"],
    w_FD: Float[Array, "F D"],
    compute_dtype: ComputeDtype = "float32",
) -> Float[Array, "B F"]:
    """``(x_BD - b_pre_D) @ w_FD.T`` in float32, reading both sides as ``compute_dtype``.

    The gradient to ``b_pre_D`` needs that to the rows only in their sum, which comes first: a vector through the matrix
    in place of a fifth product of the size of the others.
    """
    return by_transposed(x_BD - b_pre_D[None], w_FD, compute_dtype)


def _centred_forward(
    x_BD: Array, b_pre_D: Array, w_FD: Array, compute_dtype: ComputeDtype
) -> tuple[Array, tuple[Array, Array, Array]]:
    return centred_matmul(x_BD, b_pre_D, w_FD, compute_dtype), (x_BD, b_pre_D, w_FD)


def _centred_backward(
    compute_dtype: ComputeDtype, saved: tuple[Array, Array, Array], out_BF: Array
) -> tuple[Array, Array, Array]:
    x_BD, b_pre_D, w_FD = saved
    dtype = gradient_dtype(compute_dtype)
    # The compiler drops dx where nobody asks for it, as in training.
    dx_BD = matmul(out_BF, w_FD, dtype)
    return dx_BD, -(summed(out_BF) @ w_FD), over_rows(out_BF, x_BD - b_pre_D[None], dtype)


centred_matmul.defvjp(_centred_forward, _centred_backward)
