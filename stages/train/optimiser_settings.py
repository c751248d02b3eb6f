"""Settings of the train stage that say how it learns: optimiser, schedules, precision.

A stretch of the run is up to 1 a share of all steps, above 1 a number of steps.
"""

from typing import Literal

from saex_pipe.common.config import StageConfig, setting


class OptimiserSettings(StageConfig):
    """Optimiser, schedules, precision."""

    learning_rate: float | None = setting(
        None,
        unit="",
        meaning="peak of the schedule; unset: that of the variant's source, or more where the run is short (the "
        "lesser of 0.1 and 2 / sqrt(steps), over the root of the width)",
        gt=0,
    )
    learning_rate_warmup: float | None = setting(
        None, unit="share of the run or steps", meaning="linear rise; unset: 0.05, at most 1,000 steps", ge=0
    )
    learning_rate_shape: Literal["constant", "cosine"] = setting(
        "constant", unit="", meaning="what the learning rate does after its rise"
    )
    learning_rate_cycles: int = setting(1, unit="", meaning="cosines one after another: all but one are restarts", ge=1)
    learning_rate_floor: float = setting(
        0.0, unit="share of the peak", meaning="what a cosine falls to before it restarts", ge=0, le=1
    )
    learning_rate_decay: float | None = setting(
        None,
        unit="share of the run or steps",
        meaning="linear fall to 0 at the end; unset: 0.2, or 0 with cosine",
        ge=0,
    )
    optimiser: Literal["adam", "adam_8bit", "adafactor", "muon", "signum"] = setting(
        "adam", unit="", meaning="adam_8bit keeps its moments in 2 bytes a parameter rather than 8"
    )
    momentum: float | None = setting(
        None,
        unit="per step",
        meaning="decay of the first moment; 0: none, which helps against dead latents; unset: 0.9 for adam, adam_8bit "
        "and signum, 0.95 for muon, 0 for adafactor",
        ge=0,
        lt=1,
    )
    beta_square: float = setting(0.999, unit="per step", meaning="decay of adam's second moment", gt=0, lt=1)
    epsilon: float = setting(6.25e-10, unit="", meaning="what adam adds to the root of the second moment", gt=0)
    clip_norm: float | None = setting(
        1.0, unit="", meaning="global norm that gradients are scaled down to; none: never", gt=0
    )
    micro_batches: int = setting(
        1, unit="parts", meaning="parts of a batch that go through the loss one after another, to save memory", ge=1
    )
    average_decay: float | None = setting(
        None,
        unit="per step",
        meaning="save the moving averages of the parameters, with this decay, rather than the last ones",
        ge=0,
        lt=1,
    )
    compute_dtype: Literal["float32", "bfloat16", "int8"] = setting(
        "bfloat16",
        unit="",
        meaning="type of matmul inputs (int8: with bfloat16 gradients); sums, weights and statistics are float32",
    )
    weight_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        unit="",
        meaning="type in which matrices are kept; bfloat16 halves them and rounds every update stochastically",
    )
    sparsity_warmup: float | None = setting(
        None,
        unit="share of the run or steps",
        meaning="linear rise of the sparsity penalty from 0 (default 0.05 of relu, the whole run of jumprelu's tanh, "
        "else none)",
        ge=0,
    )
