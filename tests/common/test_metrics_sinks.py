"""TensorBoard's files as TensorBoard reads them, W&B as a stand-in, and what is said where a sink cannot be used."""

import importlib.machinery
import struct
import sys
import types

import pytest

from saex_pipe.common import metrics_sinks
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.metrics_sinks import Run, check_sinks, open_sinks

HISTOGRAM = {"edges": [-2.0, -1.0, 0.0], "counts": [3, 1], "rarer": 7}


def a_run(place, first_step=0):
    return Run(stage="train", out="runs/x/sae", digest="abc", settings={"k": 4}, place=place, first_step=first_step)


def tensorboard_events(folder):
    """Events of every file in the order of their names; a record is a length, its checksum, the data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_gets_scalars_and_histograms_by_step(tmp_path):
    with open_sinks(["tensorboard"], a_run(tmp_path)) as (sink,):
        sink.event(work="training", step=10, loss=0.5, rows=1280)
        sink.event(work="training", step=20, firing=HISTOGRAM)
    values = {
        (event.step, value.tag): value
        for event in tensorboard_events(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    assert set(values) == {(10, "loss"), (10, "rows"), (20, "firing")}
    assert values[10, "loss"].simple_value == 0.5
    assert values[10, "rows"].simple_value == 1280
    histogram = values[20, "firing"].histo
    assert (histogram.num, histogram.min, histogram.max) == (4, -2.0, 0.0)
    assert [*histogram.bucket] == [3, 1]
    assert [*histogram.bucket_limit] == [-1.0, 0.0]
    assert histogram.sum == pytest.approx(3 * -1.5 + -0.5)
    assert histogram.sum_squares == pytest.approx(3 * 1.5**2 + 0.5**2)


def test_a_resumed_run_hides_the_steps_that_it_does_again(tmp_path):
    with open_sinks(["tensorboard"], a_run(tmp_path, first_step=40)) as (sink,):
        sink.event(step=50, loss=0.1)
    starts = [event.step for event in tensorboard_events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert starts == [41], "TensorBoard drops what it has of this step and those after it"


class RefusedError(Exception):
    """As wandb.Error."""


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what it is told in ``told``."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.told = []

    class Opened:
        def log(self, values, step):
            module.told.append((step, values))

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            module.told.append("closed")

    def init(**settings):
        module.settings = settings
        return Opened()

    module.init, module.Error, module.Histogram = init, RefusedError, lambda np_histogram: np_histogram
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_values_by_step(wandb):
    check_sinks(["wandb"], "gs://b/sae", None)
    with open_sinks(["wandb"], a_run(None)) as (sink,):
        sink.event(work="training", step=10, loss=0.5)
        sink.event(step=20, firing=HISTOGRAM)
    assert wandb.told == [
        (10, {"work": "training", "loss": 0.5}),
        (20, {"firing": ([3, 1], [-2.0, -1.0, 0.0])}),
        "closed",
    ]
    assert wandb.settings["name"] == "sae"
    assert wandb.settings["config"] == {"k": 4}
    assert "mode" not in wandb.settings, "WANDB_MODE decides"


def test_a_resumed_run_goes_on_as_the_same_run_of_wandb_and_another_does_not(wandb):
    def identity(**changes):
        with open_sinks(["wandb"], a_run(None)._replace(**changes)):
            assert wandb.settings["resume"] == "allow"
        return wandb.settings["id"]

    assert identity() == identity(first_step=40)
    assert len({identity(), identity(out="runs/y/sae"), identity(digest="abd")}) == 3


def test_wandb_without_a_key_is_one_line(wandb):
    def init(**settings):
        raise RefusedError("api_key not configured (no-tty).\nMore of it")

    wandb.init = init
    with pytest.raises(SaexError) as caught, open_sinks(["wandb"], a_run(None)):
        pass
    assert "api_key not configured (no-tty).); run 'wandb login', set WANDB_MODE=offline" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("sink", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path, sink, package):
    monkeypatch.setattr(metrics_sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        check_sinks([sink], str(tmp_path), tmp_path)
    assert f"needs the package {package}, which is not installed" in str(caught.value)
    assert f"pip install 'saex-pipe[{sink}]'" in str(caught.value)


def test_tensorboard_needs_a_local_folder():
    with pytest.raises(InputError, match=r"which gs://b/sae cannot do; use the sink wandb"):
        check_sinks(["tensorboard"], "gs://b/sae", None)
