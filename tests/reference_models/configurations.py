"""Which tiny models there are: arguments for the configuration classes of ``transformers``, by family and name.

Each is as small as shows what it is for. Rows of 32 and 64 numbers let GGUF store them as Q8_0; the ``wide`` ones are
for the types with blocks of 256. Windows and contexts are shorter than the sequences of ``folders.tokens_NL``.
"""

from typing import Any

from reference_models.gemma_configurations import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_VISION
from reference_models.shapes import (
    DEFAULT_ROPE,
    EPSILON,
    LLAMA3,
    SHAPE,
    SIZES,
    STRETCHED,
    WIDE,
    WIDE_SIZES,
    YARN,
    Configuration,
    Fields,
    longrope,
)


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
