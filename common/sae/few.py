"""Products with codes of which few are active, though how many is known only once the codes are there.

Of a ReLU's latents half are active at first and, once it is trained, a hundredth or less. So these products go by
the active codes alone (``pairs``) where those are few (``counted``), or else densely. Both give the same within float32
rounding, but for one thing: by way of pairs no gradient reaches a code that is 0, unless it is named as wanted. What
makes codes of pre-activations must not ask for it, as a ReLU does not; a jump does, near its threshold.

On two cores a ReLU step at L0 = 32 takes half the time so (B=2048, D=576, F=9216). TPUs, whose matrix units are faster
than their gathers by more, do so for products of which their roofline says it pays (see ``crossover``).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.sae import pairs as by_pairs
from saex_pipe.common.sae.batch_sums import summed
from saex_pipe.common.sae.compute import Compute, gradient_dtype
from saex_pipe.common.sae.counted import Entries, nonzero, switch
from saex_pipe.common.sae.matmul import centred_matmul, matmul, over_rows
from saex_pipe.common.sae.sharded import on_each_device
from saex_pipe.common.sae.sparse import dots

Cuts: TypeAlias = tuple[int, ...]  # where groups of latents begin, and where the last one ends


def encoded(
    x_BD: Float[Array, "B D"], b_pre_D: Float[Array, " D"], w_enc_FD: Float[Array, "F D"], compute: Compute
) -> Float[Array, "B F"]:
    """``(x_BD - b_pre_D) @ w_enc_FD.T``, whose gradient is that of few entries."""

    def own(x_BD: Array, b_pre_D: Array, w_enc_FD: Array) -> Array:
        return _encoded(x_BD, b_pre_D, w_enc_FD, compute)

    if compute.mesh is None:
        return own(x_BD, b_pre_D, w_enc_FD)
    encode = on_each_device(compute.mesh, own, (P(DATA), P(), P(MODEL)), P(DATA, MODEL))
    return encode(x_BD, b_pre_D, w_enc_FD)


def decoded(
    codes_BF: Float[Array, "B F"],
    w_dec_FD: Float[Array, "F D"],
    compute: Compute,
    *,
    held: bool = False,
) -> Float[Array, "B D"]:
    """``codes_BF @ w_dec_FD`` of codes of which few are active; the weight gets no gradient where it is ``held``."""
    groups_GBD = decoded_groups(codes_BF, w_dec_FD, (), compute, held=held)
    return groups_GBD[0]


def decoded_groups(
    codes_BF: Float[Array, "B F"],
    w_dec_FD: Float[Array, "F D"],
    starts: tuple[int, ...],
    compute: Compute,
    *,
    wanted_BF: Bool[Array, "B F"] | None = None,
    held: bool = False,
) -> Float[Array, "G B D"]:
    """The same for each of the groups of latents that begin at 0 and at ``starts``, which ascend.

    Args:
        codes_BF: float32.
        w_dec_FD: float32; gets no gradient where it is ``held``.
        starts: of all groups but the first.
        compute: of the products.
        wanted_BF: which codes get a gradient although they may be 0; None: none.
        held: see ``w_dec_FD``.
    """
    how = _How(starts, compute, held)
    if compute.mesh is None:
        return _decoded(how, codes_BF, wanted_BF, w_dec_FD)

    def own(codes_BF: Array, wanted_BF: Array | None, w_dec_FD: Array) -> Array:
        return jax.lax.psum(_decoded(how, codes_BF, wanted_BF, w_dec_FD), MODEL)

    decode = on_each_device(compute.mesh, own, (P(DATA, MODEL), P(DATA, MODEL), P(MODEL)), P(None, DATA))
    return decode(codes_BF, wanted_BF, w_dec_FD)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _encoded(x_BD: Array, b_pre_D: Array, w_enc_FD: Array, compute: Compute) -> Array:
    return centred_matmul(x_BD, b_pre_D, w_enc_FD, compute.dtype)


def _encoded_forward(
    x_BD: Array, b_pre_D: Array, w_enc_FD: Array, compute: Compute
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _encoded(x_BD, b_pre_D, w_enc_FD, compute), (x_BD, b_pre_D, w_enc_FD)


def _encoded_backward(compute: Compute, saved: tuple[Array, Array, Array], out_BF: Array) -> tuple[Array, Array, Array]:
    x_BD, b_pre_D, w_enc_FD = saved
    centred_BD = x_BD - b_pre_D[None]

    def dense() -> Array:
        return over_rows(out_BF, centred_BD, gradient_dtype(compute.dtype))

    def sparse(found: Entries) -> Array:
        weights_P = found.of(out_BF)
        return by_pairs.sum_by(found.latents_P, weights_P, found.rows_P, centred_BD, jnp.zeros_like(w_enc_FD))

    dw_enc_FD = switch(nonzero(out_BF), out_BF.shape, x_BD.shape[1], ("scatter",), compute, dense, sparse)
    db_pre_D = -(summed(out_BF) @ w_enc_FD)
    # The compiler drops dx where nobody asks for it, as in training.
    return matmul(out_BF, w_enc_FD, gradient_dtype(compute.dtype)), db_pre_D, dw_enc_FD


_encoded.defvjp(_encoded_forward, _encoded_backward)


class _How(NamedTuple):
    """What is static of ``_decoded``."""

    starts: tuple[int, ...]
    compute: Compute
    held: bool

    @property
    def groups(self) -> int:
        """G."""
        return len(self.starts) + 1

    def group_of(self, latents: Int[Array, "*shape"], own: int) -> Int[Array, "*shape"]:
        """The groups of some of this device's ``own`` latents, which are counted from its first."""
        first = 0 if self.compute.mesh is None else jax.lax.axis_index(MODEL) * own
        begun = ((latents + first >= start).astype(jnp.int32) for start in self.starts)
        return sum(begun, start=jnp.zeros(latents.shape, jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decoded(how: _How, codes_BF: Array, wanted_BF: Array | None, w_dec_FD: Array) -> Float[Array, "G B D"]:
    """On a mesh of one device's own codes and weights, and without a sum over devices."""
    return _decoded_forward(how, codes_BF, wanted_BF, w_dec_FD)[0]


def _decoded_forward(
    how: _How, codes_BF: Array, wanted_BF: Array | None, w_dec_FD: Array
) -> tuple[Array, tuple[Array, Array | None, Array, Array]]:
    rows, (latents, width) = codes_BF.shape[0], w_dec_FD.shape

    def dense() -> Array:
        return _of_shard(how, latents, partial(_groups, codes_BF, w_dec_FD, how.compute))

    def sparse(found: Entries) -> Array:
        start_ND = jnp.zeros((how.groups * rows, width), jnp.float32)
        keys_P = how.group_of(found.latents_P, latents) * rows + found.rows_P
        sums_ND = by_pairs.sum_by(keys_P, found.of(codes_BF), found.latents_P, w_dec_FD, start_ND)
        return sums_ND.reshape(how.groups, rows, width)

    words_BW = nonzero(codes_BF)
    result = switch(words_BW, codes_BF.shape, width, ("sum",), how.compute, dense, sparse)
    return result, (codes_BF, wanted_BF, w_dec_FD, words_BW)


def _decoded_backward(
    how: _How, saved: tuple[Array, Array | None, Array, Array], out_GBD: Array
) -> tuple[Array, None, Array]:
    codes_BF, wanted_BF, w_dec_FD, words_BW = saved
    rows, (latents, width) = codes_BF.shape[0], w_dec_FD.shape
    out_ND = out_GBD.reshape(-1, width)

    def dense_to_codes() -> Array:
        def back(cuts: Cuts) -> Array:
            return jax.vjp(lambda codes_BF: _groups(codes_BF, w_dec_FD, how.compute, cuts), codes_BF)[1](out_GBD)[0]

        return _of_shard(how, latents, back)

    def dense_to_weights() -> Array:
        def back(cuts: Cuts) -> Array:
            return jax.vjp(lambda w_dec_FD: _groups(codes_BF, w_dec_FD, how.compute, cuts), w_dec_FD)[1](out_GBD)[0]

        return _of_shard(how, latents, back)

    def rows_of(found: Entries) -> Array:
        return how.group_of(found.latents_P, latents) * rows + found.rows_P

    def sparse_to_codes(found: Entries) -> Array:
        dvalues_P = jnp.where(found.there_P, dots(out_ND, w_dec_FD, rows_of(found), found.latents_P), 0.0)
        return jnp.zeros_like(codes_BF).at[found.rows_P, found.latents_P].add(dvalues_P)

    def sparse_to_weights(found: Entries) -> Array:
        start_FD = jnp.zeros_like(w_dec_FD)
        return by_pairs.sum_by(found.latents_P, found.of(codes_BF), rows_of(found), out_ND, start_FD)

    by_words = partial(switch, shape=codes_BF.shape, width=width, compute=how.compute)
    if wanted_BF is None and not how.held:  # one list serves both
        to_both: tuple[Array, Array] = by_words(
            words_BW,
            products=("dot", "scatter"),
            dense=lambda: (dense_to_codes(), dense_to_weights()),
            sparse=lambda found: (sparse_to_codes(found), sparse_to_weights(found)),
        )
        return to_both[0], None, to_both[1]
    wanted_BW = words_BW if wanted_BF is None else words_BW | nonzero(wanted_BF)
    to_codes = by_words(wanted_BW, products=("dot",), dense=dense_to_codes, sparse=sparse_to_codes)
    if how.held:
        return to_codes, None, jnp.zeros_like(w_dec_FD)
    # Codes of 0 add nothing here.
    to_weights = by_words(words_BW, products=("scatter",), dense=dense_to_weights, sparse=sparse_to_weights)
    return to_codes, None, to_weights


_decoded.defvjp(_decoded_forward, _decoded_backward)


def _groups(codes_BF: Array, w_dec_FD: Array, compute: Compute, cuts: Cuts) -> Float[Array, "G B D"]:
    """The dense product of each group of latents, which lie between two ``cuts``."""

    def product(start: int, stop: int) -> Array:
        if start == stop:
            return jnp.zeros((codes_BF.shape[0], w_dec_FD.shape[1]), jnp.float32)
        return matmul(codes_BF[:, start:stop], w_dec_FD[start:stop], compute.dtype)

    return jnp.stack([product(start, stop) for start, stop in pairwise(cuts)])


def _of_shard(how: _How, own: int, function: Callable[[Cuts], Array]) -> Array:
    """``function`` of where groups are cut among this device's ``own`` latents; many begin and end at one place.

    Where a group begins need not be where a shard does. The cuts of all shards are known ahead, so that each multiplies
    its own latents once.
    """
    mesh = how.compute.mesh
    shards = 1 if mesh is None or not how.starts else mesh.shape[MODEL]
    bounds = (0, *how.starts, shards * own)
    cuts = [tuple(min(max(bound - shard * own, 0), own) for bound in bounds) for shard in range(shards)]
    if shards == 1:
        return function(cuts[0])
    kinds = sorted(set(cuts))  # all shards beyond the last start are of one
    kind = jnp.array([kinds.index(each) for each in cuts], jnp.int32)[jax.lax.axis_index(MODEL)]
    result: Array = jax.lax.switch(kind, [partial(function, each) for each in kinds])
    return result
