"""Which tiny models there are: arguments for the configuration classes of ``transformers``, by family and name.

Each is as small as shows what it is for. Rows of 32 and 64 numbers let GGUF store them as Q8_0; the ``wide`` ones are
for the types with blocks of 256. Windows and contexts are shorter than the sequences of ``folders.tokens_NL``.
"""

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """A model's configuration, and what a GGUF file makes of it."""

    fields: Fields
    # What GGUF does not say and llama.cpp takes instead; None: its converter cannot write this model.
    gguf: Fields | None = field(default_factory=dict)


# So large that leaving it out would show, and the same number in float32, as GGUF stores it.
EPSILON = 2.0**-6
SIZES = {
    "vocab_size": 61,  # odd, so that padding shows
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WIDE_SIZES = {**SIZES, "vocab_size": 67, "hidden_size": 256, "intermediate_size": 256}
SHAPE, WIDE = {**SIZES, "rms_norm_eps": EPSILON}, {**WIDE_SIZES, "rms_norm_eps": EPSILON}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# The ramp of yarn lies across the pairs of a head of this theta.
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 60}
STRETCHED = {**SHAPE, "max_position_embeddings": 240}
# Four pairs of dimensions. Divisors that differ between short and long, and from pair to pair.
SHORT, LONG = [1.0, 1.125, 1.25, 1.625], [1.5, 2.5, 4.0, 8.0]


def longrope(original: int, **others: Any) -> Fields:
    parameters = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, **others}
    return {"original_max_position_embeddings": original, "rope_parameters": {"rope_theta": 10000.0, **parameters}}


def gpt2(**fields: Any) -> Fields:
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    }
    fields = {**SIZES, **fields, "max_position_embeddings": 16}
    return {"layer_norm_epsilon": EPSILON, **{names.get(name, name): value for name, value in fields.items()}}


GPT2 = {
    "tied": Configuration(gpt2(intermediate_size=None)),
    "untied_inner": Configuration(
        gpt2(tie_word_embeddings=False, activation_function="gelu", num_attention_heads=2),
        gguf={"activation_function": "gelu_new"},
    ),
    "wide": Configuration(gpt2(**WIDE_SIZES)),
}

NEOX = {**SIZES, "layer_norm_eps": EPSILON, "rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.25}}
GPT_NEOX = {
    # A quarter of 16 dimensions turns.
    "parallel": Configuration({**NEOX, "num_attention_heads": 2}),
    "sequential_unbiased": Configuration(
        {
            **NEOX,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
        },
        gguf={
            "hidden_act": "gelu",
            "rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 1.0},
        },
    ),
    "tied_linear": Configuration(
        {
            **NEOX,
            "tie_word_embeddings": True,
            "rope_parameters": {**DEFAULT_ROPE, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        },
        gguf={"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
    ),
    "wide": Configuration({**NEOX, **WIDE_SIZES}),
}

LLAMA = {
    "smollm2": Configuration(  # three query heads for each key/value head, as SmolLM2 has
        {
            **SHAPE,
            "hidden_size": 96,
            "intermediate_size": 32,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 100000.0},
        }
    ),
    "llama3_biased": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3,
        }
    ),
    "linear_full_heads": Configuration(
        {**SHAPE, "rope_parameters": {**DEFAULT_ROPE, "rope_type": "linear", "factor": 4.0}}
    ),
    "yarn": Configuration({**STRETCHED, "num_key_value_heads": 2, "rope_parameters": YARN}),
    "wide": Configuration({**WIDE, "num_key_value_heads": 2, "rope_parameters": LLAMA3}),
}

MISTRAL = {
    "window": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 4,
            "rope_parameters": DEFAULT_ROPE,
        },
        gguf={"sliding_window": None},
    ),
    "unlimited_multi_query": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 1,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1000000.0},
        }
    ),
    "wide": Configuration({**WIDE, "num_key_value_heads": 2, "sliding_window": 4}, gguf={"sliding_window": None}),
}

QWEN2 = {
    "tied": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1000000.0},
        }
    ),
    "windows_above_yarn": Configuration(
        {
            **STRETCHED,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "rope_parameters": YARN,
        },
        gguf={"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "wide": Configuration({**WIDE, "num_key_value_heads": 1, "rope_parameters": DEFAULT_ROPE}),
}

QWEN3 = {
    "tied": Configuration(
        {
            **SHAPE,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 1000000.0},
        }
    ),
    "biased_windows_yarn": Configuration(
        {
            **STRETCHED,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 2.5, "beta_slow": 0.5},
        },
        # The converter would write the attention factor, which llama.cpp multiplies with the one it derives.
        gguf=None,
    ),
    "wide": Configuration({**WIDE, "num_key_value_heads": 2, "head_dim": 128, "rope_parameters": DEFAULT_ROPE}),
}

PHI3 = {
    "window": Configuration({**SHAPE, "pad_token_id": 0, "sliding_window": 4, "rope_parameters": DEFAULT_ROPE}),
    "longrope_short": Configuration(
        {
            **SHAPE,
            "pad_token_id": 0,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            **longrope(16, partial_rotary_factor=0.5),
        }
    ),
    "longrope_long": Configuration(
        {**SHAPE, "pad_token_id": 0, "num_key_value_heads": 2, "tie_word_embeddings": True, **longrope(8)}
    ),
    "wide": Configuration(
        {**WIDE, "num_attention_heads": 16, "pad_token_id": 0, **longrope(8, partial_rotary_factor=0.5)}
    ),
}

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

FAMILIES = {
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3_WITH_VISION,
}
# Every configuration as "family/name".
ALL = {f"{family}/{name}": found for family, named in FAMILIES.items() for name, found in named.items()}
NARROW = [key for key in ALL if not key.endswith("/wide")]
