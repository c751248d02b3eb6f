"""Settings of the toy stage."""

from typing import ClassVar, Literal, Self

import pydantic

from saex_pipe.common.config import StageConfig, setting


class Config(StageConfig):
    """Synthetic activations that are sparse combinations of a known dictionary (Sharkey et al. 2022)."""

    stage: ClassVar[str] = "toy"
    folder: ClassVar[str] = "activations"
    schema_version: ClassVar[int] = 2  # of the activation store

    latents: int = setting(128, unit="features", meaning="number of true features", ge=2, le=1 << 20)
    width: int = setting(
        64, unit="dimensions", meaning="width of an activation; below latents for superposition", ge=2, le=1 << 16
    )
    active: float = setting(4.0, unit="features a row", meaning="mean number of features that fire in a row", gt=0)
    frequency_decay: float = setting(
        0.99,
        unit="ratio",
        meaning="how often a feature fires, relative to the feature before it; 1 for all alike",
        gt=0,
        le=1,
    )
    correlation: float = setting(
        0.5,
        unit="fraction of variance",
        meaning="share that all features draw from common causes, which makes some fire together and some apart",
        ge=0,
        le=1,
    )
    noise: float = setting(
        0.0, unit="activation", meaning="standard deviation of Gaussian noise on each coordinate", ge=0
    )
    rows: int = setting(204_800, unit="rows", meaning="number of activations", ge=1)
    window_length: int = setting(
        128, unit="rows", meaning="rows laid out as one window, so that the store looks like one of tokens", ge=1
    )
    holdout_fraction: float = setting(0.1, unit="fraction of windows", meaning="windows kept from training", ge=0, lt=1)
    store_dtype: Literal["float32", "bfloat16"] = setting("float32", unit="", meaning="dtype of the stored activations")
    seed: int = setting(0, unit="", meaning="seed of dictionary and rows", ge=0, lt=1 << 63)

    @pydantic.model_validator(mode="after")
    def _features_can_fire_that_often(self) -> Self:
        # The sum of decay^i: how many fire in a row when the first one fires always.
        most = sum(self.frequency_decay**i for i in range(self.latents))
        if self.active > most:
            raise ValueError(
                f"active = {self.active:g} is above {most:.4g}, the most that {self.latents} latents with "
                f"frequency_decay = {self.frequency_decay:g} can reach"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _rows_fill_windows(self) -> Self:
        if self.rows % self.window_length:
            raise ValueError(f"rows = {self.rows} is not a multiple of window_length = {self.window_length}")
        return self
