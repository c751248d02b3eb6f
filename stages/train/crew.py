"""The SAEs that are trained on the same batches: what is logged, saved and watched of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.checkpoint import TrainingState
from saex_pipe.common.formats.stage_output import StageOutput
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.learner import Learner


class Member(NamedTuple):
    """One SAE of a training run."""

    config: Config
    output: StageOutput
    saves: TrainingState


class Crew:
    """All SAEs of a cohort: what is logged, saved and watched of each. Serves as the log of their progress bar."""

    def __init__(self, learners: Sequence[tuple[Learner, list[Member]]]) -> None:
        self._learners = learners
        self._latest: list[tuple[Member, dict[str, float]]] = []
        self._saved = 0
        self.diverged: dict[Member, str] = {}

    def look(self, step: int) -> dict[str, float]:
        """The terms of step ``step``, of the first SAE for the bar; SAEs whose terms are not finite are given up.

        Raises:
            SaexError: none is left.
        """
        self._latest = []
        for learner, members in self._learners:
            for member, terms in zip(members, learner.terms(), strict=True):
                if member in self.diverged:
                    continue
                if not (math.isfinite(terms["total"]) and math.isfinite(terms["gradient_norm"])):
                    self.diverged[member] = _divergence(member, terms, step + 1)
                    continue
                self._latest.append((member, {"step": step + 1, "loss": terms.pop("total"), **terms}))
        if not self._latest:
            raise SaexError("; ".join(self.diverged.values()))
        return self._latest[0][1]

    def event(self, **values: Any) -> None:
        """Record an event of the progress in the log of every SAE, each with its own terms."""
        for member, terms in self._latest:
            member.output.metrics.event(**{**values, **terms})

    def save(self, step: int) -> None:
        """Save every SAE as it is after ``step`` steps. What was begun before is durable first, so that all have it."""
        self.wait()
        for learner, members in self._learners:
            for number, member in enumerate(members):
                if member not in self.diverged and step not in member.saves.steps():
                    member.saves.save(step, learner.state(number))

    def wait(self) -> None:
        """Return once what is being saved is durable."""
        for _, members in self._learners:
            for member in members:
                member.saves.wait()


def _divergence(member: Member, terms: Mapping[str, float], step: int) -> str:
    saved = member.saves.steps()[-1]
    kept = f"the last good checkpoint is that of step {saved}" if saved else "there is no checkpoint yet"
    what = "loss" if not math.isfinite(terms["total"]) else "gradient"
    value = terms["total"] if what == "loss" else terms["gradient_norm"]
    return (
        f"{member.config.out}: the {what} is {value} at step {step}: training has diverged; {kept}; "
        "lower train.learning_rate, or look for outliers with a smaller harvest.drop_norm_multiple"
    )
