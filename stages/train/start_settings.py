"""Settings of the train stage that say what it starts from: units, initial parameters."""

from typing import Annotated, Literal

from saex_pipe.common.config import Resource, StageConfig, setting


class StartSettings(StageConfig):
    """Normalisation of the rows, and initial parameters."""

    normalise: Literal[
        "none", "mean_square", "expected_norm", "clipped", "ema", "layer_norm", "whitening_pca", "whitening_zca"
    ] = setting(
        "mean_square",
        unit="",
        meaning="units of training: rows scaled to unit mean square per dimension (ema: of the recent batches), or to "
        "a mean norm of the square root of the width (clipped: and no longer than clip_multiple of it), each by its "
        "own mean and spread (layer_norm; not for a transcoder), or whitened; every tap of a crosscoder by itself; "
        "folded into the saved weights, but for layer_norm, which is done again where the SAE is used",
    )
    clip_multiple: float = setting(
        3.0, unit="expected norms", meaning="length that clipped scales longer rows down to", gt=0
    )
    ema_decay: float = setting(0.999, unit="per step", meaning="of the mean square that ema follows", gt=0, lt=1)
    sample_rows: int = setting(
        32_768,
        unit="rows",
        meaning="first rows of training, for what statistics of the store do not give: whitening, geometric median, "
        "firing shares",
        ge=2,
    )
    start_from: Annotated[str | None, Resource()] = setting(
        None,
        unit="URI",
        meaning="SAE to go on from, a folder that saex-pipe or SAELens wrote; width, latents and kind must be the same",
    )
    initial_encoder: Literal["decoder_transpose", "kaiming", "orthogonal"] | None = setting(
        None, unit="", meaning="encoder at the start (default decoder_transpose)"
    )
    initial_decoder: Literal["unit", "kaiming", "orthogonal", "pseudo_inverse", "zero"] | None = setting(
        None, unit="", meaning="decoder at the start: random rows (default unit), the encoder's inverse, or 0"
    )
    initial_decoder_norm: float | None = setting(
        None,
        unit="",
        meaning="length of the decoder's rows at the start, where they are free (default 1; relu 0.1)",
        gt=0,
    )
    initial_encoder_norm: float | None = setting(
        None,
        unit="",
        meaning="length of the encoder's columns at the start, where they are the decoder's rows (default 0.5 of topk "
        "and batchtopk, else that of the rows, or 2 widths / latents over it if that is less)",
        gt=0,
    )
    initial_decoder_bias: Literal["zero", "mean", "geometric_median"] | None = setting(
        None, unit="", meaning="decoder bias at the start (default mean)"
    )
    initial_encoder_bias: Literal["zero", "centred", "firing_share"] | None = setting(
        None,
        unit="",
        meaning="encoder bias at the start: 0, pre-activations of mean 0 (default), or latents that fire equally often "
        "(default of jumprelu)",
    )
    initial_firing_share: float | None = setting(
        None,
        unit="share of rows",
        meaning="on which every latent fires at the start, with firing_share; unset: 10,000 / latents, at most 0.1",
        gt=0,
        lt=1,
    )
