"""Next-token losses in nats, without the logits of many windows in memory at once.

A vocabulary of 49,152 makes the float32 logits of one window of 128 tokens 25 MB, and of a batch of 64 windows 1.6 GB;
``next_token_losses`` therefore goes from final activations to losses a few hundred tokens at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex_pipe.common.llm.decoder import unembed
from saex_pipe.common.llm.params import LanguageModel

ROWS_AT_ONCE = 256  # tokens whose logits are in memory together: 50 MB for a vocabulary of 49,152


class NextTokenLosses(NamedTuple):
    """In nats, float32. Position l of a cross-entropy says how well token l + 1 was predicted there."""

    cross_entropy_NL1: Float[Array, "N L1"]
    reference_NL1: Float[Array, "N L1"] | None  # cross-entropy of the reference run; None without one
    kl_NL: Float[Array, "N L"] | None  # of this run from the reference; None without one


def next_token_cross_entropy(logits_NLV: Float[Array, "N L V"], tokens_NL: Int[Array, "N L"]) -> Float[Array, "N L1"]:
    """-log p(token l + 1 | tokens up to l) in nats, for all positions but the last; float32."""
    return _surprise(logits_NLV[:, :-1], tokens_NL[:, 1:])


def kl_divergence(logits_p: Float[Array, "*rows V"], logits_q: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """KL(p || q) in nats, float32: what is lost by predicting with q what follows p."""
    log_p = jax.nn.log_softmax(logits_p.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits_q.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def next_token_losses(
    model: LanguageModel,
    final_NLD: Float[Array, "N L D"],
    tokens_NL: Int[Array, "N L"],
    reference_NLD: Float[Array, "N L D"] | None = None,
) -> NextTokenLosses:
    """Losses of a run from its ``final_norm`` tap.

    Args:
        model: loaded with its unembedding.
        final_NLD: the tap ``final_norm`` of the run.
        tokens_NL: the tokens of the windows.
        reference_NLD: ``final_norm`` of another run, usually the clean one: the p of KL(p || q).
    """
    windows, length, width = final_NLD.shape
    next_tokens = jnp.roll(tokens_NL, -1, axis=1).reshape(-1)  # the last position's wraps around, and is cut off below
    rows = (final_NLD.reshape(-1, width), next_tokens)
    if reference_NLD is None:
        surprise = jax.lax.map(lambda row: _surprise(unembed(model, row[0]), row[1]), rows, batch_size=ROWS_AT_ONCE)
        return NextTokenLosses(surprise.reshape(windows, length)[:, :-1], None, None)

    def both(row: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        logits, reference = unembed(model, row[0]), unembed(model, row[2])
        return _surprise(logits, row[1]), _surprise(reference, row[1]), kl_divergence(reference, logits)

    found = jax.lax.map(both, (*rows, reference_NLD.reshape(-1, width)), batch_size=ROWS_AT_ONCE)
    surprise, of_reference, kl = (values.reshape(windows, length) for values in found)
    return NextTokenLosses(surprise[:, :-1], of_reference[:, :-1], kl)


def _surprise(logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """-log softmax(logits)[token], without the log-probabilities of the other tokens."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
