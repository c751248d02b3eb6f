"""Settings of the copy stage."""

from typing import Annotated, ClassVar, Literal

from saex_pipe.common.config import StageConfig, Upstream, setting


class Config(StageConfig):
    """An activation store to another one, in another type, with fewer taps or windows, or cut otherwise."""

    stage: ClassVar[str] = "copy"
    folder: ClassVar[str] = "activations"
    schema_version: ClassVar[int] = 2  # of the activation store

    store: Annotated[str, Upstream("activations")] = setting(unit="URI", meaning="activation store to copy")
    taps: tuple[str, ...] = setting((), unit="names", meaning="taps to copy; unset: all")
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = setting(
        None, unit="", meaning="type of the stored activations; unset: as they are"
    )
    windows: int | None = setting(None, unit="windows", meaning="so many from the first on; unset: all", ge=1)
    shard_windows: int | None = setting(None, unit="windows", meaning="windows in a shard; unset: as they are", ge=1)
    chunk_windows: int | None = setting(None, unit="windows", meaning="windows in a chunk; unset: as they are", ge=1)
