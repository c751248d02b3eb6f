"""Settings of the tune stage."""

from typing import Annotated, ClassVar, Literal

from saex_pipe.common.config import Resource, StageConfig, Upstream, setting


class Config(StageConfig):
    """An SAE to one whose reconstructions serve the model: trained on, a second phase, through the blocks above it."""

    stage: ClassVar[str] = "tune"
    folder: ClassVar[str] = "tuned"
    stands_for: ClassVar[str | None] = "sae"

    sae: Annotated[str, Upstream("sae")] = setting(unit="URI", meaning="SAE to start from")
    model: Annotated[str, Resource()] = setting(unit="URI", meaning="language model to splice the SAE into")
    tokens: Annotated[str, Upstream("corpus")] = setting(unit="URI", meaning="token store whose windows are used")
    objective: Literal["kl", "cross_entropy"] = setting(
        "kl", unit="", meaning="what the spliced model loses: divergence from the model itself, or next-token loss"
    )
    balance: float = setting(
        1.0, unit="", meaning="weight of that objective, brought to the size of the reconstruction loss", ge=0
    )
    tokens_seen: int = setting(
        1 << 20, unit="tokens", meaning="tokens to tune on; more than there are means several epochs", ge=1
    )
    learning_rate: float | None = setting(None, unit="", meaning="peak; unset: a tenth of the variant's own", gt=0)
    sparsity_coefficient: float | None = setting(
        None, unit="", meaning="weight of the sparsity penalty, if the SAE has one; unset: that of its training", ge=0
    )
    seed: int = setting(0, unit="", meaning="seed of the order of windows", ge=0, lt=1 << 31)
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", unit="", meaning="type of the model's weights and of matmul inputs; sums are float32"
    )
    batch_windows: int = setting(8, unit="windows", meaning="windows in one step", ge=1)
    checkpoint_every_steps: int = setting(
        100, unit="steps", meaning="steps between two saves to resume from", ge=1, affects_result=False
    )
