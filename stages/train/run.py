"""Activation store to one or many sparse autoencoders."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.checkpoint import TrainingState, write_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.stage_output import METRICS
from saex_pipe.common.metrics_log import progress
from saex_pipe.common.metrics_sinks import check_sinks
from saex_pipe.common.preemption import StopRequest, graceful_stop
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.crew import Crew, Member
from saex_pipe.stages.train.devices import stacks_pay
from saex_pipe.stages.train.export import exported
from saex_pipe.stages.train.learner import Learner, shape_of
from saex_pipe.stages.train.processes import agreed_to_stop, join, output_of_all
from saex_pipe.stages.train.report import REPORT, Facts, read_events, report
from saex_pipe.stages.train.rows import Arrivals, Returns, Sides, make_reader, open_rows

_LOG_EVERY_STEPS = 10
# SAEs that agree in these read the same batches.
_READING = (
    *("store", "other_stores", "store_weights", "follow", "tranche_shards", "tap", "target_tap", "taps"),
    *("batch_rows", "rows", "seed", "pool_bytes", "checkpoint_every_steps", "model_parallel"),
)


def run(config: Config, *, force: bool = False) -> Manifest:
    """Train the SAE at ``config.out``."""
    return run_sweep([config], force=force)[0]


def run_sweep(configs: Sequence[Config], *, force: bool = False) -> list[Manifest]:
    """Train one SAE a configuration, each at its own ``out``: what can share a read of the data does.

    The result of each is that of training it alone: to the bit where it is alone in its shape, to the rounding of
    stacked products where several are one stack. One that diverges does not keep the others from finishing.
    """
    for config in configs:
        check_sinks(config.sinks, config.out, Folder(config.out).local_path())
    join(configs[0])
    with ExitStack() as stack, graceful_stop() as stop:
        outputs = [stack.enter_context(output_of_all(config, force=force)) for config in configs]
        members = []
        for config, output in zip(configs, outputs, strict=True):
            if output.manifest is None:
                members.append(Member(config, output, stack.enter_context(TrainingState(output.folder))))
        failures = [failure for cohort in _cohorts(members) for failure in _train(cohort, stop)]
        if failures:
            raise SaexError("; ".join(failures))
        manifests = [output.manifest for output in outputs]
        assert all(manifests)
        return [manifest for manifest in manifests if manifest is not None]


class Cohort(NamedTuple):
    """SAEs that go through the same batches from the same step on."""

    start: int
    members: list[Member]


def _cohorts(members: Iterable[Member]) -> Iterator[Cohort]:
    """Those that read alike and have a checkpoint of the same step, together."""
    left = list(members)
    while left:
        reading = _reading(left[0].config)
        alike = [member for member in left if _reading(member.config) == reading]
        # A kill between the saves of two members leaves one of them a save ahead, with the other's step kept, too.
        start = min(member.saves.steps()[-1] for member in alike)
        together = [member for member in alike if start in member.saves.steps()]
        yield Cohort(start, together)
        left = [member for member in left if member not in together]


def _reading(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _READING}


def _learners(cohort: Cohort, store: Any, sides: Sides) -> Iterator[tuple[Learner, list[Member]]]:
    def shape(member: Member) -> str:
        return json.dumps(shape_of(member.config), sort_keys=True)

    for _, group in itertools.groupby(sorted(cohort.members, key=shape), key=shape):
        alike, first = list(group), None
        for members in [alike] if stacks_pay() else [[member] for member in alike]:
            configs = [member.config for member in members]
            learner = Learner(configs, store, sides, resumed=cohort.start > 0, like=first)
            first = first or learner
            states = []
            for number, member in enumerate(members):
                if cohort.start:
                    states.append(member.saves.restore(cohort.start, learner.abstract_state()))
                else:
                    states.append(learner.initial_state(number))
            learner.start(states)
            yield learner, members


def _train(cohort: Cohort, stop: StopRequest) -> list[str]:
    """Train the SAEs of a cohort to their ends; what is to be said of those that diverged."""
    shared = cohort.members[0].config
    store, sides = open_rows(shared, stop)
    learners = list(_learners(cohort, store, sides))
    for member in cohort.members:
        member.saves.forget_after(cohort.start)
    crew = Crew(learners, cohort.start)
    reader = make_reader(shared, store, sides.taps)
    arrivals = Arrivals(reader, shared.batch_rows, stop)
    given_back = Returns(shared, store, reader, cohort.members[0].output.digest)
    steps = math.ceil(shared.rows / shared.batch_rows)
    total, done = steps * shared.batch_rows, cohort.start * shared.batch_rows
    with reader, crew.sinks(), progress("training", total, "rows", done=done, log=crew) as bar:
        for step in range(cohort.start, steps):
            if given_back.is_due(step):
                crew.save(step)
                crew.wait()
                given_back.release(step)
            waited = reader.waiting_seconds + arrivals.waiting_seconds
            if not arrivals.has(step):
                crew.save(step)
                stop.raise_if_requested()
            for learner, _ in learners:
                if learner.configs[0].resamples_before(step):
                    learner.resample(step, reader)
            batch = reader.batch(step, learners[0][0].devices.rows)
            for learner, _ in learners:
                learner.step(batch)
            last, due = step + 1 == steps, (step + 1) % shared.checkpoint_every_steps == 0
            shown, looks = {}, due or last or (step + 1) % _LOG_EVERY_STEPS == 0
            stopping = agreed_to_stop(stop, may_ask=looks)
            if stopping or looks:
                shown = crew.look(step)
            waited = reader.waiting_seconds + arrivals.waiting_seconds - waited
            size = sum(rows_BD.nbytes for rows_BD in batch.values())
            bar.advance(shared.batch_rows, bytes=size, waiting_seconds=waited, **shown)
            if stopping or due or last:
                crew.save(step + 1)
            if stopping and not last:
                stop.raise_if_requested()
    crew.wait()
    for learner, members in learners:
        for number, member in enumerate(members):
            if member not in crew.diverged:
                _finish(learner, number, member, store, sides)
    return list(crew.diverged.values())


def _finish(learner: Learner, number: int, member: Member, store: Any, sides: Sides) -> None:
    state, terms = learner.state(number)
    variant, config = learner.variants[number], member.config
    write_sae(member.output.folder, exported(config, store, variant, state, sides, learner.devices))
    since_fired_F = learner.devices.on_host(state.rows_since_fired_F)
    steps = int(state.step)
    contents = {
        "variant": config.variant,
        "latents": variant.latents,
        "dead_fraction": float((since_fired_F >= config.dead_after_rows).mean()),
        "last_step": {name: float(value) for name, value in jax.device_get(terms)._asdict().items()},
    }
    totals = {
        "steps": steps,
        "rows": steps * config.batch_rows,
        "bytes": sum(array.nbytes for array in state.params.values()),
    }
    member.output.metrics.close()
    events = read_events(member.output.folder.read(METRICS) or b"")
    facts = Facts(config.out, config.model_dump(mode="json"), contents, totals)
    member.output.folder.write(REPORT, report(facts, events).encode())
    member.output.finish(contents=contents, totals=totals)
