"""Phi-3 and Phi-4-mini: fused projections, long-context rotary positions."""

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
    without,
)


def _windows(config: Fields) -> dict[str, Any]:
    window = config.get("sliding_window")
    return {"sliding_window": window or 0, "sliding": (bool(window),) * config["num_hidden_layers"]}


def _gguf_windows(fields: Fields) -> dict[str, Any]:
    window = fields.get("attention.sliding_window", 0)
    return {"sliding_window": window, "sliding": (bool(window),) * fields["block_count"]}


PHI3 = Family(
    name="phi3",
    traits={**LLAMA_TRAITS, "qk_norms": False, "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False},
    defaults={"norm_epsilon": 1e-5, "activation": "silu", "tied_embeddings": False},
    hf_model_types=frozenset({"phi3"}),
    hf_fields=HF_FIELDS,
    hf_derive=_windows,
    hf_read=frozenset({"sliding_window"}),
    hf_fixed={**HF_FIXED, "attention_bias": (False,)},
    hf_ignored={**HF_IGNORED, "interpolate_factor": "read by no runtime", "full_attn_mod": "read by no runtime"},
    hf_tensors={
        **without(HF_TENSORS, "query", "key", "value", "gate", "up"),
        "qkv": "layers.{}.self_attn.qkv_proj.weight",
        "gate_up": "layers.{}.mlp.gate_up_proj.weight",
    },
    gguf_architecture="phi3",
    gguf_fields=GGUF_FIELDS,
    gguf_derive=_gguf_windows,
    gguf_read=frozenset({"attention.sliding_window"}),
    gguf_fixed=GGUF_FIXED,
    gguf_tensors={
        **without(GGUF_TENSORS, "query", "key", "value", "gate", "up"),
        "qkv": "blk.{}.attn_qkv.weight",
        "gate_up": "blk.{}.ffn_up.weight",
    },
)
