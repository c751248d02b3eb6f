"""Settings of the train stage that say what it starts from: units, initial parameters."""

from typing import Literal

from saex_pipe.common.config import StageConfig, setting


class StartSettings(StageConfig):
    """Normalisation of the rows, and initial parameters."""

    normalise: Literal["mean_square", "none"] = setting(
        "mean_square", unit="", meaning="scale rows to unit mean square per dimension; folded into the saved weights"
    )
