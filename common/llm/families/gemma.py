"""Gemma 1, 2 (soft caps, norms on both sides, alternating windows) and 3 (norms on heads, local and global rope).

Hugging Face stores the norms of all three less 1; llama.cpp's converter adds the 1.
"""

from typing import Any

from saex_pipe.common.errors import InputError
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

_TRAITS = {**LLAMA_TRAITS, "scales_embedding": True, "mlp_bias": False}
_DEFAULTS = {
    "norm_epsilon": 1e-6,
    "activation": "gelu_pytorch_tanh",
    "tied_embeddings": True,
    "head_dim": 256,
    "qkv_bias": False,
    "attn_out_bias": False,
}
_HF_FIELDS = {**HF_FIELDS, "qkv_bias": "attention_bias", "attn_out_bias": "attention_bias"}
_CAPPED_FIELDS = {
    **_HF_FIELDS,
    "activation": "hidden_activation",
    "query_scalar": "query_pre_attn_scalar",
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}
_GGUF_CAPS = {"attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
# hidden_act says "gelu" in the first files of Gemma 1 and 2 and was never what they were trained with.
_HF_FIXED = {**HF_FIXED, "hidden_act": ("gelu", "gelu_pytorch_tanh")}

_HF_SANDWICH = {
    **HF_TENSORS,
    "post_attn_norm": "layers.{}.post_attention_layernorm.weight",
    "mlp_norm": "layers.{}.pre_feedforward_layernorm.weight",
    "post_mlp_norm": "layers.{}.post_feedforward_layernorm.weight",
}
_GGUF_SANDWICH = {
    **GGUF_TENSORS,
    "post_attn_norm": "blk.{}.post_attention_norm.weight",
    "post_mlp_norm": "blk.{}.post_ffw_norm.weight",
}

GEMMA = Family(
    name="gemma",
    traits={**_TRAITS, "post_norms": False, "qk_norms": False},
    defaults={**_DEFAULTS, "kv_heads": 16},
    hf_model_types=frozenset({"gemma"}),
    hf_fields={**_HF_FIELDS, "activation": "hidden_activation"},
    hf_fixed=_HF_FIXED,
    hf_ignored=HF_IGNORED,
    hf_tensors=HF_TENSORS,
    hf_less_one=True,
    gguf_architecture="gemma",
    gguf_fields=GGUF_FIELDS,
    gguf_fixed=GGUF_FIXED,
    gguf_tensors=GGUF_TENSORS,
)


def _every_other(config: Fields) -> dict[str, Any]:
    return from_layer_types(config, config.get("sliding_window", 4096), lambda layer: layer % 2 == 0)


def _gguf_every_other(fields: Fields) -> dict[str, Any]:
    sliding = tuple(layer % 2 == 0 for layer in range(fields["block_count"]))
    return {
        "sliding_window": fields.get("attention.sliding_window", 4096),
        "sliding": sliding,
        **_query_scalar(fields, layers_of_largest=46),
    }


def _query_scalar(fields: Fields, layers_of_largest: int) -> dict[str, Any]:
    """The 27B models divide queries by another number than the rest; GGUF leaves it to the reader to know."""
    of_largest = fields["embedding_length"] / fields["attention.head_count"]
    return {
        "query_scalar": of_largest if fields["block_count"] == layers_of_largest else fields["attention.key_length"]
    }


GEMMA2 = Family(
    name="gemma2",
    traits={**_TRAITS, "post_norms": True, "qk_norms": False},
    defaults={**_DEFAULTS, "kv_heads": 4, "query_scalar": 256.0, "attention_cap": 50.0, "logit_cap": 30.0},
    hf_model_types=frozenset({"gemma2"}),
    hf_fields=_CAPPED_FIELDS,
    hf_derive=_every_other,
    hf_read=frozenset({"sliding_window", "layer_types"}),
    hf_fixed=_HF_FIXED,
    hf_ignored={**HF_IGNORED, "sliding_window_size": "an older name of sliding_window, beside it"},
    hf_tensors=_HF_SANDWICH,
    hf_less_one=True,
    gguf_architecture="gemma2",
    gguf_fields={**GGUF_FIELDS, **_GGUF_CAPS},
    gguf_derive=_gguf_every_other,
    gguf_read=frozenset({"attention.sliding_window"}),
    gguf_fixed=GGUF_FIXED,
    gguf_tensors=_GGUF_SANDWICH,
)

_PATTERN = 6  # every sixth layer of Gemma 3 sees the whole window


def _local_and_global(config: Fields) -> dict[str, Any]:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PATTERN
    return from_layer_types(config, config.get("sliding_window", 4096), lambda layer: (layer + 1) % pattern != 0)


def _gguf_local_and_global(fields: Fields) -> dict[str, Any]:
    layers = fields["block_count"]
    pattern = fields.get("attention.sliding_window_pattern", _PATTERN)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if len(pattern) != layers:
        raise InputError(f"attention.sliding_window_pattern has {len(pattern)} entries", f"it must have {layers}")
    return {
        "sliding_window": fields.get("attention.sliding_window", 4096),
        "sliding": tuple(bool(slides) for slides in pattern),
        **_query_scalar(fields, layers_of_largest=62),
    }


GEMMA3 = Family(
    name="gemma3",
    traits={**_TRAITS, "post_norms": True, "qk_norms": True},
    defaults={**_DEFAULTS, "kv_heads": 4, "query_scalar": 256.0},
    # The text part of the 4B model says none of these.
    hf_defaults={"query_heads": 8, "vocabulary": 262208, "max_positions": 131072},
    rope_theta=1_000_000.0,
    local_rope_theta=10_000.0,
    hf_model_types=frozenset({"gemma3_text"}),
    hf_fields=_CAPPED_FIELDS,
    hf_derive=_local_and_global,
    hf_read=frozenset({"sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"}),
    hf_fixed=_HF_FIXED,
    hf_ignored=HF_IGNORED,
    hf_tensors={
        **_HF_SANDWICH,
        "query_norm": "layers.{}.self_attn.q_norm.weight",
        "key_norm": "layers.{}.self_attn.k_norm.weight",
    },
    # A model that also sees images carries its text part under one of the last two.
    hf_prefixes=("model.", "", "model.language_model.", "language_model.model."),
    hf_ignored_tensors={
        "*vision_tower.*": "for images",
        "*multi_modal_projector.*": "for images",
    },
    hf_less_one=True,
    gguf_architecture="gemma3",
    gguf_fields={**GGUF_FIELDS, **_GGUF_CAPS},
    gguf_derive=_gguf_local_and_global,
    gguf_read=frozenset({"attention.sliding_window", "attention.sliding_window_pattern"}),
    gguf_fixed=GGUF_FIXED,
    gguf_tensors={
        **_GGUF_SANDWICH,
        "query_norm": "blk.{}.attn_q_norm.weight",
        "key_norm": "blk.{}.attn_k_norm.weight",
    },
)
