"""Milliseconds of one SAE training step, beside bare matrix products, SAELens and sparsify.

    python infra/bench/train_step.py [--quick] [--peer-python PATH] [--variant A,B] [--shape 2048x576x9216,...]
                                     [--k 32] [--dtype bfloat16,float32] [--parts steps,topk] [--optimiser signum]

Prints one JSON line per case:

- ``step``: a whole step of a variant as the train stage takes it: loss, gradients, projection, clipping, Adam,
  constraint, counters. A variant without k has two cases, with k latents active on a row, as when it is trained, and
  with half of them ("at the start"). ``bound`` is the time of bare products of the same FLOPs, measured in the same
  rounds: where k latents are active the encoder's product and K of F of the others, at the rate of the encoder's; at
  the start all five, at the rate of the five. The peers are SAELens' SAE of that variant and, for TopK,
  sparsify's, each with its own loop (``peers_train.py``) in the setting that it is fastest in: float32 or autocast to
  bfloat16, eager or compiled (eager alone with --quick), whatever the dtype of ours. A line for each peer.
  With --optimiser ours and sparsify's have the same one; else each has its default, Adam and Signum. SAELens has Adam.
- ``topk``: parts of a TopK step; a part without products has no bound.

Sides take turns, step by step, and never compute at once. Values are medians, ratios medians over the rounds, so that
other load on the machine hits all alike. ``ratio`` is how many times as long the peer takes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
from harvest_peer import PeerError, note
from train_parts import (
    Part,
    Shape,
    dense_products,
    encoder_product,
    needed_flops,
    topk_parts,
    variant_of,
    whole_step,
)
from train_peer import TrainPeer

from saex_pipe.common.host_memory import keep_freed_memory
from saex_pipe.common.sae.variants import VARIANTS

SHAPES = ("2048x576x9216", "2048x768x24576")
DTYPES = ("bfloat16", "float32")
PEERS = {"saelens": ("relu", "jumprelu", "gated", "topk", "batchtopk", "matryoshka_batchtopk"), "sparsify": ("topk",)}
TRIED_STEPS = 3  # of a peer's setting, after its warm-up
WARM_ROUNDS = 6  # until the processes have the memory that they keep
PAUSE_SECONDS = 0.1  # between sides, for threads that spin before they sleep


class Side(NamedTuple):
    """Something that takes its turn, and milliseconds of one step of it."""

    name: str
    milliseconds: Callable[[], float]


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """Milliseconds of ``call`` until its result is there; the first call, which compiles, is over."""
    jax.block_until_ready(call())

    def milliseconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return 1e3 * (time.perf_counter() - start)

    return milliseconds


def alternate(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each side in each round; those that warm up are not counted."""
    found: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(-WARM_ROUNDS, rounds):
        for side in sides:
            time.sleep(PAUSE_SECONDS)
            milliseconds = side.milliseconds()
            if number >= 0:
                found[side.name].append(milliseconds)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def line(case: str, ours: list[float], bound: list[float] | None) -> dict[str, Any]:
    """The JSON object of one case, from the milliseconds in each round."""
    found = {"bench": "train_step", "case": case, "value": round(statistics.median(ours), 2), "unit": "ms"}
    found |= {"bound": None, "bound_fraction": None}
    if bound is not None:
        found |= {"bound": round(statistics.median(bound), 2), "bound_fraction": ratio(bound, ours)}
    return found


class Opponent:
    """A peer in a process of its own."""

    def __init__(self, name: str, process: TrainPeer, compiling: bool, optimiser: str | None) -> None:
        self._name, self._process = name, process
        self._more = {"optimiser": optimiser} if optimiser else {}
        self._settings = list(product(("float32", "autocast"), (False, True) if compiling else (False,)))

    def side(self, variant: str, shape: Shape) -> Side | None:
        """The peer in its fastest setting, ready for its next step; None where it has no such variant or fails."""
        if variant not in PEERS[self._name]:
            return None
        tried: dict[tuple[str, bool], float] = {}
        for setting in self._settings:
            try:
                self._begin(variant, shape, *setting)
                tried[setting] = statistics.median(self._process.time(TRIED_STEPS))
            except PeerError as error:
                note(f"{self._name} {variant} {setting} is left out: {error}", script="train_step.py")
        if not tried:
            return None
        name = self._begin(variant, shape, *min(tried, key=lambda setting: tried[setting]))
        return Side(name, lambda: self._process.time(1)[0])

    def _begin(self, variant: str, shape: Shape, precision: str, compiled: bool) -> str:
        self._process.send(
            peer=self._name,
            variant=variant,
            **shape._asdict(),
            precision=precision,
            compile=compiled,
            threads=os.cpu_count() or 1,
            **self._more,
        )
        return str(self._process.ready()["name"])


def step_cases(
    name: str, shape: Shape, opponents: Sequence[Opponent], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One variant in every dtype against its bound and its peers."""
    variant = variant_of(name, shape)
    peers = [side for opponent in opponents if (side := opponent.side(name, shape)) is not None]
    cases = {f"{name}, {dtype}, {shape}": (dtype, True) for dtype in options.dtypes}
    if not hasattr(variant, "k"):
        cases |= {f"{name} at the start, {dtype}, {shape}": (dtype, False) for dtype in options.dtypes}
    bare: dict[str, Part] = {}
    sides = []
    for case, (dtype, few) in cases.items():
        bare[case] = encoder_product(shape, dtype) if few else dense_products(shape, dtype)
        few = few and not hasattr(variant, "k")
        step = whole_step(variant, shape, dtype, few=few, optimiser=options.optimiser or "adam")
        sides += [Side(case, timed(step)), Side(f"bare {case}", timed(bare[case].call))]
    found = alternate([*sides, *peers], options.rounds)
    for case, (_, few) in cases.items():
        share = needed_flops(name, shape, few=few) / bare[case].flops
        bound = [share * milliseconds for milliseconds in found[f"bare {case}"]]
        ours = line(f"step, {case}", found[case], bound)
        for peer in peers:
            theirs = found[peer.name]
            more = {"peer": peer.name, "peer_value": round(statistics.median(theirs), 2)}
            yield ours | more | {"ratio": ratio(theirs, found[case])}
        if not peers:
            yield ours


def part_cases(shape: Shape, dtype: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The parts of a TopK step, bounded at the rate of the encoder's product."""
    parts = topk_parts(shape, dtype)
    found = alternate([Side(part.name, timed(part.call)) for part in parts], rounds)
    bare = parts[0]
    for part in parts:
        bound = [part.flops / bare.flops * milliseconds for milliseconds in found[bare.name]]
        yield line(f"topk: {part.name}, {dtype}, {shape}", found[part.name], bound if part.flops else None)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, one dtype, few rounds: within two minutes")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python with torch, sae-lens and eai-sparsify")
    parser.add_argument("--variant", help=f"of {', '.join(VARIANTS)}; all where not given")
    parser.add_argument("--shape", help=f"rows x width x latents; {','.join(SHAPES)} where not given")
    parser.add_argument("--k", type=int, default=32, help="active latents per row")
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)}; with --quick the first alone")
    parser.add_argument("--parts", default="steps,topk", help="what to time")
    parser.add_argument("--optimiser", choices=("adam", "signum"), help="of ours and of sparsify")
    parser.add_argument("--rounds", type=int, help="rounds that count: 11, with --quick 3")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 11)
    options.variants = options.variant.split(",") if options.variant else sorted(VARIANTS)
    for name in options.variants:
        if name not in VARIANTS:
            parser.error(f"there is no variant {name!r}; those there are: {', '.join(sorted(VARIANTS))}")
    shapes = options.shape.split(",") if options.shape else SHAPES[:1] if options.quick else SHAPES
    options.shapes = [Shape(*map(int, shape.split("x")), options.k) for shape in shapes]
    options.dtypes = options.dtype.split(",") if options.dtype else DTYPES[:1] if options.quick else DTYPES
    return options


def main() -> None:
    options = arguments()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        opponents = []
        for name in PEERS if options.peer_python else ():
            place = Path(folder) / name
            place.mkdir()
            process = stack.enter_context(TrainPeer(options.peer_python, place))
            opponents.append(Opponent(name, process, not options.quick, options.optimiser))
        if not opponents:
            note("no peers: --peer-python names no Python that has them", script="train_step.py")
        for shape in options.shapes:
            for name in options.variants if "steps" in options.parts else ():
                for found in step_cases(name, shape, opponents, options):
                    print(json.dumps(found), flush=True)
            for dtype in options.dtypes if "topk" in options.parts.split(",") else ():
                for found in part_cases(shape, dtype, options.rounds):
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
