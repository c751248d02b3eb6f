"""Qwen 2 and 2.5 (biases on query, key and value) and Qwen 3 (norms on every query and key head)."""

from typing import Any

from saex_pipe.common.llm.families.family import (
    GGUF_FIELDS,
    GGUF_FIXED,
    GGUF_TENSORS,
    HF_FIELDS,
    HF_FIXED,
    HF_IGNORED,
    HF_TENSORS,
    LLAMA_TRAITS,
    Family,
    Fields,
)
from saex_pipe.common.llm.families.windows import from_layer_types

_WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def _windows(config: Fields) -> dict[str, Any]:
    """Windows slide only where ``use_sliding_window`` says so, from layer ``max_window_layers`` on."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        return from_layer_types(config, 0, lambda layer: False)
    first = config.get("max_window_layers", 28)
    return from_layer_types(config, config.get("sliding_window", 4096), lambda layer: layer >= first)


QWEN2 = Family(
    name="qwen2",
    traits={**LLAMA_TRAITS, "qk_norms": False, "qkv_bias": True, "attn_out_bias": False, "mlp_bias": False},
    defaults={"norm_epsilon": 1e-6, "activation": "silu", "tied_embeddings": False, "kv_heads": 32},
    hf_model_types=frozenset({"qwen2"}),
    hf_fields=HF_FIELDS,
    hf_derive=_windows,
    hf_read=_WINDOW_FIELDS,
    hf_fixed={**HF_FIXED, "use_mrope": (False,)},
    hf_ignored=HF_IGNORED,
    hf_tensors=HF_TENSORS,
    gguf_architecture="qwen2",
    gguf_fields=GGUF_FIELDS,
    gguf_fixed=GGUF_FIXED,
    gguf_tensors=GGUF_TENSORS,
)

_HEAD_NORMS = {"query_norm": "layers.{}.self_attn.q_norm.weight", "key_norm": "layers.{}.self_attn.k_norm.weight"}
_GGUF_HEAD_NORMS = {"query_norm": "blk.{}.attn_q_norm.weight", "key_norm": "blk.{}.attn_k_norm.weight"}

QWEN3 = Family(
    name="qwen3",
    traits={**LLAMA_TRAITS, "qk_norms": True, "mlp_bias": False},
    defaults={
        **QWEN2.defaults,
        "head_dim": 128,
        "qkv_bias": False,
        "attn_out_bias": False,
    },
    hf_model_types=frozenset({"qwen3"}),
    hf_fields={**HF_FIELDS, "qkv_bias": "attention_bias", "attn_out_bias": "attention_bias"},
    hf_derive=_windows,
    hf_read=_WINDOW_FIELDS,
    hf_fixed=HF_FIXED,
    hf_ignored=HF_IGNORED,
    hf_tensors={**HF_TENSORS, **_HEAD_NORMS},
    gguf_architecture="qwen3",
    gguf_fields=GGUF_FIELDS,
    gguf_fixed=GGUF_FIXED,
    gguf_tensors={**GGUF_TENSORS, **_GGUF_HEAD_NORMS},
)
