"""The models as GGUF files, converted as llama.cpp does, and the same weights back in Hugging Face's layout.

Facts from https://github.com/ggml-org/llama.cpp: ``conversion/`` (base, llama, qwen, phi, gemma, gpt2, gpt_neox) for
what is written, ``src/models/`` for what is assumed where the file is silent. Known to differ from Hugging Face:

- No sliding window is written for Mistral (a ``llama`` there) and Qwen, no rotary base for GPT-NeoX and Gemma 1 and 2,
  no activation, no ``query_pre_attn_scalar`` and no pattern of windows for Gemma 2 and 3; ``Configuration.gguf`` says
  what is assumed. Gemma 1 and 2 lose an unembedding of their own.
- Phi-3's window is written, though llama.cpp itself then ignores it; a reader that follows the file does not.
- The rotary bases of both kinds of layer of Gemma 3 are written; older files lack the near one, and it is 10000.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from reference_models.configurations import ALL, NARROW
from reference_models.folders import Tensors, config_of, weights_of
from reference_models.k_quants import quantize

NARROW_KINDS, WIDE_KINDS = ("F32", "F16", "BF16", "Q8_0"), ("Q4_K", "Q6_K")
# Every configuration that GGUF can hold, in every type that its rows can have.
CASES = [
    (key, kind)
    for key, configuration in ALL.items()
    if configuration.gguf is not None
    for kind in (NARROW_KINDS if key in NARROW else WIDE_KINDS)
]
ARCHITECTURES = {"gpt_neox": "gptneox", "mistral": "llama", "gemma3_text": "gemma3"}
F32 = gguf.GGMLQuantizationType.F32


class Step(NamedTuple):
    """How the converter changes some tensors, and the way back."""

    families: tuple[str, ...]
    endings: tuple[str, ...]
    forth: Callable[[np.ndarray, int], np.ndarray]  # of weights and their number of heads
    back: Callable[[np.ndarray, int], np.ndarray]


def _interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """The two halves of every head's rows, turn and turn about."""
    return weights.reshape(heads, 2, -1, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _halves(weights: np.ndarray, heads: int) -> np.ndarray:
    return weights.reshape(heads, -1, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _by_projection(weights: np.ndarray, heads: int) -> np.ndarray:
    """All queries, all keys, all values, from those of each head in turn."""
    return weights.reshape(heads, 3, -1, *weights.shape[1:]).swapaxes(0, 1).reshape(weights.shape)


def _by_head(weights: np.ndarray, heads: int) -> np.ndarray:
    return weights.reshape(3, heads, -1, *weights.shape[1:]).swapaxes(0, 1).reshape(weights.shape)


STEPS = {
    "permutation": Step(
        ("llama", "mistral"),
        ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"),
        _interleaved,
        _halves,
    ),
    "split of heads": Step(("gpt_neox",), ("query_key_value.weight", "query_key_value.bias"), _by_projection, _by_head),
    "added one": Step(
        ("gemma", "gemma2", "gemma3_text"), ("norm.weight",), lambda w, _: w + np.float32(1), lambda w, _: w - 1
    ),
    "transposition": Step(
        ("gpt2",), ("c_attn.weight", "c_proj.weight", "c_fc.weight"), lambda w, _: w.T, lambda w, _: w.T
    ),
}


def _heads(name: str, config: dict[str, Any]) -> int:
    return config["num_key_value_heads"] if ".k_proj." in name else config.get("num_attention_heads", 0)


def _converted(name: str, weights: np.ndarray, config: dict[str, Any], left_out: Collection[str] = ()) -> np.ndarray:
    for title, step in STEPS.items():
        if config["model_type"] in step.families and name.endswith(step.endings) and title not in left_out:
            weights = step.forth(weights, _heads(name, config))
    return weights


def _restored(name: str, weights: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    for step in STEPS.values():
        if config["model_type"] in step.families and name.endswith(step.endings):
            weights = step.back(weights, _heads(name, config))
    return np.ascontiguousarray(weights, np.float32)


def _kind(name: str, weights: np.ndarray, kind: str) -> gguf.GGMLQuantizationType:
    """The type of one tensor: vectors and positions stay F32, and llama-quantize spares the vocabulary."""
    if weights.ndim == 1 or name == "position_embd.weight":
        return F32
    if kind == "Q4_K" and name in ("token_embd.weight", "output.weight"):
        return gguf.GGMLQuantizationType.Q6_K
    return gguf.GGMLQuantizationType[kind]


def _gguf_names(config: dict[str, Any]) -> Callable[[str], str]:
    family = config["model_type"]
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES.get(family, family))
    names = gguf.get_tensor_name_map(architecture, config.get("num_hidden_layers", config.get("n_layer")))
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def _kept(config: dict[str, Any], tensors: Tensors) -> Tensors:
    drops_head = config["model_type"] in ("gemma", "gemma2")
    return {name: weights for name, weights in tensors.items() if not (drops_head and name == "lm_head.weight")}


def as_stored(key: str, kind: str) -> tuple[dict[str, Any], Tensors]:
    """The model that a GGUF file holds, in Hugging Face's terms: configuration and dequantised tensors."""
    config, rounded = config_of(key), {}
    to_gguf = _gguf_names(config)
    for name, weights in _kept(config, weights_of(key)).items():
        stored = _converted(name, weights, config)
        exact = _kind(to_gguf(name), stored, kind)
        rounded[name] = _restored(name, gguf.dequantize(quantize(stored, exact), exact).reshape(stored.shape), config)
    return {**config, **ALL[key].gguf}, rounded


def last_tap(key: str) -> str:
    """The residual stream that leaves the last block."""
    config = config_of(key)
    return f"blocks.{config.get('num_hidden_layers', config.get('n_layer')) - 1}.resid_post"


def write_gguf(
    path: Path,
    key: str,
    kind: str = "F32",
    *,
    left_out: Collection[str] = (),
    tensors: Tensors | None = None,
    split_after: int = 0,
) -> Path:
    """The file of one configuration.

    Args:
        path: of the file, or of the whole of which the parts are named after.
        key: the configuration.
        kind: the type of the matrices.
        left_out: titles of ``STEPS`` that a faulty converter forgets.
        tensors: instead of the configuration's own.
        split_after: tensors in each part, 0 for one file.
    """
    config = config_of(key)
    family, to_gguf = config["model_type"], _gguf_names(config)
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(family, family), split_max_tensors=split_after)
    _add_metadata(writer, config)
    for name, table in _rope_tables(config).items():
        writer.add_tensor(name, np.asarray(table, np.float32))
    for name, weights in _kept(config, weights_of(key) if tensors is None else tensors).items():
        stored = _converted(name, weights, config, left_out)
        exact = _kind(to_gguf(name), stored, kind)
        writer.add_tensor(to_gguf(name), quantize(stored, exact), raw_dtype=exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    family = config["model_type"]
    if family == "gpt2":
        config = {
            **config,
            "num_hidden_layers": config["n_layer"],
            "max_position_embeddings": config["n_positions"],
            "hidden_size": config["n_embd"],
            "num_attention_heads": config["n_head"],
            "intermediate_size": config["n_inner"] or 4 * config["n_embd"],
            "layer_norm_eps": config["layer_norm_epsilon"],
        }
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if family in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if family not in ("gpt2", "gpt_neox", "phi3") and config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    {
        "gpt_neox": _add_gpt_neox,
        "llama": _add_llama,
        "mistral": _add_llama,
        "qwen2": _add_rope,
        "qwen3": _add_rope,
        "phi3": _add_phi3,
        "gemma2": _add_gemma2,
        "gemma3_text": _add_gemma3,
    }.get(family, lambda writer, config: None)(writer, config)


def _add_rope(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Rotary positions of the families that leave them to the converter's base class."""
    parameters = config["rope_parameters"]
    far = parameters.get("full_attention", parameters)
    writer.add_rope_freq_base(far["rope_theta"])
    if "sliding_attention" in parameters:
        writer.add_rope_freq_base_swa(parameters["sliding_attention"]["rope_theta"])
    if far["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(far["factor"])
    elif far["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(far["factor"])
        writer.add_rope_scaling_orig_ctx_len(far["original_max_position_embeddings"])


def _add_llama(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _add_rope(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["head_dim"])


def _add_gpt_neox(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_rope_dimension_count(_turning_dims(config))
    writer.add_parallel_residual(config["use_parallel_residual"])


def _add_phi3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    parameters = config["rope_parameters"]
    original = config["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(_turning_dims(config))
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_sliding_window(config["sliding_window"] or 0)
    if "long_factor" in parameters:
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))


def _add_gemma2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _add_gemma3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _add_rope(writer, config)
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _turning_dims(config: dict[str, Any]) -> int:
    share = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    return int(share * config["hidden_size"]) // config["num_attention_heads"]


def _rope_tables(config: dict[str, Any]) -> dict[str, list[float]]:
    """Divisors of the frequencies, where the file carries them as tensors."""
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        return {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
    if rope.get("rope_type") != "llama3":
        return {}
    # The converter takes 8192, the length of every published Llama 3, for what the configuration says here.
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for pair in range(config["head_dim"] // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / config["head_dim"])
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": divisors}
