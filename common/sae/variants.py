"""The table of SAE variants and the one way to build one from settings."""

import difflib

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.topk import TopK

VARIANTS: dict[str, type[TopK] | type[Relu]] = {"topk": TopK, "relu": Relu}


def build(
    variant_name: str,
    latents: int,
    k: int | None = None,
    sparsity_coefficient: float | None = None,
    transcoder: bool = False,
    auxiliary_stride: int = 1,
) -> Variant:
    """The variant of that name.

    Args:
        variant_name: a key of ``VARIANTS``.
        latents: number of latents, at least 1.
        k: active latents per row, of ``topk`` only, 1 to ``latents``.
        sparsity_coefficient: weight of the sparsity penalty, of ``relu`` only, at least 0.
        transcoder: input and target are different activations.
        auxiliary_stride: the auxiliary loss of ``topk`` reads every n-th row, at least 1; ``relu`` has none.

    Raises:
        InputError: a value is unknown, missing, out of range or not of this variant.
    """
    if variant_name not in VARIANTS:
        near = difflib.get_close_matches(variant_name, VARIANTS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"variant {variant_name!r} is unknown", f"{hint}choose one of {', '.join(sorted(VARIANTS))}")
    if latents < 1:
        raise InputError(f"latents = {latents} is below 1", "set latents (or expansion) to at least 1")
    if VARIANTS[variant_name] is TopK:
        if sparsity_coefficient is not None:
            raise InputError(f"topk takes no sparsity_coefficient (got {sparsity_coefficient})", "set k instead")
        if k is None:
            raise InputError("topk needs k, the number of active latents per row", f"set k, 1 to {latents}")
        if not 1 <= k <= latents:
            raise InputError(f"k = {k} is outside 1 to {latents} (latents)", "lower k or raise latents")
        if auxiliary_stride < 1:
            raise InputError(f"auxiliary_stride = {auxiliary_stride} is below 1", "set it to 1 for every row")
        return TopK(latents=latents, k=k, transcoder=transcoder, auxiliary_stride=auxiliary_stride)
    if k is not None:
        raise InputError(f"relu takes no k (got {k})", "set sparsity_coefficient instead, or variant = topk")
    if sparsity_coefficient is None:
        raise InputError("relu needs sparsity_coefficient", "set it, for instance 5")
    if not sparsity_coefficient >= 0:
        raise InputError(f"sparsity_coefficient = {sparsity_coefficient} is below 0", "set it to 0 or more")
    return Relu(latents=latents, sparsity_coefficient=sparsity_coefficient, transcoder=transcoder)
