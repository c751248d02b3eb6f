"""The families of decoders: a thin table each, from Hugging Face and GGUF names to ours.

A field that changes the numbers is either read, or fixed to the values that the decoder implements, or refused.
A field that does not is listed as ignored, with the reason. A tensor that is not in the table is refused too:
that is how biases and rope tables are noticed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Names of one family. Tensor templates hold ``{}`` where the layer's number goes."""

    name: str
    hf_model_types: frozenset[str]
    hf_fields: Mapping[str, str]  # ours -> theirs
    hf_fixed: Mapping[str, tuple[Any, ...]]  # theirs -> the values that the decoder implements
    hf_ignored: Mapping[str, str]  # theirs -> why it does not matter
    hf_tensors: Mapping[str, str]  # ours -> theirs
    hf_ignored_tensors: Mapping[str, str]  # template -> why it does not matter
    gguf_architectures: frozenset[str]
    gguf_fields: Mapping[str, str]  # ours -> theirs, without the "llama." before it
    gguf_fixed: Mapping[str, tuple[Any, ...]]
    gguf_repeated: Mapping[str, str]  # theirs -> the field of ours that it must equal
    gguf_tensors: Mapping[str, str]
    gguf_permuted: frozenset[str]  # tensors whose rows llama.cpp reorders for interleaved rotary positions
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the reference assumes where the file is silent


IGNORED_ANYWHERE = {
    "architectures": "names the head class; the tensors say whether the language-model head is there",
    "_name_or_path": "where the file came from",
    "transformers_version": "which version wrote the file",
    "transformers.js_config": "for another runtime",
    "torch_dtype": "the dtype in the file; compute_dtype decides ours",
    "dtype": "the dtype in the file; compute_dtype decides ours",
    "initializer_range": "initialisation of training only",
    "attention_dropout": "training only",
    "use_cache": "generation only",
    "bos_token_id": "the tokenizer says it",
    "eos_token_id": "the tokenizer says it",
    "pad_token_id": "the tokenizer says it",
    "pretraining_tp": "slices matmuls to reproduce a training set-up; the result is the same up to rounding",
    "is_llama_config": "marks a conversion; says nothing about the numbers",
}

LLAMA = Family(
    name="llama",
    hf_model_types=frozenset({"llama", "mistral"}),
    hf_fields={
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "query_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp_width": "intermediate_size",
        "vocabulary": "vocab_size",
        "max_positions": "max_position_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "rope_theta": "rope_theta",
        "tied_embeddings": "tie_word_embeddings",
    },
    hf_fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "rope_scaling": (None,),
        "rope_interleaved": (False,),
        "sliding_window": (None,),
        "partial_rotary_factor": (1.0,),
        "quantization_config": (None,),
    },
    hf_ignored=IGNORED_ANYWHERE,
    hf_tensors={
        "embed": "model.embed_tokens.weight",
        "unembed": "lm_head.weight",
        "final_norm": "model.norm.weight",
        "attn_norm": "model.layers.{}.input_layernorm.weight",
        "query": "model.layers.{}.self_attn.q_proj.weight",
        "key": "model.layers.{}.self_attn.k_proj.weight",
        "value": "model.layers.{}.self_attn.v_proj.weight",
        "attn_out": "model.layers.{}.self_attn.o_proj.weight",
        "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
        "gate": "model.layers.{}.mlp.gate_proj.weight",
        "up": "model.layers.{}.mlp.up_proj.weight",
        "down": "model.layers.{}.mlp.down_proj.weight",
    },
    hf_ignored_tensors={"model.layers.{}.self_attn.rotary_emb.inv_freq": "computed from rope_theta"},
    gguf_architectures=frozenset({"llama"}),
    gguf_fields={
        "layers": "block_count",
        "width": "embedding_length",
        "query_heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "mlp_width": "feed_forward_length",
        "vocabulary": "vocab_size",
        "max_positions": "context_length",
        "norm_epsilon": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    },
    gguf_fixed={"rope.scaling.type": ("none",), "expert_count": (0,), "expert_used_count": (0,)},
    # Unequal ones would mean heads that are rotated in part.
    gguf_repeated=dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), "head_dim"),
    gguf_tensors={
        "embed": "token_embd.weight",
        "unembed": "output.weight",
        "final_norm": "output_norm.weight",
        "attn_norm": "blk.{}.attn_norm.weight",
        "query": "blk.{}.attn_q.weight",
        "key": "blk.{}.attn_k.weight",
        "value": "blk.{}.attn_v.weight",
        "attn_out": "blk.{}.attn_output.weight",
        "mlp_norm": "blk.{}.ffn_norm.weight",
        "gate": "blk.{}.ffn_gate.weight",
        "up": "blk.{}.ffn_up.weight",
        "down": "blk.{}.ffn_down.weight",
    },
    gguf_permuted=frozenset({"query", "key"}),
    # LlamaConfig of transformers: what it takes for a field that config.json leaves out.
    defaults={"rope_theta": 10000.0, "norm_epsilon": 1e-6, "tied_embeddings": False},
)

FAMILIES = {family.name: family for family in (LLAMA,)}
