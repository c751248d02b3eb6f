"""Held-out windows through the model three times: as it is, with the SAE spliced in, with the activation zeroed.

Only tokens that are rows (``row_policy``) are replaced: the SAE was never trained on padding, special tokens and
attention sinks, and replacing a sink by anything breaks the model. The blocks below the tap run once.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.cross_entropy import next_token_losses
from saex_pipe.common.llm.decoder import Edit, apply
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.llm.splice import Taps
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.scores import Reconstruction


class Losses(NamedTuple):
    """Per predicted token, in nats; the prediction of token i+1 stands at position i."""

    clean: Float32[Array, "N L1"]
    sae: Float32[Array, "N L1"]
    zero: Float32[Array, "N L1"]
    kl: Float32[Array, "N L1"]  # of the spliced model's distribution from the clean one's


class BatchScores(NamedTuple):
    """One batch of windows."""

    losses: Losses
    target_NLD: Array
    recon_NLD: Array
    active_NL: Array  # active latents of each token
    fired_F: Array  # over the rows of the batch


def make_scorer(taps: Taps, base: str | None) -> Callable[..., BatchScores]:
    """A compiled function ``(model, sae, tokens, found, keep)`` to the scores of one batch.

    ``found`` holds the captured taps, ``base`` among them: the passes resume there, or at the embedding for None.
    """

    @jax.jit
    def score(model: LanguageModel, sae: Sae, tokens_NL: Array, found: dict[str, Array], keep_NL: Array) -> BatchScores:
        recon_NLD = sae.reconstruct(found[taps.tap])
        resume_from = None if base is None else (base, found[base])
        codes = sae.codes_sparse(found[taps.tap].reshape(-1, found[taps.tap].shape[-1]))

        def final(edits: dict[str, Edit]) -> Array:
            wanted = (tap_names.FINAL_NORM,)
            return apply(model, tokens_NL, taps=wanted, edits=edits, logits=False, resume_from=resume_from).taps[
                tap_names.FINAL_NORM
            ]

        def replaced_by(new_NLD: Array) -> Array:
            return final({taps.target: lambda value_NLD, _: jnp.where(keep_NL[..., None], new_NLD, value_NLD)})

        clean_NLD = final({})
        sae_NL1, clean_NL1, kl_NL = next_token_losses(model, replaced_by(recon_NLD), tokens_NL, clean_NLD)
        assert clean_NL1 is not None
        assert kl_NL is not None
        kl_NL1 = kl_NL[:, :-1]  # like the cross-entropy, for the positions that predict a token
        zero_NL1 = next_token_losses(model, replaced_by(jnp.zeros_like(recon_NLD)), tokens_NL).cross_entropy_NL1
        losses = Losses(clean_NL1, sae_NL1, zero_NL1, kl_NL1)
        rows_B1 = keep_NL.reshape(-1)[:, None]
        fired_F = jnp.zeros(sae.latents, bool).at[codes.latents_BK].max((codes.values_BK > 0) & rows_B1)
        return BatchScores(losses, found[taps.target], recon_NLD, codes.active_B.reshape(keep_NL.shape), fired_F)

    return score


def keep_rows(
    policy: RowPolicy, tokens_NL: np.ndarray, padding_NL: np.ndarray, found: Mapping[str, Array]
) -> Bool[np.ndarray, "N L"]:
    """Which tokens are rows, by the policy the SAE's store was made with; ``found`` holds all the taps it limits."""
    norms = {tap: np.linalg.norm(np.asarray(found[tap]), axis=-1) for tap in policy.norm_limits or {}}
    return policy.keep(tokens_NL, padding_NL, norms)


class Sums(NamedTuple):
    """Running sums over the windows of one shard."""

    nats: dict[str, float]  # of each kind of loss, float64
    predicted: int  # tokens
    reconstruction: Reconstruction


def add_batch(sums: Sums, scores: BatchScores, keep_NL: np.ndarray, padding_NL: np.ndarray) -> Sums:
    """``sums`` with one batch added. Predictions of padding do not count."""
    real_NL1 = ~padding_NL[:, 1:] & ~padding_NL[:, :-1]
    nats = {
        name: sums.nats.get(name, 0.0) + float(np.asarray(loss_NL1, np.float64)[real_NL1].sum())
        for name, loss_NL1 in scores.losses._asdict().items()
    }
    sums.reconstruction.add(
        np.asarray(scores.target_NLD)[keep_NL],
        np.asarray(scores.recon_NLD)[keep_NL],
        np.asarray(scores.active_NL)[keep_NL],
        np.asarray(scores.fired_F),
    )
    return Sums(nats, sums.predicted + int(real_NL1.sum()), sums.reconstruction)
