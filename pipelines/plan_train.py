"""What training will need of TPUs, before any is rented: memory per chip, rows a second, what the store must deliver.

The very step that the train stage runs is compiled ahead of time, which says what fits. How long it takes is bounded
by a roofline over the products it cannot do without (``common.sae.flops``) and the bytes it must move.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from saex_pipe.common.aot import Compiled, Topology, compile_ahead, topology
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.statistics import ActivationStatistics
from saex_pipe.common.formats.store_info import DTYPES
from saex_pipe.common.mesh import DATA, MODEL
from saex_pipe.common.preemption import StopRequest
from saex_pipe.common.sae.flops import step_flops
from saex_pipe.pipelines.plan import Roofline, gib, planned_config
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.learner import Learner
from saex_pipe.stages.train.rows import Sides, open_rows

_DTYPE = "bfloat16"  # of rows that are not there yet
_WIDTH = "width"


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One training on one topology. Memory is of one JAX device: a chip, on tpu7x half a chip."""

    variant: str
    latents: int
    width: int
    topology: str
    chips: int
    data_parallel: int
    model_parallel: int
    batch_rows: int
    parameters: int
    memory: Compiled
    memory_limit_bytes: int
    flops_per_step: float
    roofline: Roofline
    row_bytes: int

    @property
    def rows_per_second(self) -> float:
        """The bound, for the whole slice."""
        return self.batch_rows / self.roofline.step_seconds

    def to_json(self) -> dict[str, Any]:
        """As JSON values, derived ones included."""
        return asdict(self) | {
            "memory": self.memory._asdict(),
            "step_seconds": self.roofline.step_seconds,
            "rows_per_second": self.rows_per_second,
            "store_bytes_per_second": self.rows_per_second * self.row_bytes,
        }


class PlannedRows:
    """Stands for a store that is not there: taps of one width, whose values do not matter."""

    def __init__(self, taps: Sequence[str], width: int, rows: int) -> None:
        self.info = self
        self.rows, self.taps = rows, dict.fromkeys(taps, width)

    def statistics(self, tap: str) -> ActivationStatistics:
        """Of rows about 0 with unit mean square."""
        ones_D = np.ones((1, self.taps[tap]), np.float32)
        return ActivationStatistics.of_rows(np.concatenate([ones_D, -ones_D]))

    def decoded_dtype(self, tap: str) -> np.dtype:
        """What rows are read as."""
        return DTYPES[_DTYPE]

    def row_bytes(self, tap: str) -> int:
        """Stored bytes of a row."""
        return self.taps[tap] * DTYPES[_DTYPE].itemsize


def plan_train(config: Config, width: int | None, on: Topology) -> TrainPlan:
    """Compile the training step for ``on`` and bound its speed.

    Args:
        config: settings of the training; its store need not exist.
        width: of the rows, where it does not; None: the store's.
        on: where it is to run.

    Raises:
        InputError: neither a width nor a store, sizes that do not divide over the mesh, or a step that does not fit
            into the memory of a chip.
    """
    store, sides = _rows(config, width)
    learner = Learner([config], store, sides, devices=on.devices, resumed=True)
    mesh = learner.devices.mesh
    assert mesh is not None
    dtypes = tuple(np.result_type(*map(store.info.decoded_dtype, taps)) for taps in sides)
    lowered = learner.lower_step(cast(tuple[Any, Any], dtypes))
    remedy = (
        f"use more chips, a larger --model-parallel than {config.model_parallel}, smaller train.batch_rows than "
        f"{config.batch_rows}, or train.optimiser = adam_8bit"
    )
    variant, (state, _) = learner.variants[0], learner.abstract_state()
    flops = step_flops(variant, state.params, config.batch_rows)
    return TrainPlan(
        variant=config.variant,
        latents=variant.latents,
        width=state.params["w_enc_FD"].shape[1],
        topology=on.name,
        chips=on.chips,
        data_parallel=mesh.shape[DATA],
        model_parallel=mesh.shape[MODEL],
        batch_rows=config.batch_rows,
        parameters=sum(leaf.size for leaf in state.params.values()),
        memory=compile_ahead(lowered, remedy=remedy),
        memory_limit_bytes=on.chip.hbm_bytes,
        flops_per_step=flops,
        roofline=_roofline(variant, state, config.batch_rows, flops, mesh.shape[DATA], mesh.shape[MODEL], on),
        row_bytes=sum(store.info.row_bytes(tap) for tap in sides.taps),
    )


def _rows(config: Config, width: int | None) -> tuple[Any, Sides]:
    if width is None and Manifest.read(Folder(config.store)) is not None:
        return open_rows(config, StopRequest())
    if width is None:
        raise InputError(
            f"there is no store at {config.store} to take the width of a row from", f"give it with --set {_WIDTH}=2304"
        )
    tap = config.tap or "rows"
    sides = Sides(config.taps, config.taps) if config.taps else Sides((tap,), (config.target_tap or tap,))
    return PlannedRows(sides.taps, width, config.rows), sides


def _roofline(variant: Any, state: Any, rows: int, flops: float, data: int, model: int, on: Topology) -> Roofline:
    """Of a step with its state, shapes with their places.

    Memory: the state is read and written, gradients are written and read, weights are read by both passes, and
    pre-activations, float32, are written and read. Interconnect, rings in both directions: sums of the reconstruction
    over ``model``, of the gradients over ``data``, and where k latents are chosen, the candidates' values.
    """
    rows_here, latents_here = rows / data, variant.latents / model
    held, weights = _bytes_here(state), _bytes_here(state.params)
    moved = 2 * held + 4 * weights + 2 * 4 * rows_here * latents_here
    summed = 4 * rows_here * state.params["w_dec_FD"].shape[1]
    gathered = 4 * rows_here * min(getattr(variant, "k", 0), latents_here) * (model - 1)
    crossing = 2 * summed * (model - 1) / model + gathered + 2 * weights * (data - 1) / data
    return Roofline(
        compute_seconds=flops / len(on.devices) / on.chip.peak_bf16_flops,
        memory_seconds=moved / on.chip.hbm_bytes_per_second,
        interconnect_seconds=crossing / (2 * on.chip.link_bytes_per_second),
    )


def _bytes_here(tree: Any) -> int:
    """The size of what one device holds of arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def run_train_plan(
    recipe: str | None, name: str, assignments: Sequence[str], as_json: bool, model_parallel: int | None
) -> None:
    """The command: print the plan of a recipe's training on the topology ``name``, as a table or as JSON.

    Assignments are those of ``--set``; ``width=N`` among them is the width of the rows of a store that is not there.
    """
    widths = [text.partition("=")[2] for text in assignments if text.partition("=")[0].strip() == _WIDTH]
    if widths and not (widths[-1].strip().isdigit() and int(widths[-1])):
        raise InputError(f"{_WIDTH} = {widths[-1]} is no width of a row", "give a number from 1 on")
    others = [text for text in assignments if text.partition("=")[0].strip() != _WIDTH]
    config, _ = planned_config("train", recipe, others, model_parallel=model_parallel)
    assert isinstance(config, Config)
    plan = plan_train(config, int(widths[-1]) if widths else None, topology(name))
    if as_json:
        print(json.dumps(plan.to_json()))
    else:
        _print_table(plan)


def _print_table(plan: TrainPlan) -> None:
    memory, roof = plan.memory, plan.roofline
    devices = "" if plan.chips == plan.data_parallel * plan.model_parallel else ", two devices each"
    rows = {
        "slice": f"{plan.topology}, {plan.chips} chips{devices}: "
        f"data {plan.data_parallel} x model {plan.model_parallel}",
        "step": f"{plan.batch_rows:,} rows",
        "memory of a device": f"{gib(memory.peak_bytes)} of {gib(plan.memory_limit_bytes)} "
        f"({memory.peak_bytes / plan.memory_limit_bytes:.0%}): arguments {gib(memory.argument_bytes)}, "
        f"outputs {gib(memory.output_bytes)}, temporaries {gib(memory.temporary_bytes)}",
        "collectives": ", ".join(f"{count} {kind}" for kind, count in memory.collectives.items()) or "none",
        "compiled in": f"{memory.seconds:.1f} s",
        "FLOPs per step": f"{plan.flops_per_step / 1e12:.3f} T",
        "step at the roofline": f"{1e3 * roof.step_seconds:.3g} ms: compute {1e3 * roof.compute_seconds:.3g}, "
        f"memory {1e3 * roof.memory_seconds:.3g}, interconnect {1e3 * roof.interconnect_seconds:.3g}",
        "rows per second": f"at most {plan.rows_per_second:,.0f}",
        "store": f"{plan.row_bytes:,} bytes per row; {plan.rows_per_second * plan.row_bytes / 1e9:.3g} GB per second "
        "at that bound",
    }
    title = (
        f"{plan.variant}, {plan.latents:,} latents on rows of {plan.width:,} ({plan.parameters / 1e9:.3g} G weights)"
    )
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)
