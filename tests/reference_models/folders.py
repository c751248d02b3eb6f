"""The models as Hugging Face folders: recorded configuration and tensor shapes, weights from a seed, no torch."""

import json
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "common" / "llm" / "data"
Tensors = dict[str, np.ndarray]
WINDOWS, LENGTH = 2, 10
KEPT = slice(1, None)  # the window whose values are recorded; the other one must make no difference to it


@cache
def described() -> dict[str, dict[str, Any]]:
    """By configuration the ``config.json`` that ``transformers`` saves, and the names and shapes of the tensors."""
    return json.loads((DATA / "families.json").read_text())


def config_of(key: str) -> dict[str, Any]:
    """A copy of the recorded ``config.json``."""
    return json.loads(json.dumps(described()[key]["config"]))


@cache
def recorded(family: str) -> dict[str, np.ndarray]:
    """What the reference computed: ``name/tap`` and ``name/logits`` of the family's configurations."""
    with np.load(DATA / f"{family}_reference.npz") as file:
        return dict(file)


def reference_of(key: str) -> dict[str, np.ndarray]:
    """Every tap of one configuration, and ``logits``, of the window that is kept."""
    family, _, name = key.partition("/")
    return {k.removeprefix(f"{name}/"): v for k, v in recorded(family).items() if k.startswith(f"{name}/")}


def random(key: str) -> np.random.RandomState:
    """A generator whose stream is frozen for good, as recorded values need (NumPy's NEP 19)."""
    return np.random.RandomState(zlib.crc32(key.encode()))


def tokens_NL(vocabulary: int = 58) -> np.ndarray:
    """Two windows of tokens, for all models; ids that mark images are left out."""
    return random("tokens").randint(0, vocabulary, (WINDOWS, LENGTH)).astype(np.int32)


def weights_of(key: str, shapes: Mapping[str, list[int]] | None = None) -> Tensors:
    """Random weights in which every term matters: scores far from even, norms and biases far from neutral."""
    random_state, tensors = random(key), {}
    for name, shape in sorted((shapes or described()[key]["tensors"]).items()):
        noise = random_state.standard_normal(shape)
        if len(shape) == 1 and name.endswith("weight"):
            stored_less_one = key.startswith("gemma")
            value = noise * 0.35 + (0.2 if stored_less_one else 1.2)
        elif len(shape) == 1:
            value = noise * 0.4
        elif any(part in name for part in ("embed_tokens", "embed_in.", "wte.", "wpe.")):
            # Gemma multiplies by the root of the width. The same matrix gives the logits where it is tied.
            value = noise * (shape[-1] ** -0.5 if key.startswith("gemma") else 0.7)
        else:
            fan_in = shape[0] if ".c_" in name else int(np.prod(shape[1:]))  # GPT-2's matrices are [in, out]
            value = noise * 1.5 * fan_in**-0.5
        tensors[name] = value.astype(np.float32)
    return tensors


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file."""
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}


def write_folder(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    in_bfloat16: bool = False,
) -> Path:
    """``config.json`` and safetensors, in one file or in shards with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    kind = ml_dtypes.bfloat16 if in_bfloat16 else None
    tensors = {name: np.ascontiguousarray(tensor, kind) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(places.values())):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def write_model(path: Path, key: str, **options: Any) -> Path:
    """A configuration as ``transformers`` would save it."""
    return write_folder(path, config_of(key), weights_of(key), **options)
