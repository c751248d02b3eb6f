"""Settings of the cache stage."""

from typing import Annotated, ClassVar

from saex_pipe.common.config import StageConfig, Upstream, setting


class Config(StageConfig):
    """Activation store and SAE to what is known about each feature."""

    stage: ClassVar[str] = "cache"
    folder: ClassVar[str] = "cache"

    store: Annotated[str, Upstream("activations")] = setting(unit="URI", meaning="activation store to read")
    sae: Annotated[str, Upstream("sae")] = setting(unit="URI", meaning="SAE whose features to cache")
    max_tokens: int | None = setting(None, unit="tokens", meaning="tokens of the store to use; unset: all", ge=1)
    examples_per_feature: int = setting(
        10, unit="windows", meaning="strongest examples kept of a feature, and as many again over its whole range", ge=1
    )
    context: int = setting(12, unit="tokens", meaning="neighbours on either side shown with an example", ge=0)
    output_tokens: int = setting(
        10, unit="tokens", meaning="output tokens listed that a feature raises or lowers most; 0: none", ge=0
    )
    nearest: int = setting(5, unit="features", meaning="features with the most similar decoder rows to list", ge=0)
    runner: str = setting(
        "FnApiRunner", unit="", meaning="Apache Beam runner; FnApiRunner works in this process", affects_result=False
    )
    runner_options: tuple[str, ...] = setting(
        (), unit="flags", meaning="options passed through to the runner, such as --region=...", affects_result=False
    )
