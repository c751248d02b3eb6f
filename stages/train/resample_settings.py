"""Settings of the train stage that say when dead latents start again from badly explained inputs."""

from saex_pipe.common.config import StageConfig, setting


class ResampleSettings(StageConfig):
    """Resampling of dead latents; off unless ``resample_every_rows`` is set."""

    resample_every_rows: int | None = setting(
        None, unit="rows", meaning="dead latents start again from badly explained inputs so often; unset: never", ge=1
    )
    resample_until_rows: int | None = setting(
        None, unit="rows", meaning="and not after so many; unset: half of all rows", ge=1
    )
    resample_from_rows: int = setting(
        819_200, unit="rows", meaning="inputs that those are drawn from; with follow no more than a tranche holds", ge=1
    )
