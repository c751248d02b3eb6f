"""Plans of training for TPUs that are not here. What needs libtpu is skipped where it is missing."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from saex_pipe.common.aot import Topology, topology
from saex_pipe.common.errors import InputError
from saex_pipe.pipelines.cli import main
from saex_pipe.pipelines.plan_train import PlannedRows, plan_train
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train.config import Config

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
RELU = {"variant": "relu", "sparsity_coefficient": 1.0}
TOPK = {"variant": "topk", "k": 64}


def settings(**changes):
    return Config.create({"store": "runs/none", "out": "runs/unused", "rows": 10**8, **changes})


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("slice_name", "chips"), [("v5e:2x4", 8), ("v5p:2x2x1", 4)])
@pytest.mark.parametrize("variant", [RELU, TOPK, TOPK | {"selection": "approximate"}])
def test_a_million_latents_fit_on_a_small_slice(variant, slice_name, chips):
    width, latents = 2304, 2**20
    plan = plan_train(settings(**variant, latents=latents, model_parallel=chips), width, topology(slice_name))
    memory, weights = plan.memory, 2 * width * latents
    # Weights and two moments in float32; the rest are biases, counters and the batch.
    assert 12 * weights / chips < memory.argument_bytes < 12.1 * weights / chips
    assert memory.argument_bytes < memory.peak_bytes < plan.memory_limit_bytes
    assert plan.parameters == weights + latents + width


@needs_libtpu
def test_a_plan_as_a_table_and_as_json(capsys):
    arguments = ["plan", "train", "--topology", "v5e:2x4", "--model-parallel", "4", "--set", "store=runs/none"]
    arguments += ["--set", "variant=relu", "--set", "sparsity_coefficient=1", "--set", "latents=4096"]
    arguments += ["--set", "rows=1000000", "--set", "width=256"]
    main([*arguments, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert (plan["data_parallel"], plan["model_parallel"], plan["width"]) == (2, 4, 256)
    assert plan["flops_per_step"] == 2 * 2048 * 5 * 256 * 4096  # five products of rows, width and latents
    assert plan["row_bytes"] == 2 * 256
    assert plan["step_seconds"] == max(plan["roofline"].values())
    assert plan["rows_per_second"] == pytest.approx(2048 / plan["step_seconds"])
    assert plan["store_bytes_per_second"] == pytest.approx(plan["rows_per_second"] * 512)
    assert plan["memory"]["collectives"].keys() == {"all-reduce"}
    # A quarter of weights and moments; half of the batch as input and as target.
    assert plan["memory"]["argument_bytes"] == pytest.approx(3 * 4 * 2 * 256 * 1024 + 2 * 1024 * 512, rel=0.01)
    main(arguments)
    shown = " ".join(capsys.readouterr().out.split())
    assert "relu, 4,096 latents on rows of 256" in shown
    assert "v5e:2x4, 8 chips: data 2 x model 4" in shown


@needs_libtpu
def test_a_step_that_does_not_fit_says_what_to_change():
    with pytest.raises(InputError, match=r"needs .*of memory on each chip, .*; use more chips, a larger --model-par"):
        plan_train(settings(**RELU, latents=2**20), 2304, topology("v5e:1x1"))


def test_without_a_store_the_width_is_asked_for():
    eight = Topology("v5e:2x4", "v5e", 8, jax.devices())
    with pytest.raises(InputError, match=r"no store at runs/none to take .*; give it with --set width=2304"):
        plan_train(settings(**RELU, latents=64), None, eight)


def test_what_cannot_be_planned_is_refused(capsys):
    for width in ("0", "wide"):
        with pytest.raises(SystemExit) as exit_:
            main(["plan", "train", "--set", f"width={width}", "--set", "store=x", "--set", "rows=1"])
        assert exit_.value.code == 2
        assert f"width = {width} is no width of a row" in capsys.readouterr().err


def test_the_step_is_that_of_the_store(tmp_path):
    """With a store its width and dtype count; the plan's devices may be any."""
    out = str(tmp_path / "activations")
    toy.run(ToyConfig(out=out, latents=24, width=12, active=2.0, rows=1024))
    eight = Topology("v5e:2x4", "v5e", 8, jax.devices())
    small = {"latents": 32, "batch_rows": 64, "model_parallel": 4, "rows": 1024}
    plan = plan_train(settings(**RELU, **small, store=out), None, eight)
    assert (plan.width, plan.data_parallel, plan.model_parallel) == (12, 2, 4)
    assert plan.memory.collectives.keys() == {"all-reduce"}
    assert plan.roofline.interconnect_seconds > 0


def test_planned_rows_have_unit_mean_square():
    found = PlannedRows(["rows"], 256, 1).statistics("rows")
    assert found.mean_square_norm == pytest.approx(256)
    np.testing.assert_array_equal(found.mean_D, np.zeros(256))
