"""Several workers on one store: fixed shares, claims, and what becomes of those that die or come late."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from small_store import SmallStore

from saex_pipe.common.errors import InputError, ShareDone, Superseded
from saex_pipe.common.formats import claims
from saex_pipe.common.formats.activations import ActivationStore, ActivationWriter
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import freed_below, release_shards
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.preemption import StopRequest
from saex_pipe.common.worker import Share
from saex_pipe.stages.corpus import run as corpus
from saex_pipe.stages.corpus.config import Config as CorpusConfig
from saex_pipe.stages.harvest import run as harvest
from saex_pipe.stages.harvest import work as work_module
from saex_pipe.stages.harvest.config import Config
from saex_pipe.stages.harvest.work import Work

WINDOWS = 80
SETTINGS = {
    "taps": [tiny_run.TAP, "blocks.1.mlp_out"],
    "tap_dtypes": ["blocks.*.mlp_out=int8"],
    "compute_dtype": "float32",
    "batch_windows": 8,
    "shard_windows": 8,
    "chunk_windows": 4,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("harvest")
    model = tiny_run.write_model(place / "model")
    source = tiny_run.write_corpus(place / "text.jsonl.gz")
    out = str(place / "corpus")
    settings = {"window_length": 32, "max_tokens": WINDOWS * 32, "holdout_fraction": 0.0}
    corpus.run(CorpusConfig.create({"source": [str(source)], "tokenizer": str(model), "out": out} | settings))
    return {"model": str(model), "tokens": out}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(work_module, "_POLL_SECONDS", 0.05)


def run(inputs, out, **changes):
    return harvest.run(Config.create(inputs | SETTINGS | {"out": str(out)} | changes))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What one worker makes of it, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "activations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        run(inputs, out)
    return out


def data_of(out):
    """Every object but those that say when and by whom."""
    skipped = ("manifest.json", "metrics", "claims/", "ledger/")
    names = [name for name in Folder(str(out)).list() if not name.startswith(skipped)]
    return {name: (Path(out) / name).read_bytes() for name in names}


def check_same(out, whole):
    assert data_of(out) == data_of(whole)
    folders = Folder(str(out)), Folder(str(whole))
    assert Manifest.read(folders[0]).contents == Manifest.read(folders[1]).contents
    assert Manifest.read(folders[0]).digest == Manifest.read(folders[1]).digest


def test_taps_are_stored_in_their_own_types(whole):
    store = ActivationStore(str(whole), ("blocks.1.mlp_out", tiny_run.TAP))
    assert store.info.dtypes == {tiny_run.TAP: "bfloat16", "blocks.1.mlp_out": "int8"}
    assert 0 < store.manifest.contents["added_error"]["blocks.1.mlp_out"] < 1e-4
    channels = store.info.channels["blocks.1.mlp_out"]
    rows_BD = store.acts("blocks.1.mlp_out", range(64))[store.keep(range(64))]  # those it was calibrated on
    np.testing.assert_allclose(rows_BD.mean(axis=0), channels.mean_D, atol=0.01 * channels.std_D.max())
    np.testing.assert_allclose(rows_BD.std(axis=0), channels.std_D, rtol=0.02)


def test_fixed_shares_give_the_store_of_one_worker(inputs, whole, tmp_path):
    out = tmp_path / "a"
    with pytest.raises(ShareDone, match="worker 1/3: its 3 shards are done; 3 of 10 are in all"):
        run(inputs, out, worker="1/3")
    with pytest.raises(ShareDone, match="6 of 10"):
        run(inputs, out, worker="2/3")
    assert run(inputs, out, worker="0/3") is not None
    check_same(out, whole)
    assert {path.name for path in out.glob("metrics*")} == {f"metrics-{n}-of-3.jsonl" for n in range(3)}


def test_a_lone_elastic_worker_makes_everything(inputs, whole, tmp_path):
    run(inputs, tmp_path / "a", elastic=True)
    check_same(tmp_path / "a", whole)
    states = [json.loads(path.read_text()) for path in (tmp_path / "a" / "claims").iterdir()]
    assert len(states) == 10
    assert all("finished" in state for state in states)


SCRIPT = """
import json, os, signal, sys
import saex_pipe.common.formats.activations as activations
from saex_pipe.stages.harvest import run
from saex_pipe.stages.harvest.config import Config

settings, die_in = json.loads(sys.argv[1]), int(sys.argv[2])
write = activations.ActivationWriter.write_shard

def dying(writer, windows, *rest, **conditions):
    if windows.start == die_in * 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(writer, windows, *rest, **conditions)

activations.ActivationWriter.write_shard = dying
run.run(Config.create(settings))
"""


def test_a_worker_that_is_killed_delays_its_shards_only(inputs, whole, tmp_path):
    settings = inputs | SETTINGS | {"out": str(tmp_path / "a"), "elastic": True, "lease_seconds": 2.0}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    start = [sys.executable, "-c", SCRIPT, json.dumps(settings)]
    doomed = subprocess.Popen([*start, "2"], env=environment)
    assert doomed.wait(60) == -signal.SIGKILL
    held = [path for path in (tmp_path / "a" / "claims").glob("*.json") if "worker" in json.loads(path.read_text())]
    assert held, "it died with claims in its hands"
    workers = [subprocess.Popen([*start, "-1"], env=environment) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    check_same(tmp_path / "a", whole)


class Clock:
    """Stands in for the time of this machine: it passes only where workers wait for each other."""

    def __init__(self, waiting):
        self.now, self.waiting = 0.0, waiting

    def monotonic(self):
        return self.now

    def sleep(self, _):
        self.waiting(self.now)
        self.now += 100.0


def test_all_but_the_shards_of_a_dead_worker_are_made_before_its_lease_is_over(inputs, whole, tmp_path, monkeypatch):
    out, lease = tmp_path / "a", 1000.0
    settings = inputs | SETTINGS | {"out": str(out), "elastic": True, "lease_seconds": lease}
    doomed = [sys.executable, "-c", SCRIPT, json.dumps(settings), "2"]
    assert subprocess.run(doomed, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=60).returncode == -signal.SIGKILL
    states = {int(path.stem): json.loads(path.read_text()) for path in (out / "claims").glob("*.json")}
    held = {shard for shard, state in states.items() if "worker" in state}
    assert 2 in held
    assert len(held) < 5, "it claims no more than it has under way"
    finished = {}

    def note(now):
        finished[now] = {int(path.stem) for path in (out / "ledger").glob("*.json")}

    clock = Clock(note)
    monkeypatch.setattr(claims, "time", clock)
    monkeypatch.setattr(work_module, "time", clock)
    run(inputs, out, elastic=True)
    others = set(range(10)) - held
    assert finished == dict.fromkeys(np.arange(0, lease, 100.0), others), "made at once; the lease is waited for after"
    check_same(out, whole)


CLOCKS = """
import sys, time
clocks, ahead = (time.time, time.monotonic), float(sys.argv[3])
time.time, time.monotonic = lambda: clocks[0]() + ahead, lambda: clocks[1]() + ahead
"""
COUNT = """
print(len(made))
"""


def test_workers_whose_clocks_are_an_hour_apart_make_every_shard_once(inputs, whole, tmp_path):
    settings = inputs | SETTINGS | {"out": str(tmp_path / "a"), "elastic": True, "lease_seconds": 60.0}
    counting = SCRIPT.replace("def dying(", "made = []\n\ndef dying(").replace(
        "    return write(", "    made.append(windows.start)\n    return write("
    )
    start = [sys.executable, "-c", CLOCKS + counting + COUNT, json.dumps(settings), "-1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*start, ahead], **pipes) for ahead in ("0", "3600")]
    made = [int(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
    assert sum(made) == 10
    check_same(tmp_path / "a", whole)


class Watched(SmallStore):
    """A store with two elastic workers, whose claims last as long as the test says."""

    def worker(self, name, lease, share=None):
        output = type("Output", (), {"folder": self.folder, "finished_shards": self.finished})()
        writer, stop = ActivationWriter(self.folder, self.info), StopRequest()
        return Work(output, writer, worker=name, share=share, lease_seconds=lease, room=None, stop=stop)

    def finished(self):
        return {int(name[7:13]) for name in self.folder.list("ledger/")}

    def write_by(self, worker, shard, shift, before=lambda: None):
        windows = self.shards[shard]
        part = slice(windows.start, windows.stop)

        def write(over):
            before()
            acts = {"a": self.acts_NLD[part] + shift}
            return worker._writer.write_shard(windows, self.tokens_NL[part], self.keep_NL[part], acts, over=over)

        worker.write(shard, write)


def test_a_late_writer_cannot_touch_what_its_successor_has_committed(folder):
    store = Watched(folder.uri, windows=4).start()
    late, next_one = store.worker("late", 0.05), store.worker("next", 60.0)
    assert list(late.round()) == [0]

    def meanwhile():  # the late one has computed for longer than its lease, and knows nothing of it
        assert list(next_one.round()) == []
        time.sleep(0.06)
        assert list(next_one.round()) == [0]
        store.write_by(next_one, 0, shift=0)

    store.write_by(late, 0, shift=1, before=meanwhile)
    assert store.finished() == {0}
    store.ledger[0] = json.loads(store.folder.read("ledger/000000.json"))
    found = ActivationStore(store.finish().uri).acts("a", range(4))
    np.testing.assert_array_equal(found, store.acts_NLD)


def test_a_successor_writes_over_what_a_late_writer_left(folder):
    store = Watched(folder.uri, windows=4).start()
    late, next_one = store.worker("late", 0.05), store.worker("next", 60.0)
    assert list(late.round()) == [0]
    list(next_one.round())
    time.sleep(0.06)
    assert list(next_one.round()) == [0]
    once = iter([lambda: store.write_by(late, 0, shift=1)])
    store.write_by(next_one, 0, shift=0, before=lambda: next(once, lambda: None)())
    store.ledger[0] = json.loads(store.folder.read("ledger/000000.json"))
    found = ActivationStore(store.finish().uri).acts("a", range(4))
    np.testing.assert_array_equal(found, store.acts_NLD)


def test_of_two_processes_of_one_share_only_the_later_one_is_believed(folder):
    store = Watched(folder.uri, windows=12).start()
    old = store.worker("old", 1000.0, Share(0, 1))
    shards = old.round()
    assert [next(shards), next(shards)] == [0, 1]
    store.write_by(old, 0, shift=0)

    def meanwhile():  # the machine that was thought to be gone comes back to a shard that it was about to write
        new = store.worker("new", 1000.0, Share(0, 1))
        assert list(new.round()) == [1, 2], "at once, not after the lease"
        for shard in (1, 2):
            store.write_by(new, shard, shift=0)

    store.write_by(old, 1, shift=1, before=meanwhile)
    with pytest.raises(Superseded, match="new has started on the same share"):
        next(shards)
    assert store.finished() == {0, 1, 2}
    store.ledger = {shard: json.loads(store.folder.read(f"ledger/{shard:06d}.json")) for shard in range(3)}
    np.testing.assert_array_equal(ActivationStore(store.finish().uri).acts("a", range(12)), store.acts_NLD)


@pytest.mark.parametrize("worker", [None, "0/1"])
def test_what_follows_a_killed_process_waits_for_no_lease(inputs, whole, tmp_path, monkeypatch, worker):
    settings = inputs | SETTINGS | {"out": str(tmp_path / "a"), "worker": worker, "lease_seconds": 1000.0}
    doomed = [sys.executable, "-c", SCRIPT, json.dumps(settings), "2"]
    assert subprocess.run(doomed, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=60).returncode == -signal.SIGKILL
    held = [path for path in (tmp_path / "a" / "claims").glob("*.json") if "worker" in json.loads(path.read_text())]
    assert held, "it died with claims in its hands"

    def sleep(_):
        raise AssertionError("waited for a process that is dead")

    monkeypatch.setattr(work_module.time, "sleep", sleep)
    run(inputs, tmp_path / "a", worker=worker)
    check_same(tmp_path / "a", whole)
    assert list((tmp_path / "a" / "workers").iterdir()) == []


def test_what_is_being_written_when_it_is_interrupted_is_kept(inputs, whole, tmp_path, monkeypatch):
    write_shard, begun = ActivationWriter.write_shard, threading.Event()

    def slow(*given, **conditions):
        begun.set()
        time.sleep(0.5)
        return write_shard(*given, **conditions)

    def empty_or_interrupted(*given):
        if begun.is_set():
            raise KeyboardInterrupt
        return empty(*given)

    empty = harvest.Shard.empty
    monkeypatch.setattr(ActivationWriter, "write_shard", slow)
    with monkeypatch.context() as patch:
        patch.setattr(harvest.Shard, "empty", empty_or_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, tmp_path / "a")
    assert [path.stem for path in (tmp_path / "a" / "ledger").iterdir()] == ["000000"]
    assert all("finished" in json.loads(path.read_text()) for path in (tmp_path / "a" / "claims").iterdir())
    run(inputs, tmp_path / "a")
    check_same(tmp_path / "a", whole)


# Takes half a second a shard; from the second one on the first process waits until another has started.
SLOW = """
import time
from pathlib import Path
fast, place = activations.ActivationWriter.write_shard, Path(json.loads(sys.argv[1])["out"], "workers", "0-of-1.json")
def slow(writer, windows, *rest, **conditions):
    time.sleep(0.5)
    name = globals().setdefault("name", place.read_bytes())
    while {waits} and windows.start and place.read_bytes() == name:
        time.sleep(0.01)
    return fast(writer, windows, *rest, **conditions)
activations.ActivationWriter.write_shard = slow
"""


def test_the_same_command_started_twice_goes_on_in_the_second_and_ends_the_first(inputs, whole, tmp_path):
    out = tmp_path / "a"
    settings = json.dumps(inputs | SETTINGS | {"out": str(out)})
    pipes = {"env": os.environ | {"JAX_PLATFORMS": "cpu"}, "stderr": subprocess.PIPE, "text": True}
    scripts = [SCRIPT.replace("run.run(", SLOW.format(waits=waits) + "run.run(") for waits in (True, False)]
    first = subprocess.Popen([sys.executable, "-c", scripts[0], settings, "-1"], **pipes)
    deadline = time.monotonic() + 60
    while not list((out / "ledger").glob("*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = subprocess.Popen([sys.executable, "-c", scripts[1], settings, "-1"], **pipes)
    said = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert second.returncode == 0, said[1]
    assert first.returncode != 0
    assert "has started on the same share (0-of-1) and goes on with it" in said[0]
    check_same(out, whole)


def test_workers_of_a_job_keep_logs_of_their_own(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setenv("JOB_COMPLETIONS", "3")
    with pytest.raises(ShareDone):
        run(inputs, tmp_path / "a", worker="auto")
    assert [path.name for path in (tmp_path / "a").glob("metrics*")] == ["metrics-1-of-3.jsonl"]


def test_a_harvest_waits_until_its_follower_has_freed_room(inputs, whole, tmp_path, monkeypatch):
    shard_bytes = ActivationStore(str(whole)).info.shard_bytes
    folder, sizes = Folder(str(tmp_path / "a")), []

    def consume(seconds):  # what a follower does while the harvest waits
        finished = [int(name[7:13]) for name in folder.list("ledger/")]
        sizes.append(sum(name.startswith("acts/") and "/c/" in name for name in folder.list()))
        release_shards(folder, ActivationStore(str(whole)).info, "one", max(finished) + 1)

    monkeypatch.setattr(work_module.time, "sleep", consume)
    run(inputs, tmp_path / "a", max_store_bytes=3 * shard_bytes)
    assert sizes
    assert max(sizes) <= 2 * 3
    assert freed_below(folder) == 9
    with pytest.raises(InputError, match="followers have freed its first 9 shards; harvest again"):
        ActivationStore(str(tmp_path / "a"))


def test_room_cannot_be_bounded_later(inputs, whole, tmp_path):
    out = tmp_path / "a"
    with pytest.raises(ShareDone):
        run(inputs, out, worker="0/2")
    with pytest.raises(InputError, match=r"max_store_bytes is set, and .* was begun without it: its followers free"):
        run(inputs, out, max_store_bytes=10**9)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"worker": "2/2"}, "worker 2 of 2 does not exist"),
        ({"worker": "0/2", "elastic": True}, "worker and elastic contradict each other"),
        ({"tap_dtypes": ["blocks.1.mlp_out=int4"]}, "'blocks.1.mlp_out=int4'; write PATTERN=DTYPE"),
        ({"tap_dtypes": ["embed=int8"]}, "'embed=int8', which is none of the taps; harvest.taps holds"),
        ({"max_store_bytes": 10}, "max_store_bytes = 10 does not hold two shards"),
    ],
)
def test_settings_that_make_no_sense_are_refused(inputs, tmp_path, changes, line):
    with pytest.raises(InputError, match=line):
        run(inputs, tmp_path / "a", **changes)


HOSTS = """
import json, sys
import jax
from saex_pipe.common.errors import ShareDone
from saex_pipe.stages.harvest import run
from saex_pipe.stages.harvest.config import Config

jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
try:
    run.run(Config.create(json.loads(sys.argv[1]) | {"worker": "jax"}))
except ShareDone as done:
    print(done)
"""


def test_hosts_of_one_computation_write_their_own_shards(inputs, whole, tmp_path):
    settings = json.dumps(inputs | SETTINGS | {"out": str(tmp_path / "a")})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOSTS, settings, address]
    hosts = [subprocess.Popen([*command, str(n)], env=environment, stdout=subprocess.PIPE, text=True) for n in range(2)]
    try:
        said = [host.communicate(timeout=90)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    assert [host.returncode for host in hosts] == [0, 0]
    assert all("its 5 shards are done" in line or not line for line in said)
    check_same(tmp_path / "a", whole)
