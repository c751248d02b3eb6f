"""The devices of a training run, of one process or of several, and what lies where on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from saex_pipe.common.mesh import batch_sharding, check_batch, make_mesh
from saex_pipe.common.sae.sharding import born_sharded, check_latents, shardings
from saex_pipe.stages.train.config import Config


def available() -> Sequence[jax.Device]:
    """All devices of all processes."""
    return jax.devices()


def stacks_pay() -> bool:
    """Whether SAEs of one shape take a step faster as one stack than one after another.

    Not on CPUs: on two cores a stack of four takes 1.05 (ReLU) to 1.2 (TopK) times as long as four steps.
    """
    return available()[0].platform != "cpu"


@dataclass(frozen=True)
class Devices:
    """Where the states and batches of SAEs with ``latents`` lie: over a mesh, or (None) on one device."""

    mesh: Mesh | None
    latents: int
    batch_rows: int

    @staticmethod
    def of(config: Config, latents: int, on: Sequence[jax.Device] | None = None) -> "Devices":
        """All devices there are; or a mesh of those given, be it one.

        Raises:
            InputError: latents or rows that do not divide over them; the message names numbers that do.
        """
        mesh = make_mesh(config.model_parallel, devices=available() if on is None else on)
        check_latents(latents, mesh)
        check_batch(config.batch_rows // config.micro_batches, mesh, "train.batch_rows / train.micro_batches")
        return Devices(None if on is None and mesh.size == 1 else mesh, latents, config.batch_rows)

    def made(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """What ``make`` makes of ``arguments``; every device makes its own part."""
        return (
            jax.jit(make)(*arguments) if self.mesh is None else born_sharded(make, self.latents, self.mesh, *arguments)
        )

    def compiled(self, function: Callable[..., Any], like: Any, **options: Any) -> Any:
        """``function`` compiled, with results that lie as trees of the shapes ``like`` do."""
        if self.mesh is not None:
            options["out_shardings"] = shardings(like, self.latents, self.mesh)
        return jax.jit(function, **options)

    @cached_property
    def rows(self) -> slice:
        """The rows of every batch that this process reads: from the first to the last that its devices take."""
        if self.mesh is None:
            return slice(0, self.batch_rows)
        places = batch_sharding(self.mesh).addressable_devices_indices_map((self.batch_rows,)).values()
        bounds = [place[0].indices(self.batch_rows) for place in places if place is not None]
        return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

    def placed(self, rows_BD: np.ndarray) -> Any:
        """One side of a batch, of which this process has read ``rows``, each row on the devices that take it."""
        if self.mesh is None:
            return rows_BD

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(self.batch_rows)
            return rows_BD[start - self.rows.start : stop - self.rows.start]

        shape = (self.batch_rows, rows_BD.shape[1])
        return jax.make_array_from_callback(shape, batch_sharding(self.mesh), part)

    def described(self, shapes: Any) -> Any:
        """Shapes of a state with the places where they will lie."""
        if self.mesh is None:
            placed = jax.tree.map(lambda _: SingleDeviceSharding(available()[0]), shapes)
        else:
            placed = shardings(shapes, self.latents, self.mesh)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placed)

    def abstract_rows(self, width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """Shape and place of one side of a batch."""
        sharding = None if self.mesh is None else batch_sharding(self.mesh)
        return jax.ShapeDtypeStruct((self.batch_rows, width), dtype, sharding=sharding)

    def on_host(self, array: Array) -> np.ndarray:
        """The whole array. Where other processes hold parts of it, all of them must ask, and each part goes by way of
        the devices of all, one after another, so that none of these ever holds the whole.
        """
        if self.mesh is None or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        spec = array.sharding.spec  # type: ignore[attr-defined]
        axis = next(number for number, name in enumerate(spec) if name is not None)
        size = array.sharding.shard_shape(array.shape)[axis]
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        cut = jax.jit(partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=axis), out_shardings=everywhere)
        starts = range(0, array.shape[axis], size)
        return np.concatenate([np.asarray(cut(array, jnp.int32(start))) for start in starts], axis=axis)
