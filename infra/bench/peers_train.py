"""The peers of the training benchmark, in a Python of their own: the training loops of SAELens and sparsify on torch.

Reads one JSON request a line and answers each with one JSON line, so that they compute only when they are asked to:

    {"peer": "saelens", "variant": "topk", "rows": ..., "width": ..., "latents": ..., "k": ...,
     "precision": "float32" or "autocast" (to bfloat16), "compile": ..., "threads": ...}
                  a case, which begins with a few steps to warm up: {"name": ..., "ms": [...]}
    {"go": n}     n more steps of it, in succession: {"ms": [...]}

The next case ends the one before it, and the end of the requests ends the process. What fails is answered with
{"error": ...}, and the next request has to be a case. What else a case may say is in ``Case``.

Each library runs its own ``fit``, with its defaults, on a source of activations that are held in memory. A step lasts
from one request for activations to the next, so that it is all that the library does in it: forward pass, backward
pass, clipping, projection, optimiser, schedules and the bookkeeping of dead latents. No latent is dead yet in the
steps that are timed (SAELens waits 1,000 steps, sparsify leaves its auxiliary loss out by default).
"""

import contextlib
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch

HELD_BATCHES = 8
ENDLESS = 10**6  # steps, which no case ever reaches
LEVELS = (1, 3, 7, 15, 32)  # widths of the Matryoshka levels, in parts of 32
SAELENS_NAMES = {
    "relu": "Standard",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka_batchtopk": "MatryoshkaBatchTopK",
}


class Case(NamedTuple):
    """One training step to time; ``k`` matters to the variants that have it."""

    peer: str
    variant: str
    rows: int
    width: int
    latents: int
    k: int
    precision: str
    compile: bool
    threads: int
    warm: int = 3
    sparse: bool = False  # TopK of SAELens on sparse tensors, without its scaling by decoder norms, see saelens_sae
    optimiser: str = "signum"  # of sparsify, or adam; SAELens has Adam alone

    def name(self, package: str) -> str:
        """What is run, for the results."""
        parts = [package, metadata.version(package), self.variant, self.precision]
        parts += ["sparse"] if self.sparse else []
        parts += [self.optimiser] if self.peer == "sparsify" else []
        parts += ["compiled" if self.compile else "eager", f"torch {torch.__version__}", f"{self.threads} threads"]
        return " ".join(parts)


class Over(Exception):  # noqa: N818
    """No more steps of a case are wanted, but those of the next request, if there is one."""

    def __init__(self, request: dict[str, Any] | None) -> None:
        super().__init__()
        self.request = request


class Server:
    """Reads requests and writes answers."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed

    def read(self) -> dict[str, Any] | None:
        """The next request, or None after the last."""
        line = sys.stdin.readline()
        request: dict[str, Any] | None = json.loads(line) if line.strip() else None
        return request

    def answer(self, **answer: Any) -> None:
        """Answer the request that was read last."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=self._answers, flush=True)

    def activations(self, case: Case, name: str) -> Iterator[torch.Tensor]:
        """Batches of the steps that are asked for, until another case is; each step is timed."""
        batches = itertools.cycle(torch.randn(HELD_BATCHES, case.rows, case.width).unbind())
        wanted, description = case.warm, {"name": name}
        while True:
            marks = [time.perf_counter()]
            for batch in itertools.islice(batches, wanted):
                yield batch
                marks.append(time.perf_counter())
            self.answer(**description, ms=[1e3 * (after - before) for before, after in itertools.pairwise(marks)])
            request = self.read()
            if request is None or "go" not in request:
                raise Over(request)
            wanted, description = request["go"], {}


def saelens_sae(case: Case) -> Any:
    """The training SAE of a variant, with the defaults of its configuration.

    Sparse tensors are an option of TopK alone; on a CPU they have no gradient through the scaling of activations by
    decoder norms, which is on by default.
    """
    from sae_lens import saes

    settings: dict[str, Any] = {}
    if case.variant in ("topk", "batchtopk", "matryoshka_batchtopk"):
        settings["k"] = case.k
    if case.variant == "topk" and case.sparse:
        settings |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    if case.variant == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [parts * case.latents // LEVELS[-1] for parts in LEVELS]
    name = f"{SAELENS_NAMES[case.variant]}TrainingSAE"
    configuration = getattr(saes, f"{name}Config")(d_in=case.width, d_sae=case.latents, **settings)
    return getattr(saes, name)(configuration)


def saelens(case: Case, activations: Callable[[str], Iterator[torch.Tensor]]) -> None:
    """The loop of ``SAETrainer``; the SAE is compiled as its runner does it."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = saelens_sae(case)
    configuration = SAETrainerConfig(
        total_training_samples=ENDLESS * case.rows,
        train_batch_size_samples=case.rows,
        lr_end=3e-5,  # a tenth of the rate, as its runner sets it; the default schedule is constant
        autocast=case.precision == "autocast",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(configuration, sae, activations(case.name("sae-lens")))
    if case.compile:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")
    trainer.fit()


class Tap(torch.nn.Module):
    """The layer whose output is trained on."""

    def forward(self, acts_1BD: torch.Tensor) -> torch.Tensor:
        """What it is given."""
        return acts_1BD


class InMemory(torch.nn.Module):
    """What sparsify's trainer takes for a language model: one layer, whose activations are there already."""

    device = torch.device("cpu")

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.tap = Tap()
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.source = iter([torch.zeros(1, case.width)])  # for the pass by which the trainer learns the width

    @property
    def base_model(self) -> torch.nn.Module:
        """The part in which layers are looked up."""
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The next activations, whatever the tokens."""
        out_1BD: torch.Tensor = self.tap(next(self.source)[None])
        return out_1BD


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One window of tokens for each step, as many as there are rows of activations."""

    def __init__(self, rows: int) -> None:
        self.window = {"input_ids": torch.zeros(rows, dtype=torch.long)}

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.window


def sparsify(case: Case, activations: Callable[[str], Iterator[torch.Tensor]]) -> None:
    """The loop of ``Trainer``, its coder under autocast as it would be on a GPU."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    if case.variant != "topk":
        raise ValueError(f"sparsify has no {case.variant}")
    model = InMemory(case)
    configuration = TrainConfig(
        SparseCoderConfig(num_latents=case.latents, k=case.k),
        batch_size=1,
        optimizer=case.optimiser,
        hookpoints=["tap"],
        log_to_wandb=False,
        save_every=ENDLESS,
        save_dir=tempfile.gettempdir(),
    )
    trainer = Trainer(configuration, Windows(case.rows), model)
    coder = trainer.saes["tap"]
    if case.compile:
        coder.forward = torch.compile(coder.forward)
    if case.precision == "autocast":
        coder.forward = torch.autocast("cpu", dtype=torch.bfloat16)(coder.forward)
    model.source = activations(case.name("eai-sparsify"))
    trainer.fit()


PEERS = {"saelens": saelens, "sparsify": sparsify}


def run(server: Server, request: dict[str, Any]) -> dict[str, Any] | None:
    """Run one case until it is over; the request after its last."""
    try:
        case = Case(**request)
        torch.compiler.reset()
        torch.manual_seed(0)
        torch.set_num_threads(case.threads)
        PEERS[case.peer](case, lambda name: server.activations(case, name))
    except Over as over:
        return over.request
    except Exception as error:
        server.answer(error=f"{type(error).__name__}: {error}")
    return server.read()


def main() -> None:
    """Serve until the requests end."""
    server = Server()
    warnings.simplefilter("ignore")
    request = server.read()
    while request is not None:
        request = run(server, request)
        gc.collect()  # or the weights of one case stay during the next


if __name__ == "__main__":
    main()
