"""Where something is spliced into a decoder in place of an activation, and what is read of the decoder for it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
from jaxtyping import Array, Int32

from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.params import LanguageModel


class Taps(NamedTuple):
    """What is read and what is replaced; the same but for a transcoder."""

    tap: str
    target: str


def resume_place(taps: Taps, architecture: Architecture) -> str | None:
    """The last residual stream that is not after either tap, from which passes with an edit start; None: the start."""
    tap = min(taps, key=lambda name: tap_names.parse(name, architecture))
    if tap == tap_names.EMBED:
        return None
    if tap == tap_names.FINAL_NORM:
        return f"blocks.{architecture.layers - 1}.resid_post"
    return f"blocks.{tap.split('.')[1]}.resid_pre"


def make_capture(wanted: Iterable[str]) -> Callable[[LanguageModel, Array], dict[str, Array]]:
    """A compiled pass that gives the values of the taps ``wanted``, which may repeat."""
    taps = list(dict.fromkeys(wanted))

    @jax.jit
    def capture(model: LanguageModel, tokens_NL: Int32[Array, "N L"]) -> dict[str, Array]:
        return apply(model, tokens_NL, taps=taps, logits=False).taps

    return capture
