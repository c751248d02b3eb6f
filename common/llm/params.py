"""The weights of a decoder as Flax NNX modules, and the model that carries them.

Modules are pytrees: a ``LanguageModel`` goes through ``jax.jit`` as an argument, its architecture static.
"""

from dataclasses import dataclass, field

import jax
from flax import nnx
from jaxtyping import Array, Float

from saex_pipe.common.llm.architecture import Architecture


class Blocks(nnx.Module):
    """Weights of the loaded blocks, stacked over layers (first axis, T). Matrices are [in, out].

    q, k, v share one matrix and so do gate and up: fewer and larger matmuls. Norms are float32, matrices in
    the compute dtype.
    """

    def __init__(self, weights: dict[str, Float[Array, "..."]]) -> None:
        self.attn_norm = nnx.Param(weights["attn_norm"])  # [T, D]
        self.w_qkv = nnx.Param(weights["w_qkv"])  # [T, D, (H + 2 G) * head_dim]
        self.w_attn_out = nnx.Param(weights["w_attn_out"])  # [T, H * head_dim, D]
        self.mlp_norm = nnx.Param(weights["mlp_norm"])  # [T, D]
        self.w_gate_up = nnx.Param(weights["w_gate_up"])  # [T, D, 2 * mlp_width]
        self.w_down = nnx.Param(weights["w_down"])  # [T, mlp_width, D]

    @property
    def layers(self) -> int:
        """How many blocks were loaded."""
        return int(self.attn_norm.shape[0])


class DecoderParams(nnx.Module):
    """All weights of a decoder; ``unembed`` is None where it is tied to ``embed`` or was not loaded."""

    def __init__(
        self,
        embed: Float[Array, "V D"],
        blocks: Blocks,
        final_norm: Float[Array, " D"],
        unembed: Float[Array, "V D"] | None,
    ) -> None:
        self.embed = nnx.Param(embed)
        self.blocks = blocks
        self.final_norm = nnx.Param(final_norm)
        self.unembed = None if unembed is None else nnx.Param(unembed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LanguageModel:
    """A decoder: its architecture (static under jit) and the weights that were loaded of it."""

    architecture: Architecture = field(metadata={"static": True})
    params: DecoderParams
    with_unembedding: bool = field(default=True, metadata={"static": True})

    @property
    def dtype(self) -> str:
        """The dtype of the matrices, in which matmuls take their inputs."""
        return str(self.params.embed.dtype)
