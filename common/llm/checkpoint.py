"""A model on disk by our names, whatever its format calls, transposes, permutes or fuses.

Every name and shape is checked before the first tensor is read, so a bad file leaves nothing half-loaded.
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.configuration import ROPE_TENSORS, bias_name, from_gguf, from_hugging_face
from saex_pipe.common.llm.families import FAMILIES
from saex_pipe.common.llm.gguf import GgufFile
from saex_pipe.common.llm.hugging_face import SafetensorsFolder, read_json

_NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm", "query_norm", "key_norm", "final_norm")
_MATRICES = ("query", "key", "value", "qkv", "attn_out", "gate", "up", "gate_up", "down")
_BIAS = "_bias"


class _Source(Protocol):
    """Tensors by the file's own names."""

    def read(self, name: str, dtype: Any = ...) -> np.ndarray: ...

    def check(self, names: Iterable[str]) -> None: ...


class Checkpoint:
    """The tensors of a ``.gguf`` file or a Hugging Face folder by role: ``query``, ``query_bias``, ``attn_norm``.

    Raises an ``InputError`` for a file that cannot be read or is damaged, an unknown architecture or field, and a
    missing, unexpected or misshapen tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source: _Source
        self._permuted: frozenset[str] = frozenset()
        self._in_out = self._less_one = self._head_by_head = False
        if path.is_dir():
            self.architecture = from_hugging_face(read_json(path / "config.json"), path / "config.json")
            family = FAMILIES[self.architecture.family]
            folder = SafetensorsFolder(path)
            self._source, self._shapes = folder, folder.shapes
            self._names = _hugging_face_names(family.hf_tensors, family.hf_prefixes, folder.shapes)
            self._in_out, self._less_one = family.hf_in_out, family.hf_less_one
            self._head_by_head = family.hf_head_by_head
            ignored = tuple(family.hf_ignored_tensors)
        else:
            file = GgufFile(path)
            self.architecture = gguf_architecture(file)
            family = FAMILIES[self.architecture.family]
            self._source, self._names = file, dict(family.gguf_tensors)
            self._shapes = {name: info.shape for name, info in file.tensors.items()}
            self._permuted = family.gguf_permuted
            ignored = ROPE_TENSORS
        self._check_tensors(ignored)

    def roles(self) -> Iterator[str]:
        """Every role that the model fills in each layer."""
        a = self.architecture
        yield from ("attn_norm", "attn_out", "mlp_norm", "down")
        yield from ("qkv",) if "qkv" in self._names else ("query", "key", "value")
        yield from ("gate_up",) if "gate_up" in self._names else ("gate", "up") if a.gated else ("up",)
        yield from ("query_norm", "key_norm") if a.qk_norms else ()
        yield from ("post_attn_norm", "post_mlp_norm") if a.post_norms else ()
        yield from ("attn_norm_bias", "mlp_norm_bias") if a.layer_norms else ()
        if a.qkv_bias:
            yield from ("qkv_bias",) if "qkv" in self._names else ("query_bias", "key_bias", "value_bias")
        yield from ("attn_out_bias",) if a.attn_out_bias else ()
        if a.mlp_bias:
            yield "down_bias"
            yield from (
                ("gate_up_bias",) if "gate_up" in self._names else ("gate_bias", "up_bias") if a.gated else ("up_bias",)
            )

    def read(self, role: str, layer: int = 0, dtype: Any = np.float32) -> Float[np.ndarray, "..."]:
        """One tensor in the row order of Hugging Face, a matrix as [out, in] (a view where that will do)."""
        weights = self._source.read(self._name(role, layer), dtype)
        a = self.architecture
        if self._in_out and role in _MATRICES:
            weights = weights.T
        if self._less_one and role in _NORMS:
            weights = weights + 1
        matrix = role.removesuffix(_BIAS)
        if matrix in self._permuted:
            weights = unpermute_rows(weights, a.query_heads if matrix == "query" else a.kv_heads)
        if self._head_by_head and matrix == "qkv":
            weights = _heads_together(weights, a.query_heads)
        return weights

    def read_fused(
        self, fused: str, parts: tuple[str, ...], layer: int, dtype: Any
    ) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """The ``parts`` of a projection, which the file holds apart or as one tensor ``fused``; one at a time."""
        bias = _BIAS if fused.endswith(_BIAS) else ""
        if fused.removesuffix(_BIAS) not in self._names:
            for part in parts:
                yield part, self.read(part + bias, layer, dtype)
            return
        weights = self.read(fused, layer, dtype)
        start = 0
        for part in parts:
            stop = start + self.shape(part + bias)[0]
            yield part, weights[start:stop]
            start = stop

    def shape(self, role: str) -> tuple[int, ...]:
        """The shape of a tensor, [out, in] for a matrix."""
        a = self.architecture
        query, key_value = a.query_heads * a.head_dim, a.kv_heads * a.head_dim
        shape = {
            "embed": (a.vocabulary, a.width),
            "unembed": (a.vocabulary, a.width),
            "positions": (a.max_positions, a.width),
            "query": (query, a.width),
            "key": (key_value, a.width),
            "value": (key_value, a.width),
            "qkv": (query + 2 * key_value, a.width),
            "attn_out": (a.width, query),
            "gate": (a.mlp_width, a.width),
            "up": (a.mlp_width, a.width),
            "gate_up": (2 * a.mlp_width, a.width),
            "down": (a.width, a.mlp_width),
            "query_norm": (a.head_dim,),
            "key_norm": (a.head_dim,),
        }.get(role.removesuffix(_BIAS), (a.width,))
        return shape[:1] if role.endswith(_BIAS) else shape

    def _name(self, role: str, layer: int) -> str:
        name = self._names[role.removesuffix(_BIAS)].format(layer)
        return bias_name(name) if role.endswith(_BIAS) else name

    def _check_tensors(self, ignored: tuple[str, ...]) -> None:
        """Refuse missing tensors, wrong shapes, and tensors that the family's table does not know."""
        a = self.architecture
        once = ["embed", "final_norm"]
        once += [] if a.tied_embeddings else ["unembed"]
        once += ["positions"] if a.rope is None else []
        once += ["final_norm_bias"] if a.layer_norms else []
        wanted = {self._name(role, 0): role for role in once}
        wanted |= {self._name(role, layer): role for role in self.roles() for layer in range(a.layers)}
        for name, role in wanted.items():
            if name not in self._shapes:
                raise InputError(f"{self.path} lacks tensor {name}", "get an intact copy of the model")
            shape = self.shape(role)
            if self._in_out and role in _MATRICES:
                shape = shape[::-1]
            if self._shapes[name] != shape:
                raise InputError(
                    f"{self.path}: tensor {name} has shape {self._shapes[name]}, its configuration says {shape}",
                    "get a model whose weights and configuration belong together",
                )
        known = {*wanted, self._names.get("unembed")}
        unknown = sorted(
            name for name in set(self._shapes) - known if not any(fnmatchcase(name, pattern) for pattern in ignored)
        )
        if unknown:
            raise InputError(
                f"{self.path}: tensor {unknown[0]!r} is not part of the {a.family} family as configured",
                "this version cannot run the model faithfully; use one without it",
            )
        self._source.check(wanted)


def unpermute_rows(weights: Float[np.ndarray, "out *in"], heads: int) -> Float[np.ndarray, "out *in"]:
    """Undo llama.cpp's reordering of query and key rows.

    It interleaves the two halves of every head, for rotary positions that turn neighbouring pairs; ours turn the
    halves, as Hugging Face's do. Leaving the order as it is gives activations that look plausible and are wrong.
    """
    halves = weights.reshape(heads, len(weights) // heads // 2, 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _heads_together(weights: Float[np.ndarray, "out *in"], heads: int) -> Float[np.ndarray, "out *in"]:
    """From query, key and value of each head in turn to all queries, all keys, all values."""
    by_head = weights.reshape(heads, 3, -1, *weights.shape[1:])
    return by_head.swapaxes(0, 1).reshape(weights.shape)


def gguf_architecture(file: GgufFile) -> Architecture:
    """The architecture of an open GGUF file."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    return from_gguf(file.metadata, shapes, file.read, file.path)


def _hugging_face_names(
    tensors: Mapping[str, str], prefixes: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Full names: checkpoints of the bare decoder leave the prefix out, those of larger models have a longer one."""
    prefix = next((prefix for prefix in prefixes if prefix + tensors["embed"] in shapes), prefixes[0])
    names = {role: prefix + name for role, name in tensors.items()}
    heads = (tensors["unembed"], "language_model." + tensors["unembed"])
    return {**names, "unembed": next((name for name in heads if name in shapes), heads[0])}
