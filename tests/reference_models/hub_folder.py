"""A model as an older folder, and the fields that older files share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reference_models.folders import Tensors, weights_of, write_folder
from reference_models.shapes import EPSILON


@dataclass(frozen=True)
class HubFolder:
    """One configuration as an older folder."""

    key: str
    config: dict[str, Any]
    renamed: tuple[tuple[str, str], ...] = ()  # starts of tensor names, ours to theirs
    buffers: tuple[tuple[str, tuple[int, ...]], ...] = ()  # in every layer, with this shape

    def tensors(self) -> Tensors:
        found = {}
        for name, weights in weights_of(self.key).items():
            start, other = next((pair for pair in self.renamed if name.startswith(pair[0])), ("", ""))
            found[other + name.removeprefix(start)] = weights
        for name, shape in self.buffers:
            found |= {name.format(layer): np.ones(shape, np.float32) for layer in range(2)}
        return found

    def write(self, path: Path) -> Path:
        return write_folder(path, self.config, self.tensors())


SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0",
}
LLAMA_LIKE = {
    **SHAPE,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rms_norm_eps": EPSILON,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
