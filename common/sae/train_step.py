"""One training step: loss, gradients, update, constraint, and the count of rows since each latent fired."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae.contract import ComputeDtype, LossTerms, Params, Variant
from saex_pipe.common.sae.optimiser import global_norm

# Counters stop here, far from the end of int32.
MAX_ROWS_COUNTED = 2**30


class TrainState(NamedTuple):
    """All that changes from step to step: saving it is enough to resume bit for bit."""

    params: Params
    opt_state: optax.OptState
    tokens_since_fired_F: Int[Array, " F"]  # rows seen since the latent was last active, int32
    step: Int[Array, ""]  # steps done, int32


class StepTerms(NamedTuple):
    """Float32 scalars about one batch, before its update; units as in ``LossTerms``."""

    total: Float[Array, ""]
    reconstruction: Float[Array, ""]
    sparsity: Float[Array, ""]
    auxiliary: Float[Array, ""]
    l0: Float[Array, ""]
    fvu: Float[Array, ""]
    dead_fraction: Float[Array, ""]  # share of latents that count as dead in this step
    gradient_norm: Float[Array, ""]  # global norm before clipping


Step = Callable[[TrainState, Array, Array], tuple[TrainState, StepTerms]]


def init_state(params: Params, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    latents = params["b_enc_F"].shape[-1]
    return TrainState(
        params=params,
        opt_state=optimiser.init(params),
        tokens_since_fired_F=jnp.zeros(latents, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


def make_step(
    variant: Variant,
    optimiser: optax.GradientTransformation,
    dead_after_rows: int,
    compute_dtype: ComputeDtype = "float32",
    sparsity_warmup_steps: int = 0,
) -> Step:
    """``step(state, x_BD, target_BD) -> (state, terms)``, pure; wrap it in ``jax.jit(step, donate_argnums=0)``.

    Args:
        variant: what is trained.
        optimiser: an optax transformation that ends with the learning rate.
        dead_after_rows: a latent that did not fire for so many rows counts as dead.
        compute_dtype: what matmuls read; everything else is float32.
        sparsity_warmup_steps: the sparsity penalty rises linearly from 0 over so many steps.

    Rows of ``x_BD`` and ``target_BD`` are float32 or bfloat16, in the units the SAE is trained in.
    """

    def step(
        state: TrainState, x_BD: Float[Array, "B D_in"], target_BD: Float[Array, "B D_out"]
    ) -> tuple[TrainState, StepTerms]:
        dead_F = state.tokens_since_fired_F >= dead_after_rows
        warmed = jnp.minimum(1.0, state.step.astype(jnp.float32) / max(1, sparsity_warmup_steps))
        sparsity_scale = warmed if sparsity_warmup_steps else jnp.ones((), jnp.float32)

        def loss(params: Params) -> tuple[Array, LossTerms]:
            return variant.loss(
                params,
                x_BD.astype(jnp.float32),
                target_BD.astype(jnp.float32),
                dead_F,
                compute_dtype=compute_dtype,
                sparsity_scale=sparsity_scale,
            )

        gradients, terms = jax.grad(loss, has_aux=True)(state.params)
        gradients = variant.project_gradients(state.params, gradients)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by int32 counters
            updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
        params = variant.constrain(optax.apply_updates(state.params, updates))
        rows_since_F = jnp.minimum(state.tokens_since_fired_F, MAX_ROWS_COUNTED) + x_BD.shape[0]
        after = TrainState(
            params=params,
            opt_state=opt_state,
            tokens_since_fired_F=jnp.where(terms.fired_F, 0, rows_since_F),
            step=state.step + 1,
        )
        return after, StepTerms(
            total=terms.total,
            reconstruction=terms.reconstruction,
            sparsity=terms.sparsity,
            auxiliary=terms.auxiliary,
            l0=terms.l0,
            fvu=terms.fvu,
            dead_fraction=jnp.mean(dead_F, dtype=jnp.float32),
            gradient_norm=global_norm(gradients),
        )

    return step
