"""L0 and FVU of every variant after equal rows, ours beside SAELens' same variant with its defaults.

    python infra/bench/train_quality.py [--quick] [--peer-python PATH] [--store URI --tap NAME] [--variant A,B]
                                        [--rows 500000] [--batch 2048] [--latents 4608] [--k 32] [--scaled]
                                        [--coefficients 0.3,1,3,10,30]

Trains on a toy store with a known dictionary and, with ``--store``, on that activation store, such as a quickstart's.
Both sides get the same rows in the same order, and both are scored on the same rows held out, with the codes that they
have in training (so BatchTopK selects over all rows held out). Ours runs with the defaults of the train stage, SAELens
with those of its trainer and of its SAE of that variant, on raw rows or, with ``--scaled``, on rows of mean norm
sqrt(D).

A variant without k has a sparsity coefficient, whose unit is each library's own. SAELens has its default, 1; ours are
trained with all ``--coefficients`` as one stack, and the one counts that has the smallest FVU among those with no
more active latents than SAELens.

Prints three JSON lines per variant and store: ``FVU`` and ``L0`` after all rows, where ``ratio`` is how many times as
large the peer's is; and ``rows to the FVU``: after how many rows ours has what the peer has in the end with no more
active latents, null if never. There is no bound.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from harvest_peer import note
from train_step import PEERS

from saex_pipe.common.host_memory import keep_freed_memory
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.common.sae.contract import Moment, Variant
from saex_pipe.common.sae.train_step import TrainState
from saex_pipe.common.sae.variants import VARIANTS
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.learner import Learner
from saex_pipe.stages.train.rows import Rows, Sides, make_reader, open_rows

MOMENTS = 20  # at which both sides are scored
MORE_L0 = 1.02  # counts as no more


class Score(NamedTuple):
    """On the rows held out, after so many rows of training."""

    rows: int
    l0: float
    fvu: float


class Subject(NamedTuple):
    """A store, the rows taken from it in the order of training, and rows that are not trained on."""

    name: str
    store: Rows
    sides: Sides
    rows_BD: np.ndarray
    held_BD: np.ndarray
    rows_file: Path
    held_file: Path


def read_rows(name: str, config: Config, held_rows: int, place: Path) -> Subject:
    """All rows that ``config`` trains on, and the next ``held_rows`` of their order, as .npy files at ``place``."""
    with graceful_stop() as stop:
        store, sides = open_rows(config, stop)
    (tap,) = sides.taps
    batches = -(-held_rows // config.batch_rows)
    steps = config.rows // config.batch_rows
    wanted = (steps + batches) * config.batch_rows
    if store.rows < wanted:
        raise SystemExit(f"{config.store} has {store.rows:,} rows, {wanted:,} are needed: lower --rows or --held-out")
    shape = (steps * config.batch_rows, store.info.taps[tap])
    files = [place / f"{name}-{part}.npy" for part in ("rows", "held")]
    rows_BD = np.lib.format.open_memmap(files[0], "w+", np.float32, shape)
    held = []
    with make_reader(config, store, sides.taps) as reader:
        for step in range(steps + batches):
            batch_BD = np.asarray(reader.batch(step)[tap], np.float32)
            if step < steps:
                rows_BD[step * config.batch_rows : (step + 1) * config.batch_rows] = batch_BD
            else:
                held.append(batch_BD)
    rows_BD.flush()
    np.save(files[1], np.concatenate(held))
    return Subject(name, store, sides, rows_BD, np.load(files[1]), *files)


def moments_of(rows: int, batch_rows: int) -> list[int]:
    """Numbers of rows, multiples of a batch, the last of them all rows."""
    steps = rows // batch_rows
    return sorted({max(1, steps * i // MOMENTS) * batch_rows for i in range(1, MOMENTS + 1)})


def ours(configs: Sequence[Config], subject: Subject, moments: Sequence[int]) -> list[list[Score]]:
    """Scores of each SAE at each moment; they train as one stack."""
    learner = Learner(configs, subject.store, subject.sides)
    learner.start([learner.initial_state(number) for number in range(len(configs))])
    batch_rows, (tap,) = configs[0].batch_rows, subject.sides.taps

    @jax.jit
    def score(variant: Variant, state: TrainState, held_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BD = state.normalisers.input.apply(held_BD)
        terms = variant.loss(state.params, x_BD, x_BD, Moment.plain(variant.latents))[1]
        return terms.l0, terms.fvu

    found: list[list[Score]] = [[] for _ in configs]
    for end in range(batch_rows, len(subject.rows_BD) + 1, batch_rows):
        learner.step({tap: subject.rows_BD[end - batch_rows : end]})
        if end in moments:
            for number, variant in enumerate(learner.variants):
                l0, fvu = score(variant, learner.state(number)[0], subject.held_BD)
                found[number].append(Score(end, float(l0), float(fvu)))
    return found


def theirs(name: str, options: argparse.Namespace, subject: Subject) -> tuple[str, list[Score]] | None:
    """What SAELens is called, and its scores at each moment; None where it is not there or has no such variant."""
    if options.peer_python is None or name not in PEERS["saelens"]:
        return None
    request = {
        "variant": name,
        "k": options.k,
        "latents": options.latents,
        "batch_rows": options.batch,
        "threads": os.cpu_count() or 1,
        "rows": str(subject.rows_file),
        "held_out": str(subject.held_file),
        "moments": moments_of(len(subject.rows_BD), options.batch),
        "scaled": options.scaled,
    }
    command = [options.peer_python, str(Path(__file__).with_name("peers_quality.py")), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["without a word"]
        note(f"SAELens' {name} is left out: {words[-1]}", script="train_quality.py")
        return None
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    return lines[-1]["name"], [Score(line["rows"], line["l0"], line["fvu"]) for line in lines]


def chosen(candidates: Sequence[list[Score]], l0: float) -> int:
    """The one that reconstructs best with no more than ``l0`` active latents in the end, or else the sparsest."""
    last = [scores[-1] for scores in candidates]
    sparse = [number for number, score in enumerate(last) if score.l0 <= MORE_L0 * l0]
    return min(sparse, key=lambda n: last[n].fvu) if sparse else min(range(len(last)), key=lambda n: last[n].l0)


def first_as_good(scores: Sequence[Score], goal: Score) -> int | None:
    """Rows after which FVU and L0 are no more than those of ``goal``."""
    return next((s.rows for s in scores if s.fvu <= goal.fvu and s.l0 <= MORE_L0 * goal.l0), None)


def cases(name: str, options: argparse.Namespace, subject: Subject, config: Config) -> Iterator[dict[str, Any]]:
    """The lines of one variant on one store."""
    known = {field.name for field in fields(VARIANTS[name])}
    settings: list[dict[str, Any]] = [{"k": options.k}]
    if "k" not in known:
        settings = [{"sparsity_coefficient": value} for value in options.coefficients]
    configs = [Config.create(config.model_dump() | {"variant": name, **changes}) for changes in settings]
    peer = theirs(name, options, subject)
    found = ours(configs, subject, moments_of(len(subject.rows_BD), options.batch))
    best = chosen(found, peer[1][-1].l0 if peer else float("inf"))
    told = " ".join(f"{key}={value:g}" for key, value in settings[best].items())
    case = f"{name}, {subject.name}, {told}, D={subject.rows_BD.shape[1]} F={options.latents}"
    last, after = found[best][-1], f"after {len(subject.rows_BD):,} rows"
    lines = [
        (f"FVU {after}", last.fvu, "fraction", peer and peer[1][-1].fvu),
        (f"L0 {after}", last.l0, "latents per row", peer and peer[1][-1].l0),
    ]
    if peer:
        lines.append(("rows to the FVU", first_as_good(found[best], peer[1][-1]), "rows", len(subject.rows_BD)))
    for what, value, unit, peer_value in lines:
        line = {"bench": "train_quality", "case": f"{case}, {what}", "value": value and round(value, 5), "unit": unit}
        line |= {"bound": None, "bound_fraction": None}
        if peer:
            line |= {
                "peer": peer[0],
                "peer_value": round(peer_value, 5),
                "ratio": round(peer_value / value, 3) if value else None,
            }
        yield line


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, of a small toy")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python with torch and sae-lens")
    parser.add_argument("--store", help="an activation store, beside the toy")
    parser.add_argument("--tap", help="of that store; its only one where not given")
    parser.add_argument("--variant", help=f"of {', '.join(VARIANTS)}; all where not given")
    parser.add_argument("--rows", type=int, help="rows to train on: 500,000; with --quick 50,000")
    parser.add_argument("--held-out", type=int, default=8192, help="rows to score on")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a step")
    parser.add_argument("--latents", type=int, help="of the SAEs: 4,608; with --quick 512")
    parser.add_argument("--k", type=int, help="active latents per row: 32; with --quick 8")
    parser.add_argument("--coefficients", default="0.3,1,3,10,30", help="of variants without k")
    parser.add_argument("--scaled", action="store_true", help="scale SAELens' rows to a mean norm of sqrt(D)")
    options = parser.parse_args()
    options.rows = options.rows or (50_000 if options.quick else 500_000)
    options.latents = options.latents or (512 if options.quick else 4608)
    options.k = options.k or (8 if options.quick else 32)
    options.coefficients = [float(value) for value in options.coefficients.split(",")]
    options.variants = options.variant.split(",") if options.variant else sorted(VARIANTS)
    return options


def main() -> None:
    options = arguments()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        window = ToyConfig.model_fields["window_length"].default
        stored = -(-(options.rows + options.held_out + options.batch) // window) * window
        width, features = (64, 256) if options.quick else (256, 2048)
        uri = str(place / "toy")
        active = float(options.k)
        toy.run(ToyConfig(out=uri, latents=features, width=width, active=active, rows=stored, holdout_fraction=0))
        stores = {"toy": (uri, None)} | ({"store": (options.store, options.tap)} if options.store else {})
        for name, (uri, tap) in stores.items():
            config = Config(
                store=uri,
                tap=tap,
                out=str(place / "unused"),
                latents=options.latents,
                batch_rows=options.batch,
                rows=options.rows // options.batch * options.batch,
            )
            subject = read_rows(name, config, options.held_out, place)
            for variant in options.variants:
                for line in cases(variant, options, subject, config):
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
