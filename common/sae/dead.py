"""What dead latents alone would reconstruct, at a cost that grows with their number."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.sae.batch_sums import shifted
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.matmul import centred_matmul, matmul
from saex_pipe.common.sae.sharded import on_each_device
from saex_pipe.common.sae.sharding import partition
from saex_pipe.common.sae.sparse import Slots
from saex_pipe.common.sae.stack import largest_of_stack

SIZE_STEP = 4  # from one number of dead latents that is compiled for to the next


class DeadCodes(NamedTuple):
    """How pre-activations z_BM of dead latents become codes_BM; is_dead_M is false for latents that only pad.

    On a mesh the M latents are one device's own.
    """

    mark: Callable[[Array, Array], Array]  # (z_BM, is_dead_M) to what codes depend on without a gradient, [B, 1]
    codes: Callable[[Array, Array, Array], Array]  # (z_BM, is_dead_M, mark_B1) to codes_BM, 0 where only padded


def decode_dead(
    variant: Variant,
    params: Params,
    x_BD: Float[Array, "B D_in"],
    dead_F: Bool[Array, " F"],
    codes_of: DeadCodes,
    compute: Compute,
    *,
    smallest: int,
    slots: Slots | None = None,
) -> Float[Array, "B D_out"]:
    """``codes_of`` the pre-activations of the dead latents times W_dec, float32, without bias; 0 where none is dead.

    It is compiled for M = ``smallest``, four times that, and so on up to all latents, and the first of them that holds
    the dead latents runs; of a stack the first that holds those of every SAE. w_enc_FD, b_enc_F, w_dec_FD and
    ``variant.b_pre`` get a gradient, the weights by way of their ``slots`` where there are some; ``x_BD`` gets none.
    Slots are not for a mesh.
    """
    used = {name: params[name] for name in ("w_enc_FD", "b_enc_F", "w_dec_FD")}
    if slots is not None:
        used |= {name: jax.lax.stop_gradient(used[name]) for name in ("w_enc_FD", "w_dec_FD")}
    how = _How(codes_of, compute, smallest)
    if compute.mesh is None:
        return _decode(how, used, slots, variant.b_pre(params), x_BD, dead_F)

    def own(used: Params, b_pre_D: Array, x_BD: Array, dead_F: Array) -> Array:
        return jax.lax.psum(_decode(how, used, None, b_pre_D, x_BD, dead_F), MODEL)

    cut = {name: partition(name, leaf.shape, dead_F.shape[0]) for name, leaf in used.items()}
    decode = on_each_device(compute.mesh, own, (cut, P(), P(DATA), P(MODEL)), P(DATA))
    return decode(used, variant.b_pre(params), x_BD, dead_F)


class _How(NamedTuple):
    """What is static of ``_decode``."""

    codes_of: DeadCodes
    compute: Compute
    smallest: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(
    how: _How, used: Params, slots: Slots | None, b_pre_D: Array, x_BD: Array, dead_F: Array
) -> Float[Array, "B D_out"]:
    """On a mesh all but ``b_pre_D`` and ``x_BD`` is of one device's own latents, and so is the result.

    Differentiated as it stands, the switch would hand over what every branch keeps for its gradient, zeros for those
    that did not run: 40 ms of a step without dead latents. So the gradient has a switch of its own and computes the
    pre-activations again.
    """
    return _forward(how, used, slots, b_pre_D, x_BD, dead_F)[0]


def _forward(
    how: _How, used: Params, slots: Slots | None, b_pre_D: Array, x_BD: Array, dead_F: Array
) -> tuple[Array, tuple[Params, Slots | None, Array, Array, Array, Array]]:
    rows, width = x_BD.shape[0], used["w_dec_FD"].shape[1]

    def none_dead() -> tuple[Array, Array]:
        return jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows, 1), jnp.float32)

    def some_dead(size: int) -> tuple[Array, Array]:
        dead, is_dead_M = _first_dead(dead_F, size)
        z_BM = _pre_activations(how.compute, _of(used, dead), b_pre_D, x_BD)
        mark_B1 = how.codes_of.mark(z_BM, is_dead_M)
        codes_BM = how.codes_of.codes(z_BM, is_dead_M, mark_B1)
        return matmul(codes_BM, _of(used, dead)["w_dec_FD"], how.compute.dtype), mark_B1

    out_BD, mark_B1 = _switch(how, dead_F, none_dead, some_dead)
    return out_BD, (used, slots, b_pre_D, x_BD, dead_F, mark_B1)


def _backward(
    how: _How, saved: tuple[Params, Slots | None, Array, Array, Array, Array], out_BD: Array
) -> tuple[Params, Slots | None, Array, Array, Array]:
    used, slots, b_pre_D, x_BD, dead_F, mark_B1 = saved

    def none_dead() -> tuple[Params, Array]:
        return jax.tree.map(jnp.zeros_like, (used, b_pre_D))

    def some_dead(size: int) -> tuple[Params, Array]:
        dead, is_dead_M = _first_dead(dead_F, size)

        def decode(of_dead: Params, b_pre_D: Array) -> Array:
            z_BM = _pre_activations(how.compute, of_dead, b_pre_D, x_BD)
            codes_BM = how.codes_of.codes(z_BM, is_dead_M, mark_B1)
            return matmul(codes_BM, of_dead["w_dec_FD"], how.compute.dtype)

        to_dead, to_b_pre_D = jax.vjp(decode, _of(used, dead), b_pre_D)[1](out_BD)
        if dead is None:
            return to_dead, to_b_pre_D
        # Padding repeats a latent and adds 0 to its gradient.
        return {name: jnp.zeros_like(leaf).at[dead].add(to_dead[name]) for name, leaf in used.items()}, to_b_pre_D

    to_used, to_b_pre_D = _switch(how, dead_F, none_dead, some_dead)
    to_slots = None
    if slots is not None:
        to_slots = Slots(to_used["w_enc_FD"], to_used["w_dec_FD"])
        to_used = jax.tree.map(jnp.zeros_like, used) | {"b_enc_F": to_used["b_enc_F"]}
    return to_used, to_slots, to_b_pre_D, jnp.zeros_like(x_BD), jnp.zeros(dead_F.shape, jax.dtypes.float0)


_decode.defvjp(_forward, _backward)


def _switch(how: _How, dead_F: Array, none_dead: Callable[[], Any], some_dead: Callable[[int], Any]) -> Any:
    """The branch for as many latents as are dead."""
    latents, dead_count = dead_F.shape[0], jnp.sum(dead_F, dtype=jnp.int32)
    sizes = [min(how.smallest, latents)]
    while sizes[-1] < latents:
        sizes.append(min(SIZE_STEP * sizes[-1], latents))
    most = dead_count if how.compute.mesh is None else jax.lax.pmax(dead_count, MODEL)
    branch = jnp.sum(most > jnp.array([0, *sizes[:-1]]), dtype=jnp.int32)
    return jax.lax.switch(largest_of_stack(branch), [none_dead, *(partial(some_dead, size) for size in sizes)])


def _first_dead(dead_F: Array, size: int) -> tuple[Array | None, Array]:
    """Numbers of the dead latents, padded to ``size``, and which of them are no padding; None: all in their order."""
    if size == dead_F.shape[0]:
        return None, dead_F
    (dead_M,) = jnp.nonzero(dead_F, size=size, fill_value=0)
    return dead_M, jnp.arange(size, dtype=jnp.int32) < jnp.sum(dead_F, dtype=jnp.int32)


def _of(used: Params, dead_M: Array | None) -> Params:
    if dead_M is None:
        return used
    return {name: leaf[dead_M] for name, leaf in used.items()}


def _pre_activations(compute: Compute, used: Params, b_pre_D: Array, x_BD: Array) -> Float[Array, "B M"]:
    return shifted(centred_matmul(x_BD, b_pre_D, used["w_enc_FD"], compute.dtype), used["b_enc_F"])
