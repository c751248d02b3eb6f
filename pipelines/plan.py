"""What the harvest will need of TPUs, before any is rented: memory per chip, tokens a second, bytes to store.

The very step that the harvest runs is compiled ahead of time, which says what fits. How long it takes is bounded by a
roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785) over numbers counted from the architecture,
since the compiler's own count takes the body of a loop once.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from saex_pipe.common import resources
from saex_pipe.common.aot import Compiled, Topology, compile_ahead, topology
from saex_pipe.common.config import StageConfig
from saex_pipe.common.formats.store_info import DTYPES, given_dtypes
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.architecture import Architecture
from saex_pipe.common.llm.load import read_architecture
from saex_pipe.common.llm.params import LanguageModel, abstract_model
from saex_pipe.common.mesh import check_batch, make_mesh
from saex_pipe.pipelines import chain
from saex_pipe.stages.harvest.config import Config
from saex_pipe.stages.harvest.forward import lower_forward
from saex_pipe.stages.harvest.stored import stored_dtypes

_REMOTE_FOLDERS = ("hf://", "gs://", "s3://")
_HALF = 0.5  # of the bound, which well-tuned forward passes reach


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least seconds that one step can take on each of the things it needs; the largest bounds the step."""

    compute_seconds: float  # FLOPs at the peak of bfloat16
    memory_seconds: float  # weights once, residual stream in and out of each block, activations out
    interconnect_seconds: float  # sums over the model axis, as rings in both directions

    @property
    def step_seconds(self) -> float:
        """The bound on a step."""
        return max(self.compute_seconds, self.memory_seconds, self.interconnect_seconds)


@dataclass(frozen=True, kw_only=True)
class HarvestPlan:
    """One harvest on one topology. Memory is of one JAX device: a chip, on tpu7x half a chip."""

    model: str
    architecture: Architecture
    taps: tuple[str, ...]
    topology: str
    chips: int
    data_parallel: int
    model_parallel: int
    batch_windows: int
    window_length: int
    memory: Compiled
    memory_limit_bytes: int
    flops_per_token: float
    roofline: Roofline
    store_bytes_per_token: int

    @property
    def tokens_per_second(self) -> float:
        """The bound, for the whole slice."""
        return self.batch_windows * self.window_length / self.roofline.step_seconds

    def to_json(self) -> dict[str, Any]:
        """As JSON values, derived ones included."""
        half = self.tokens_per_second * _HALF
        return asdict(self) | {
            "architecture": self.architecture.family,
            "memory": self.memory._asdict(),
            "step_seconds": self.roofline.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_at_half": half,
            "store_bytes_per_hour_at_half": half * self.store_bytes_per_token * 3600,
        }


def plan_harvest(config: Config, window_length: int, on: Topology) -> HarvestPlan:
    """Compile the harvest's step for ``on`` and bound its speed. Of the model only ``config.json`` is read.

    Args:
        config: settings of the harvest; its token store need not exist.
        window_length: tokens in a window.
        on: where it is to run.

    Raises:
        InputError: a model that cannot be run, sizes that do not divide over the mesh, or a step that does not fit
            into the memory of a chip.
    """
    architecture = _read_architecture(config.model)
    dtypes = stored_dtypes(config, architecture)
    taps = tuple(dtypes)
    mesh = make_mesh(config.model_parallel, devices=on.devices)
    check_batch(config.batch_windows, mesh, "harvest.batch_windows")
    layers = tap_names.last_layer(taps, architecture) + 1
    model = abstract_model(architecture, layers=layers, with_unembedding=False, dtype=config.compute_dtype, mesh=mesh)
    shape = (config.batch_windows, window_length)
    lowered = lower_forward(model, given_dtypes(dtypes), shape=shape, mesh=mesh)
    remedy = f"use fewer harvest.batch_windows than {config.batch_windows}, more chips, or a larger --model-parallel"
    store_bytes = sum(tap_names.width(tap, architecture) * DTYPES[dtype].itemsize for tap, dtype in dtypes.items())
    flops = flops_per_token(architecture, taps, window_length)
    return HarvestPlan(
        model=config.model,
        architecture=architecture,
        taps=taps,
        topology=on.name,
        chips=on.chips,
        data_parallel=mesh.shape["data"],
        model_parallel=config.model_parallel,
        batch_windows=config.batch_windows,
        window_length=window_length,
        memory=compile_ahead(lowered, remedy=remedy),
        memory_limit_bytes=on.chip.hbm_bytes,
        flops_per_token=flops,
        roofline=_roofline(model, math.prod(shape), flops, store_bytes, on),
        store_bytes_per_token=store_bytes,
    )


def flops_per_token(a: Architecture, taps: Sequence[str], length: int) -> float:
    """Floating-point operations of the matrix products up to the last tap, a multiplication and an addition as two.

    Attention counts the keys that the mask leaves, averaged over a window of ``length`` tokens.
    """
    heads, kv = a.query_heads * a.head_dim, a.kv_heads * a.head_dim
    mlp = 2 * a.width * a.mlp_width * (3 if a.gated else 2)
    end = max(tap_names.validate(taps, a).values())
    total = 0.0
    for layer in range(min(end.layer + 1, a.layers)):
        window = min(a.sliding_window, length) if a.sliding and a.sliding[layer] else length
        keys = (window * (window + 1) / 2 + (length - window) * window) / length
        attention = 2 * a.width * (heads + 2 * kv) + 4 * heads * keys
        parts = {"attn_z": attention, "attn_out": 2 * heads * a.width, "mlp_out": mlp}
        total += sum(flops for site, flops in parts.items() if tap_names.Tap(layer, tap_names.SITES.index(site)) <= end)
    return total


def _roofline(model: LanguageModel, tokens: int, flops: float, store_bytes: int, on: Topology) -> Roofline:
    """For a step of ``tokens`` tokens."""
    mesh, a = model.mesh, model.architecture
    assert mesh is not None
    blocks, parts = model.blocks.layers, mesh.shape["model"]
    tokens_here = tokens / mesh.shape["data"]
    weights = sum(_bytes_here(weight) for weight in jax.tree.leaves(model.blocks))
    stream = tokens_here * a.width * 4  # the residual stream is float32, and so are the sums over devices
    sums = 1 + blocks * (1 if a.parallel else 2)  # the embedding's; after attention and MLP, or of both at once
    ring = 2 * (parts - 1) / parts / (2 * on.chip.link_bytes_per_second)
    return Roofline(
        compute_seconds=tokens * flops / len(on.devices) / on.chip.peak_bf16_flops,
        memory_seconds=(weights + 2 * blocks * stream + tokens_here * store_bytes) / on.chip.hbm_bytes_per_second,
        interconnect_seconds=sums * stream * ring,
    )


def _bytes_here(weight: jax.ShapeDtypeStruct) -> int:
    """The size of the part of a weight that one device holds."""
    assert weight.sharding is not None
    return math.prod(weight.sharding.shard_shape(weight.shape)) * weight.dtype.itemsize


def _read_architecture(uri: str) -> Architecture:
    """Of a model anywhere; of a folder far away, ``config.json`` alone is fetched."""
    if uri.startswith(_REMOTE_FOLDERS) and not uri.partition("#")[0].endswith((".gguf", ".json")):
        uri = f"{uri.rstrip('/')}/config.json"
    path = resources.fetch(uri)
    return read_architecture(path.parent if path.name == "config.json" else path)


def planned_config(
    stage: str, recipe: str | None, assignments: Sequence[str], **settings: str | int | None
) -> tuple[StageConfig, chain.Recipe]:
    """The configuration of ``stage`` of a recipe, and the recipe.

    Assignments are those of ``--set``; ``settings`` of the stage that are not None come on top.
    """
    loaded = chain.load_recipe(recipe) if recipe is not None else chain.Recipe("custom", "", (), {}, "")
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
    loaded = chain.with_assignments(loaded, [*assignments, *given], stage)
    return chain.configure(loaded, stage, "runs/plan"), loaded


def run_harvest_plan(
    recipe: str | None, name: str, assignments: Sequence[str], as_json: bool, **settings: str | int | None
) -> None:
    """The command: print the plan of a recipe's harvest on the topology ``name``, as a table or as JSON."""
    config, loaded = planned_config("harvest", recipe, assignments, **settings)
    assert isinstance(config, Config)
    default = chain.config_class("corpus").model_fields["window_length"].default
    length = loaded.settings.get("corpus", {}).get("window_length", default)
    plan = plan_harvest(config, length, topology(name))
    if as_json:
        print(json.dumps(plan.to_json()))
    else:
        _print_table(plan)


def _print_table(plan: HarvestPlan) -> None:
    memory, roof = plan.memory, plan.roofline
    half = plan.tokens_per_second * _HALF
    devices = "" if plan.chips == plan.data_parallel * plan.model_parallel else ", two devices each"
    taps = plan.taps[0] if len(plan.taps) == 1 else f"{len(plan.taps)} taps, the last {plan.taps[-1]}"
    mesh = f"data {plan.data_parallel} x model {plan.model_parallel}"
    rows = {
        "slice": f"{plan.topology}, {plan.chips} chips{devices}: {mesh}",
        "step": f"{plan.batch_windows} windows of {plan.window_length:,} tokens",
        "memory of a device": f"{gib(memory.peak_bytes)} of {gib(plan.memory_limit_bytes)} "
        f"({memory.peak_bytes / plan.memory_limit_bytes:.0%}): arguments {gib(memory.argument_bytes)}, "
        f"outputs {gib(memory.output_bytes)}, temporaries {gib(memory.temporary_bytes)}",
        "collectives": ", ".join(f"{count} {kind}" for kind, count in memory.collectives.items()) or "none",
        "compiled in": f"{memory.seconds:.1f} s",
        "FLOPs per token": f"{plan.flops_per_token / 1e9:.3f} G",
        "step at the roofline": f"{1e3 * roof.step_seconds:.3g} ms: compute {1e3 * roof.compute_seconds:.3g}, "
        f"memory {1e3 * roof.memory_seconds:.3g}, interconnect {1e3 * roof.interconnect_seconds:.3g}",
        "tokens per second": f"at most {plan.tokens_per_second:,.0f}; {half:,.0f} at half of that",
        "store": f"{plan.store_bytes_per_token:,} bytes per token; "
        f"{half * plan.store_bytes_per_token * 3600 / 1e12:.3g} TB per hour at half of the bound",
    }
    table = Table(
        title=f"{plan.model} ({plan.architecture.family}) to {taps}",
        title_justify="left",
        show_header=False,
    )
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def gib(size: float) -> str:
    """Bytes, for people."""
    return f"{size / 2**30:.2f} GiB"
