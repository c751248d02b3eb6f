"""What is seen of a training run: metrics, firing frequencies, sinks."""

import json

import numpy as np
import pytest

from saex_pipe.common import metrics_sinks
from saex_pipe.common.errors import InputError
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import crew
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.density import EDGES, density, is_moment

LATENTS, STEPS = 32, 60
SETTINGS = {"latents": LATENTS, "k": 2, "batch_rows": 128, "rows": 128 * STEPS, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "activations")
    toy.run(ToyConfig(out=out, latents=24, width=12, active=2.0, rows=8192))
    return out


def config(store, out, **changes):
    return Config.create({"store": store, "out": str(out)} | SETTINGS | changes)


def events(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """Events of two SAEs that were trained as one stack, the second into TensorBoard too."""
    place = tmp_path_factory.mktemp("pair")
    pair = [config(store, place / "a"), config(store, place / "b", auxiliary_coefficient=0.5, sinks=["tensorboard"])]
    train.run_sweep(pair)
    return place


@pytest.mark.parametrize("name", ["a", "b"])
def test_firing_frequencies_of_every_sae_are_kept_over_time(trained, name):
    kept = [event for event in events(trained / name) if "firing_frequency_log10" in event]
    assert [event["step"] for event in kept] == [10, 20, 30, 40, 50, 60]
    for event in kept:
        found = event["firing_frequency_log10"]
        assert sum(found["counts"]) + found["rarer"] == LATENTS
    # k = 2 of 32 latents: they fire on a sixteenth of the rows on average, so that most lie above a hundredth.
    edges, counts = np.array(found["edges"]), np.array(found["counts"])
    assert counts[edges[:-1] >= -2].sum() > LATENTS / 2


@pytest.mark.parametrize("name", ["a", "b"])
def test_every_event_of_the_curve_says_how_well_the_device_is_used(trained, name):
    curve = [event for event in events(trained / name) if "loss" in event]
    assert [event["step"] for event in curve] == [10, 20, 30, 40, 50, 60]
    assert all(event["rows"] == event["step"] * 128 for event in curve)
    assert "mfu" not in curve[0], "the first steps wait for the compiler"
    assert all(0 < event["mfu"] < 1 and 0 <= event["waiting_share"] <= 1 for event in curve[1:])


def test_the_learning_rate_of_each_step_is_logged(trained):
    rates = {event["step"]: event["learning_rate"] for event in events(trained / "a") if "loss" in event}
    peak = 0.1 / 12**0.5  # of a short run, on rows of width 12
    # Constant after 3 steps of warm-up, and down to 0 over the last 12 of 60: in the last one a twelfth is left.
    assert rates == pytest.approx(dict.fromkeys((10, 20, 30, 40), peak) | {50: peak * 11 / 12, 60: peak / 12})


def test_tensorboard_has_the_curve_of_the_sae_that_asked_for_it(trained):
    assert not (trained / "a" / "tensorboard").exists()
    (file,) = (trained / "b" / "tensorboard").iterdir()
    data = file.read_bytes()
    assert data.count(b"fvu") == 6
    assert data.count(b"firing_frequency_log10") == 6


def test_a_sink_that_is_missing_stops_before_anything_is_written(store, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="sink 'wandb' needs the package wandb"):
        train.run(config(store, tmp_path / "sae", sinks=["wandb"]))
    assert not (tmp_path / "sae").exists()


def test_use_of_the_device_is_operations_over_seconds_times_peak(monkeypatch):
    class Learner:
        configs = (Config(store="", out="", rows=1),)

        def step_flops(self):
            return 300.0

    now = [7.0]
    monkeypatch.setattr(crew, "peak_flops", lambda dtype: 1000.0)
    monkeypatch.setattr(crew.time, "perf_counter", lambda: now[0])
    watched = crew.Crew([(Learner(), [])], start=40)
    assert watched._utilisation(50) == {}
    now[0] += 6.0
    assert watched._utilisation(60) == {"mfu": 0.5}
    now[0] += 1.5
    assert watched._utilisation(61) == {"mfu": 0.2}


def test_histogram_of_frequencies():
    found = density(np.array([0.0, 1e-7, 2e-6, 0.05, 0.05, 1.0], np.float32))
    filled = {round(float(EDGES[i]), 2): n for i, n in enumerate(found["counts"]) if n}
    assert filled == {-5.75: 1, -1.5: 2, -0.25: 1}
    assert found["rarer"] == 2


def test_moments_are_spread_over_the_steps():
    looked, seen = 0, []
    for step in range(10, 1001, 10):
        if is_moment(step, looked, 1000):
            seen.append(step)
        looked = step
    assert seen == [*range(50, 1001, 50)]
    assert is_moment(3, 2, 5)


def test_the_report_lies_beside_the_sae(trained):
    for name in ("a", "b"):
        page = (trained / name / "report.html").read_text()
        assert "Training of a topk with 32 latents" in page
        assert page.count('class="cell"') >= 6, "firing frequencies at six moments"
        assert "FVU, fraction" in page
