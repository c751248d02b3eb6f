"""Several SAEs from one read of the data: as if each had been trained alone."""

import json

import numpy as np
import pytest

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.checkpoint import SAE_FILES, TrainingState, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config

STEPS = 30
SETTINGS = {"latents": 32, "batch_rows": 128, "rows": 128 * STEPS, "compute_dtype": "float32"}
RELU = {"variant": "relu", "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "activations")
    toy.run(ToyConfig(out=out, latents=24, width=12, active=2.0, rows=6144))
    return out


def config(store, out, **changes):
    return Config.create({"store": store, "out": str(out)} | SETTINGS | changes)


def sae_bytes(out):
    return {name: Folder(str(out)).read(name) for name in SAE_FILES}


class Interrupted(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


@pytest.mark.parametrize("stacked", [True, False])
def test_a_sweep_gives_what_separate_runs_give(store, tmp_path, monkeypatch, stacked):
    monkeypatch.setattr(train, "stacks_pay", lambda: stacked)
    points = [{"sparsity_coefficient": c, "learning_rate": rate} for c, rate in ((0.1, 3e-3), (3.0, 3e-3), (0.1, 1e-2))]
    train.run_sweep([config(store, tmp_path / f"swept{i}", **RELU | point) for i, point in enumerate(points)])
    for i, point in enumerate(points):
        train.run(config(store, tmp_path / f"alone{i}", **RELU | point))
        swept, alone = (read_sae(str(tmp_path / f"{kind}{i}")) for kind in ("swept", "alone"))
        assert swept.cfg == alone.cfg
        assert swept.saex == alone.saex
        for name, tensor in alone.tensors.items():
            tolerance = (1e-3, 1e-4) if stacked else (0, 0)  # one after another they are the same bits
            scale = np.abs(tensor).max()
            np.testing.assert_allclose(swept.tensors[name], tensor, rtol=tolerance[0], atol=tolerance[1] * scale)
    first, second = (read_sae(str(tmp_path / f"swept{i}")).tensors["W_enc"] for i in (0, 1))
    assert not np.allclose(first, second, rtol=0.05)


def test_other_shapes_share_the_read_and_give_the_same_bits(store, tmp_path, monkeypatch):
    read, undisturbed = [], RowReader.batch
    monkeypatch.setattr(RowReader, "batch", lambda self, step, rows: read.append(step) or undisturbed(self, step, rows))
    changes = [{"k": 2}, {"k": 4}, {"k": 2, "latents": 40}]
    train.run_sweep([config(store, tmp_path / f"swept{i}", **change) for i, change in enumerate(changes)])
    assert read == list(range(STEPS))
    train.run(config(store, tmp_path / "alone", k=4))
    assert sae_bytes(tmp_path / "swept1") == sae_bytes(tmp_path / "alone")
    events = [json.loads(line) for line in (tmp_path / "swept1" / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["l0"] == pytest.approx(4, abs=0.3)
    assert events[-1]["rows"] == SETTINGS["rows"]


def test_a_kill_between_two_saves_loses_nothing(store, tmp_path, monkeypatch):
    def configs(name):
        return [config(store, tmp_path / f"{name}{k}", k=k, checkpoint_every_steps=10) for k in (2, 4)]

    train.run_sweep(configs("whole"))
    saves, undisturbed = [], TrainingState.save

    def save(self, step, tree):
        saves.append(step)
        if len(saves) == 4:  # the second SAE's at step 20
            raise Interrupted
        undisturbed(self, step, tree)

    monkeypatch.setattr(TrainingState, "save", save)
    with pytest.raises(Interrupted):
        train.run_sweep(configs("killed"))
    assert saves == [10, 10, 20, 20]
    monkeypatch.setattr(TrainingState, "save", undisturbed)
    read, reading = [], RowReader.batch
    monkeypatch.setattr(RowReader, "batch", lambda self, step, rows: read.append(step) or reading(self, step, rows))
    train.run_sweep(configs("killed"))
    assert read == list(range(10, STEPS)), "both go on from the step that both have"
    for k in (2, 4):
        assert sae_bytes(tmp_path / f"killed{k}") == sae_bytes(tmp_path / f"whole{k}")


def test_one_that_diverges_does_not_stop_the_others(store, tmp_path):
    point = RELU | {"sparsity_coefficient": 0.1}
    configs = [config(store, tmp_path / f"{rate}", **point | {"learning_rate": rate}) for rate in (3e-3, 1e30)]
    with pytest.raises(SaexError, match=r"1e\+30: the (loss|gradient) is (nan|inf) at step \d+: training has diverged"):
        train.run_sweep(configs)
    assert read_sae(str(tmp_path / "0.003")).cfg["architecture"] == "standard"
    assert not (tmp_path / "1e+30" / "manifest.json").exists()
