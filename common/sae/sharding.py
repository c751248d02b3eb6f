"""Which part of an SAE, and of all that training keeps of it, lies on which device of a mesh ``(data, model)``.

Latents (the axis F) lie over ``model``, everything else of a parameter on each device; rows of a batch lie over
``data``. Optimiser moments, averages and counters lie as the parameter they belong to.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saex_pipe.common.errors import InputError
from saex_pipe.common.mesh import MODEL
from saex_pipe.common.sae.contract import axes_of

LATENTS = "F"


def partition(name: str, shape: tuple[int, ...], latents: int) -> PartitionSpec:
    """How the array ``name``, or what an optimiser keeps for it, is cut.

    An array of the axes in its name, or of these behind an axis of SAEs trained together, is cut along F; one of
    another shape (row scales, factored moments) along the first axis as long as the latents, if there is one.
    """
    axes = axes_of(name)
    lead = len(shape) - len(axes)
    cut = lead + axes.find(LATENTS) if LATENTS in axes and 0 <= lead <= 1 else -1
    if LATENTS in axes and not (0 <= cut < len(shape) and shape[cut] == latents):
        cut = shape.index(latents) if latents in shape else -1
    return PartitionSpec() if cut < 0 else PartitionSpec(*(None,) * cut, MODEL)


def shardings(tree: Any, latents: int, mesh: Mesh) -> Any:
    """The sharding of every leaf of parameters or of a whole training state.

    Args:
        tree: arrays or their shapes; a leaf belongs to the innermost name on its path that ends in axes.
        latents: F.
        mesh: with the axes ``data`` and ``model``.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        name = next((name for name in reversed(names) if axes_of(name)), "")
        return NamedSharding(mesh, partition(name, leaf.shape, latents))

    return jax.tree_util.tree_map_with_path(of, tree)


def abstract(make: Callable[..., Any], latents: int, mesh: Mesh, *arguments: Any) -> Any:
    """Shapes and shardings of what ``make`` makes of ``arguments``; nothing is made."""
    shapes = jax.eval_shape(make, *arguments)
    placed = shardings(shapes, latents, mesh)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placed)


def born_sharded(make: Callable[..., Any], latents: int, mesh: Mesh, *arguments: Any) -> Any:
    """What ``make`` makes of ``arguments``, of which every device makes its own part."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract(make, latents, mesh, *arguments))
    return jax.jit(make, out_shardings=placed)(*arguments)


def check_latents(latents: int, mesh: Mesh) -> None:
    """Raise an ``InputError`` where the latents do not divide over the ``model`` axis."""
    parts, devices = mesh.shape[MODEL], mesh.size
    if latents % parts:
        fit = [size for size in range(1, devices + 1) if devices % size == 0 and latents % size == 0]
        raise InputError(
            f"train.model_parallel = {parts} does not divide {latents:,} latents",
            f"use {' or '.join(map(str, fit))}, or {-(-latents // parts) * parts:,} latents",
        )
