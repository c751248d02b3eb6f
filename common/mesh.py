"""The mesh of devices, ``(data, model)``, and batches laid out on it.

Windows (or rows) are shared out over ``data``; attention heads, MLP, vocabulary and latents over ``model``.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saex_pipe.common.errors import InputError

DATA, MODEL = AXES = ("data", "model")


def make_mesh(model: int = 1, data: int | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of ``data`` by ``model`` devices, neighbours on the interconnect side by side along ``model``.

    Axis types are ``AxisType.Auto``: the compiler shards what lies between the arrays whose sharding is given.

    Args:
        model: devices that share one copy of the weights.
        data: copies of the weights; None takes as many as there are devices for.
        devices: all devices of all processes where not given, in JAX's order.

    Raises:
        InputError: sizes that do not use every device exactly once.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    if model not in divisors:
        raise InputError(
            f"model axis of {model} does not divide {count} devices", f"use one of {', '.join(map(str, divisors))}"
        )
    if data not in (None, count // model):
        raise InputError(
            f"a mesh of data {data} x model {model} does not use {count} devices exactly",
            f"use data {count // model} with model {model}, or pass other devices",
        )
    grid = mesh_utils.create_device_mesh((count // model, model), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ``data``, everything else of a row on each device of its row."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch(rows: int, mesh: Mesh, name: str) -> None:
    """Raise an ``InputError`` where a batch of ``rows`` does not divide over ``data``; ``name`` is its setting's."""
    shares = mesh.shape[DATA]
    if rows % shares:
        raise InputError(
            f"{name} = {rows} does not divide over {shares} devices of the data axis",
            f"use a multiple of {shares}, such as {-(-rows // shares) * shares}",
        )


def place_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """The whole ``batch``, which every process holds alike, as one array with its rows over ``data``.

    Each process copies only the rows of its own devices. Made for token ids, which are small; their activations
    are read back where they are, one ``addressable_shards`` a device.
    """
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch, batch.shape)
