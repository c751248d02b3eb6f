"""The train stage on several devices: the same SAE, resumed on more or fewer of them, and what does not divide."""

import jax
import numpy as np
import pytest

from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import devices
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.learner import Learner

SETTINGS = {
    "variant": "relu",
    "sparsity_coefficient": 0.1,
    "latents": 32,
    "average_decay": 0.9,
    "batch_rows": 64,
    "rows": 64 * 8,
    "compute_dtype": "float32",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("toy") / "activations")
    toy.run(ToyConfig(out=out, latents=24, width=12, active=2.0, rows=1024))
    return out


@pytest.fixture
def use(monkeypatch):
    """``use(count)``: train on the first so many devices."""
    return lambda count: monkeypatch.setattr(devices, "available", lambda: jax.devices()[:count])


def config(store, out, **changes):
    return Config.create({"store": store, "out": str(out)} | SETTINGS | changes)


def assert_alike(out, other):
    found, expected = read_sae(str(out)).tensors, read_sae(str(other)).tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = np.linalg.norm(found[name] - tensor) / np.linalg.norm(tensor)
        assert error < 1e-5, name


@pytest.fixture(scope="module")
def on_one(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "sae"
    train.run(config(store, out))
    return out


def test_a_run_goes_on_with_other_numbers_of_devices(store, tmp_path, use, on_one, monkeypatch):
    """Eight devices, then two, then one, then eight again, each stopped after a save."""
    for count, model_parallel, stop_at in ((8, 4, 2), (2, 2, 4), (1, 1, 6), (8, 8, None)):
        use(count)
        undisturbed, seen = Learner.step, []

        def step(self, batch, undisturbed=undisturbed, seen=seen, stop_at=stop_at):
            seen.append(1)
            if stop_at is not None and len(seen) > 2:
                raise KeyboardInterrupt
            undisturbed(self, batch)

        with monkeypatch.context() as patched:
            patched.setattr(Learner, "step", step)
            settings = config(store, tmp_path / "sae", model_parallel=model_parallel, checkpoint_every_steps=2)
            if stop_at is None:
                train.run(settings)
            else:
                with pytest.raises(KeyboardInterrupt):
                    train.run(settings)
        assert len(seen) == (2 if stop_at is None else 3), "it goes on from the step that was saved last"
    assert_alike(tmp_path / "sae", on_one)
