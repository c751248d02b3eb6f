"""Optimiser, precision, averages and resampling as settings of a run: resumed to the bit, and what is saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import SAE_FILES, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.common.sae.variants import build
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import devices
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.learner import Learner, optimiser_of, step_settings

STEPS = 30
SETTINGS = {"latents": 32, "k": 2, "batch_rows": 128, "rows": 128 * STEPS, "compute_dtype": "float32"}
COMPACT = {
    **{"optimiser": "adam_8bit", "weight_dtype": "bfloat16", "micro_batches": 2, "average_decay": 0.9},
    **{"latents": 96, "dead_after_rows": 128},  # some did not fire on the last batch
    **{"resample_every_rows": 1280, "resample_until_rows": 2600, "resample_from_rows": 1000},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "activations")
    toy.run(ToyConfig(out=out, latents=24, width=12, active=2.0, rows=8192))
    return out


@pytest.fixture
def one_device(monkeypatch):
    """In place of the eight that the tests have."""
    monkeypatch.setattr(devices, "available", lambda: jax.devices()[:1])


def config(store, out, **changes):
    return Config.create({"store": store, "out": str(out), "learning_rate": 1e-3} | SETTINGS | changes)


def run(store, out, **changes):
    return train.run(config(store, out, **changes))


def sae_bytes(out):
    return {name: Folder(str(out)).read(name) for name in SAE_FILES}


class Interrupted(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def test_a_killed_run_resumes_to_the_same_bits(one_device, store, tmp_path, monkeypatch):
    run(store, tmp_path / "whole", **COMPACT)
    undisturbed = RowReader.batch

    def batch(self, step, *rest):
        # A step is asked for in order once training comes to it; resampling before step 10 has read it before.
        if step == 25:
            raise Interrupted
        return undisturbed(self, step, *rest)

    monkeypatch.setattr(RowReader, "batch", batch)
    with pytest.raises(Interrupted):
        run(store, tmp_path / "killed", checkpoint_every_steps=10, **COMPACT)
    monkeypatch.setattr(RowReader, "batch", undisturbed)
    run(store, tmp_path / "killed", checkpoint_every_steps=10, **COMPACT)
    assert sae_bytes(tmp_path / "killed") == sae_bytes(tmp_path / "whole")


def test_resampling_comes_when_it_is_due(store, tmp_path, monkeypatch):
    """After 1,280 and 2,560 of 3,840 rows; not after 3,840 and never before the first step."""
    assert [step for step in range(STEPS) if config(store, tmp_path, **COMPACT).resamples_before(step)] == [10, 20]
    halfway = config(store, tmp_path, resample_every_rows=300)
    assert [step for step in range(STEPS) if halfway.resamples_before(step)] == [3, 5, 8, 10, 12, 15]
    assert not any(config(store, tmp_path).resamples_before(step) for step in range(STEPS))
    dead, resample = {}, Learner.resample

    def watched(self, step, reader):
        before = np.asarray(self.state(0)[0].rows_since_fired_F) >= 128
        resample(self, step, reader)
        dead[step] = before.sum(), (np.asarray(self.state(0)[0].rows_since_fired_F) >= 128).sum()

    monkeypatch.setattr(Learner, "resample", watched)
    run(store, tmp_path / "sae", **COMPACT)
    assert list(dead) == [10, 20]
    assert dead[10][0] > 0
    assert [after for _, after in dead.values()] == [0, 0]


def test_the_averages_are_saved_where_they_are_kept(one_device, store, tmp_path):
    """Means of decoder rows of length 1 are shorter."""
    run(store, tmp_path, average_decay=0.9, normalise="none", learning_rate=1e-2)
    assert np.linalg.norm(read_sae(str(tmp_path)).tensors["W_dec"], axis=1).min() < 0.999


def test_settings_reach_optimiser_and_step(store, tmp_path):
    changes = {
        **{"optimiser": "signum", "momentum": 0.5, "beta_square": 0.9, "epsilon": 1e-8, "clip_norm": 3.0},
        **{"learning_rate_warmup": 4, "learning_rate_decay": 0.25, "sparsity_warmup": 0.5, "micro_batches": 4},
    }
    given = config(store, tmp_path, **changes)
    optimiser = optimiser_of(given)
    assert (optimiser.name, optimiser.momentum, optimiser.beta_square) == ("signum", 0.5, 0.9)
    assert (optimiser.epsilon, optimiser.clip_norm) == (1e-8, 3.0)
    rates = [float(optimiser.schedule.factor(100, jnp.asarray(step))) for step in (0, 3, 50, 99)]
    assert rates == pytest.approx([0.25, 1, 1, 0.04])
    settings = step_settings(given, build("relu", 8, sparsity_coefficient=1.0), 100, None)
    assert settings.micro_batches == 4
    assert [float(settings.sparsity_schedule(jnp.float32(done))) for done in (0, 0.25, 0.75)] == [0, 0.5, 1]


def test_the_penalty_rises_as_the_variant_is_published_with_unless_it_is_set(store, tmp_path):
    relu, gated = (build(name, 8, sparsity_coefficient=1.0) for name in ("relu", "gated"))
    unset = config(store, tmp_path)
    schedule = step_settings(unset, relu, 1000, None).sparsity_schedule
    assert [round(float(schedule(jnp.float32(done))), 5) for done in (0, 0.025, 0.05, 0.5)] == [0, 0.5, 1, 1]
    assert step_settings(unset, gated, 1000, None).sparsity_schedule is None
    assert step_settings(config(store, tmp_path, sparsity_warmup=0.0), relu, 1000, None).sparsity_schedule is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 3}, "train.batch_rows = 128 does not divide into train.micro_batches = 3"),
        ({"optimiser": "adamw"}, "train.optimiser = 'adamw'"),
        ({"clip_norm": 0.0}, "train.clip_norm = 0.0"),
    ],
)
def test_bad_settings_leave_nothing_behind(store, tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        run(store, tmp_path / "sae", **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "sae").exists()


def test_int8_without_its_extra_says_what_to_install(store, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'saex-pipe\[int8\]'"):
        step_settings(config(store, tmp_path, compute_dtype="int8"), build("topk", 8, k=2), 10, None)
