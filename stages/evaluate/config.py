"""Settings of the evaluate stage."""

from typing import Annotated, ClassVar, Literal

from saex_pipe.common.config import Resource, StageConfig, Upstream, setting


class Config(StageConfig):
    """Scores of an SAE: on held-out text through its model, or against the known dictionary of a toy store."""

    stage: ClassVar[str] = "evaluate"
    folder: ClassVar[str] = "scores"

    sae: Annotated[str, Upstream("sae")] = setting(unit="URI", meaning="SAE to score")
    model: Annotated[str | None, Resource()] = setting(
        None, unit="URI", meaning="language model to splice the SAE into"
    )
    tokens: Annotated[str | None, Upstream("corpus", only_with=("corpus",))] = setting(
        None, unit="URI", meaning="token store whose held-out windows are used"
    )
    store: Annotated[str | None, Upstream("activations", only_with=("toy",))] = setting(
        None, unit="URI", meaning="toy store to score on, instead of model and tokens"
    )
    tap: str | None = setting(None, unit="name", meaning="activation to replace; unset: the one the SAE was trained on")
    max_tokens: int = setting(1 << 20, unit="tokens", meaning="held-out tokens to use at most", ge=1)
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", unit="", meaning="type of weights and matmul inputs; sums are always float32"
    )
    batch_windows: int = setting(8, unit="windows", meaning="windows in one forward pass", ge=1)
