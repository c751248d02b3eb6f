"""Settings of the harvest stage."""

import platform
import uuid
from typing import Annotated, ClassVar, Literal, Self

import pydantic

from saex_pipe.common.config import Resource, StageConfig, Upstream, setting
from saex_pipe.common.worker import Share, read_share

PROCESS = f"{platform.node()}-{uuid.uuid4().hex[:12]}"  # no other has this name, and it says where to look


class Config(StageConfig):
    """Token windows through a language model to an activation store."""

    stage: ClassVar[str] = "harvest"
    folder: ClassVar[str] = "activations"
    schema_version: ClassVar[int] = 2  # of the activation store

    model: Annotated[str, Resource()] = setting(
        unit="URI", meaning="language model: a GGUF file or Hugging Face folder"
    )
    tokens: Annotated[str, Upstream("corpus")] = setting(unit="URI", meaning="token store to run")
    taps: tuple[str, ...] = setting(
        unit="names",
        meaning="activations to store, such as blocks.15.resid_pre; * and {4,8} stand for several",
        min_length=1,
    )
    store_dtype: Literal["float32", "bfloat16", "float16", "int8"] = setting(
        "bfloat16", unit="", meaning="type of the stored activations; float16 cannot hold values above 65,504"
    )
    tap_dtypes: tuple[str, ...] = setting(
        (), unit="names", meaning="taps of another type, such as blocks.*.mlp_out=int8; later ones count"
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", unit="", meaning="type of weights and matmul inputs; sums are always float32"
    )
    batch_windows: int = setting(32, unit="windows", meaning="windows in one forward pass, over all devices", ge=1)
    model_parallel: int = setting(
        1,
        unit="devices",
        meaning="devices that share one copy of the weights; the copies share out the windows",
        affects_result=False,
        ge=1,
    )
    writers: int = setting(
        1, unit="shards", meaning="shards written at once; one more is being filled", affects_result=False, ge=1
    )
    drop_special_tokens: bool = setting(True, unit="", meaning="keep BOS, separators and other special tokens out")
    drop_positions: tuple[int, ...] = setting(
        (0,), unit="positions", meaning="positions of every window that are never rows; the first is an attention sink"
    )
    drop_norm_multiple: float | None = setting(
        10.0, unit="times the median norm", meaning="rows of a larger norm are dropped as sinks; 0: keep all", ge=0
    )
    shard_windows: int | None = setting(None, unit="windows", meaning="windows in a shard; unset: 64 to 256 MB", ge=1)
    chunk_windows: int | None = setting(None, unit="windows", meaning="windows in a chunk; unset: about 4 MiB", ge=1)
    worker: str | None = setting(
        None,
        unit="",
        meaning="share of the shards to make: i/n counted from 0, auto (Kubernetes, SLURM), or jax (jax.distributed)",
        affects_result=False,
    )
    elastic: bool = setting(
        False, unit="", meaning="claim shards one by one, beside any number of other workers", affects_result=False
    )
    lease_seconds: float = setting(
        120.0, unit="s", meaning="after which a claim that shows no life is taken over", affects_result=False, gt=0
    )
    max_store_bytes: int | None = setting(
        None, unit="bytes", meaning="wait for followers to free shards beyond so many", affects_result=False, ge=1
    )

    @pydantic.model_validator(mode="after")
    def _one_way_to_share(self) -> Self:
        if self.worker is not None and self.elastic:
            raise ValueError("worker and elastic contradict each other; give one of the two")
        return self

    @property
    def worker_name(self) -> str | None:
        """Name of this process among several that write one store."""
        if self.elastic:
            return PROCESS
        return None if self.worker is None else self.share.name

    @property
    def share(self) -> Share:
        """The part of the shards that this process makes, where it is fixed."""
        return Share(0, 1) if self.worker is None else read_share(self.worker)

    def alone(self) -> Self:
        """The same store made by one process that shares it with no other and waits for no reader."""
        return self.model_copy(update={"worker": None, "elastic": False, "max_store_bytes": None})
