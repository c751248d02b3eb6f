"""Killed at any moment, in any stage, a run is finished by the next one, to the same bytes, nothing done twice."""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_run
from processes import fork_command

_FOLDERS = {
    "tiny": ("corpus", "activations", "sae", "scores", "cache", "page"),
    "toy": ("activations", "sae", "scores"),
}


class Chain:
    """A chain, the place it writes to, and what an undisturbed run left there."""

    def __init__(self, name, folder):
        self.name, self.folder, self.out = name, folder, folder / "out"
        folder.mkdir(parents=True, exist_ok=True)
        recipe = ("toy", *tiny_run.TOY) if name == "toy" else (str(tiny_run.write_recipe(folder / "recipe")),)
        self.arguments = ["run", *recipe, "--out", str(self.out)]
        assert self.run() == 0, self.stderr()  # which compiles what all later runs find compiled
        shutil.rmtree(self.out)
        assert self.run() == 0, self.stderr()
        manifests = {at: json.loads((self.out / at / "manifest.json").read_bytes()) for at in self.folders}
        self.seconds = {at: found["timings"]["seconds"] for at, found in manifests.items()}
        self.stages = {at: found["stage"] for at, found in manifests.items()}
        self.result = contents(self.out)
        assert {"sae/sae_weights.safetensors", "scores/scores.json"} <= {*self.result}
        assert not [name for name in self.result if re.search(r"parts/|__lock|tmp|\.saex-new/|\.saex-old/", name)]
        shutil.rmtree(self.out)

    @property
    def folders(self):
        return _FOLDERS[self.name]

    def start(self, *more, before=""):
        return fork_command([*self.arguments, *more], self.folder / "said", before)

    def run(self, *more):
        process = self.start(*more)
        process.join(600)
        return process.exitcode

    def start_and_reach(self, at, seconds, *more):
        """Start, and return after ``seconds`` in the stage that writes to ``at``, or earlier where the run ends."""
        mark, folder = stamp(self.out / at / "started.json"), self.out / at
        process = self.start(*more)
        while process.is_alive() and stamp(folder / "started.json") == mark and not (folder / "manifest.json").exists():
            time.sleep(0.001)
        process.join(seconds)
        return process

    def stderr(self):
        return (self.folder / "said.stderr").read_text()


def stamp(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def contents(out):
    """Every file of a run that must be the same however often it was killed."""
    found = {}
    for path in sorted(p for p in Path(out).rglob("*") if p.is_file()):
        name, data = str(path.relative_to(out)), path.read_bytes()
        if path.name == "manifest.json":
            data = {key: value for key, value in json.loads(data).items() if key not in ("timings", "finished_at")}
        if name.startswith("sae/state/"):
            name, data = "/".join(name.split("/")[:3]), b""  # which checkpoints there are, not how Orbax packs them
        if path.name not in ("metrics.jsonl", "report.html"):  # which tell of times
            found[name] = data
    return found


def finished(out):
    """What is committed, and when: ledger entries, manifests, checkpoints."""
    paths = [p for p in Path(out).rglob("*.json") if p.name == "manifest.json" or p.parent.name == "ledger"]
    return {path: path.stat().st_mtime_ns for path in paths}


def check_kept(before, out, note):
    after = finished(out)
    assert {path: after.get(path) for path in before} == before, note
    return after


def check_result(chain, note):
    result = contents(chain.out)
    assert sorted(result) == sorted(chain.result), note
    assert [name for name in result if result[name] != chain.result[name]] == [], note


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    made = {}

    def chain(name):
        if name not in made:
            made[name] = Chain(name, tmp_path_factory.mktemp(name))
        shutil.rmtree(made[name].out, ignore_errors=True)
        return made[name]

    return chain


@pytest.mark.parametrize(
    ("seed", "moments"), [(0, 2), *(pytest.param(seed, 6, marks=pytest.mark.slow) for seed in range(1, 6))]
)
@pytest.mark.parametrize("name", ["tiny", "toy"])
def test_killed_at_random_moments_in_every_stage(chains, name, seed, moments):
    chain, chance = chains(name), random.Random(seed)
    kept, killed, note = {}, [], ""
    for at, stage in chain.stages.items():
        # The earliest first: one that comes too late, because the machine is less busy now, leaves nothing to kill.
        for seconds in sorted(chance.uniform(0, chain.seconds[at]) for _ in range(moments)):
            process = chain.start_and_reach(at, seconds, "--only", stage)
            process.kill()
            process.join()
            killed += [stage] * (process.exitcode == -signal.SIGKILL)
            note = f"{name}, seed {seed}: last killed {seconds:.3f} s into {stage}"
            assert process.exitcode in (-signal.SIGKILL, 0), note + chain.stderr()
            kept = check_kept(kept, chain.out, note)
        assert chain.run("--only", stage) == 0, note + chain.stderr()
    assert len({*killed}) >= len(chain.stages) - 1, "kills that came too late test nothing"
    assert chain.run() == 0, note + chain.stderr()
    check_kept(kept, chain.out, note)
    check_result(chain, note)


# Writes down which steps are trained.
_RECORD_STEPS = """
from saex_pipe.common.formats.row_reader import RowReader
batch = RowReader.batch
def recorded(reader, step, *options):
    with open({steps!r}, "a") as file:
        print(step, file=file)
    return batch(reader, step, *options)
RowReader.batch = recorded
"""


def test_training_goes_on_from_its_last_checkpoint(chains, tmp_path):
    chain, steps = chains("tiny"), tmp_path / "steps"
    process = chain.start(before=_RECORD_STEPS.format(steps=str(steps)))
    while process.is_alive() and not (chain.out / "sae" / "state" / "60").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "trained to the end before it could be killed"
    first = [int(step) for step in steps.read_text().split()]
    steps.unlink()
    process = chain.start(before=_RECORD_STEPS.format(steps=str(steps)))
    process.join(600)
    second = [int(step) for step in steps.read_text().split()]
    assert second[0] >= 60, f"trained to {first[-1]}, then again from {second[0]}"
    assert second == list(range(second[0], 120))
    check_result(chain, f"trained to {first[-1]}, then from {second[0]}")


# Dies right after the first write of each object or shard that the file ``written`` does not name yet.
_DIE_AFTER_EACH_WRITE = """
import os, signal, sys
from saex_pipe.common.formats.folder import Folder
written = set(open({written!r}).read().splitlines())
def dying(write, name_of):
    def write_and_die(*arguments, **options):
        found = write(*arguments, **options)
        if (name := name_of(*arguments)) not in written:
            with open({written!r}, "a") as file:
                print(name, file=file)
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return write_and_die
from saex_pipe.common.formats import activations
start = activations._Writes.start
def write_object(writes, name, shard):
    start(writes, name, shard)
    writes._finish[-1]()
activations._Writes.start = dying(write_object, lambda writes, name, shard: writes._folder.uri + "/" + name)
Folder.write = dying(Folder.write, lambda folder, name, data: folder.uri + "/" + name)
def claim_of(folder, name, data, _):
    return f"{{folder.uri}}/{{name}}, {{'finished' if b'finished' in data else 'held'}}"
Folder.write_if = dying(Folder.write_if, claim_of)
for module in [module for name, module in sys.modules.items() if name.startswith("saex_pipe.")]:
    if hasattr(module, "write_windows"):
        module.write_windows = dying(module.write_windows, lambda array, windows, _: array.kvstore.url + str(windows))
"""


@pytest.mark.parametrize(
    ("name", "stage", "fewest"),
    [
        ("toy", "toy", 9),
        ("tiny", "corpus", 10),
        *(
            pytest.param("tiny", stage, fewest, marks=pytest.mark.slow)
            for stage, fewest in {"harvest": 32, "train": 5, "evaluate": 4, "cache": 10, "view": 3}.items()
        ),
    ],
)
def test_killed_after_every_single_write(chains, name, stage, fewest, tmp_path):
    chain, written, kept = chains(name), tmp_path / "written", {}
    written.touch()
    if stage not in ("toy", "corpus"):
        for earlier in ("corpus", "harvest", "train", "evaluate", "cache", "view"):
            if earlier == stage:
                break
            assert chain.run("--only", earlier) == 0, chain.stderr()
    before = _DIE_AFTER_EACH_WRITE.format(written=str(written))
    kills = 0
    while True:
        process = chain.start("--only", stage, before=before)
        process.join(600)
        note = f"killed after writing {written.read_text().splitlines()[-1]}"
        kept = check_kept(kept, chain.out, note)
        if process.exitcode != -signal.SIGKILL:
            break
        kills += 1
    assert process.exitcode == 0, note + chain.stderr()
    assert kills >= fewest
    assert chain.run() == 0, chain.stderr()
    check_result(chain, f"{stage} killed after each of {kills} writes")


# Dies right after operation number ``left`` on a folder as a whole: renaming it, or deleting what is in it.
_DIE_DURING_REPLACEMENT = """
import os, signal
left = {left}
def dying(operation):
    def count_and_die(*arguments, **options):
        global left
        if operation is rename and not os.path.isdir(arguments[0]):
            return operation(*arguments, **options)  # a file that takes its place in a folder that grows
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return operation(*arguments, **options)
    return count_and_die
rename = os.rename
os.rename, os.unlink, os.rmdir = dying(os.rename), dying(os.unlink), dying(os.rmdir)
"""


@pytest.mark.parametrize("left", [0, 1, 2, 3, 4, 12])
def test_killed_while_a_forced_result_replaces_the_old_one(chains, left):
    chain = chains("toy")
    assert chain.run("--only", "toy", "--set", "toy.seed=1") == 0
    old = contents(chain.out / "activations")
    process = chain.start("--only", "toy", "--force", before=_DIE_DURING_REPLACEMENT.format(left=left))
    process.join(600)
    assert process.exitcode == -signal.SIGKILL, chain.stderr()
    new = {name.partition("/")[2]: data for name, data in chain.result.items() if name.startswith("activations/")}
    assert any(contents(folder) in (old, new) for folder in chain.out.iterdir()), "a whole result stays"
    assert chain.run("--only", "toy") == 0 if left else chain.run("--only", "toy", "--force") == 0, chain.stderr()
    assert contents(chain.out / "activations") == new
    assert [folder.name for folder in chain.out.iterdir()] == ["activations"]


def test_an_interrupted_replacement_does_not_lose_the_old_result(chains):
    chain = chains("toy")
    assert chain.run("--only", "toy") == 0
    kept = finished(chain.out)
    process = chain.start(
        "--only", "toy", "--force", "--set", "toy.seed=1", before=_DIE_DURING_REPLACEMENT.format(left=1)
    )
    process.join(600)
    assert process.exitcode == -signal.SIGKILL, chain.stderr()
    assert chain.run("--only", "toy") == 0, chain.stderr()
    check_kept(kept, chain.out, "the old settings again")


STOPPED = [
    (signal.SIGTERM, 75, "stopped by SIGTERM with everything finished committed; run the same command again"),
    (signal.SIGINT, 130, "interrupted; what was finished is kept, run the same command again to go on"),
]

# The signal arrives while Beam is running what it was given.
_SIGNAL_IN_A_WORKER = """
import os
from saex_pipe.stages.corpus.work import CorpusWork
texts = CorpusWork._texts
def signalled(work, source):
    os.kill(os.getpid(), {sign})
    return texts(work, source)
CorpusWork._texts = signalled
"""


@pytest.mark.parametrize(("sign", "status", "line"), STOPPED)
def test_asked_to_stop_inside_a_worker_of_beam(chains, sign, status, line):
    chain = chains("tiny")
    process = chain.start("--only", "corpus", before=_SIGNAL_IN_A_WORKER.format(sign=int(sign)))
    process.join(600)
    assert (process.exitcode, chain.stderr()) == (status, f"saex-pipe: {line}\n")


@pytest.mark.parametrize(("sign", "status", "line"), STOPPED)
def test_asked_to_stop_in_every_stage(chains, sign, status, line):
    chain, kept = chains("tiny"), {}
    for at in chain.stages:
        for share in (0.5, 0.2, 0.05, 0.0):
            process = chain.start_and_reach(at, share * chain.seconds[at])
            with suppress(ProcessLookupError):
                os.kill(process.pid, sign)
            process.join(600)
            if not (chain.out / chain.folders[-1] / "manifest.json").exists():
                break
            # The run was over before it could be stopped, as the machine is less busy than it was: earlier, then.
            shutil.rmtree(chain.out / chain.folders[-1])
        progress = [text for text in chain.stderr().splitlines() if " s left" not in text]
        assert (process.exitcode, progress) == (status, [f"saex-pipe: {line}"]), at
        kept = check_kept(kept, chain.out, at)
    assert chain.run() == 0, chain.stderr()
    check_kept(kept, chain.out, line)
    check_result(chain, line)
