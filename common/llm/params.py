"""The weights of a decoder as Flax NNX modules, how they lie on a mesh, and the model that carries them.

Modules are pytrees: a ``LanguageModel`` goes through ``jax.jit`` as an argument, its architecture static.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.mesh import MODEL

# How each weight is cut (Shoeybi et al. 2019, Megatron-LM, https://arxiv.org/abs/1909.08053): by heads, by the
# MLP's hidden dimensions, by the vocabulary. What is not named here lies whole on every device.
_CUTS = {
    "embed": PartitionSpec(MODEL),
    "unembed": PartitionSpec(MODEL),
    "w_qkv": PartitionSpec(None, None, MODEL),
    "b_qkv": PartitionSpec(None, MODEL),
    "w_attn_out": PartitionSpec(None, MODEL),
    "w_in": PartitionSpec(None, None, None, MODEL),
    "b_in": PartitionSpec(None, None, MODEL),
    "w_down": PartitionSpec(None, MODEL),
}
# These are used in float32, where a rounding would touch every token alike.
FLOAT32 = frozenset(
    {
        *("attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias", "post_attn_norm", "post_mlp_norm"),
        *("query_norm", "key_norm", "final_norm", "final_norm_bias"),
        *("b_qkv", "b_attn_out", "b_in", "b_down", "positions"),
    }
)


class Weights(nnx.Module):
    """Named weights; one that a family lacks is None."""

    def __init__(self, weights: Mapping[str, Float[Array, "..."]]) -> None:
        for name in self.__annotations__:
            setattr(self, name, nnx.Param(weights[name]) if name in weights else None)


class Blocks(Weights):
    """Weights of the loaded blocks, stacked over layers (first axis, T). Matrices are [in, out].

    ``w_qkv`` holds for each key/value head (G) its r query heads, its key and its value, side by side: one matmul,
    and cut over G every device has heads that belong together.
    """

    attn_norm: nnx.Param  # [T, D]
    attn_norm_bias: nnx.Param | None  # [T, D]
    w_qkv: nnx.Param  # [T, D, G, r + 2, head_dim]
    b_qkv: nnx.Param | None  # [T, G, r + 2, head_dim]
    query_norm: nnx.Param | None  # [T, head_dim]
    key_norm: nnx.Param | None  # [T, head_dim]
    w_attn_out: nnx.Param  # [T, H * head_dim, D]
    b_attn_out: nnx.Param | None  # [T, D]
    post_attn_norm: nnx.Param | None  # [T, D]
    mlp_norm: nnx.Param  # [T, D]
    mlp_norm_bias: nnx.Param | None  # [T, D]
    w_in: nnx.Param  # [T, D, 2, mlp_width], gate and up, or [T, D, 1, mlp_width]
    b_in: nnx.Param | None  # [T, 2 or 1, mlp_width]
    w_down: nnx.Param  # [T, mlp_width, D]
    b_down: nnx.Param | None  # [T, D]
    post_mlp_norm: nnx.Param | None  # [T, D]

    @property
    def layers(self) -> int:
        """How many blocks were loaded."""
        return int(self.attn_norm.shape[0])


class Outside(Weights):
    """Weights outside the blocks; ``unembed`` is None where it is tied to ``embed`` or was not loaded.

    The rows of embed and unembed are padded to a multiple of the mesh's model axis.
    """

    embed: nnx.Param  # [V, D]
    positions: nnx.Param | None  # [P, D], learned
    final_norm: nnx.Param  # [D]
    final_norm_bias: nnx.Param | None  # [D]
    unembed: nnx.Param | None  # [V, D]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LanguageModel:
    """A decoder: its architecture and mesh (static under jit) and the weights that were loaded of it."""

    architecture: Architecture = field(metadata={"static": True})
    outside: Outside
    blocks: Blocks
    with_unembedding: bool = field(default=True, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})

    @property
    def dtype(self) -> str:
        """The dtype of the matrices, in which matmuls take their inputs."""
        return str(self.outside.embed.dtype)

    def cut(self, x: Array, *axes: str | None) -> Array:
        """Say over which axes of the mesh an array is cut; without a mesh nothing is."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


def shapes(
    a: Architecture, *, layers: int, with_unembedding: bool, mesh: Mesh | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of the weights outside and inside the blocks, by name, of the ones that the model has.

    Raises an ``InputError`` where heads or MLP do not divide over the model axis of the mesh.
    """
    parts = 1 if mesh is None else mesh.shape[MODEL]
    check_divides(a, parts)
    groups = kv_groups(a, parts)
    vocabulary = -(-a.vocabulary // parts) * parts
    stacked = a.query_heads // groups + 2
    inputs = 2 if a.gated else 1
    norms = ["attn_norm", "mlp_norm"]
    norms += ["attn_norm_bias", "mlp_norm_bias"] if a.layer_norms else []
    norms += ["post_attn_norm", "post_mlp_norm"] if a.post_norms else []
    norms += ["b_attn_out"] if a.attn_out_bias else []
    norms += ["b_down"] if a.mlp_bias else []
    blocks: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (a.width,))
    blocks |= {
        "w_qkv": (a.width, groups, stacked, a.head_dim),
        "w_attn_out": (a.query_heads * a.head_dim, a.width),
        "w_in": (a.width, inputs, a.mlp_width),
        "w_down": (a.mlp_width, a.width),
    }
    blocks |= {"b_qkv": (groups, stacked, a.head_dim)} if a.qkv_bias else {}
    blocks |= {"b_in": (inputs, a.mlp_width)} if a.mlp_bias else {}
    blocks |= {"query_norm": (a.head_dim,), "key_norm": (a.head_dim,)} if a.qk_norms else {}
    outside: dict[str, tuple[int, ...]] = {"embed": (vocabulary, a.width), "final_norm": (a.width,)}
    outside |= {"final_norm_bias": (a.width,)} if a.layer_norms else {}
    outside |= {"positions": (a.max_positions, a.width)} if a.rope is None else {}
    outside |= {"unembed": (vocabulary, a.width)} if with_unembedding and not a.tied_embeddings else {}
    return outside, {name: (layers, *shape) for name, shape in blocks.items()}


def sharding(name: str, mesh: Mesh | None) -> Sharding:
    """Where a weight lies: cut over the model axis of the mesh, or on the default device."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, _CUTS.get(name, PartitionSpec()))


def abstract_model(
    a: Architecture, *, layers: int, with_unembedding: bool, dtype: str, mesh: Mesh | None = None
) -> LanguageModel:
    """The model as shapes, dtypes and shardings without weights, to compile for devices that are not here."""

    def abstract(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        kind = jnp.float32 if name in FLOAT32 else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding(name, mesh))

    outside, blocks = shapes(a, layers=layers, with_unembedding=with_unembedding, mesh=mesh)
    return LanguageModel(
        a,
        Outside({name: abstract(name, shape) for name, shape in outside.items()}),  # type: ignore[misc]
        Blocks({name: abstract(name, shape) for name, shape in blocks.items()}),  # type: ignore[misc]
        with_unembedding,
        mesh,
    )


def kv_groups(a: Architecture, parts: int) -> int:
    """Key/value heads as they are laid out: repeated where there are fewer of them than parts of the mesh."""
    return max(a.kv_heads, parts)


def check_divides(a: Architecture, parts: int) -> None:
    """Raise an ``InputError`` where a model axis of ``parts`` devices cannot carry the heads and the MLP."""

    def fits(parts: int) -> bool:
        heads = a.kv_heads % parts == 0 or (parts % a.kv_heads == 0 and a.query_heads % parts == 0)
        return heads and a.mlp_width % parts == 0

    if not fits(parts):
        sizes = ", ".join(str(size) for size in range(1, a.query_heads + 1) if fits(size))
        raise InputError(
            f"{a.query_heads} query heads, {a.kv_heads} key/value heads and an MLP of {a.mlp_width} do not divide over "
            f"{parts} devices of the model axis",
            f"sizes that do are {sizes}",
        )
