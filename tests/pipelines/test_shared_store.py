"""Several machines on one store, as they are started by hand: processes that share nothing but a folder."""

import os
import subprocess
import time

import pytest
import tiny_run

from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import freed_below

ROOM = 4  # shards
SHARD_BYTES = 24 * 32 * tiny_run.WIDTH * 2
SETTINGS = ("train.rows=4096", "train.batch_rows=128", "train.tranche_shards=2", "train.checkpoint_every_steps=4")
SET = [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return str(tiny_run.write_recipe(tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """What one process after the other makes of it."""
    out = str(tmp_path_factory.mktemp("alone") / "run")
    for command in (["corpus", recipe], ["harvest", recipe], ["train", recipe, "--follow"]):
        done = tiny_run.saex_pipe(*command, "--out", out, *SET)
        assert done.returncode == 0, done.stderr
    return Folder(out)


def start(*arguments):
    return subprocess.Popen(tiny_run.command(*arguments), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("folder", [pytest.param("file", marks=pytest.mark.slow), "s3", "gs"], indirect=True)
def test_a_small_bucket_feeds_a_training_run_while_two_workers_fill_it(recipe, alone, folder):
    out = folder.uri
    done = tiny_run.saex_pipe("corpus", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    room = ["--set", f"harvest.max_store_bytes={ROOM * SHARD_BYTES}"]
    running = [start("harvest", recipe, "--out", out, "--elastic", *room) for _ in range(2)]
    store, most, deadline = Folder(out).child("activations"), 0, time.monotonic() + 280
    while store.read("store.json") is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.append(start("train", recipe, "--out", out, "--follow", *SET))
    while any(process.poll() is None for process in running):
        assert time.monotonic() < deadline
        most = max(most, sum(name.startswith("acts/") and "/c/" in name for name in store.list()))
        time.sleep(0.02)
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    shards = len(alone.child("activations").list("ledger/"))
    assert ROOM < shards == len(store.list("ledger/"))
    assert 0 < most <= ROOM
    assert freed_below(store) >= shards - ROOM
    name = "sae/sae_weights.safetensors"
    assert Folder(out).read(name) == alone.read(name)


def test_shares_are_given_by_option_or_by_the_job(recipe, alone, tmp_path):
    out = str(tmp_path)
    assert tiny_run.saex_pipe("corpus", recipe, "--out", out).returncode == 0
    job = os.environ | {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "2"}
    second = tiny_run.saex_pipe("harvest", recipe, "--out", out, "--worker", "auto", env=job)
    assert (second.returncode, second.stderr.count("worker 1/2: its 3 shards are done; 3 of 7 are in all")) == (0, 1)
    first = tiny_run.saex_pipe("harvest", recipe, "--out", out, "--worker", "0/2")
    assert first.returncode == 0, first.stderr
    for name in alone.child("activations").list():
        if "/c/" in name or name.startswith(("index/", "ledger/")):
            assert Folder(out).read(f"activations/{name}") == alone.read(f"activations/{name}"), name
