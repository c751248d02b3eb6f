"""Gemma 1, 2 and 3 as older files describe them; see ``hub_configs``."""

from reference_models.gemma_configurations import VISION
from reference_models.hub_folder import SHAPE, HubFolder
from reference_models.shapes import EPSILON

GEMMA_LIKE = {
    **SHAPE,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "rms_norm_eps": EPSILON,
    "rope_theta": 10000.0,
}
# google/gemma-2b, whose "gelu" was never the exact one
GEMMA = HubFolder(
    "gemma/multi_query",
    {
        **GEMMA_LIKE,
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu",
        "hidden_activation": None,
        "model_type": "gemma",
        "num_key_value_heads": 1,
        "rope_scaling": None,
    },
)
# google/gemma-2-2b
GEMMA2 = HubFolder(
    "gemma2/capped",
    {
        **GEMMA_LIKE,
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 4.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 3.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 10,
        "sliding_window": 4,
    },
)
# google/gemma-3-1b-pt, with the scaling of the larger ones
GEMMA3 = HubFolder(
    "gemma3_text/local_and_global",
    {
        **GEMMA_LIKE,
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 5,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
)
# google/gemma-3-4b-it, with tensors named as version 5 of transformers names them
GEMMA3_VISION = HubFolder(
    "gemma3/with_vision",
    {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 58,
        "eoi_token_index": 59,
        "eos_token_id": [1, 106],
        "image_token_index": 60,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 1,
        "model_type": "gemma3",
        "text_config": {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 5,
            "rms_norm_eps": EPSILON,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "vocab_size": 61,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    },
    renamed=(
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
)
