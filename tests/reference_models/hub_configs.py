"""The same models as older files describe them: field for field what ``config.json`` of published models holds.

Fields are those of the named model on the Hugging Face hub, with the numbers of the tiny ones. Some older files also
name tensors otherwise, or carry buffers that every runtime computes for itself.
"""

from reference_models.hub_folder import LLAMA_LIKE, SHAPE, HubFolder
from reference_models.hub_gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_VISION
from reference_models.shapes import EPSILON, LLAMA3, LONG, SHORT

# openai-community/gpt2
GPT2 = HubFolder(
    "gpt2/tied",
    {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": EPSILON,
        "model_type": "gpt2",
        "n_ctx": 16,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 16,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 61,
    },
    renamed=(("transformer.", ""),),
    buffers=(("h.{}.attn.bias", (1, 1, 16, 16)),),
)
NEOX = {
    **SHAPE,
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "layer_norm_eps": EPSILON,
    "model_type": "gpt_neox",
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}
# EleutherAI/pythia-70m
PYTHIA = HubFolder(
    "gpt_neox/parallel",
    {**NEOX, "num_attention_heads": 2},
    buffers=(
        ("gpt_neox.layers.{}.attention.bias", (1, 1, 64, 64)),
        ("gpt_neox.layers.{}.attention.masked_bias", ()),
        ("gpt_neox.layers.{}.attention.rotary_emb.inv_freq", (2,)),
    ),
)
# The fields of togethercomputer/RedPajama-INCITE-Base-3B-v1, and attention_bias
SEQUENTIAL = HubFolder(
    "gpt_neox/sequential_unbiased",
    {
        **NEOX,
        "attention_bias": False,
        "hidden_act": "gelu_fast",
        "rotary_emb_base": 300,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
    },
)
LINEAR_NEOX = HubFolder(
    "gpt_neox/tied_linear",
    {**NEOX, "rotary_pct": 0.5, "tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
)
# HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2 = HubFolder(
    "llama/smollm2",
    {
        **LLAMA_LIKE,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_size": 96,
        "intermediate_size": 32,
        "is_llama_config": True,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
)
# meta-llama/Llama-3.1-8B
LLAMA31 = HubFolder(
    "llama/llama3_biased",
    {
        **LLAMA_LIKE,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "head_dim": 16,
        "mlp_bias": True,
        "model_type": "llama",
        "num_key_value_heads": 1,
        "pretraining_tp": 1,
        "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"},
        "rope_theta": 500.0,
    },
)
# huggyllama/llama-7b, with the scaling of lmsys/vicuna-7b-v1.5-16k
LLAMA1 = HubFolder(
    "llama/linear_full_heads",
    {
        **LLAMA_LIKE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    buffers=(("model.layers.{}.self_attn.rotary_emb.inv_freq", (4,)),),
)
# mistralai/Mistral-7B-v0.1
MISTRAL = HubFolder(
    "mistral/window",
    {
        **LLAMA_LIKE,
        "architectures": ["MistralForCausalLM"],
        "head_dim": 16,
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 4,
    },
)
# Qwen/Qwen2.5-0.5B, whose window is stated and not used
QWEN25 = HubFolder(
    "qwen2/tied",
    {
        **LLAMA_LIKE,
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "sliding_window": 4,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
)
# Qwen/Qwen2.5-7B-Instruct with the scaling that its page recommends
QWEN25_LONG = HubFolder(
    "qwen2/windows_above_yarn",
    {
        **LLAMA_LIKE,
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 240,
        "max_window_layers": 1,
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 60, "type": "yarn"},
        "rope_theta": 500.0,
        "sliding_window": 4,
        "use_sliding_window": True,
    },
)
# Qwen/Qwen3-0.6B
QWEN3 = HubFolder(
    "qwen3/tied",
    {
        **LLAMA_LIKE,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
)
PHI_LIKE = {
    **LLAMA_LIKE,
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "model_type": "phi3",
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
}
# microsoft/Phi-3-mini-4k-instruct
PHI3 = HubFolder(
    "phi3/window",
    {
        **PHI_LIKE,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 4096,
        "rope_scaling": None,
        "sliding_window": 4,
    },
)
# microsoft/Phi-4-mini-instruct
PHI4 = HubFolder(
    "phi3/longrope_short",
    {
        **PHI_LIKE,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
        "sliding_window": None,
    },
)
# microsoft/Phi-3-mini-128k-instruct
PHI3_LONG = HubFolder(
    "phi3/longrope_long",
    {
        **PHI_LIKE,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 8,
        "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
)
FOLDERS = (
    *(GPT2, PYTHIA, SEQUENTIAL, LINEAR_NEOX, SMOLLM2, LLAMA31, LLAMA1, MISTRAL, QWEN25, QWEN25_LONG, QWEN3),
    *(PHI3, PHI4, PHI3_LONG, GEMMA, GEMMA2, GEMMA3, GEMMA3_VISION),
)
HUB = {folder.key: folder for folder in FOLDERS}
