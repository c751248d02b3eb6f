"""Weights from a ``.gguf`` file or a Hugging Face folder into a ``LanguageModel``, each straight to its devices.

Tensors are dequantised one by one, and only those that the wanted layers need. Each is written at once into the
shards that this process holds, so that the host never has more than one whole tensor beside them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.checkpoint import Checkpoint, gguf_architecture
from saex_pipe.common.llm.configuration import from_hugging_face
from saex_pipe.common.llm.gguf import GgufFile
from saex_pipe.common.llm.hugging_face import read_json
from saex_pipe.common.llm.params import FLOAT32, Blocks, LanguageModel, Outside, shapes, sharding

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ALIGNMENT = 64  # bytes; JAX on a CPU takes over a buffer that is aligned so rather than copy it


class Unembedding(NamedTuple):
    """What turns a final residual stream into logits: ``norm(x_D) * final_norm_D @ w_unembed_DV``, less a constant.

    ``norm`` divides by the root mean square, after the mean is removed where ``removes_mean``.
    """

    w_unembed_DV: Float[np.ndarray, "D V"]  # float32
    final_norm_D: Float[np.ndarray, " D"]  # float32
    norm_epsilon: float
    removes_mean: bool


def read_architecture(path: Path) -> Architecture:
    """The architecture of a ``.gguf`` file or Hugging Face folder, without reading weights."""
    if path.is_dir():
        return from_hugging_face(read_json(path / "config.json"), path / "config.json")
    return gguf_architecture(GgufFile(path))


def load_model(
    path: Path,
    *,
    last_layer: int | None = None,
    with_unembedding: bool = True,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
) -> LanguageModel:
    """Load a decoder from a ``.gguf`` file or a Hugging Face folder.

    Args:
        path: the file or folder.
        last_layer: the last block to load, -1 for none; None loads all. Weights above it are never read.
        with_unembedding: whether logits will be asked for.
        dtype: of the matrices and of matmul inputs, ``float32`` or ``bfloat16``; norms, biases and sums are float32.
        mesh: devices with axes ``data`` and ``model``; None is one device. Every process of a mesh loads the parts
            of its own devices.

    Raises:
        InputError: a file that cannot be read or is damaged, an unknown architecture or field, a missing,
            unexpected or misshapen tensor, heads that do not divide over the mesh.
    """
    if dtype not in _DTYPES:
        raise InputError(f"compute dtype {dtype!r}", f"it must be one of {', '.join(_DTYPES)}")
    checkpoint = Checkpoint(path)
    architecture = checkpoint.architecture
    layers = architecture.layers if last_layer is None else last_layer + 1
    if not 0 <= layers <= architecture.layers:
        raise InputError(f"last layer {last_layer}", f"the model's layers are 0 to {architecture.layers - 1}, or -1")
    outside, blocks = shapes(architecture, layers=layers, with_unembedding=with_unembedding, mesh=mesh)
    compute = _DTYPES[dtype]
    loaded: dict[str, jax.Array] = {}
    for name, shape in {**outside, **blocks}.items():
        stack = _Stack(name, shape, _DTYPES["float32"] if name in FLOAT32 else compute, mesh)
        if name in outside:
            stack.put(checkpoint.read(name, dtype=stack.dtype))
        for layer in range(layers) if name in blocks else ():
            _fill(stack, checkpoint, name, layer)
        loaded[name] = stack.take()
    return LanguageModel(
        architecture,
        Outside({name: loaded[name] for name in outside}),
        Blocks({name: loaded[name] for name in blocks}),
        with_unembedding,
        mesh,
    )


def load_unembedding(path: Path) -> Unembedding:
    """The unembedding and final norm alone, in float32, for reading directions as output tokens."""
    checkpoint = Checkpoint(path)
    weights = checkpoint.read("embed" if checkpoint.architecture.tied_embeddings else "unembed")
    a = checkpoint.architecture
    return Unembedding(weights.T, checkpoint.read("final_norm"), a.norm_epsilon, a.layer_norms)


class _Stack:
    """A weight while it is read: one buffer on the host for each different part that a device here will hold."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh | None) -> None:
        self.shape, self.dtype = shape, dtype
        self._sharding = sharding(name, mesh)
        self._devices = self._sharding.addressable_devices_indices_map(shape)
        self._buffers: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        for index in self._devices.values():
            bounds = self._bounds(index)
            if bounds not in self._buffers:
                self._buffers[bounds] = _aligned_zeros(tuple(stop - start for start, stop in bounds), dtype)

    def put(self, weights: np.ndarray, *at: int | slice) -> None:
        """Write the part at ``at`` of the whole weight: whole numbers and whole slices, then the axes of ``weights``.

        ``weights`` may have fewer rows than the padded weight.
        """
        axes = [axis for axis in range(len(self.shape)) if axis >= len(at) or isinstance(at[axis], slice)]
        for bounds, buffer in self._buffers.items():
            source: list[slice] = []
            target: list[int | slice] = list(at) + [slice(None)] * (len(self.shape) - len(at))
            for axis, size in zip(axes, weights.shape, strict=True):
                start, stop = bounds[axis]
                if target[axis] == slice(None):
                    source.append(slice(start, stop))
                    target[axis] = slice(0, max(min(stop, size) - start, 0))
                else:  # a part of an axis that is never cut
                    source.append(slice(None))
            buffer[tuple(target)] = weights[tuple(source)]

    def take(self) -> jax.Array:
        """The weight on its devices; the buffers go with it."""
        parts = [jax.device_put(self._buffers[self._bounds(index)], device) for device, index in self._devices.items()]
        self._buffers = {}
        return jax.make_array_from_single_device_arrays(self.shape, self._sharding, parts)

    def _bounds(self, index: Any) -> tuple[tuple[int, int], ...]:
        return tuple(cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True))


def _fill(stack: _Stack, checkpoint: Checkpoint, name: str, layer: int) -> None:
    """Read what one layer holds of a stacked weight and put it in its place."""
    a, dtype = checkpoint.architecture, stack.dtype
    if name in ("w_qkv", "b_qkv"):
        groups, stacked = stack.shape[-3], stack.shape[-2]
        repeats = groups // a.kv_heads
        fused = "qkv" if name == "w_qkv" else "qkv_bias"
        query, key = slice(0, stacked - 2), slice(stacked - 2, stacked - 1)
        places = {"query": query, "key": key, "value": slice(stacked - 1, None)}
        inputs = (slice(None),) if name == "w_qkv" else ()
        for part, weights in checkpoint.read_fused(fused, ("query", "key", "value"), layer, dtype):
            by_head = weights.reshape(groups if part == "query" else a.kv_heads, -1, a.head_dim, *weights.shape[1:])
            if part != "query":
                by_head = by_head.repeat(repeats, axis=0)
            stack.put(np.moveaxis(by_head, -1, 0) if inputs else by_head, layer, *inputs, slice(None), places[part])
    elif name in ("w_in", "b_in"):
        fused = "gate_up" if name == "w_in" else "gate_up_bias"
        inputs = (slice(None),) if name == "w_in" else ()
        parts = ("gate", "up") if a.gated else ("up",)
        for place, (_, weights) in enumerate(checkpoint.read_fused(fused, parts, layer, dtype)):
            stack.put(weights.T, layer, *inputs, place)
    else:
        role = {"w_attn_out": "attn_out", "b_attn_out": "attn_out_bias", "w_down": "down", "b_down": "down_bias"}
        stack.put(checkpoint.read(role.get(name, name), layer, dtype).T, layer)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
