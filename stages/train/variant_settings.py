"""Settings of the train stage that say what is trained: the variant and its hyperparameters.

A setting that is unset takes the variant's own default; one that the variant does not have is refused.
"""

from typing import Literal

from saex_pipe.common.config import StageConfig, setting


class VariantSettings(StageConfig):
    """The fields of ``common.sae`` variants, by their names there."""

    variant: str = setting(
        "topk",
        unit="",
        meaning="kind of autoencoder: topk, batchtopk, matryoshka_batchtopk, matryoshka_jumprelu, jumprelu, relu, "
        "gated, wright or p_annealing",
    )
    latents: int | None = setting(None, unit="latents", meaning="width of the dictionary", ge=1)
    expansion: float | None = setting(None, unit="latents per input dimension", meaning="or its relative width", gt=0)
    k: int | None = setting(
        None, unit="active latents per row", meaning="sparsity of topk and batchtopk (default 32)", ge=1
    )
    k_start: int | None = setting(
        None, unit="active latents per row", meaning="first value of k, which changes linearly; unset: k", ge=1
    )
    k_fraction: float | None = setting(
        None, unit="share of the steps", meaning="over which k changes from k_start (default 0.1)", gt=0, le=1
    )
    rank_by_decoder_norm: bool | None = setting(
        None, unit="", meaning="let batchtopk compare codes times the lengths of their decoder rows"
    )
    levels: tuple[int, ...] | None = setting(
        None,
        unit="latents",
        meaning="widths of a Matryoshka SAE's nested dictionaries; unset: 1/32, 3/32, 7/32, 15/32 and all of them",
    )
    sparsity_coefficient: float | None = setting(
        None, unit="", meaning="weight of the sparsity penalty; all but topk and batchtopk have one", ge=0
    )
    penalty: Literal["l1", "sqrt_l1", "tanh", "hoyer", "reciprocal", "l0"] | None = setting(
        None, unit="", meaning="sparsity penalty of relu, gated and wright (default l1)"
    )
    penalty_scale: float | None = setting(
        None,
        unit="of codes",
        meaning="steepness of tanh (1 / unit, default 4), last epsilon of reciprocal (default 0.05), bandwidth of l0 "
        "(default 0.1)",
        gt=0,
    )
    weighted_by_decoder_norms: bool | None = setting(
        None, unit="", meaning="penalise codes times the lengths of their decoder rows (default of relu alone)"
    )
    p_end: float | None = setting(
        None, unit="", meaning="exponent of the penalty at the end of p_annealing (default 0.2)", gt=0, le=1
    )
    anneal_start: float | None = setting(
        None, unit="of all steps", meaning="fraction of the steps before the exponent falls (default 0.1)", ge=0, lt=1
    )
    finetune_fraction: float | None = setting(
        None,
        unit="of all steps",
        meaning="last steps of wright, in which scales and decoder alone learn and no penalty is taken; 0, the "
        "default: scales learn throughout",
        ge=0,
        le=1,
    )
    reconstruction: Literal["squared", "variance_normalised", "absolute"] | None = setting(
        None, unit="", meaning="loss of the reconstruction: squared error, its share of the variance, absolute error"
    )
    decoder_rows: Literal["unit", "at_most_unit", "free"] | None = setting(
        None, unit="", meaning="what the lengths of the decoder's rows are kept at"
    )
    skip: bool | None = setting(None, unit="", meaning="give a transcoder a linear path beside the latents")
    centred: bool | None = setting(
        None, unit="", meaning="encode rows minus the decoder's bias (default, but not of relu)"
    )
    dead_remedy: Literal["none", "auxk", "ghost_exp", "ghost_softplus", "sparsity_threshold"] | None = setting(
        None,
        unit="",
        meaning="loss that revives dead latents; topk and batchtopk have auxk, the default of the others is none",
    )
    auxiliary_coefficient: float | None = setting(
        None, unit="", meaning="weight of that loss (default 1/32 for auxk, else 1)", ge=0
    )
    k_auxiliary: int | None = setting(
        None, unit="latents per row", meaning="dead latents in auxk; unset: half the target's width", ge=1
    )
    ghost_by_share: bool | None = setting(
        None, unit="", meaning="multiply ghost gradients by the share of dead latents"
    )
    frequency_threshold: float | None = setting(
        None,
        unit="of rows",
        meaning="sparsity_threshold raises latents that fire on less; unset: a tenth of the mean latent's frequency",
        gt=0,
        lt=1,
    )
    auxiliary_stride: int | None = setting(
        None, unit="rows", meaning="that loss reads every so-many-th row (default 1); its cost falls likewise", ge=1
    )
    jumprelu_form: Literal["l0", "tanh", "target_l0"] | None = setting(
        None,
        unit="",
        meaning="penalty of jumprelu: active latents, their tanh (default), or their distance from target_l0",
    )
    bandwidth: float | None = setting(
        None, unit="of a pre-activation", meaning="width around a threshold in which it learns, of jumprelu", gt=0
    )
    threshold_start: float | None = setting(
        None, unit="of a pre-activation", meaning="first threshold of jumprelu", ge=0
    )
    threshold_rate: float | None = setting(
        None, unit="", meaning="learning rate of jumprelu's thresholds, relative to that of all else", ge=0
    )
    target_l0: float | None = setting(
        None, unit="active latents per row", meaning="what jumprelu's target_l0 aims at (default 32)", gt=0
    )
    tanh_scale: float | None = setting(
        None, unit="per code", meaning="how soon jumprelu's tanh saturates (default 4)", gt=0
    )
    pre_activation_coefficient: float | None = setting(
        None, unit="", meaning="pull of jumprelu's tanh on dead latents (default 3e-6)", ge=0
    )
    frequency_coefficient: float | None = setting(
        None, unit="", meaning="weight of latents that fire too often, in jumprelu's target_l0 (default 1)", ge=0
    )
    frequency_limit: float | None = setting(
        None, unit="share of rows", meaning="above which a latent fires too often there (default 0.1)", ge=0, le=1
    )
