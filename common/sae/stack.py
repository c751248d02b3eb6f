"""What SAEs that go through ``vmap`` as one stack decide together."""

import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int


@custom_vmap
def largest_of_stack(branch: Int[Array, ""]) -> Int[Array, ""]:
    """``branch``, under ``vmap`` the largest of the stack: a switch by a number that differs would run every branch."""
    return branch


@largest_of_stack.def_vmap
def _largest(size: int, batched: list[bool], branch_S: Int[Array, " S"]) -> tuple[Int[Array, ""], bool]:
    del size
    return jnp.max(branch_S) if batched[0] else branch_S, False
