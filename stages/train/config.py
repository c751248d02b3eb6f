"""Settings of the train stage."""

from typing import Annotated, ClassVar

from saex_pipe.common.config import Upstream, setting
from saex_pipe.common.metrics_sinks import Sink
from saex_pipe.stages.train.device_settings import DeviceSettings
from saex_pipe.stages.train.optimiser_settings import OptimiserSettings
from saex_pipe.stages.train.resample_settings import ResampleSettings
from saex_pipe.stages.train.start_settings import StartSettings
from saex_pipe.stages.train.variant_settings import VariantSettings


class Config(VariantSettings, StartSettings, OptimiserSettings, ResampleSettings, DeviceSettings):
    """Activation store to a sparse autoencoder; with ``target_tap`` to a transcoder, with ``taps`` to a crosscoder."""

    stage: ClassVar[str] = "train"
    folder: ClassVar[str] = "sae"

    store: Annotated[str, Upstream("activations")] = setting(unit="URI", meaning="activation store to train on")
    other_stores: Annotated[tuple[str, ...], Upstream("activations")] = setting(
        (), unit="URIs", meaning="more activation stores of the same taps, mixed into every batch"
    )
    store_weights: tuple[float, ...] = setting(
        (), unit="", meaning="relative share of each store, the first one first; unset: by their rows"
    )
    follow: bool = setting(
        False, unit="", meaning="start while the store is still being written, and read its shards as they are finished"
    )
    tranche_shards: int | None = setting(
        None,
        unit="shards",
        meaning="with follow: shards mixed together; unset: as many as mix well, or as pool_bytes holds",
        ge=1,
    )
    tap: str | None = setting(None, unit="name", meaning="activation to encode; unset: the store's only one")
    target_tap: str | None = setting(None, unit="name", meaning="activation to predict: trains a transcoder")
    taps: tuple[str, ...] = setting(
        (), unit="names", meaning="activations of a crosscoder, instead of tap; * and {4,8} stand for several"
    )
    batch_rows: int = setting(2048, unit="rows", meaning="rows of one step", ge=1)
    rows: int = setting(unit="rows", meaning="training rows in all; more than the store has means several epochs", ge=1)
    seed: int = setting(0, unit="", meaning="seed of initialisation and of the order of rows", ge=0, lt=1 << 31)
    dead_after_rows: int = setting(
        10_000_000, unit="rows", meaning="a latent that has not fired for so long counts as dead", ge=1, le=1 << 30
    )
    pool_bytes: int | None = setting(
        None,
        unit="bytes",
        meaning="memory for mixing rows, reading ahead included; unset: 1 GiB, or up to 8 GiB where only that keeps a "
        "row from meeting more than one other row of its window in a batch",
        ge=1,
    )
    checkpoint_every_steps: int = setting(
        500, unit="steps", meaning="steps between two saves to resume from", ge=1, affects_result=False
    )
    sinks: tuple[Sink, ...] = setting(
        (), unit="", meaning="where else metrics go: tensorboard, wandb", affects_result=False
    )

    @property
    def takes_unfinished(self) -> bool:
        """A followed store may still be growing."""
        return self.follow

    def resamples_before(self, step: int) -> bool:
        """Whether ``resample_every_rows`` more rows were full with the step before ``step``."""
        every, done = self.resample_every_rows, step * self.batch_rows
        if every is None or done > (self.resample_until_rows or self.rows // 2):
            return False
        return step > 0 and done // every > (done - self.batch_rows) // every
