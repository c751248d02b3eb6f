"""The tiny models of Gemma 1, 2 and 3; see ``configurations``."""

from reference_models.shapes import DEFAULT_ROPE, SHAPE, WIDE, Configuration

GEMMA = {
    "multi_query": Configuration({**SHAPE, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": DEFAULT_ROPE}),
    "untied_full_heads": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "tie_word_embeddings": False,
            "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 300.0},
        },
        gguf={"tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE},
    ),
    "wide": Configuration({**WIDE, "num_key_value_heads": 1, "head_dim": 64, "rope_parameters": DEFAULT_ROPE}),
}

CAPPED = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": 4,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 3.0,
    "rope_parameters": DEFAULT_ROPE,
}
GEMMA2 = {
    "capped": Configuration({**SHAPE, **CAPPED, "num_hidden_layers": 3}, gguf={"query_pre_attn_scalar": 16}),
    "uncapped_untied": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "rope_parameters": DEFAULT_ROPE,
        },
        gguf=None,
    ),
    "wide": Configuration({**WIDE, **CAPPED, "head_dim": 64, "query_pre_attn_scalar": 64}),
}

LOCAL_AND_GLOBAL = {
    "sliding_attention": DEFAULT_ROPE,
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
NEAR, FAR = "sliding_attention", "full_attention"
GEMMA3 = {
    # llama.cpp knows one pattern, five near layers and a far one, and one way to scale queries.
    "local_and_global": Configuration(
        {
            **SHAPE,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 5,
            "sliding_window": 4,
            "layer_types": [NEAR, FAR, NEAR],
            "rope_parameters": LOCAL_AND_GLOBAL,
        },
        gguf={"layer_types": [NEAR] * 3, "query_pre_attn_scalar": 16},
    ),
    "untied_multi_query": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": [FAR, NEAR],
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                NEAR: {**DEFAULT_ROPE, "rope_theta": 100.0},
                FAR: {**DEFAULT_ROPE, "rope_theta": 3000.0},
            },
        },
        gguf={"layer_types": [NEAR] * 2},
    ),
    "wide": Configuration(
        {
            **WIDE,
            "num_hidden_layers": 7,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 4,
            "layer_types": [NEAR] * 5 + [FAR, NEAR],
            "rope_parameters": LOCAL_AND_GLOBAL,
        }
    ),
}

VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 4,
    "patch_size": 2,
    "vision_use_head": False,
}
GEMMA3_WITH_VISION = {
    "with_vision": Configuration(
        {
            "text_config": {**GEMMA3["local_and_global"].fields, "model_type": "gemma3_text"},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 1,
            "boi_token_index": 58,
            "eoi_token_index": 59,
            "image_token_index": 60,
        },
        gguf=None,  # the text part alone becomes the GGUF file of local_and_global
    )
}
