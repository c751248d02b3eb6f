"""Resampling of dead latents in a training run."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.resample import Drawn, draw, nothing_drawn, revive
from saex_pipe.common.sae.train_step import TrainState
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.devices import Devices
from saex_pipe.stages.train.rows import Reader, tranche_order

# Of one SAE or a stack, with its state before a step, from batches of raw input and target: the state after it.
Resampling = Callable[[Variant, TrainState, int, Iterable[tuple[Any, Any]]], TrainState]


def steps_drawn_from(config: Config, reader: Reader, step: int) -> range:
    """The steps whose batches dead latents are drawn from before ``step``: that one and those after it.

    Of a followed store only batches that lie whole in the tranche where ``step`` begins, those just before ``step`` as
    well where too few are left: the tranche before may be freed, and the next one's writer may wait for room until this
    one is learnt from. Where it holds no whole batch, that of ``step``, which is to be read in any case.
    """
    count = math.ceil(config.resample_from_rows / config.batch_rows)
    order = tranche_order(reader)
    if order is None:
        return range(step, step + count)
    tranche = order.tranche_around(step * config.batch_rows)
    first, stop = -(-tranche.start // config.batch_rows), tranche.stop // config.batch_rows
    start = max(first, min(step, stop - count))
    return range(start, min(start + count, stop)) or range(step, step + 1)


def make_resampling(
    config: Config, devices: Devices, like: TrainState, compute: Compute, *, is_stack: bool
) -> Resampling:
    """The compiled functions of ``common.sae.resample``; the SAEs of a stack share batches and randomness.

    Args:
        config: of the SAEs.
        devices: where they lie.
        like: shapes of their state.
        compute: of the reconstruction.
        is_stack: whether leaves have a leading axis S.
    """

    def over(function: Callable[..., Any], *axes: int | None) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=axes) if is_stack else function

    def key(step: Array, number: Array) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), number)

    def add(variant: Variant, state: TrainState, drawn: Drawn, moment_2: Array, x_BD: Array, target_BD: Array) -> Drawn:
        return draw(variant, state, drawn, key(*moment_2), x_BD, target_BD, compute)

    def end(variant: Variant, state: TrainState, drawn: Drawn, moment_2: Array) -> TrainState:
        return revive(variant, state, drawn, key(*moment_2), config.dead_after_rows)

    nothing = over(nothing_drawn, 0)
    like_drawn = jax.eval_shape(nothing, like.params)
    begin_all = devices.compiled(nothing, like_drawn)
    add_all = devices.compiled(over(add, 0, 0, 0, None, None, None), like_drawn, donate_argnums=2)
    end_all = devices.compiled(over(end, 0, 0, 0, None), like, donate_argnums=1)

    def resample(variant: Variant, state: TrainState, step: int, batches: Iterable[tuple[Any, Any]]) -> TrainState:
        drawn = begin_all(state.params)
        for number, batch in enumerate(batches, start=1):
            drawn = add_all(variant, state, drawn, np.array([step, number], np.uint32), *batch)
        return end_all(variant, state, drawn, np.array([step, 0], np.uint32))

    return resample
