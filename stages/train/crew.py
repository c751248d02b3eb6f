"""The SAEs that are trained on the same batches: what is logged, saved and watched of each."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.checkpoint import TrainingState
from saex_pipe.common.formats.stage_output import StageOutput
from saex_pipe.common.metrics_log import EventLog
from saex_pipe.common.metrics_sinks import Run, open_sinks
from saex_pipe.common.peak import peak_flops
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.density import density, is_moment
from saex_pipe.stages.train.learner import Learner
from saex_pipe.stages.train.processes import is_first, wait_for_all

_SHOWN = ("loss", "l0", "fvu", "dead_fraction")  # beside the bar


class Member(NamedTuple):
    """One SAE of a training run."""

    config: Config
    output: StageOutput
    saves: TrainingState


class Crew:
    """All SAEs of a cohort: what is logged, saved and watched of each. Serves as the log of their progress bar."""

    def __init__(self, learners: Sequence[tuple[Learner, list[Member]]], start: int) -> None:
        self._learners = learners
        self._latest: list[tuple[Member, dict[str, float]]] = []
        self._logs: dict[Member, list[EventLog]] = {
            member: [member.output.metrics] for _, members in learners for member in members
        }
        self._start = start
        self._looked, self._seconds = start, math.nan  # at which step, and when
        self._flops = sum(learner.step_flops() for learner, _ in learners)
        self._peak = peak_flops(learners[0][0].configs[0].compute_dtype)
        self.diverged: dict[Member, str] = {}

    @contextmanager
    def sinks(self) -> Iterator[None]:
        """While it lasts, events go to the sinks that were asked for, too."""
        with ExitStack() as stack:
            for member, logs in self._logs.items():
                output, config = member.output, member.config
                run = Run(
                    stage=config.stage,
                    out=config.out,
                    digest=output.digest,
                    settings=config.model_dump(mode="json"),
                    place=output.folder.local_path(),
                    first_step=self._start,
                )
                logs += stack.enter_context(open_sinks(config.sinks if is_first() else (), run))
            yield

    def look(self, step: int) -> dict[str, float]:
        """What to show of step ``step``: terms of the first SAE. SAEs whose terms are not finite are given up.

        Raises:
            SaexError: none is left.
        """
        self._latest, done = [], step + 1
        for learner, members in self._learners:
            for number, (member, terms) in enumerate(zip(members, learner.terms(), strict=True)):
                if member in self.diverged:
                    continue
                if not (math.isfinite(terms["total"]) and math.isfinite(terms["gradient_norm"])):
                    self.diverged[member] = _divergence(member, terms, done)
                    continue
                rate = learner.learning_rate(number, step)
                terms = {"step": done, "loss": terms.pop("total"), **terms, "learning_rate": rate}
                self._latest.append((member, terms))
                if is_moment(done, self._looked, learner.total_steps):
                    self._log(member, step=done, firing_frequency_log10=density(learner.frequencies(number)))
        if not self._latest:
            raise SaexError("; ".join(self.diverged.values()))
        return {name: self._latest[0][1][name] for name in _SHOWN} | self._utilisation(done)

    def _utilisation(self, done: int) -> dict[str, float]:
        """Share of the device's peak in the steps since the last look; not at the first, which waits for a compiler."""
        seconds = time.perf_counter()
        steps, taken = done - self._looked, seconds - self._seconds
        self._looked, self._seconds = done, seconds
        return {"mfu": round(self._flops * steps / (taken * self._peak), 4)} if taken > 0 else {}

    def event(self, **values: Any) -> None:
        """Record an event of the progress in the log of every SAE, each with its own terms."""
        for member, terms in self._latest:
            self._log(member, **{**values, **terms})

    def _log(self, member: Member, **values: Any) -> None:
        for log in self._logs[member]:
            log.event(**values)

    def save(self, step: int) -> None:
        """Save every SAE as it is after ``step`` steps, but for those that have diverged by then.

        What was begun before is durable first, so that all have it.
        """
        if self._looked < step:
            self.look(step - 1)
        self.wait()
        for learner, members in self._learners:
            for number, member in enumerate(members):
                if member not in self.diverged and step not in member.saves.steps():
                    member.saves.save(step, learner.state(number))

    def wait(self) -> None:
        """Return once what is being saved is durable: the parts of every process."""
        for _, members in self._learners:
            for member in members:
                member.saves.wait()
        wait_for_all()


def _divergence(member: Member, terms: Mapping[str, float], step: int) -> str:
    saved = member.saves.steps()[-1]
    kept = f"the last good checkpoint is that of step {saved}" if saved else "there is no checkpoint yet"
    what = "loss" if not math.isfinite(terms["total"]) else "gradient"
    value = terms["total"] if what == "loss" else terms["gradient_norm"]
    return (
        f"{member.config.out}: the {what} is {value} at step {step}: training has diverged; {kept}; "
        "lower train.learning_rate, or look for outliers with a smaller harvest.drop_norm_multiple"
    )
