"""One training step: loss, gradients, update, constraint, and the counts by which latents are called dead."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import LossTerms, Moment, Params, Variant
from saex_pipe.common.sae.normalisation import Normalisers
from saex_pipe.common.sae.rounding import WeightDtype, in_float32, stored

# Counters stop here, far from the end of int32.
MAX_ROWS_COUNTED = 2**30
FREQUENCY_ROWS = 200_000  # rows over which the firing frequency is averaged, exponentially


class TrainState(NamedTuple):
    """All that changes from step to step: saving it is enough to resume bit for bit."""

    params: Params
    opt_state: optax.OptState
    normalisers: Normalisers
    averages: Params  # exponential moving averages of ``params``, {} where there are none
    rows_since_fired_F: Int[Array, " F"]  # rows seen since the latent was last active, int32
    frequency_F: Float[Array, " F"]  # share of recent rows on which the latent was active
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


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step is besides its variant and its optimiser; static."""

    total_steps: int
    dead_after_rows: int = MAX_ROWS_COUNTED
    sparsity_schedule: Callable[[Array], Array] | None = None  # fraction of the steps done to a factor; None: 1
    micro_batches: int = 1  # parts of the batch that go through the loss one after another
    average_decay: float | None = None  # of the moving averages of the parameters, per step
    weight_dtype: WeightDtype = "float32"  # in which the state keeps matrices; all is computed from float32
    compute: Compute = PLAIN


# Variant, peak learning rate, state, raw input, raw target. All but the batch may carry a leading axis S under vmap.
Step = Callable[[Variant, Array, TrainState, Array, Array], tuple[TrainState, StepTerms]]


def init_state(
    params: Params,
    optimiser: optax.GradientTransformation,
    normalisers: Normalisers,
    *,
    averaged: bool = False,
    weight_dtype: WeightDtype = "float32",
) -> TrainState:
    """The state before the first step; ``averaged`` and ``weight_dtype`` as in the ``StepSettings``."""
    latents = params["b_enc_F"].shape[-1]
    return TrainState(
        params=stored(params, weight_dtype, jnp.zeros((), jnp.int32)),
        opt_state=optimiser.init(params),
        normalisers=normalisers,
        averages=jax.tree.map(jnp.copy, params) if averaged else {},
        rows_since_fired_F=jnp.zeros(latents, jnp.int32),
        frequency_F=jnp.zeros(latents, jnp.float32),
        step=jnp.zeros((), jnp.int32),
    )


def make_step(optimiser: optax.GradientTransformation, settings: StepSettings) -> Step:
    """The pure function ``step(variant, learning_rate, state, x_BD, target_BD)``; the caller jits or vmaps it.

    ``x_BD`` and ``target_BD`` are float32 or bfloat16, in raw units; ``state.normalisers`` bring them to those of
    training. ``optimiser`` gives updates for a peak learning rate of 1, which ``learning_rate`` multiplies.
    """

    def step(
        variant: Variant,
        learning_rate: Float[Array, ""],
        state: TrainState,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
    ) -> tuple[TrainState, StepTerms]:
        rows = x_BD.shape[0]
        normalisers = Normalisers(state.normalisers.input.observe(x_BD), state.normalisers.target.observe(target_BD))
        moment, before = _moment(state, settings), in_float32(state.params)
        gradients, terms = _gradients(variant, before, normalisers, x_BD, target_BD, moment, settings)
        gradients = variant.project_gradients(before, gradients)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by int32 counters
            updates, opt_state = optimiser.update(gradients, state.opt_state, before)
        params = variant.constrain(_moved(before, updates, learning_rate, variant.learning_rate_factors()))
        rows_since_F = jnp.minimum(state.rows_since_fired_F, MAX_ROWS_COUNTED) + rows
        # A mean of all rows so far until there are FREQUENCY_ROWS of them.
        share = rows / jnp.minimum((state.step.astype(jnp.float32) + 1) * rows, float(FREQUENCY_ROWS))
        after = TrainState(
            params=stored(params, settings.weight_dtype, state.step + 1),
            opt_state=opt_state,
            normalisers=normalisers,
            averages=_averaged(state, params, settings.average_decay),
            rows_since_fired_F=jnp.where(terms.active_F > 0, 0, rows_since_F),
            frequency_F=state.frequency_F
            + jnp.minimum(share, 1.0) * (terms.active_F.astype(jnp.float32) / rows - state.frequency_F),
            step=state.step + 1,
        )
        return after, StepTerms(
            total=terms.total,
            reconstruction=terms.reconstruction,
            sparsity=terms.sparsity,
            auxiliary=terms.auxiliary,
            l0=terms.l0,
            fvu=terms.fvu,
            dead_fraction=jnp.mean(moment.dead_F, dtype=jnp.float32),
            gradient_norm=optax.tree.norm(gradients),
        )

    return step


def _moment(state: TrainState, settings: StepSettings) -> Moment:
    done = state.step.astype(jnp.float32) / settings.total_steps
    schedule = settings.sparsity_schedule
    return Moment(
        dead_F=state.rows_since_fired_F >= settings.dead_after_rows,
        frequency_F=state.frequency_F,
        sparsity_scale=jnp.ones((), jnp.float32) if schedule is None else schedule(done),
        fraction_done=done,
    )


def _gradients(
    variant: Variant,
    params: Params,
    normalisers: Normalisers,
    x_BD: Array,
    target_BD: Array,
    moment: Moment,
    settings: StepSettings,
) -> tuple[Params, LossTerms]:
    """Gradients and terms of a batch; with micro batches, the mean of theirs."""

    def of(x_BD: Array, target_BD: Array) -> tuple[Params, LossTerms]:
        scaled = normalisers.input.apply(x_BD), normalisers.target.apply(target_BD)

        def loss(params: Params) -> tuple[Array, LossTerms]:
            return variant.loss(params, *scaled, moment, settings.compute)

        gradients, terms = jax.grad(loss, has_aux=True)(params)
        return gradients, terms

    parts = settings.micro_batches
    if parts == 1:
        return of(x_BD, target_BD)

    def add(total: tuple[Params, LossTerms], part: tuple[Array, Array]) -> tuple[tuple[Params, LossTerms], None]:
        return jax.tree.map(jnp.add, total, of(*part)), None

    # Every n-th row, so that the parts of a batch whose rows lie over several devices do, too.
    cut = jax.tree.map(lambda rows: rows.reshape(-1, parts, rows.shape[1]).swapaxes(0, 1), (x_BD, target_BD))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of, cut[0][0], cut[1][0]))
    (gradients, terms), _ = jax.lax.scan(add, zeros, cut)
    mean = jax.tree.map(lambda leaf: leaf / parts, (gradients, terms._replace(active_F=jnp.zeros(()))))
    return mean[0], mean[1]._replace(active_F=terms.active_F)


def _moved(params: Params, updates: Params, learning_rate: Array, factors: Mapping[str, float]) -> Params:
    return {name: leaf + learning_rate * factors.get(name, 1.0) * updates[name] for name, leaf in params.items()}


def _averaged(state: TrainState, params: Params, decay: float | None) -> Params:
    if decay is None:
        return state.averages
    return jax.tree.map(lambda mean, leaf: decay * mean + (1 - decay) * leaf, state.averages, params)
