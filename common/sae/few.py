"""Products with codes of which few are active, though how many is known only once the codes are there.

Of a ReLU's latents half are active at first and, once it is trained, a hundredth or less. So these products count, and
go by way of the active codes alone (``pairs``) where there are at most rows F / ``SHARES`` of them, or else densely.
Both give the same within float32 rounding, but for one thing: by way of pairs no gradient reaches a code that is 0.
What makes codes of pre-activations must not ask for it, as a ReLU and a jump do not.

Only CPUs take that way: on two cores a ReLU step at L0 = 32 takes half the time (B=2048, D=576, F=9216). TPUs, whose
matrix units are faster than their gathers by more, multiply densely (see ``crossover``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from saex_pipe.common.peak import tpu_kind
from saex_pipe.common.sae import pairs as by_pairs
from saex_pipe.common.sae.batch_sums import summed
from saex_pipe.common.sae.bit_words import counts, entries, words
from saex_pipe.common.sae.compute import Compute, gradient_dtype
from saex_pipe.common.sae.matmul import by_transposed, centred_matmul, matmul, over_rows, transposed
from saex_pipe.common.sae.pairs import Pairs
from saex_pipe.common.sae.stack import largest_of_stack

SHARES = (512, 256, 128)  # latents per active one; each is compiled for, and the first that holds all active codes runs


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def encoded(
    x_BD: Float[Array, "B D"], b_pre_D: Float[Array, " D"], w_enc_DF: Float[Array, "D F"], compute: Compute
) -> Float[Array, "B F"]:
    """``(x_BD - b_pre_D) @ w_enc_DF``, whose gradient is that of few entries."""
    return centred_matmul(x_BD, b_pre_D, w_enc_DF, compute.dtype)


def _encoded_forward(
    x_BD: Array, b_pre_D: Array, w_enc_DF: Array, compute: Compute
) -> tuple[Array, tuple[Array, Array, Array]]:
    return encoded(x_BD, b_pre_D, w_enc_DF, compute), (x_BD, b_pre_D, w_enc_DF)


def _encoded_backward(compute: Compute, saved: tuple[Array, Array, Array], out_BF: Array) -> tuple[Array, Array, Array]:
    x_BD, b_pre_D, w_enc_DF = saved
    centred_BD = x_BD - b_pre_D[None]

    def dense() -> Array:
        return over_rows(centred_BD, out_BF, gradient_dtype(compute.dtype))

    def sparse(found: Pairs) -> Array:
        start_FD = jnp.zeros_like(w_enc_DF.T)
        return transposed(by_pairs.sum_by(found.latents_P, found.values_P, found.rows_P, centred_BD, start_FD))

    dw_enc_DF = _switch(out_BF, compute, dense, sparse)
    db_pre_D = -(w_enc_DF @ summed(out_BF))
    # The compiler drops dx where nobody asks for it, as in training.
    return by_transposed(out_BF, w_enc_DF, gradient_dtype(compute.dtype)), db_pre_D, dw_enc_DF


encoded.defvjp(_encoded_forward, _encoded_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decoded(
    codes_BF: Float[Array, "B F"], w_dec_FD: Float[Array, "F D"], compute: Compute, held: bool = False
) -> Float[Array, "B D"]:
    """``codes_BF @ w_dec_FD`` of codes of which few are active; the weights get no gradient where they are ``held``."""
    rows = codes_BF.shape[0]
    return _switch(
        codes_BF,
        compute,
        lambda: matmul(codes_BF, w_dec_FD, compute.dtype),
        lambda found: by_pairs.decoded(found, w_dec_FD, rows)[0],
    )


def _decoded_forward(
    codes_BF: Array, w_dec_FD: Array, compute: Compute, held: bool
) -> tuple[Array, tuple[Array, Array]]:
    return decoded(codes_BF, w_dec_FD, compute, held), (codes_BF, w_dec_FD)


def _decoded_backward(compute: Compute, held: bool, saved: tuple[Array, Array], out_BD: Array) -> tuple[Array, Array]:
    codes_BF, w_dec_FD = saved

    def dense() -> tuple[Array, ...]:
        to_codes = by_transposed(out_BD, w_dec_FD, gradient_dtype(compute.dtype))
        return (to_codes,) if held else (to_codes, over_rows(codes_BF, out_BD, gradient_dtype(compute.dtype)))

    def sparse(found: Pairs) -> tuple[Array, ...]:
        dvalues_P = jnp.where(found.values_P != 0, by_pairs.dots(found, out_BD, w_dec_FD), 0.0)
        to_codes = jnp.zeros_like(codes_BF).at[found.rows_P, found.latents_P].add(dvalues_P)
        if held:
            return (to_codes,)
        start_FD = jnp.zeros_like(w_dec_FD)
        return to_codes, by_pairs.sum_by(found.latents_P, found.values_P, found.rows_P, out_BD, start_FD)

    to_codes, *to_weights = _switch(codes_BF, compute, dense, sparse)
    return to_codes, to_weights[0] if to_weights else jnp.zeros_like(w_dec_FD)


decoded.defvjp(_decoded_forward, _decoded_backward)


def _switch(values_BF: Array, compute: Compute, dense: Callable[[], Any], sparse: Callable[[Pairs], Any]) -> Any:
    """``sparse`` of the entries that are not 0 if they are few, else ``dense``."""
    rows, latents = values_BF.shape
    limits = [rows * (latents // share) for share in SHARES]
    device = jax.devices()[0] if compute.mesh is None else compute.mesh.devices.flat[0]
    dense_alone = compute.codes == "dense" or compute.mesh is not None or tpu_kind(device) is not None
    if dense_alone or not limits[0]:
        return dense()
    words_BW = words(values_BF, lambda part: part != 0)
    branch = jnp.sum(jnp.sum(counts(words_BW), dtype=jnp.int32) > jnp.array(limits), dtype=jnp.int32)
    found = [partial(lambda most: sparse(_pairs(values_BF, words_BW, most)), most) for most in limits]
    return jax.lax.switch(largest_of_stack(branch), [*found, dense])


def _pairs(values_BF: Float[Array, "B F"], words_BW: UInt32[Array, "B W"], most: int) -> Pairs:
    """The entries that are not 0, ``most`` of them at most, by row."""
    rows_P, latents_P, there_P = entries(words_BW, most)
    return Pairs(jnp.where(there_P, values_BF[rows_P, latents_P], 0.0), rows_P, latents_P)
