"""Tokens per second of the harvest's forward pass, beside bare matmuls, transformers, and SAELens' activation store.

    python infra/bench/harvest.py [--quick] [--peer-python PATH] [--models A,B] [--dtypes A,B] [--windows 8x128,1x1024]

Prints one JSON line per case:

- ``to the tap``: the forward pass of the decoder to the input of a block in the middle. ``bound`` is what the matmuls
  alone reach in the same run (``harvest_bound.py`` says which are counted), the peer is ``transformers`` on the same
  windows, cut off at the same layer.
- ``in host memory``: the forward pass of the harvest stage, with norms, the store's dtype and the way to the host.
  The peer is the activation store of SAELens with the batch that suits it best, once on a HookedTransformer, which
  is its default, and once on its wrapper around a model of transformers.
- ``one long window``: tokens per second, and by how much the resident memory grows during the pass; its bound is what
  the growth from 2,048 to 4,096 tokens predicts for 8,192 if memory is linear in the window.
- ``harvest stage``: tokens per second of the stage's loop, bounded by its forward pass alone; and the share of the
  loop's time in which the device has no forward pass queued or running.

Peers run where ``--peer-python`` names a Python that has them (torch, transformers, sae-lens, datasets), in a process
that computes only while ours waits. Each picks its best setting first: threads, wrapper, batch, and eager or
torch.compile (eager alone with --quick). Rounds of all sides alternate, values and ratios are medians over rounds, so
that other load on the machine hits all alike. Activations of both sides are compared before anything is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from harvest_bound import bare_matmuls
from harvest_models import QUICKSTART, Subject, write_gpt2_small, write_llama
from harvest_peer import PeerError, PeerProcess, note
from harvest_stage import stage_cases

from saex_pipe.common.formats.store_info import DTYPES
from saex_pipe.common.host_memory import keep_freed_memory
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.mesh import batch_sharding, make_mesh
from saex_pipe.stages.harvest.forward import compile_forward

MODELS = {
    "smollm2-135m": lambda place: write_llama(place, "smollm2-135m", QUICKSTART, layers=15),
    "gpt2-small": lambda place: write_gpt2_small(place, layers=6),
}
PEERS = ("transformers", "saelens", "saelens-proxy")
BUSY = 0.5  # processes running on average over a minute
PAUSE_SECONDS = 0.2  # between sides, for threads that spin before they sleep
LONG = (2048, 4096, 8192)
# Relative error up to which two sides compute the same thing; bfloat16 keeps 8 bits, through up to 15 blocks.
LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 5e-2}


class Shape(NamedTuple):
    """Windows of one pass, and tokens of a window."""

    windows: int
    length: int

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.windows * self.length


class Side(NamedTuple):
    """Something to time, by what it is called in the results: seconds of one call, and the tokens it handles."""

    name: str
    seconds: Callable[[], float]
    tokens: int


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Seconds of ``call`` until its result is there."""

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return seconds


def alternate(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each side in each round; one round goes before that is not counted."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            time.sleep(PAUSE_SECONDS)
            seconds = side.seconds()
            if number:
                rates[side.name].append(side.tokens / seconds)
    return rates


def line(case: str, ours: list[float], bound: list[float], peer: str, peers: list[float]) -> dict[str, Any]:
    """The JSON object of one case, from the rates in each round; ``peers`` is empty where none runs."""

    def ratio(other: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(ours, other, strict=True)), 3)

    found: dict[str, Any] = {
        "bench": "harvest",
        "case": case,
        "value": round(statistics.median(ours), 1),
        "unit": "tokens/s",
        "bound": round(statistics.median(bound), 1),
        "bound_fraction": ratio(bound),
    }
    if peers:
        found |= {"peer": peer, "peer_value": round(statistics.median(peers), 1), "ratio": ratio(peers)}
    return found


class Opponents:
    """The peers on one model in one dtype; none where there is no process for them."""

    def __init__(self, process: PeerProcess | None, subject: Subject, dtype: str, place: Path, compiling: bool) -> None:
        self._process, self._dtype, self._place, self._compiling = process, dtype, place, compiling
        if process is not None:
            process.ask(do="open", folder=str(subject.folder), layers=subject.layers, dtype=dtype)

    def side(self, peer: str, tokens_NL: np.ndarray, wanted_NLD: np.ndarray) -> Side | None:
        """A peer in its best setting for these windows, where it computes what is wanted of the first two."""
        if self._process is None:
            return None
        process, tokens, acts = self._process, self._place / "tokens.npy", self._place / "acts.npy"
        np.save(tokens, tokens_NL)
        try:
            chosen = process.ask(do="choose", peer=peer, tokens=str(tokens), acts=str(acts), compile=self._compiling)
        except PeerError as error:
            note(f"{peer} is left out: {error}")
            return None
        found_NLD = np.load(acts)
        error = float(np.linalg.norm(found_NLD - wanted_NLD) / np.linalg.norm(wanted_NLD))
        if error > LARGEST_ERROR[self._dtype]:
            note(f"{peer} is left out: its activations differ from ours by {error:.1e} of their norm")
            return None
        return Side(chosen["name"], lambda: float(process.ask(do="time", peer=peer)["seconds"]), chosen["tokens"])


def forward_cases(
    model: LanguageModel, subject: Subject, shape: Shape, opponents: Opponents, rounds: int
) -> Iterator[dict[str, Any]]:
    """The forward pass alone, and the one of the stage with its results on the host, against bound and peers."""
    tap, dtype = subject.tap, model.dtype
    tokens_NL = np.random.default_rng(0).integers(0, model.architecture.vocabulary, shape, dtype=np.int32)
    assert model.mesh is not None
    harvest = compile_forward(model, {tap: DTYPES[dtype]}, shape=shape, mesh=model.mesh)
    to_tap = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=[tap], logits=False).taps[tap])
    on_device = jax.device_put(tokens_NL, batch_sharding(model.mesh))
    wanted_NLD = np.asarray(to_tap(model, on_device)[:2])
    ours = [
        Side("to the tap", timed(lambda: to_tap(model, on_device)), shape.tokens),
        Side("matmuls", timed(bare_matmuls(model, *shape)), shape.tokens),
        Side("in host memory", timed(lambda: jax.device_get(harvest(tokens_NL))), shape.tokens),
    ]
    peers = [opponents.side(peer, tokens_NL, wanted_NLD) for peer in PEERS]
    rates = alternate([*ours, *(side for side in peers if side is not None)], rounds)
    delivered = [(ours[2], peer) for peer in peers[1:] if peer is not None] or [(ours[2], None)]
    for side, peer in [(ours[0], peers[0]), *delivered]:
        case = f"{subject.name} {tap} {dtype} windows {shape.windows}x{shape.length}, {side.name}"
        name = "" if peer is None else peer.name
        yield line(case, rates[side.name], rates["matmuls"], name, rates.get(name, []))


def long_window_cases(subject: Subject, dtype: str) -> Iterator[dict[str, Any]]:
    """One window of each length in a process of its own: speed at the longest, and how memory grows."""
    found = {}
    for length in LONG:
        command = [sys.executable, str(Path(__file__).with_name("harvest_memory.py")), str(subject.folder)]
        command += [str(subject.layers), dtype, str(length)]
        found[length] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    grown = [found[length]["peak_bytes"] / 1e6 for length in LONG]
    linear = grown[1] + (grown[1] - grown[0]) * (LONG[2] - LONG[1]) / (LONG[1] - LONG[0])
    case = f"{subject.name} {subject.tap} {dtype} windows 1x{LONG[-1]}, one long window"
    rate = round(LONG[-1] / found[LONG[-1]]["seconds"], 1)
    yield {"bench": "harvest", "case": f"{case}, speed", "value": rate, "unit": "tokens/s"}
    yield {
        "bench": "harvest",
        "case": f"{case}, memory of the pass",
        "value": round(grown[2], 1),
        "unit": "MB",
        "bound": round(linear, 1),
        "bound_fraction": round(linear / grown[2], 3),
        "at_shorter_windows": dict(zip(LONG[:2], (round(size, 1) for size in grown), strict=False)),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: within two minutes")
    parser.add_argument(
        "--peer-python", metavar="PATH", help="a Python with torch, transformers, sae-lens and datasets"
    )
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}; with --quick the first alone")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--windows", metavar="NxL,...", help="windows of one pass, and tokens of a window")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--parts", default="forward,long,stage", help="which cases, of forward, long and stage")
    found = parser.parse_args()
    found.models = found.models.split(",") if found.models else list(MODELS)[: 1 if found.quick else None]
    windows = found.windows or ("8x128" if found.quick else "8x128,32x128,1x1024,4x1024")
    found.shapes = [Shape(*map(int, text.split("x"))) for text in windows.split(",")]
    found.rounds = found.rounds or (3 if found.quick else 9)
    return found


def main() -> None:
    """Run the cases."""
    keep_freed_memory()
    options = arguments()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place = Path(folder)
        if os.getloadavg()[0] > BUSY:
            note(f"{os.getloadavg()[0]:.1f} other processes are running: torch loses more by that than we do")
        subjects = [MODELS[name](place) for name in options.models]
        process = None
        if options.peer_python is None:
            note("no peers: --peer-python names no Python that has them")
        else:
            process = stack.enter_context(PeerProcess(options.peer_python, place))
        for subject in subjects if "forward" in options.parts else ():
            for dtype in options.dtypes.split(","):
                opponents = Opponents(process, subject, dtype, place, compiling=not options.quick)
                mesh = make_mesh(devices=jax.devices()[:1])
                last = subject.layers - 1
                model = load_model(subject.folder, last_layer=last, with_unembedding=False, dtype=dtype, mesh=mesh)
                for shape in options.shapes:
                    for found in forward_cases(model, subject, shape, opponents, options.rounds):
                        print(json.dumps(found), flush=True)
        if "long" in options.parts:
            longest = subjects[0]._replace(layers=2) if options.quick else subjects[0]
            for found in long_window_cases(longest, options.dtypes.split(",")[0]):
                print(json.dumps(found), flush=True)
        if "stage" in options.parts:
            for found in stage_cases(place, tokens=8192 if options.quick else 65536):
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
