"""The forward pass of the harvest: tokens in, activations in the store's dtype and their norms out."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32

from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.mesh import batch_sharding, place_batch


class Harvested(NamedTuple):
    """One batch of windows, by tap. Norms are taken before rounding to the store's dtype."""

    acts: Mapping[str, Float[Array, "N L D"]]
    norms: Mapping[str, Float32[Array, "N L"]]


Forward = Callable[[Int32[np.ndarray, "N L"]], Harvested]


def lower_forward(
    model: LanguageModel, dtypes: Mapping[str, np.dtype], *, shape: tuple[int, int], mesh: Mesh
) -> jax.stages.Lowered:
    """The forward pass for ``shape``, (windows, length), ready to compile; ``model`` may be one of shapes alone.

    ``dtypes`` names the taps, and the type in which each one's activations are handed over.

    Windows are shared out over the data axis.
    """
    rows = batch_sharding(mesh)

    def harvest(model: LanguageModel, tokens_NL: Int32[Array, "N L"]) -> Harvested:
        found = apply(model, tokens_NL, taps=list(dtypes), logits=False).taps
        acts = {tap: acts_NLD.astype(dtypes[tap]) for tap, acts_NLD in found.items()}
        return Harvested(acts, {tap: jnp.linalg.norm(acts_NLD, axis=-1) for tap, acts_NLD in found.items()})

    return jax.jit(harvest, out_shardings=rows).lower(model, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows))


def compile_forward(
    model: LanguageModel, dtypes: Mapping[str, np.dtype], *, shape: tuple[int, int], mesh: Mesh
) -> Forward:
    """Compile the forward pass.

    Returns:
        A function that queues one pass and returns at once. Fewer windows are padded; so is what comes out then.
    """
    compiled = lower_forward(model, dtypes, shape=shape, mesh=mesh).compile()

    def forward(tokens_NL: Int32[np.ndarray, "N L"]) -> Harvested:
        padded_NL = np.pad(tokens_NL, ((0, shape[0] - len(tokens_NL)), (0, 0)))
        harvested: Harvested = compiled(model, place_batch(padded_NL, mesh))
        for array in jax.tree.leaves(harvested):
            for piece in pieces(array):
                piece.data.copy_to_host_async()  # begins when the pass ends, whatever the host is busy with then
        return harvested

    return forward


def pieces(array: Array) -> list[jax.Shard]:
    """The parts of an array on the devices here, each once."""
    return [piece for piece in array.addressable_shards if piece.replica_id == 0]
