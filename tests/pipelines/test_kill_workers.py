"""Elastic workers and a trainer that follows them, each killed at random moments and started again."""

import random
import signal
import time

import pytest
import tiny_run
from processes import fork_command

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import freed_below

ROOM = 4 * 24 * 32 * tiny_run.WIDTH * 2  # bytes of four shards
SETTINGS = ("train.rows=4096", "train.batch_rows=128", "train.tranche_shards=2", "train.checkpoint_every_steps=4")
KILLS = 6


class Role:
    """One command, started again whenever it was killed."""

    def __init__(self, name, arguments, folder):
        self.name, self.arguments, self.output = name, arguments, folder / name
        self.starts, self.kills = 0, 0
        self.start()

    def start(self):
        self.process = fork_command(self.arguments, self.output)
        self.starts += 1

    def kill(self):
        self.process.kill()
        self.process.join()
        assert self.process.exitcode in (-signal.SIGKILL, 0), self.said()
        if self.process.exitcode:
            self.kills += 1
            self.start()

    def said(self):
        return f"{self.name}: " + self.output.with_name(f"{self.name}.stderr").read_text()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return str(tiny_run.write_recipe(tmp_path_factory.mktemp("recipe")))


def run(folder, name, *arguments):
    process = fork_command([*arguments], folder / name)
    process.join(300)
    assert process.exitcode == 0, (folder / f"{name}.stderr").read_text()


def options(*settings):
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """What one process after the other makes of it, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, "corpus", "corpus", recipe, "--out", str(folder))
    run(folder, "harvest", "harvest", recipe, "--out", str(folder))
    run(folder, "train", "train", recipe, "--out", str(folder), "--follow", *options(*SETTINGS))
    return folder


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("room", [False, True], ids=["", "little room"])
def test_workers_and_a_follower_killed_at_random_moments(recipe, alone, tmp_path, room, seed):
    chance, out = random.Random(seed), tmp_path / "run"
    run(tmp_path, "corpus", "corpus", recipe, "--out", str(out))
    store = Folder(str(out / "activations"))
    freed = options(f"harvest.max_store_bytes={ROOM}") if room else []
    harvest = ["harvest", recipe, "--out", str(out), "--elastic", *options("harvest.lease_seconds=0.5"), *freed]
    roles = [Role(f"worker {number}", harvest, tmp_path) for number in range(2)]
    while not store.list("claims/"):
        assert any(role.process.is_alive() for role in roles), [role.said() for role in roles]
        time.sleep(0.001)
    roles[0].kill()  # one at least while shards are being made
    train = ["train", recipe, "--out", str(out), "--follow", *options(*SETTINGS)]
    roles.append(Role("follower", train, tmp_path))
    for _ in range(KILLS):
        time.sleep(chance.uniform(0, 1.2))
        if alive := [role for role in roles if role.process.is_alive()]:
            chance.choice(alive).kill()
    for role in roles:
        role.process.join(120)
        assert role.process.exitcode == 0, role.said()
    assert sum(role.kills for role in roles) > 0

    whole = Folder(str(alone / "activations"))
    assert {name: store.read(name) for name in store.list("ledger/")} == {
        name: whole.read(name) for name in whole.list("ledger/")
    }
    if room:
        assert freed_below(store) > 0
    else:
        for array in ("acts", "keep", "tokens"):
            names = [name for name in whole.list(array) if "/c/" in name]
            assert {name: store.read(name) for name in names} == {name: whole.read(name) for name in names}
        assert ActivationStore(store.uri).rows == ActivationStore(whole.uri).rows
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (out / "sae" / name).read_bytes() == (alone / "sae" / name).read_bytes(), [role.kills for role in roles]
