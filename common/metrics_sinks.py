"""Where else the events of a stage go, if asked for: TensorBoard and Weights & Biases.

Each comes with an extra of the same name, ``pip install saex-pipe[tensorboard]`` or ``saex-pipe[wandb]``, and is
imported only where it is asked for.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saex_pipe.common.config import canonical_digest
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.metrics_log import EventLog

Sink = Literal["tensorboard", "wandb"]
_PACKAGES: dict[Sink, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Run(NamedTuple):
    """What is being logged."""

    stage: str
    out: str  # URI of the output
    digest: str  # of the configuration: with ``out``, what makes two runs the same
    settings: Mapping[str, Any]
    place: Path | None  # the local folder of the output, None where it is on an object store
    first_step: int  # events of steps after it replace those that an earlier process logged


def check_sinks(sinks: Sequence[Sink], out: str, place: Path | None) -> None:
    """Raise an ``InputError`` where a sink cannot be used; what ``Run`` says of ``out`` and ``place`` holds here."""
    for sink in sinks:
        if importlib.util.find_spec(_PACKAGES[sink]) is None:
            raise InputError(
                f"sink {sink!r} needs the package {_PACKAGES[sink]}, which is not installed",
                f"pip install 'saex-pipe[{sink}]', or leave it out",
            )
        if sink == "tensorboard" and place is None:
            raise InputError(
                f"TensorBoard's files are appended to, which {out} cannot do",
                "use the sink wandb, a local out, or read metrics.jsonl",
            )


@contextmanager
def open_sinks(sinks: Sequence[Sink], run: Run) -> Iterator[list[EventLog]]:
    """The sinks, closed in the end."""
    makers: dict[Sink, Callable[[Run], AbstractContextManager[EventLog]]]
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        yield [stack.enter_context(makers[sink](run)) for sink in dict.fromkeys(sinks)]


class TensorBoard:
    """Scalars and histograms by step, in the folder ``tensorboard`` of the output."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def event(self, **values: Any) -> None:
        """Record one event, which has a ``step``."""
        step = values.pop("step")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
            elif isinstance(value, Mapping):
                edges, counts = value["edges"], value["counts"]
                middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
                self._writer.add_histogram_raw(
                    name,
                    min=edges[0],
                    max=edges[-1],
                    num=sum(counts),
                    sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
                    sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
                    bucket_limits=edges[1:],
                    bucket_counts=counts,
                    global_step=step,
                )


@contextmanager
def _tensorboard(run: Run) -> Iterator[TensorBoard]:
    from tensorboardX import SummaryWriter

    assert run.place is not None
    purged = run.first_step + 1 if run.first_step else None
    writer = SummaryWriter(str(run.place / "tensorboard"), purge_step=purged)
    try:
        yield TensorBoard(writer)
    finally:
        writer.close()


class Wandb:
    """Values by step. A step that was logged before, by a process that was killed, is not logged again."""

    def __init__(self, run: Any, histogram: Any) -> None:
        self._run, self._histogram = run, histogram

    def event(self, **values: Any) -> None:
        """Record one event, which has a ``step``."""
        step = values.pop("step")
        shown = {
            name: self._histogram(np_histogram=(value["counts"], value["edges"]))
            if isinstance(value, Mapping)
            else value
            for name, value in values.items()
        }
        self._run.log(shown, step=step)


@contextmanager
def _wandb(run: Run) -> Iterator[Wandb]:
    """Mode, project, entity and folder are those of W&B's own variables, such as ``WANDB_MODE=offline``."""
    import wandb

    try:
        opened = wandb.init(
            id=canonical_digest([run.digest, run.out])[:16],
            resume="allow",
            name=run.out.rstrip("/").rpartition("/")[2],
            job_type=run.stage,
            config=dict(run.settings),
        )
    except wandb.Error as error:
        message = str(error).splitlines()[0]
        raise SaexError(
            f"Weights & Biases cannot be used ({message}); run 'wandb login', set WANDB_MODE=offline, or leave it out"
        ) from None
    with opened:
        yield Wandb(opened, wandb.Histogram)
