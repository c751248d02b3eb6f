"""One step of end-to-end tuning.

Identifying functionally important features with end-to-end sparse dictionary learning. Dan Braun, Jordan Taylor,
Nicholas Goldowsky-Dill, Lee Sharkey. 2024. https://arxiv.org/abs/2405.12241
Revisiting end-to-end sparse autoencoder training: a short finetune is all you need. Adam Karvonen. 2025.
https://arxiv.org/abs/2503.17272

    L = (L_sae + b a O) / (1 + b)        a = sg(R / (O + 1e-8))

L_sae is the loss that the SAE was trained with, R the reconstruction in it, and O the objective per predicted token in
nats, of the model with the SAE's reconstruction in the place of the activation: KL(model || spliced model), or the
next-token cross-entropy. a brings O to the size of R, so that b alone weighs the two.

Rows are those of the model as it is: nothing below the splice depends on the SAE. The mean and spread that layer_norm
takes off a row and puts back on its reconstruction are therefore constants; no gradient goes through them.

What the variant keeps the decoder's rows at in units of training, 1, is here the length that each of them has in the
SAE: in raw units they are as long as its normalisation made them, each by another length where it was whitening.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.cross_entropy import next_token_losses
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Moment, Params, Variant, row_norms
from saex_pipe.common.sae.normalisation import Normalisers

_EPSILON = 1e-8


class Windows(NamedTuple):
    """One batch of windows of tokens."""

    tokens_NL: Int[Array, "N L"]
    keep_NL: Bool[Array, "N L"]  # rows: what the SAE was trained on, and what is replaced
    rows_B: Int[Array, " B"]  # places in the flattened windows that are rows; B is N L, some come twice
    real_NL1: Bool[Array, "N L1"]  # positions that predict a token which is not padding


class TuneState(NamedTuple):
    """All that changes from step to step."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


class TuneTerms(NamedTuple):
    """Float32 scalars about one batch, before its update."""

    total: Float[Array, ""]
    sae_loss: Float[Array, ""]  # as in training
    objective: Float[Array, ""]  # nats per predicted token
    l0: Float[Array, ""]
    fvu: Float[Array, ""]
    gradient_norm: Float[Array, ""]


class Splice(NamedTuple):
    """Where the SAE stands in the model."""

    tap: str
    target: str
    base: str | None  # tap from which passes resume; None: from the tokens


def lengths_of_rows(params: Params) -> Float[Array, " F"]:
    """Of the decoder; 1 for a row of zeros."""
    norms_F = row_norms(params["w_dec_FD"])
    return jnp.where(norms_F > 0, norms_F, 1.0)


def make_step(
    variant: Variant,
    lengths_F: Float[Array, " F"],
    splice: Splice,
    normalisers: Normalisers,
    optimiser: optax.GradientTransformation,
    *,
    learning_rate: float,
    objective: Literal["kl", "cross_entropy"],
    balance: float,
    compute: Compute,
) -> Callable[[LanguageModel, TuneState, Windows, Mapping[str, Array]], tuple[TuneState, TuneTerms]]:
    """The pure function ``step(model, state, windows, found)``; ``found`` holds the taps of the model as it is.

    ``lengths_F`` stand for 1 where the variant constrains the decoder's rows.
    """

    def per_length(params: Params) -> Params:
        return {**params, "w_dec_FD": params["w_dec_FD"] / lengths_F[:, None]}

    def constrained(params: Params) -> Params:
        if variant.decoder_rows == "free":
            return params
        params = variant.constrain(per_length(params))
        return {**params, "w_dec_FD": params["w_dec_FD"] * lengths_F[:, None]}

    def spliced(model: LanguageModel, params: Params, windows: Windows, found: Mapping[str, Array]) -> Array:
        """The objective, in nats per predicted token."""
        x_BD, target_BD = (found[tap].reshape(-1, found[tap].shape[-1]) for tap in (splice.tap, splice.target))
        recon_BD = variant.reconstruct(params, normalisers.input.apply(x_BD), compute)
        new_NLD = normalisers.target.undo(recon_BD, target_BD).reshape(found[splice.target].shape)
        edits = {splice.target: lambda value_NLD, _: jnp.where(windows.keep_NL[..., None], new_NLD, value_NLD)}
        final = tap_names.FINAL_NORM
        resume = None if splice.base is None else (splice.base, found[splice.base])
        final_NLD = apply(model, windows.tokens_NL, taps=(final,), edits=edits, logits=False, resume_from=resume).taps[
            final
        ]
        losses = next_token_losses(model, final_NLD, windows.tokens_NL, found[final])
        assert losses.kl_NL is not None
        nats_NL1 = losses.kl_NL[:, :-1] if objective == "kl" else losses.cross_entropy_NL1
        predicted = jnp.sum(windows.real_NL1, dtype=jnp.float32)
        return jnp.sum(jnp.where(windows.real_NL1, nats_NL1, 0.0)) / jnp.maximum(predicted, 1.0)

    def loss(
        params: Params, model: LanguageModel, windows: Windows, found: Mapping[str, Array]
    ) -> tuple[Array, TuneTerms]:
        def rows(tap: str) -> Array:
            return found[tap].reshape(-1, found[tap].shape[-1])[windows.rows_B]

        scaled = normalisers.input.apply(rows(splice.tap)), normalisers.target.apply(rows(splice.target))
        sae_loss, terms = variant.loss(params, *scaled, Moment.plain(variant.latents), compute)
        nats = spliced(model, params, windows, found)
        factor = balance * jax.lax.stop_gradient(terms.reconstruction / (nats + _EPSILON))
        total = (sae_loss + factor * nats) / (1 + balance)
        return total, TuneTerms(total, sae_loss, nats, terms.l0, terms.fvu, jnp.zeros(()))

    def step(
        model: LanguageModel, state: TuneState, windows: Windows, found: Mapping[str, Array]
    ) -> tuple[TuneState, TuneTerms]:
        gradients, terms = jax.grad(loss, has_aux=True)(state.params, model, windows, found)
        gradients = variant.project_gradients(per_length(state.params), gradients)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by int32 counters
            updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        moved: dict[str, Any] = {name: leaf + learning_rate * updates[name] for name, leaf in state.params.items()}
        after = TuneState(constrained(moved), opt_state, state.step + 1)
        return after, terms._replace(gradient_norm=optax.tree.norm(gradients))

    return step
