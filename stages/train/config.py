"""Settings of the train stage."""

from typing import Annotated, ClassVar, Literal

from saex_pipe.common.config import StageConfig, Upstream, setting


class Config(StageConfig):
    """Activation store to a sparse autoencoder, or to a transcoder where ``target_tap`` is set."""

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
        None, unit="shards", meaning="with follow: shards that are mixed together; unset: what pool_bytes holds", ge=1
    )
    tap: str | None = setting(None, unit="name", meaning="activation to encode; unset: the store's only one")
    target_tap: str | None = setting(None, unit="name", meaning="activation to predict: trains a transcoder")
    variant: str = setting("topk", unit="", meaning="kind of autoencoder: topk or relu")
    latents: int | None = setting(None, unit="latents", meaning="width of the dictionary", ge=1)
    expansion: float | None = setting(None, unit="latents per input dimension", meaning="or its relative width", gt=0)
    k: int | None = setting(None, unit="active latents per row", meaning="sparsity of topk (default 32)", ge=1)
    sparsity_coefficient: float | None = setting(None, unit="", meaning="weight of the sparsity penalty of relu", ge=0)
    batch_rows: int = setting(2048, unit="rows", meaning="rows of one step", ge=1)
    rows: int = setting(unit="rows", meaning="training rows in all; more than the store has means several epochs", ge=1)
    learning_rate: float | None = setting(
        None, unit="", meaning="peak of the schedule; unset: scaled with latents", gt=0
    )
    seed: int = setting(0, unit="", meaning="seed of initialisation and of the order of rows", ge=0, lt=1 << 31)
    normalise: Literal["mean_square", "none"] = setting(
        "mean_square", unit="", meaning="scale rows to unit mean square per dimension; folded into the saved weights"
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", unit="", meaning="type of matmul inputs; sums, weights and statistics are float32"
    )
    auxiliary_stride: int = setting(
        1, unit="rows", meaning="the dead-latent loss of topk reads every so-many-th row; its cost falls likewise", ge=1
    )
    dead_after_rows: int = setting(
        10_000_000, unit="rows", meaning="a latent that has not fired for so long counts as dead", ge=1, le=1 << 30
    )
    sparsity_warmup_steps: int = setting(
        0, unit="steps", meaning="steps over which the sparsity penalty rises from 0", ge=0
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

    @property
    def takes_unfinished(self) -> bool:
        """A followed store may still be growing."""
        return self.follow
