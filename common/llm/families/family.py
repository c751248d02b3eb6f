"""What a family of decoders is: a table from the names of Hugging Face and GGUF to ours.

A field that changes the numbers is either read, or fixed to the values that the decoder implements, or refused.
A field that does not is listed as ignored, with the reason. A tensor that is not in the table is refused too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]


def _nothing(fields: Fields) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of one family. Tensor templates hold ``{}`` where the layer's number goes.

    The bias of a tensor has its name with ``bias`` for ``weight``. Matrices are [out, in] unless said otherwise.
    """

    name: str
    traits: Fields  # values of an Architecture that every model of the family has
    defaults: Fields = field(default_factory=dict)  # what the reference assumes where the file is silent
    rope_theta: float | None = 10000.0  # where the file is silent; None: learned positions
    local_rope_theta: float | None = None  # of sliding layers, where they turn otherwise than the others

    hf_model_types: frozenset[str]
    hf_defaults: Fields = field(default_factory=dict)  # more of them, for config.json alone
    hf_fields: Mapping[str, str]  # ours -> theirs
    hf_renamed: Mapping[str, str] = field(default_factory=dict)  # an older name -> the present one
    hf_derive: Callable[[Fields], Fields] = _nothing  # values that take more than a name, of the fields in hf_read
    hf_read: frozenset[str] = frozenset()
    hf_fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # theirs -> what the decoder implements
    hf_ignored: Mapping[str, str] = field(default_factory=dict)  # theirs -> why it does not matter
    hf_tensors: Mapping[str, str]  # ours -> theirs, without the prefix
    hf_prefixes: tuple[str, ...] = ("model.", "")  # of every tensor but the unembedding; the first that fits
    hf_ignored_tensors: Mapping[str, str] = field(default_factory=dict)  # shell pattern -> why it does not matter
    hf_in_out: bool = False  # matrices are [in, out]
    hf_less_one: bool = False  # norms are stored less 1
    hf_head_by_head: bool = False  # fused query, key and value: those of the first head, of the second, ...

    gguf_architecture: str
    gguf_fields: Mapping[str, str]  # ours -> theirs, without "llama." before it
    gguf_derive: Callable[[Fields], Fields] = _nothing
    gguf_read: frozenset[str] = frozenset()
    gguf_fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    gguf_ignored: Mapping[str, str] = field(default_factory=dict)
    gguf_tensors: Mapping[str, str]
    gguf_permuted: frozenset[str] = frozenset()  # roles whose rows are reordered for interleaved rotary positions


HF_FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "query_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
    "tied_embeddings": "tie_word_embeddings",
}

HF_TENSORS = {
    "embed": "embed_tokens.weight",
    "unembed": "lm_head.weight",
    "final_norm": "norm.weight",
    "attn_norm": "layers.{}.input_layernorm.weight",
    "query": "layers.{}.self_attn.q_proj.weight",
    "key": "layers.{}.self_attn.k_proj.weight",
    "value": "layers.{}.self_attn.v_proj.weight",
    "attn_out": "layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "gate": "layers.{}.mlp.gate_proj.weight",
    "up": "layers.{}.mlp.up_proj.weight",
    "down": "layers.{}.mlp.down_proj.weight",
}

HF_FIXED = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
}

HF_IGNORED = {
    "architectures": "names the head class; the tensors say whether the language-model head is there",
    "_name_or_path": "where the file came from",
    "transformers_version": "which version wrote the file",
    "transformers.js_config": "for another runtime",
    "auto_map": "names of Python code for another runtime",
    "unsloth_version": "which version of another tool wrote the file",
    "unsloth_fixed": "which version of another tool wrote the file",
    "torch_dtype": "the dtype in the file; compute_dtype decides ours",
    "dtype": "the dtype in the file; compute_dtype decides ours",
    "initializer_range": "initialisation of training only",
    "attention_dropout": "training only",
    "hidden_dropout": "training only",
    "classifier_dropout": "training only",
    "resid_pdrop": "training only",
    "embd_pdrop": "training only",
    "attn_pdrop": "training only",
    "gradient_checkpointing": "training only",
    "is_decoder": "every model here is one",
    "use_cache": "generation only",
    "cache_implementation": "generation only",
    "task_specific_params": "generation only",
    "bos_token_id": "the tokenizer says it",
    "eos_token_id": "the tokenizer says it",
    "pad_token_id": "the tokenizer says it",
    "pretraining_tp": "slices matmuls to reproduce a training set-up; the result is the same up to rounding",
    "is_llama_config": "marks a conversion; says nothing about the numbers",
    "output_attentions": "what another runtime returns",
    "output_hidden_states": "what another runtime returns",
    "return_dict": "what another runtime returns",
    "chunk_size_feed_forward": "how another runtime cuts the work; the result is the same",
    "id2label": "for classifiers",
    "label2id": "for classifiers",
    "problem_type": "for classifiers",
}

GGUF_FIELDS = {
    "layers": "block_count",
    "width": "embedding_length",
    "query_heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "mlp_width": "feed_forward_length",
    "vocabulary": "vocab_size",
    "max_positions": "context_length",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
}

GGUF_TENSORS = {
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
}

GGUF_FIXED = {"expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,)}

# A block of the Llama kind; other families state what differs.
LLAMA_TRAITS = {
    "layer_norms": False,
    "gated": True,
    "parallel": False,
    "post_norms": False,
    "scales_embedding": False,
}


def without(table: Mapping[str, str], *roles: str) -> dict[str, str]:
    """The table less the tensors or fields that a family does not have."""
    return {role: name for role, name in table.items() if role not in roles}
