"""Settings of the train stage that say how it learns: optimiser, schedules, precision."""

from typing import Literal

from saex_pipe.common.config import StageConfig, setting


class OptimiserSettings(StageConfig):
    """Optimiser, schedules, precision."""

    learning_rate: float | None = setting(
        None, unit="", meaning="peak of the schedule; unset: scaled with latents", gt=0
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", unit="", meaning="type of matmul inputs; sums, weights and statistics are float32"
    )
    sparsity_warmup_steps: int = setting(
        0, unit="steps", meaning="steps over which the sparsity penalty rises from 0", ge=0
    )
