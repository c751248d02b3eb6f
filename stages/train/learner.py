"""SAEs of one shape while they are trained: one as it is, several as a stack that takes every step at once.

Or each as a learner of its own, one ``like`` another, which take the same compiled step one after another.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.flops import step_flops
from saex_pipe.common.sae.int8 import require_qwix
from saex_pipe.common.sae.optimiser import Optimiser
from saex_pipe.common.sae.schedules import RateSchedule, penalty_factor
from saex_pipe.common.sae.train_step import StepSettings, StepTerms, TrainState, init_state, make_step
from saex_pipe.common.sae.variants import build, variant_class
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.devices import Devices
from saex_pipe.stages.train.imported import imported
from saex_pipe.stages.train.resampling import make_resampling, steps_drawn_from
from saex_pipe.stages.train.rows import Reader, Rows, Sides, joined
from saex_pipe.stages.train.start_settings import StartSettings
from saex_pipe.stages.train.units import Units, units_of
from saex_pipe.stages.train.variant_settings import VariantSettings

_DEFAULT_K = 32
_NOT_OF_A_VARIANT = {"out", "variant", "latents", "expansion"}


class Learner:
    """S SAEs that differ in nothing but what may differ within one compiled step: swept fields and learning rate."""

    def __init__(
        self,
        configs: Sequence[Config],
        store: Rows,
        sides: Sides,
        *,
        devices: Sequence[jax.Device] | None = None,
        resumed: bool = False,
        like: "Learner | None" = None,
    ) -> None:
        self.configs = tuple(configs)
        shared = configs[0]
        self._sides = sides
        widths = tuple(store.info.taps[tap] for tap in sides.input)
        kind = {"transcoder": sides.input != sides.target or None, "tap_widths": widths if len(widths) > 1 else None}
        self.variants = [variant_of(config, sum(widths), kind) for config in configs]
        self.total_steps = math.ceil(shared.rows / shared.batch_rows)
        rates = [
            config.learning_rate or variant.default_learning_rate(sum(widths), self.total_steps)
            for config, variant in zip(configs, self.variants, strict=True)
        ]
        with_rows = any(variant.initial.needs_rows for variant in self.variants)
        units: Units = like._units if like else units_of(shared, store, sides, with_rows=with_rows, resumed=resumed)
        self._units: Units = jax.device_get(units)
        optimiser = optimiser_of(shared)
        self._optimiser = optimiser.build(self.total_steps)
        self._rate_factor = jax.jit(partial(optimiser.schedule.factor, self.total_steps))
        self.devices = Devices.of(shared, self.variants[0].latents, devices)
        settings = step_settings(shared, self.variants[0], self.total_steps, self.devices.mesh)
        step = make_step(self._optimiser, settings)
        if len(configs) == 1:
            self._variant, self._rate = self.variants[0], np.asarray(rates[0], np.float32)
        else:
            step = jax.vmap(step, in_axes=(0, 0, 0, None, None))
            self._variant, self._rate = jax.device_get(stacked(self.variants)), np.asarray(rates, np.float32)
        self._one = jax.eval_shape(partial(self._initial, 0), self._units, {})
        self._like = self._one if len(configs) == 1 else jax.eval_shape(stacked, [self._one] * len(configs))
        self._step: Any = like._step if like else self.devices.compiled(step, self._like, donate_argnums=2)
        self._member = self.devices.compiled(_member, self._one)
        self._resampling = make_resampling(
            shared, self.devices, self._like[0], settings.compute, is_stack=len(configs) > 1
        )
        self._state: TrainState | None = None
        self._terms: StepTerms | None = None

    def initial_state(self, member: int) -> tuple[TrainState, StepTerms]:
        """State and terms of one SAE before the first step."""
        start_from = self.configs[member].start_from
        found: Params = {}
        if start_from is not None:
            found = imported(start_from, self.variants[member], self._one[0].params, self._units.normalisers)
        return self.devices.made(partial(self._initial, member), self._units, found)

    def abstract_state(self) -> Any:
        """Shapes and places of what ``initial_state`` gives."""
        return self.devices.described(self._one)

    def _initial(self, member: int, units: Units, found: Params) -> tuple[TrainState, StepTerms]:
        """With the parameters ``found``, and otherwise new ones."""
        variant = self.variants[member]
        params = variant.constrain(variant.init(jax.random.key(self.configs[member].seed), units.stats)) | found
        # Copies, since the state is donated and input and target may share one normaliser.
        normalisers = jax.tree.map(jnp.copy, units.normalisers)
        zeros = StepTerms(*(jnp.zeros(()) for _ in StepTerms._fields))
        config = self.configs[member]
        averaged = config.average_decay is not None
        state = init_state(params, self._optimiser, normalisers, averaged=averaged, weight_dtype=config.weight_dtype)
        return state, zeros

    def start(self, states: Sequence[tuple[TrainState, StepTerms]]) -> None:
        """Go on from these, one for each SAE."""
        both = states[0] if len(states) == 1 else self.devices.compiled(stacked, self._like)(states)
        self._state, self._terms = both

    def step(self, batch: Mapping[str, np.ndarray]) -> None:
        """Learn from a batch of raw rows, by tap: those that are this process's to read, ``devices.rows``."""
        self._state, self._terms = self._step(self._variant, self._rate, self._state, *self._placed(batch))

    def _placed(self, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """Input and target of a batch on the devices."""
        x_BD = self.devices.placed(joined(batch, self._sides.input))
        alike = self._sides.target == self._sides.input
        return x_BD, x_BD if alike else self.devices.placed(joined(batch, self._sides.target))

    def lower_step(self, dtypes: tuple[Any, Any]) -> jax.stages.Lowered:
        """The step for rows of these dtypes, input and target, from shapes alone."""
        state = self.devices.described(self._like[0])
        means = self._units.stats.input_mean_D, self._units.stats.target_mean_D
        rows = (self.devices.abstract_rows(mean_D.shape[0], dtype) for mean_D, dtype in zip(means, dtypes, strict=True))
        return self._step.lower(self._variant, self._rate, state, *rows)

    def resample(self, step: int, reader: Reader) -> None:
        """Let dead latents start again before ``step``, from the rows of ``steps_drawn_from``."""
        steps = steps_drawn_from(self.configs[0], reader, step)
        batches = (self._placed(reader.batch(number, self.devices.rows)) for number in steps)
        assert self._state is not None
        self._state = self._resampling(self._variant, self._state, step, batches)

    def state(self, member: int) -> tuple[TrainState, StepTerms]:
        """State and last terms of one SAE."""
        both = cast(tuple[TrainState, StepTerms], (self._state, self._terms))
        return both if len(self.configs) == 1 else self._member(both, member)

    def terms(self) -> list[dict[str, float]]:
        """The terms of the last step, of every SAE. Waits for the step."""
        values = jax.device_get(self._terms)._asdict()
        return [
            {name: float(np.reshape(value, -1)[member]) for name, value in values.items()}
            for member in range(len(self.configs))
        ]

    def learning_rate(self, member: int, step: int) -> float:
        """Of one SAE in step ``step``, of which 0 is the first."""
        return float(np.reshape(self._rate, -1)[member] * self._rate_factor(np.int32(step)))

    def frequencies(self, member: int) -> np.ndarray:
        """Share of the recent rows on which each latent of one SAE fired, float32."""
        assert self._state is not None
        frequency = self.devices.on_host(self._state.frequency_F)
        return frequency.reshape(len(self.configs), -1)[member]

    def step_flops(self) -> float:
        """Floating-point operations that a step of all SAEs cannot do without, a device's share."""
        assert self._state is not None
        weights = self._state.params["w_enc_FD"]
        flops = sum(step_flops(variant, self._state.params, self.configs[0].batch_rows) for variant in self.variants)
        return flops / len(weights.sharding.device_set)


def shape_of(config: Config) -> dict[str, Any]:
    """The settings that all SAEs of one learner share."""
    swept = jax.tree_util.tree_leaves_with_path(_unchecked(config))
    free = {"learning_rate", *(path[0].name for path, _ in swept)}
    return {name: value for name, value in config.result_fields().items() if name not in free}


def _unchecked(config: Config) -> Variant:
    kind = {"transcoder": config.target_tap not in (None, config.tap) or None}
    return build(config.variant, 1 << 30, **_variant_settings(config), **kind)


def variant_of(config: Config, width: int, kind: dict[str, Any]) -> Variant:
    """The variant that the settings describe, for rows of ``width``; ``kind`` is what follows from the taps."""
    if (config.latents is None) == (config.expansion is None):
        raise InputError(
            f"train.latents = {config.latents} and train.expansion = {config.expansion}", "set exactly one of the two"
        )
    latents = config.latents or max(1, round(width * (config.expansion or 0)))
    return build(config.variant, latents, **_variant_settings(config) | kind)


def _variant_settings(config: Config) -> dict[str, Any]:
    names = VariantSettings.model_fields.keys() - _NOT_OF_A_VARIANT
    names |= {name for name in StartSettings.model_fields if name.startswith("initial_")}
    settings: dict[str, Any] = {name: getattr(config, name) for name in sorted(names)}
    if settings["k"] is None and "k" in variant_class(config.variant).__dataclass_fields__:
        settings["k"] = _DEFAULT_K
    return settings


def optimiser_of(config: Config) -> Optimiser:
    """The optimiser that the settings describe."""
    schedule = RateSchedule(
        warmup=config.learning_rate_warmup,
        shape=config.learning_rate_shape,
        cycles=config.learning_rate_cycles,
        floor=config.learning_rate_floor,
        decay=config.learning_rate_decay,
    )
    return Optimiser(
        name=config.optimiser,
        momentum=config.momentum,
        beta_square=config.beta_square,
        epsilon=config.epsilon,
        clip_norm=config.clip_norm,
        schedule=schedule,
    )


def step_settings(config: Config, variant: Variant, total_steps: int, mesh: Mesh | None) -> StepSettings:
    """What a step is besides variant and optimiser."""
    warmup = variant.published_sparsity_warmup() if config.sparsity_warmup is None else config.sparsity_warmup
    if config.batch_rows % config.micro_batches:
        raise InputError(
            f"train.batch_rows = {config.batch_rows} does not divide into train.micro_batches = {config.micro_batches}",
            "set micro_batches to a divisor of batch_rows",
        )
    if config.compute_dtype == "int8":
        require_qwix()
    return StepSettings(
        total_steps=total_steps,
        dead_after_rows=config.dead_after_rows,
        sparsity_schedule=partial(penalty_factor, warmup, total_steps) if warmup else None,
        micro_batches=config.micro_batches,
        average_decay=config.average_decay,
        weight_dtype=config.weight_dtype,
        compute=Compute(
            dtype=config.compute_dtype,
            codes=config.codes,
            selection=config.selection,
            recall=config.recall,
            mesh=mesh,
        ),
    )


def _member(both: tuple[TrainState, StepTerms], number: Array) -> tuple[TrainState, StepTerms]:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), both)


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one tree whose leaves have a leading axis S; Python floats become float32."""

    def stack(*leaves: Any) -> Array:
        return jnp.stack([jnp.float32(leaf) if isinstance(leaf, float) else leaf for leaf in leaves])

    return jax.tree.map(stack, *trees)
