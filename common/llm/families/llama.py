"""Llama 1 to 3, SmolLM2, and Mistral, which is Llama with sliding windows."""

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

# transformers computes the inverse frequencies anew; older files carry them.
_COMPUTED = {"*.rotary_emb.inv_freq": "computed from rope_theta"}

LLAMA = Family(
    name="llama",
    traits={**LLAMA_TRAITS, "qk_norms": False},
    defaults={
        "norm_epsilon": 1e-6,
        "activation": "silu",
        "tied_embeddings": False,
        "qkv_bias": False,
        "attn_out_bias": False,
        "mlp_bias": False,
    },
    hf_model_types=frozenset({"llama"}),
    hf_fields={
        **HF_FIELDS,
        "qkv_bias": "attention_bias",
        "attn_out_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    hf_fixed={**HF_FIXED, "sliding_window": (None,)},
    hf_ignored=HF_IGNORED,
    hf_tensors=HF_TENSORS,
    hf_ignored_tensors=_COMPUTED,
    gguf_architecture="llama",
    gguf_fields=GGUF_FIELDS,
    gguf_fixed=GGUF_FIXED,
    gguf_tensors=GGUF_TENSORS,
    gguf_permuted=frozenset({"query", "key"}),
)


def _mistral_windows(config: Fields) -> dict[str, Any]:
    window = config.get("sliding_window", 4096)
    return {"sliding_window": window or 0, "sliding": (bool(window),) * config["num_hidden_layers"]}


# In GGUF a Mistral is a llama, and its sliding window is not said: windows above it see further than they should.
MISTRAL = Family(
    name="mistral",
    traits={**LLAMA.traits, "qkv_bias": False, "attn_out_bias": False, "mlp_bias": False},
    defaults={**LLAMA.defaults, "kv_heads": 8},
    hf_model_types=frozenset({"mistral"}),
    hf_fields=HF_FIELDS,
    hf_derive=_mistral_windows,
    hf_read=frozenset({"sliding_window"}),
    hf_fixed=HF_FIXED,
    hf_ignored=HF_IGNORED,
    hf_tensors=HF_TENSORS,
    hf_ignored_tensors=_COMPUTED,
    gguf_architecture="mistral",
    gguf_fields=GGUF_FIELDS,
    gguf_fixed=GGUF_FIXED,
    gguf_tensors=GGUF_TENSORS,
    gguf_permuted=frozenset({"query", "key"}),
)
