"""The table of SAE variants and the one way to build one from settings."""

import difflib
from dataclasses import MISSING, fields, replace
from typing import Any

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.batchtopk import BatchTopK
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.gated import Gated
from saex_pipe.common.sae.jumprelu import JumpRelu
from saex_pipe.common.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaJumpRelu
from saex_pipe.common.sae.p_annealing import PAnnealing
from saex_pipe.common.sae.penalties import DEFAULT_SCALES
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.wright import Wright

VARIANTS: dict[str, type[Variant]] = {
    "batchtopk": BatchTopK,
    "gated": Gated,
    "jumprelu": JumpRelu,
    "matryoshka_batchtopk": MatryoshkaBatchTopK,
    "matryoshka_jumprelu": MatryoshkaJumpRelu,
    "p_annealing": PAnnealing,
    "relu": Relu,
    "topk": TopK,
    "wright": Wright,
}
_START = "initial_"
# What to say of a setting that a variant needs.
_REMEDIES = {"k": "set k, the active latents per row, 1 to {latents}", "sparsity_coefficient": "set it, for instance 5"}


def build(variant_name: str, latents: int, **settings: Any) -> Variant:
    """The variant of that name.

    Args:
        variant_name: a key of ``VARIANTS``.
        latents: number of latents, at least 1.
        settings: fields of the variant; None stands for its default. ``initial_KEY`` is a field of its ``initial``.

    Raises:
        InputError: a value is unknown, missing, out of range or not of this variant.
    """
    cls = variant_class(variant_name)
    if latents < 1:
        raise InputError(f"latents = {latents} is below 1", "set latents (or expansion) to at least 1")
    known = {field.name: field for field in fields(cls)}
    given = {name: value for name, value in settings.items() if value is not None}
    start = {name: given.pop(name) for name in list(given) if name.startswith(_START)}
    for name, value in given.items():
        if name not in known:
            raise InputError(
                f"{variant_name} takes no {name} (got {value})",
                f"set it to none; the settings of {variant_name} are {', '.join(sorted(known))}",
            )
    for name, field in known.items():
        if field.default is MISSING and name not in ("latents", *given):
            remedy = _REMEDIES.get(name, f"set {name}").format(latents=latents)
            raise InputError(f"{variant_name} needs {name}", remedy)
    _check(given, latents)
    if start:
        plain: Any = known["initial"].default
        given["initial"] = replace(plain, **{name.removeprefix(_START): value for name, value in start.items()})
    return cls(latents=latents, **{**cls.defaults(given), **given})


def variant_class(name: str) -> type[Variant]:
    """The class of that name; an ``InputError`` names those there are."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"variant {name!r} is unknown", f"{hint}choose one of {', '.join(sorted(VARIANTS))}")
    return VARIANTS[name]


def _check(given: dict[str, Any], latents: int) -> None:
    for name in ("k", "k_start"):
        k = given.get(name)
        if k is not None and not 1 <= k <= latents:
            raise InputError(f"{name} = {k} is outside 1 to {latents} (latents)", f"lower {name} or raise latents")
    if not all(1 <= width <= latents for width in given.get("levels", ())):
        raise InputError(f"levels = {given['levels']} are outside 1 to {latents} (latents)", "give widths within it")
    coefficient = given.get("sparsity_coefficient")
    if coefficient is not None and not coefficient >= 0:
        raise InputError(f"sparsity_coefficient = {coefficient} is below 0", "set it to 0 or more")
    if given.get("auxiliary_stride", 1) < 1:
        raise InputError(f"auxiliary_stride = {given['auxiliary_stride']} is below 1", "set it to 1 for every row")
    target_l0 = given.get("target_l0")
    if target_l0 is not None and not 0 < target_l0 <= latents:
        raise InputError(f"target_l0 = {target_l0} is outside 0 to {latents} (latents)", "lower it or raise latents")
    if given.get("skip") and not given.get("transcoder"):
        raise InputError("skip = true without a target", "a linear path is for transcoders: set target_tap")
    if given.get("penalty_scale") is not None and given.get("penalty", "l1") not in DEFAULT_SCALES:
        raise InputError(
            f"penalty_scale = {given['penalty_scale']} with penalty = {given.get('penalty', 'l1')}, which has no scale",
            f"unset it, or choose one of {', '.join(DEFAULT_SCALES)}",
        )
    if not 0 < given.get("p_end", 1.0) <= 1:
        raise InputError(f"p_end = {given['p_end']} is outside 0 (not itself) to 1", "set it to 0.2, for instance")
