"""What the decoder directions say by themselves: the output tokens they move, and their neighbours."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from saex_pipe.common.llm.load import load_unembedding
from saex_pipe.common.llm.tokenizer import Tokenizer

_FEATURES_AT_ONCE = 256


class OutputTokens(NamedTuple):
    """Tokens whose logits a feature raises and lowers most, by direct effect per unit of activation.

    The effect is that of the decoder row through the final norm's scale and the unembedding; the norm's division by
    the length of the residual stream, which differs from token to token, is left out.
    """

    top_tokens: list[list[str]]
    top_effects: Any  # float32 [F, n]
    bottom_tokens: list[list[str]]
    bottom_effects: Any

    @staticmethod
    def none(latents: int) -> "OutputTokens":
        """No tokens for any of ``latents`` features."""
        empty: list[list[str]] = [[] for _ in range(latents)]
        return OutputTokens(empty, empty, empty, empty)


def output_tokens(model: Path, w_dec_FD: Float32[np.ndarray, "F D"], number: int, tokenizer: Tokenizer) -> OutputTokens:
    """The ``number`` tokens at either end; none where the decoder does not write to the residual stream's width."""
    unembedding = load_unembedding(model)
    if unembedding.w_unembed_DV.shape[0] != w_dec_FD.shape[1]:
        return OutputTokens.none(len(w_dec_FD))
    w_DV = unembedding.final_norm_D[:, None] * unembedding.w_unembed_DV
    if unembedding.removes_mean:
        w_DV -= w_DV.mean(axis=0)
    w_DV = jnp.asarray(w_DV, jnp.bfloat16)

    @jax.jit
    def ends(rows_FD: Array, w_DV: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        effect_FV = jnp.matmul(rows_FD.astype(jnp.bfloat16), w_DV, preferred_element_type=jnp.float32)
        return jax.lax.top_k(effect_FV, number), jax.lax.top_k(-effect_FV, number)

    found = []
    for start in range(0, len(w_dec_FD), _FEATURES_AT_ONCE):
        rows_FD = w_dec_FD[start : start + _FEATURES_AT_ONCE]
        padded_FD = np.pad(rows_FD, ((0, _FEATURES_AT_ONCE - len(rows_FD)), (0, 0)))
        found.append([[np.asarray(array)[: len(rows_FD)] for array in end] for end in ends(padded_FD, w_DV)])
    (top, top_ids), (bottom, bottom_ids) = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    texts = {int(i): tokenizer.token_text(int(i)) for i in np.unique([top_ids, bottom_ids])}

    def named(ids_FN: Int32[np.ndarray, "F n"]) -> list[list[str]]:
        return [[texts[int(i)] for i in row] for row in ids_FN]

    return OutputTokens(named(top_ids), top, named(bottom_ids), -bottom)


def nearest_rows(
    w_dec_FD: Float32[np.ndarray, "F D"], number: int
) -> tuple[Int32[np.ndarray, "F n"], Float32[np.ndarray, "F n"]]:
    """For each row, the ``number`` other rows of the largest cosine, and those cosines, largest first."""
    norms_F = np.linalg.norm(w_dec_FD, axis=1)
    unit_FD = jnp.asarray(w_dec_FD / np.where(norms_F > 0, norms_F, 1)[:, None])

    @jax.jit
    def nearest(unit_FD: Array, start: Array) -> tuple[Array, Array]:
        rows_FD = jax.lax.dynamic_slice_in_dim(unit_FD, start, min(_FEATURES_AT_ONCE, len(w_dec_FD)))
        cosine_FF = rows_FD @ unit_FD.T
        own = start + jnp.arange(len(rows_FD))
        return jax.lax.top_k(cosine_FF.at[jnp.arange(len(rows_FD)), own].set(-jnp.inf), number)

    cosines = np.zeros((len(w_dec_FD), number), np.float32)
    features = np.zeros((len(w_dec_FD), number), np.int32)
    for begin in range(0, len(w_dec_FD), _FEATURES_AT_ONCE):
        start = max(0, min(begin, len(w_dec_FD) - _FEATURES_AT_ONCE))
        cosine_FN, feature_FN = nearest(unit_FD, jnp.int32(start))
        cosines[start : start + len(cosine_FN)], features[start : start + len(feature_FN)] = cosine_FN, feature_FN
    return features, cosines
