"""From the units of the raw activations to those of training, and back on export (``folding``)."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=["scale_D"], meta_fields=[])
@dataclass(frozen=True)
class Normaliser:
    """What is done to every row before training sees it. A pytree that travels in the training state."""

    scale_D: Float[Array, " D"]  # float32; a normalised row is scale times the raw one

    def apply(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Raw rows, of any float type, in the units of training, float32."""
        return x_BD.astype(jnp.float32) * self.scale_D[None]

    def observe(self, x_BD: Float[Array, "B D"]) -> "Normaliser":
        """The normaliser after a batch of raw rows: the same, unless it tracks what it sees."""
        return self


class Normalisers(NamedTuple):
    """Of the two sides; equal except for a transcoder."""

    input: Normaliser
    target: Normaliser
