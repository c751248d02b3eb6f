"""How an SAE's products are computed: what changes speed, memory and rounding, but not what is computed."""

from dataclasses import dataclass
from typing import Literal

import jax
from jax.sharding import Mesh

from saex_pipe.common.peak import tpu_kind

# What matmuls read. They accumulate in float32 (int8: int32, then float32); weights and statistics stay float32.
ComputeDtype = Literal["float32", "bfloat16", "int8"]


def gradient_dtype(dtype: ComputeDtype) -> ComputeDtype:
    """What the products of gradients read: they spread too widely for the 127 levels of int8."""
    return "bfloat16" if dtype == "int8" else dtype


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Hashable, so that it may be a static argument."""

    dtype: ComputeDtype = "float32"
    # Products with codes of which few are active: by the active latents alone, as dense matmuls, or whichever is
    # faster at these sizes as ``crossover.py`` has it. Where no k bounds how many are active, ``few.py`` counts them.
    codes: Literal["auto", "sparse", "dense"] = "auto"
    selection: Literal["exact", "approximate"] = "exact"  # of the largest latents of a row
    recall: float = 0.95  # expected share of the true ones among those selected approximately
    mesh: Mesh | None = None  # latents lie over its ``model`` axis, rows over ``data``; None: one device

    @property
    def tpu(self) -> str | None:
        """The kind of TPU that it runs on, a key of ``aot.CHIPS``; None where that is none, or an unknown one."""
        return tpu_kind(jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0])


PLAIN = Compute()
