"""A BatchTopK SAE leaves training with the L0 it had there, whatever happened on the way."""

import threading
import time

import numpy as np
import pytest
from small_store import SmallStore, whole_store

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import SAE_FILES, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import Room, freed_below
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.common.sae.variants import build
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import calibration
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.learner import step_settings

SETTINGS = {"variant": "batchtopk", "latents": 32, "k": 2, "batch_rows": 128, "rows": 128 * 40}


@pytest.mark.parametrize("codes", ["auto", "sparse", "dense"])
def test_how_codes_are_multiplied_can_be_set(codes):
    config = Config.create({"store": "s", "out": "o", "codes": codes} | SETTINGS)
    assert step_settings(config, build("batchtopk", 32, k=2), 40, None).compute.codes == codes


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


def test_thresholds_are_set_from_rows_that_a_writer_who_waits_for_room_still_keeps(tmp_path):
    shape = {"windows": 48, "length": 32, "tiling": Tiling(8, 4), "share_kept": 0.9}  # six shards of some 230 rows

    def run(store, out):
        settings = SETTINGS | {"latents": 16, "batch_rows": 32, "rows": 1200, "follow": True, "tranche_shards": 2}
        train.run(Config.create({"store": store.uri, "out": str(tmp_path / out)} | settings))
        return read_sae(str(tmp_path / out)).tensors

    growing = SmallStore(tmp_path / "growing", **shape).start()
    room = Room(growing.folder, growing.info, 4 * growing.info.shard_bytes)

    def write():
        for shard in range(6):
            while not room.has(shard):
                time.sleep(0.01)
            growing.write(shard)

    writer = threading.Thread(target=write)
    writer.start()
    found, expected = run(growing, "followed"), run(whole_store(tmp_path / "whole", **shape), "read whole")
    writer.join(30)
    assert freed_below(growing.folder) == 4  # of whose rows nothing is left
    assert found["threshold"][0] > 0
    np.testing.assert_array_equal(found["threshold"], expected["threshold"])
