"""GPT-2, and GPT-NeoX (Pythia): layer norms, biases, a plain MLP."""

from typing import Any

from saex_pipe.common.llm.families.family import (
    GGUF_FIELDS,
    GGUF_FIXED,
    GGUF_TENSORS,
    HF_FIELDS,
    HF_FIXED,
    HF_IGNORED,
    Family,
    Fields,
    without,
)

_GPT_TRAITS = {
    "layer_norms": True,
    "gated": False,
    "post_norms": False,
    "qk_norms": False,
    "scales_embedding": False,
}
_GPT_GGUF_FIELDS = {**GGUF_FIELDS, "norm_epsilon": "attention.layer_norm_epsilon"}
_GPT_GGUF_TENSORS = {**without(GGUF_TENSORS, "query", "key", "value", "gate"), "qkv": "blk.{}.attn_qkv.weight"}


def _gpt2_mlp(config: Fields) -> dict[str, Any]:
    return {"mlp_width": config.get("n_inner") or 4 * config["n_embd"]}


GPT2 = Family(
    name="gpt2",
    traits={**_GPT_TRAITS, "parallel": False, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    defaults={"norm_epsilon": 1e-5, "activation": "gelu_new", "tied_embeddings": True},
    rope_theta=None,
    hf_model_types=frozenset({"gpt2"}),
    hf_fields={
        "layers": "n_layer",
        "width": "n_embd",
        "query_heads": "n_head",
        "vocabulary": "vocab_size",
        "max_positions": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "activation": "activation_function",
        "tied_embeddings": "tie_word_embeddings",
    },
    hf_derive=_gpt2_mlp,
    hf_read=frozenset({"n_inner"}),
    hf_fixed={**HF_FIXED, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    hf_ignored={
        **HF_IGNORED,
        "n_ctx": "an older name of n_positions",
        "reorder_and_upcast_attn": "how another runtime rounds",
        **{
            f"summary_{name}": "for classifiers"
            for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
        },
    },
    hf_tensors={
        "embed": "wte.weight",
        "positions": "wpe.weight",
        "unembed": "lm_head.weight",
        "final_norm": "ln_f.weight",
        "attn_norm": "h.{}.ln_1.weight",
        "qkv": "h.{}.attn.c_attn.weight",
        "attn_out": "h.{}.attn.c_proj.weight",
        "mlp_norm": "h.{}.ln_2.weight",
        "up": "h.{}.mlp.c_fc.weight",
        "down": "h.{}.mlp.c_proj.weight",
    },
    hf_prefixes=("transformer.", ""),
    hf_ignored_tensors={"*.attn.bias": "the causal mask", "*.attn.masked_bias": "what masked scores are set to"},
    hf_in_out=True,
    gguf_architecture="gpt2",
    gguf_fields=_GPT_GGUF_FIELDS,
    gguf_fixed=GGUF_FIXED,
    gguf_tensors={**_GPT_GGUF_TENSORS, "positions": "position_embd.weight"},
)

GPT_NEOX = Family(
    name="gpt_neox",
    traits={**_GPT_TRAITS, "mlp_bias": True},
    defaults={
        "norm_epsilon": 1e-5,
        "activation": "gelu",
        "tied_embeddings": False,
        "parallel": True,
        "qkv_bias": True,
        "attn_out_bias": True,
        "partial_rotary_factor": 0.25,
    },
    hf_model_types=frozenset({"gpt_neox"}),
    hf_fields={
        **without(HF_FIELDS, "kv_heads", "head_dim"),
        "norm_epsilon": "layer_norm_eps",
        "parallel": "use_parallel_residual",
        "qkv_bias": "attention_bias",
        "attn_out_bias": "attention_bias",
    },
    hf_renamed={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    hf_fixed=HF_FIXED,
    hf_ignored=HF_IGNORED,
    hf_tensors={
        "embed": "embed_in.weight",
        "unembed": "embed_out.weight",
        "final_norm": "final_layer_norm.weight",
        "attn_norm": "layers.{}.input_layernorm.weight",
        "qkv": "layers.{}.attention.query_key_value.weight",
        "attn_out": "layers.{}.attention.dense.weight",
        "mlp_norm": "layers.{}.post_attention_layernorm.weight",
        "up": "layers.{}.mlp.dense_h_to_4h.weight",
        "down": "layers.{}.mlp.dense_4h_to_h.weight",
    },
    hf_prefixes=("gpt_neox.", ""),
    hf_ignored_tensors={
        "*.attention.bias": "the causal mask",
        "*.attention.masked_bias": "what masked scores are set to",
        "*.rotary_emb.inv_freq": "computed from rope_theta",
    },
    hf_head_by_head=True,
    gguf_architecture="gptneox",
    gguf_fields={**_GPT_GGUF_FIELDS, "parallel": "use_parallel_residual"},
    gguf_fixed=GGUF_FIXED,
    gguf_ignored={"tensor_data_layout": "how another runtime once ordered the rows"},
    gguf_tensors=_GPT_GGUF_TENSORS,
)
