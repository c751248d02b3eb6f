"""The forward pass of the harvest: tokens in, activations in the store's dtype and their norms out."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.params import LanguageModel


class Harvested(NamedTuple):
    """One batch of windows, by tap. Norms are taken before rounding to the store's dtype."""

    acts: Mapping[str, Float[Array, "N L D"]]
    norms: Mapping[str, Float32[Array, "N L"]]


Forward = Callable[[Int32[np.ndarray, "N L"]], Harvested]


def make_forward(model: LanguageModel, taps: Sequence[str], store_dtype: str, batch_windows: int) -> Forward:
    """A compiled forward pass for at most ``batch_windows`` windows; fewer are padded, so that it compiles once."""

    @jax.jit
    def compiled(model: LanguageModel, tokens_NL: Int32[Array, "N L"]) -> Harvested:
        found = apply(model, tokens_NL, taps=taps, logits=False).taps
        acts = {tap: acts_NLD.astype(store_dtype) for tap, acts_NLD in found.items()}
        return Harvested(acts, {tap: jnp.linalg.norm(acts_NLD, axis=-1) for tap, acts_NLD in found.items()})

    def forward(tokens_NL: Int32[np.ndarray, "N L"]) -> Harvested:
        windows = len(tokens_NL)
        harvested = compiled(model, np.pad(tokens_NL, ((0, batch_windows - windows), (0, 0))))
        return jax.tree.map(lambda array: array[:windows], harvested) if windows < batch_windows else harvested

    return forward
