"""Settings of the train stage that say on which devices it runs and how rows choose their latents there.

Results on other devices are equal but for the rounding of sums, so that ``model_parallel`` is no part of what a result
is of: a run may be continued on more or fewer devices.
"""

from typing import Literal

from saex_pipe.common.config import StageConfig, setting


class DeviceSettings(StageConfig):
    """Devices, and selection."""

    model_parallel: int = setting(
        1,
        unit="devices",
        meaning="devices that share one copy of the SAE, each with its part of the latents; all devices together train "
        "on all / model_parallel parts of every batch",
        affects_result=False,
        ge=1,
    )
    worker: Literal["jax"] | None = setting(
        None,
        unit="",
        meaning="jax: this is one of several processes that train together (jax.distributed), each reading its part",
        affects_result=False,
    )
    codes: Literal["auto", "sparse", "dense"] = setting(
        "auto",
        unit="",
        meaning="how codes are multiplied: by the active latents alone (where few are), by all, or whichever is faster",
    )
    selection: Literal["exact", "approximate"] = setting(
        "exact", unit="", meaning="of the largest latents of a row; approximate takes one pass on a TPU"
    )
    recall: float = setting(
        0.95, unit="share", meaning="expected share of the largest latents that the approximation finds", gt=0, lt=1
    )
