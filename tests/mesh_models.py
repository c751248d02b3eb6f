"""Tiny random models, one of each kind that a mesh cuts differently, with heads for eight devices.

Run as a program it is one of several processes that share a mesh: it runs the models of a folder on every shape of
mesh and compares what its own devices hold with recorded values.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from reference_models.folders import write_folder

from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.llm.taps import all_names
from saex_pipe.common.mesh import make_mesh, place_batch

MODEL_AXES = (8, 4, 1)
WINDOWS, LENGTH = 8, 12
# How fast a program runs does not matter here; this halves the time that it takes to compile.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 6,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CONFIGS = {
    "grouped": {**_LLAMA, "num_attention_heads": 16},
    "repeated_keys": {**_LLAMA, "num_attention_heads": 16, "num_key_value_heads": 2},
    "multi_query_biased": {
        **_LLAMA,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "vocab_size": 61,
        "tie_word_embeddings": True,
    },
    "learned_positions": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 8,
        "n_positions": 16,
        "vocab_size": 67,
    },
    "parallel": {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "rotary_pct": 0.25,
    },
    "capped_windows": {
        **_LLAMA,
        "model_type": "gemma2",
        "num_key_value_heads": 4,
        "sliding_window": 5,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
}


def write_tiny(folder: Path, name: str) -> Path:
    """A Hugging Face folder of one of ``CONFIGS`` with random weights in which every term matters."""
    return write_random(folder / name, CONFIGS[name])


def write_random(path: Path, config: dict) -> Path:
    """A Hugging Face folder of any configuration of these families, float32."""
    random = np.random.default_rng(7)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = random.standard_normal(shape, np.float32)
        if len(shape) == 1:
            less = 1 if config["model_type"] == "gemma2" else 0
            tensors[name] = noise * np.float32(0.3) + np.float32(1 - less if name.endswith("norm.weight") else 0)
        else:
            tensors[name] = noise * np.float32(1.5 / shape[-1] ** 0.5)
    return write_folder(path, config, tensors)


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, as Hugging Face has them."""
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if config["model_type"] == "gpt2":
        width = config["n_embd"]
        shapes = {"wte.weight": (config["vocab_size"], width), "wpe.weight": (config["n_positions"], width)}
        block = {
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_proj.weight": (width, width),
            "mlp.c_fc.weight": (width, 4 * width),
            "mlp.c_proj.weight": (4 * width, width),
        }
        block |= {name.replace("weight", "bias"): shape[1:] for name, shape in block.items()}
        block |= {f"ln_{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"ln_f.{part}": (width,) for part in ("weight", "bias")}
        return shapes | {f"h.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    width, mlp = config["hidden_size"], config["intermediate_size"]
    if config["model_type"] == "gpt_neox":
        shapes = {f"gpt_neox.final_layer_norm.{part}": (width,) for part in ("weight", "bias")}
        shapes |= dict.fromkeys(("gpt_neox.embed_in.weight", "embed_out.weight"), (config["vocab_size"], width))
        block = {
            "attention.query_key_value.weight": (3 * width, width),
            "attention.dense.weight": (width, width),
            "mlp.dense_h_to_4h.weight": (mlp, width),
            "mlp.dense_4h_to_h.weight": (width, mlp),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        block |= {name.replace("weight", "bias"): shape[:1] for name, shape in block.items()}
        return shapes | {f"gpt_neox.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    heads, groups = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (config["vocab_size"], width)}
    attention = {"q_proj": (heads, width), "k_proj": (groups, width), "v_proj": (groups, width)}
    attention |= {"o_proj": (width, heads)}
    block = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    block |= {f"mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")} | {
        "mlp.down_proj.weight": (width, mlp)
    }
    if config.get("attention_bias"):
        block |= {name.replace("weight", "bias"): shape[:1] for name, shape in block.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    norms += ("pre_feedforward_layernorm", "post_feedforward_layernorm") if config["model_type"] == "gemma2" else ()
    block |= {f"{name}.weight": (width,) for name in norms}
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def tokens_NL() -> np.ndarray:
    """Tokens that every one of the models knows."""
    return np.random.default_rng(3).integers(0, 61, (WINDOWS, LENGTH), dtype=np.int32)


@partial(jax.jit, compiler_options=FAST_TO_COMPILE)
def every_tap(model, tokens_NL):
    """All taps by name, and ``logits``."""
    output = apply(model, tokens_NL, taps=all_names(model.architecture))
    return {**output.taps, "logits": output.logits_NLV}


def single_device(path: Path) -> dict[str, np.ndarray]:
    """What one device computes, for comparison."""
    return jax.device_get(every_tap(load_model(path, dtype="float32"), tokens_NL()))


def on_a_mesh(path: Path, model_axis: int) -> dict[str, jax.Array]:
    """What the devices of all processes compute together."""
    mesh = make_mesh(model_axis)
    return every_tap(load_model(path, dtype="float32", mesh=mesh), placed_tokens(mesh))


def placed_tokens(mesh: jax.sharding.Mesh) -> jax.Array:
    """The tokens on a mesh."""
    return place_batch(tokens_NL(), mesh)


def largest_error(found: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> float:
    """The largest relative error of a tap, over the shards that this process holds."""
    errors = {}
    for name, array in found.items():
        assert array.shape == expected[name].shape, name
        parts = [
            (np.asarray(shard.data, np.float64), expected[name][shard.index]) for shard in array.addressable_shards
        ]
        difference = sum(float(np.sum((part - whole) ** 2)) for part, whole in parts)
        errors[name] = (
            difference / sum(float(np.sum(np.square(whole, dtype=np.float64))) for _, whole in parts)
        ) ** 0.5
    assert errors.keys() == expected.keys()
    return max(errors.values())


def main(port: str, processes: str, folder: str, process: str) -> None:
    """Print the largest error of each model and mesh, as JSON."""
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(process))
    errors = {}
    for path in sorted(Path(folder).iterdir()):
        with np.load(path / "expected.npz") as file:
            expected = dict(file)
        for axis in MODEL_AXES:
            errors[f"{path.name} {axis}"] = largest_error(on_a_mesh(path, axis), expected)
    print(json.dumps({"devices": [jax.local_device_count(), jax.device_count()], "errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
