"""The train stage on several devices: the same SAE, resumed on more or fewer of them, and what does not divide."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
import train_in_processes
from object_stores import fresh
from processes import run_processes

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.preemption import StopRequest
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import devices, processes
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.devices import Devices
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


def test_two_processes_train_one_sae_together(store, tmp_path, on_one, use):
    """Each reads its part of every batch; the first one writes; one process goes on where the two were."""
    out = tmp_path / "sae"
    settings = SETTINGS | {"store": store, "out": str(out), "model_parallel": 4, "checkpoint_every_steps": 4}
    reports = trained_by_two(settings)
    assert [report["rows"] for report in reports] == [[[0, 32]], [[32, 64]]]
    assert [(report["steps"], report["devices"]) for report in reports] == [([8], 8)] * 2
    assert_alike(out, on_one)
    written = (out / "metrics.jsonl").read_text().splitlines()
    rows = [event["rows"] for event in map(json.loads, written) if "rows" in event]
    assert rows[-1] == SETTINGS["rows"]
    assert rows == sorted(set(rows)), "only one of the two logs"
    assert sorted(int(path.name) for path in (out / "state").iterdir()) == [4, 8]
    use(2)
    for name in ("manifest.json", "state/8"):  # as if both had been killed after step 4
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    manifest = train.run(config(store, out, model_parallel=2))
    assert manifest.timings["resumed"] == 1
    assert_alike(out, on_one)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_processes_that_share_nothing_but_a_bucket_go_on_from_there(store, stores, kind, on_one, use):
    """Killed in the last save, of which one of the two had written its part: from the save before, bit for bit.

    And one process goes on from what the two have saved, and two from what the one has.
    """
    folder = Folder(fresh(stores[kind]))
    settings = SETTINGS | {"store": store, "out": folder.uri, "model_parallel": 4, "checkpoint_every_steps": 3}
    trained_by_two(settings)
    saved = {name.split("/")[1] for name in folder.list("state/")}
    assert saved == {"000000000006", "000000000008"}
    arrays = [name for name in folder.list("state/000000000006/") if "/d/" in name and "ocdbt.process_" in name]
    assert {name.partition("ocdbt.process_")[2][0] for name in arrays} == {"0", "1"}, "each saves a part"
    assert_alike(folder.uri, on_one)
    weights = folder.read("sae_weights.safetensors")

    def kill_in_the_last_save():
        folder.delete("manifest.json")
        folder.delete("sae_weights.safetensors")
        folder.delete("state/000000000008/parts/1")

    kill_in_the_last_save()
    assert [report["steps"] for report in trained_by_two(settings)] == [[8], [8]]
    assert json.loads(folder.read("manifest.json"))["timings"]["resumed"] == 1
    assert folder.read("sae_weights.safetensors") == weights
    kill_in_the_last_save()
    use(2)
    manifest = train.run(config(store, folder.uri, model_parallel=2, checkpoint_every_steps=3))
    assert manifest.timings["resumed"] == 1
    assert folder.list("state/000000000008/parts/") == ["state/000000000008/parts/0-of-1"]
    assert_alike(folder.uri, on_one)
    weights = folder.read("sae_weights.safetensors")
    folder.delete("manifest.json")
    folder.delete("sae_weights.safetensors")
    trained_by_two(settings)
    assert folder.read("sae_weights.safetensors") == weights


def test_processes_save_several_saes_at_a_time(store, tmp_path, on_one):
    """In every step, so that saves under way overlap: none takes another's meeting for its own."""
    outs = [tmp_path / name for name in "abc"]
    reports = trained_by_two(
        *(SETTINGS | {"store": store, "out": str(out), "checkpoint_every_steps": 1} for out in outs)
    )
    assert [report["steps"] for report in reports] == [[8, 8, 8]] * 2
    for out in outs:
        assert_alike(out, on_one)


def test_a_signal_that_arrives_while_processes_agree_is_not_lost(monkeypatch):
    """Where training waits for its steps, which is where it spends most of its time."""
    stop = StopRequest()

    def gathered(value):
        stop.signal = signal.SIGTERM
        return np.stack([np.zeros(2, np.int32), value])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    assert [processes.agreed_to_stop(stop, may_ask=ask) for ask in (True, False, True)] == [False, False, True]
    stop.signal = None
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda value: np.stack([value, [signal.SIGTERM, 0]])
    )
    assert processes.agreed_to_stop(stop, may_ask=True)
    assert stop.signal == signal.SIGTERM, "one's signal is that of all"


def test_processes_wait_together_for_rows_that_one_of_them_lacks(monkeypatch):
    others = iter([[0, 1], [0, 0], [0, 1], [signal.SIGTERM, 1]])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda value: np.stack([value, np.array(next(others))])
    )
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.0)
    stop = StopRequest()
    assert processes.arrived(lambda: False, stop)
    assert len(list(others)) == 2, "as soon as no one lacks any"
    others = iter([[0, 1], [signal.SIGTERM, 1]])
    assert not processes.arrived(lambda: False, stop)
    assert stop.signal == signal.SIGTERM
    stop.signal, others = None, iter([[0, 0], [0, 0]])
    lacking = iter([True, False])
    assert processes.arrived(lambda: next(lacking), stop)
    assert not list(others)


def trained_by_two(*settings):
    """What two processes report that train the SAEs of ``settings`` together."""
    return run_processes(train_in_processes.__file__, 2, json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_parallel": 3}, "model axis of 3 does not divide 8 devices; use one of 1, 2, 4, 8"),
        ({"model_parallel": 8, "latents": 20}, "train.model_parallel = 8 does not divide 20 latents; use 1 or 2 or 4,"),
        ({"batch_rows": 36}, "train.batch_rows / train.micro_batches = 36 does not divide over 8 devices of the data"),
        ({"micro_batches": 16}, "train.batch_rows / train.micro_batches = 4 does not divide over 8 devices of the"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(store, tmp_path, use, changes, message):
    use(8)
    with pytest.raises(InputError) as caught:
        train.run(config(store, tmp_path / "sae", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "sae").exists()


def test_a_batch_is_read_from_the_first_row_to_the_last_of_this_process(store, use):
    use(8)
    placed = Devices.of(config(store, "unused", model_parallel=2), 32)
    rows_BD = np.arange(64 * 12, dtype=np.float32).reshape(64, 12)
    assert (placed.rows.start, placed.rows.stop) == (0, 64)
    array = placed.placed(rows_BD)
    assert {shard.data.shape for shard in array.addressable_shards} == {(16, 12)}
    np.testing.assert_array_equal(array, rows_BD)
