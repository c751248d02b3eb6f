"""Names of the places in a decoder where activations are read or replaced.

``embed``, ``blocks.N.SITE`` and ``final_norm``. In the order in which a block computes them, SITE is

- ``resid_pre``: the residual stream that enters the block [width]
- ``attn_in``: its normalised form, the input of attention [width]
- ``attn_z``: the heads' outputs side by side, before the output projection [query_heads * head_dim]
- ``attn_out``: what attention adds to the residual stream [width]
- ``resid_mid``: the residual stream between attention and MLP [width]
- ``mlp_in``: its normalised form, the input of the MLP [width]
- ``mlp_out``: what the MLP adds to the residual stream [width]
- ``resid_post``: the residual stream that leaves the block, the ``resid_pre`` of the next [width]

Where a family has norms after attention and MLP (Gemma 2 and 3), ``attn_out`` and ``mlp_out`` come after them. Where
both read the block's input (GPT-NeoX), ``resid_mid`` is still the sum of ``resid_pre`` and ``attn_out``.
"""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.architecture import Architecture

EMBED = "embed"
FINAL_NORM = "final_norm"
SITES = ("resid_pre", "attn_in", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


class Tap(NamedTuple):
    """A tap in comparable form: taps sort in the order in which a forward pass reaches them."""

    layer: int  # -1 for embed, the number of layers for final_norm
    site: int  # index into SITES; 0 for embed and final_norm


def all_names(architecture: Architecture) -> list[str]:
    """Every tap of a model, in the order of computation."""
    blocks = [f"blocks.{layer}.{site}" for layer in range(architecture.layers) for site in SITES]
    return [EMBED, *blocks, FINAL_NORM]


def parse(name: str, architecture: Architecture) -> Tap:
    """The place of ``name``; an ``InputError`` names the nearest taps where the model has no such one."""
    if name == EMBED:
        return Tap(-1, 0)
    if name == FINAL_NORM:
        return Tap(architecture.layers, 0)
    head, _, rest = name.partition(".")
    number, _, site = rest.partition(".")
    if head != "blocks" or site not in SITES or not number.isdecimal() or str(int(number)) != number:
        raise InputError(f"the model has no tap '{name}'", f"near ones are {_nearest(name, architecture)}")
    if int(number) >= architecture.layers:
        last = architecture.layers - 1
        raise InputError(
            f"the model has no tap '{name}': its blocks are 0 to {last}", f"near ones are blocks.{last}.{site}"
        )
    return Tap(int(number), SITES.index(site))


def expand(patterns: Iterable[str], architecture: Architecture) -> tuple[str, ...]:
    """The taps that names and globs stand for, each once, in the order of computation.

    ``*`` stands for any run of characters without a dot, ``{4,8}`` for one of several: ``blocks.*.resid_post``,
    ``blocks.{4,8}.mlp_out``. Raises an ``InputError`` for a glob that fits no tap, and like ``parse`` for a name.
    """
    found: set[str] = set()
    for pattern in patterns:
        if not set("*{}") & set(pattern):
            parse(pattern, architecture)
            found.add(pattern)
            continue
        matches = matching(pattern, all_names(architecture))
        if not matches:
            raise InputError(
                f"no tap of the model fits '{pattern}'",
                f"its blocks are 0 to {architecture.layers - 1}, with {', '.join(SITES)}",
            )
        found.update(matches)
    return tuple(name for name in all_names(architecture) if name in found)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that a name or glob stands for, in their order; see ``expand``."""
    expression = "".join(map(_glob_part, re.split(r"(\*|\{[^{}]*\})", pattern)))
    return [name for name in names if re.fullmatch(expression, name)]


def validate(names: Iterable[str], architecture: Architecture) -> dict[str, Tap]:
    """The places of several taps, by name and in the order of computation; refuses unknown names and repeats."""
    found: dict[str, Tap] = {}
    for name in names:
        if name in found:
            raise InputError(f"tap '{name}' is named twice", "name each tap once")
        found[name] = parse(name, architecture)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def width(name: str, architecture: Architecture) -> int:
    """How many numbers a token has at a tap."""
    tap = parse(name, architecture)
    is_heads = name.endswith(".attn_z") and tap.layer >= 0
    return architecture.query_heads * architecture.head_dim if is_heads else architecture.width


def last_layer(names: Iterable[str], architecture: Architecture) -> int:
    """The last block whose weights are needed to compute these taps; -1 where the embedding is enough."""
    last = -1
    for tap in validate(names, architecture).values():
        needed = tap.layer - 1 if SITES[tap.site] == "resid_pre" else tap.layer
        last = max(last, min(needed, architecture.layers - 1))
    return last


def _glob_part(part: str) -> str:
    """A part of a glob as a regular expression."""
    if part == "*":
        return "[^.]*"
    if part.startswith("{") and part.endswith("}"):
        return "(?:" + "|".join(re.escape(choice.strip()) for choice in part[1:-1].split(",")) + ")"
    return re.escape(part)


def _nearest(name: str, architecture: Architecture) -> str:
    """Taps that look like ``name``, compared on one block so that its number does not drown the site."""
    parts = name.split(".")
    layer = min(int(parts[1]), architecture.layers - 1) if len(parts) > 1 and parts[1].isdecimal() else 0
    candidates = [EMBED, FINAL_NORM, *(f"blocks.{layer}.{site}" for site in SITES)]
    return ", ".join(difflib.get_close_matches(name, candidates, n=3, cutoff=0.3) or candidates)
