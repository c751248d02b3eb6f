"""The parameters of a trained SAE, with thresholds that its variant sets after training."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.sae.batchtopk import BatchTopK
from saex_pipe.common.sae.calibration import calibrated
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.rounding import in_float32
from saex_pipe.common.sae.train_step import TrainState
from saex_pipe.common.shuffle import TrancheOrder
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.devices import Devices
from saex_pipe.stages.train.rows import Reader, Rows, Sides, joined, make_reader

ROWS = 1 << 17  # the mean L0 of so many is known to within a 360th of its spread over rows


def trained_params(
    config: Config, store: Rows, variant: Variant, state: TrainState, sides: Sides, devices: Devices
) -> Params:
    """Parameters in the units of training, float32: their moving averages where these were kept.

    A BatchTopK SAE reads the last batches of its training once more, so that what it becomes follows from the final
    state alone.
    """
    params = in_float32(state.averages or state.params)
    if not isinstance(variant, BatchTopK):
        return params
    steps = int(state.step)
    with make_reader(config, store, sides.taps) as reader:
        first = _first_step(config, reader, steps)

        def batches() -> Iterator[jax.Array]:
            for step in range(first, steps):
                raw_BD = devices.placed(joined(reader.batch(step, devices.rows), sides.input))
                x_BD = state.normalisers.input.apply(jnp.asarray(raw_BD))
                for part in range(config.micro_batches):  # of which training selects in each by itself
                    yield x_BD[part :: config.micro_batches]

        return calibrated(variant, params, batches, Compute(mesh=devices.mesh))


def _first_step(config: Config, reader: Reader, steps: int) -> int:
    """Of the steps to read: those of the last ``ROWS`` rows that a writer who waits for room still keeps."""
    first = max(0, steps - max(1, ROWS // config.batch_rows))
    order = reader.order if isinstance(reader, RowReader) else None
    if isinstance(order, TrancheOrder):
        last = order.tranche_at((steps - 1) * config.batch_rows)
        while order.tranche_at(first * config.batch_rows) < last:
            first += 1
    return first
