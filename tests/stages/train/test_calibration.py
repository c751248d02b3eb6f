"""A BatchTopK SAE leaves training with the L0 it had there, whatever happened on the way."""

import numpy as np
import pytest

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import SAE_FILES, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import calibration
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config

SETTINGS = {"variant": "batchtopk", "latents": 32, "k": 2, "batch_rows": 128, "rows": 128 * 40}


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def test_the_saved_sae_has_the_l0_of_training_also_after_a_kill_while_thresholds_are_set(tmp_path, monkeypatch):
    store = str(tmp_path / "activations")
    toy.run(ToyConfig(out=store, latents=24, width=12, active=2.0, rows=4096))

    def run(out):
        return train.run(Config.create({"store": store, "out": str(tmp_path / out), "micro_batches": 2} | SETTINGS))

    run("whole")
    saved = read_sae(str(tmp_path / "whole"))
    assert saved.cfg["architecture"] == "jumprelu"
    assert np.ptp(saved.tensors["threshold"]) == 0 < saved.tensors["threshold"][0]
    rows_BD = ActivationStore(store, ("toy",)).acts("toy", range(32)).reshape(-1, 12)
    codes_BF = np.asarray(Sae(*from_saelens(saved.cfg, saved.tensors)).encode(rows_BD))
    assert (codes_BF > 0).sum(axis=1).mean() == pytest.approx(2, abs=0.05)

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "calibrated", killed)
        with pytest.raises(Killed):
            run("killed")
    assert Folder(str(tmp_path / "killed")).read("sae_weights.safetensors") is None
    run("killed")
    whole, again = (Folder(str(tmp_path / out)) for out in ("whole", "killed"))
    assert all(whole.read(name) == again.read(name) for name in SAE_FILES if name != "saex.json")
