"""Weights from a ``.gguf`` file or a Hugging Face folder into a ``LanguageModel``.

Every name and shape is checked before the first tensor is read, so a bad file leaves nothing half-loaded.
Tensors are dequantised one by one, and only those that the wanted layers need.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.architecture import Architecture, from_gguf, from_hugging_face
from saex_pipe.common.llm.families import FAMILIES
from saex_pipe.common.llm.gguf import GgufFile
from saex_pipe.common.llm.hugging_face import SafetensorsFolder, read_json
from saex_pipe.common.llm.params import Blocks, DecoderParams, LanguageModel

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_PER_LAYER = ("attn_norm", "query", "key", "value", "attn_out", "mlp_norm", "gate", "up", "down")


class Unembedding(NamedTuple):
    """What turns a final residual stream into logits: ``rms_norm(x_D) * final_norm_D @ w_unembed_DV``."""

    w_unembed_DV: Float[np.ndarray, "D V"]  # float32
    final_norm_D: Float[np.ndarray, " D"]  # float32
    norm_epsilon: float


class _Source(Protocol):
    """Tensors by the file's own names."""

    def read(self, name: str) -> np.ndarray: ...


class _Checkpoint:
    """A model on disk by our names, permutations of the file format undone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source: _Source
        if path.is_dir():
            self.architecture = from_hugging_face(read_json(path / "config.json"), path / "config.json")
            family = FAMILIES[self.architecture.family]
            folder = SafetensorsFolder(path)
            self._source, self._shapes, self._names = folder, folder.shapes, family.hf_tensors
            self._permuted: frozenset[str] = frozenset()
            ignored: Iterable[str] = family.hf_ignored_tensors
        else:
            file = GgufFile(path)
            self.architecture = _gguf_architecture(file)
            family = FAMILIES[self.architecture.family]
            self._source, self._names = file, family.gguf_tensors
            self._shapes = {name: info.shape for name, info in file.tensors.items()}
            self._permuted = family.gguf_permuted
            ignored = ()
        self._check_names(ignored)

    def shape(self, role: str) -> tuple[int, ...]:
        """The shape that a tensor must have, [out, in] for a matrix."""
        a = self.architecture
        query, key_value = a.query_heads * a.head_dim, a.kv_heads * a.head_dim
        return {
            "embed": (a.vocabulary, a.width),
            "unembed": (a.vocabulary, a.width),
            "query": (query, a.width),
            "key": (key_value, a.width),
            "value": (key_value, a.width),
            "attn_out": (a.width, query),
            "gate": (a.mlp_width, a.width),
            "up": (a.mlp_width, a.width),
            "down": (a.width, a.mlp_width),
        }.get(role, (a.width,))

    def read(self, role: str, layer: int = 0) -> np.ndarray:
        """One tensor as float32, in the row order of Hugging Face."""
        weights = self._source.read(self._names[role].format(layer))
        if role in self._permuted:
            heads = self.architecture.query_heads if role == "query" else self.architecture.kv_heads
            weights = unpermute_rows(weights, heads)
        return weights

    def _check_names(self, ignored: Iterable[str]) -> None:
        """Refuse missing tensors, wrong shapes, and tensors that the family's table does not know."""
        layers = range(self.architecture.layers)
        expected = {"embed": "embed", "final_norm": "final_norm"} | (
            {} if self.architecture.tied_embeddings else {"unembed": "unembed"}
        )
        wanted = {self._names[role]: role for role in expected}
        wanted |= {self._names[role].format(layer): role for role in _PER_LAYER for layer in layers}
        for name, role in wanted.items():
            if name not in self._shapes:
                raise InputError(f"{self.path} lacks tensor {name}", "get an intact copy of the model")
            if self._shapes[name] != self.shape(role):
                raise InputError(
                    f"{self.path}: tensor {name} has shape {self._shapes[name]}, its configuration says "
                    f"{self.shape(role)}",
                    "get a model whose weights and configuration belong together",
                )
        known = {*wanted, self._names["unembed"], *(name.format(layer) for name in ignored for layer in layers)}
        unknown = sorted(set(self._shapes) - known)
        if unknown:
            raise InputError(
                f"{self.path}: tensor {unknown[0]!r} is not part of the {self.architecture.family} family",
                "this version cannot run the model faithfully; use one without it",
            )


def read_architecture(path: Path) -> Architecture:
    """The architecture of a ``.gguf`` file or Hugging Face folder, without reading weights."""
    if path.is_dir():
        return from_hugging_face(read_json(path / "config.json"), path / "config.json")
    return _gguf_architecture(GgufFile(path))


def load_model(
    path: Path, *, last_layer: int | None = None, with_unembedding: bool = True, dtype: str = "bfloat16"
) -> LanguageModel:
    """Load a decoder from a ``.gguf`` file or a Hugging Face folder.

    Args:
        path: the file or folder.
        last_layer: the last block to load, -1 for none; None loads all. Weights above it are never read.
        with_unembedding: whether logits will be asked for.
        dtype: of the matrices and of matmul inputs, ``float32`` or ``bfloat16``; norms and sums are float32.

    Raises:
        InputError: a file that cannot be read or is damaged, an unknown architecture or field, a missing,
            unexpected or misshapen tensor.
    """
    if dtype not in _DTYPES:
        raise InputError(f"compute dtype {dtype!r}", f"it must be one of {', '.join(_DTYPES)}")
    checkpoint = _Checkpoint(path)
    architecture = checkpoint.architecture
    layers = architecture.layers if last_layer is None else last_layer + 1
    if not 0 <= layers <= architecture.layers:
        raise InputError(f"last layer {last_layer}", f"the model's layers are 0 to {architecture.layers - 1}, or -1")
    compute = _DTYPES[dtype]
    unembed = None
    if with_unembedding and not architecture.tied_embeddings:
        unembed = jnp.asarray(checkpoint.read("unembed").astype(compute))
    params = DecoderParams(
        embed=jnp.asarray(checkpoint.read("embed").astype(compute)),
        blocks=_read_blocks(checkpoint, layers, compute),
        final_norm=jnp.asarray(checkpoint.read("final_norm")),
        unembed=unembed,
    )
    return LanguageModel(architecture, params, with_unembedding)


def load_unembedding(path: Path) -> Unembedding:
    """The unembedding and final norm alone, in float32, for reading directions as output tokens."""
    checkpoint = _Checkpoint(path)
    weights = checkpoint.read("embed" if checkpoint.architecture.tied_embeddings else "unembed")
    return Unembedding(weights.T, checkpoint.read("final_norm"), checkpoint.architecture.norm_epsilon)


def unpermute_rows(weights: Float[np.ndarray, "out in"], heads: int) -> Float[np.ndarray, "out in"]:
    """Undo llama.cpp's reordering of query and key rows.

    It interleaves the two halves of every head, for rotary positions that turn neighbouring pairs; ours turn the
    halves, as Hugging Face's do. Leaving the order as it is gives activations that look plausible and are wrong.
    """
    out, width = weights.shape
    return weights.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def _gguf_architecture(file: GgufFile) -> Architecture:
    name = "token_embd.weight"
    if name not in file.tensors:
        raise InputError(f"{file.path} lacks tensor {name}", "use a GGUF file that holds a language model")
    return from_gguf(file.metadata, file.tensors[name].shape[0], "output.weight" not in file.tensors, file.path)


def _read_blocks(checkpoint: _Checkpoint, layers: int, dtype: np.dtype) -> Blocks:
    """Stack the first ``layers`` blocks, matrices turned to [in, out] and joined where they share an input."""
    joined = {
        "w_qkv": ("query", "key", "value"),
        "w_attn_out": ("attn_out",),
        "w_gate_up": ("gate", "up"),
        "w_down": ("down",),
    }
    weights: dict[str, np.ndarray] = {}
    for name, roles in joined.items():
        outs = sum(checkpoint.shape(role)[0] for role in roles)
        weights[name] = np.empty((layers, checkpoint.shape(roles[0])[1], outs), dtype)
    for name in ("attn_norm", "mlp_norm"):
        weights[name] = np.empty((layers, *checkpoint.shape(name)), np.float32)
    for layer in range(layers):
        for name, roles in joined.items():
            start = 0
            for role in roles:
                stop = start + checkpoint.shape(role)[0]
                weights[name][layer, :, start:stop] = checkpoint.read(role, layer).astype(dtype).T
                start = stop
        for name in ("attn_norm", "mlp_norm"):
            weights[name][layer] = checkpoint.read(name, layer)
    return Blocks({name: jnp.asarray(value) for name, value in weights.items()})
