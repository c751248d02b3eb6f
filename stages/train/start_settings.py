"""Settings of the train stage that say what it starts from: units, initial parameters."""

from typing import Literal

from saex_pipe.common.config import StageConfig, setting


class StartSettings(StageConfig):
    """Normalisation of the rows, and initial parameters."""

    normalise: Literal[
        "none", "mean_square", "expected_norm", "clipped", "ema", "layer_norm", "whitening_pca", "whitening_zca"
    ] = setting(
        "mean_square",
        unit="",
        meaning="units of training: rows scaled to unit mean square per dimension (ema: of the recent batches), or to "
        "a mean norm of the square root of the width (clipped: and no longer than clip_multiple of it), each by its "
        "own mean and spread, or whitened; folded into the saved weights",
    )
    clip_multiple: float = setting(
        3.0, unit="expected norms", meaning="length that clipped scales longer rows down to", gt=0
    )
    ema_decay: float = setting(0.999, unit="per step", meaning="of the mean square that ema follows", gt=0, lt=1)
    sample_rows: int = setting(
        32_768, unit="rows", meaning="first rows of training, from which whitening is computed where it is wanted", ge=2
    )
