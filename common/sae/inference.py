"""A trained SAE, in the units of the raw activations, as a value to compute with."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.normalisation import layer_norm
from saex_pipe.common.sae.sparse import ActiveCodes
from saex_pipe.common.sae.topk import TopK


class SparseCodes(NamedTuple):
    """The largest codes of each row."""

    values_BK: Float[Array, "B K"]  # float32, largest first, 0 is padding
    latents_BK: Int[Array, "B K"]  # int32
    active_B: Int[Array, " B"]  # active latents of the row, int32; above K if some did not fit


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["variant", "row_norm", "compute"])
@dataclass(frozen=True)
class Sae:
    """Variant and parameters in raw units (``folding.fold`` or ``saelens.from_saelens``); a pytree.

    All methods are jitted, take float32 or bfloat16 activations with any number of leading axes, and give float32.
    """

    variant: Variant
    params: Params
    row_norm: bool = False  # rows go through ``layer_norm`` first, and it is undone on their reconstructions
    compute: Compute = PLAIN

    @property
    def latents(self) -> int:
        """Number of latents F."""
        return self.variant.latents

    @jax.jit
    def encode(self, x: Float[Array, "*rows D_in"]) -> Float[Array, "*rows F"]:
        """Codes, dense."""
        x_BD = self._normalised(x)
        return self.variant.encode(self.params, x_BD, self.compute).reshape(*x.shape[:-1], self.latents)

    @jax.jit
    def decode(self, codes: Float[Array, "*rows F"]) -> Float[Array, "*rows D_out"]:
        """Reconstruction from dense codes; with ``row_norm`` that of the normalised row, which codes say nothing of."""
        codes_BF = codes.reshape(-1, self.latents).astype(jnp.float32)
        recon_BD = self.variant.decode(self.params, codes_BF, self.compute)
        return recon_BD.reshape(*codes.shape[:-1], recon_BD.shape[-1])

    @jax.jit
    def reconstruct(self, x: Float[Array, "*rows D_in"]) -> Float[Array, "*rows D_out"]:
        """What the SAE makes of ``x``: the function to splice into a language model."""
        recon_BD = self.variant.reconstruct(self.params, self._normalised(x), self.compute)
        if self.row_norm:
            recon_BD = layer_norm(_rows(x), self.variant.tap_widths)[1].undo(recon_BD)
        return recon_BD.reshape(*x.shape[:-1], recon_BD.shape[-1])

    @partial(jax.jit, static_argnames="limit")
    def codes_sparse(self, x_BD: Float[Array, "B D_in"], limit: int | None = None) -> SparseCodes:
        """The ``limit`` largest codes of each row; without a limit the k of a TopK SAE, else all F latents."""
        x_BD = self._normalised(x_BD)
        if isinstance(self.variant, TopK):
            active = self.variant.active(self.params, x_BD, self.compute)
            active_B = jnp.sum(active.values_BK > 0, axis=1, dtype=jnp.int32)
            return SparseCodes(active.values_BK[:, :limit], active.latents_BK[:, :limit], active_B)
        codes_BF = self.variant.encode(self.params, x_BD, self.compute)
        active = ActiveCodes(*jax.lax.top_k(codes_BF, min(limit or self.latents, self.latents)))
        return SparseCodes(*active, jnp.sum(codes_BF > 0, axis=1, dtype=jnp.int32))

    def _normalised(self, x: Array) -> Float[Array, "B D_in"]:
        return layer_norm(_rows(x), self.variant.tap_widths)[0] if self.row_norm else _rows(x)


def _rows(x: Array) -> Float[Array, "B D_in"]:
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)
