"""What the tiny models have in common: sizes, and the kinds of rotary positions."""

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
