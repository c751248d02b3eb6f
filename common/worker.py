"""Which share of a stage's shards this process works on, where several processes fill one folder."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from saex_pipe.common.errors import InputError

_Shard = TypeVar("_Shard")
_FORM = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Share:
    """Worker ``index`` of ``count``, counted from 0."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """For the names of objects."""
        return f"{self.index}-of-{self.count}"

    def of(self, shards: Sequence[_Shard]) -> Sequence[_Shard]:
        """Of all shards those of this worker: every ``count``-th."""
        return shards[self.index :: self.count]


def read_share(text: str, environment: Mapping[str, str] = os.environ) -> Share:
    """The share that ``text`` names.

    Args:
        text: ``i/n``; ``auto`` for what a Kubernetes indexed job, a SLURM array or a SLURM step says in
            ``environment``; ``jax`` for the process's number under ``jax.distributed``, started where it is not yet.
        environment: the process's variables.

    Raises:
        InputError: text that names no share, or an environment without one.
    """
    if text == "auto":
        return _from_environment(environment)
    if text == "jax":
        import jax

        if not jax.distributed.is_initialized():
            jax.distributed.initialize()
        return Share(jax.process_index(), jax.process_count())
    match = _FORM.fullmatch(text)
    if match is None:
        raise InputError(f"worker {text!r} is not of the form i/n", "write 0/4 to 3/4 for four workers, auto, or jax")
    return _checked(int(match[1]), int(match[2]), f"worker {text!r}")


def _from_environment(environment: Mapping[str, str]) -> Share:
    def number(name: str) -> int:
        try:
            return int(environment[name])
        except KeyError:
            raise InputError(
                f"--worker auto: {name} is not set", "set it in the job's manifest, or give --worker i/n"
            ) from None
        except ValueError:
            raise InputError(
                f"--worker auto: {name} = {environment[name]!r} is no number", "give --worker i/n"
            ) from None

    if "JOB_COMPLETION_INDEX" in environment:  # Kubernetes tells a pod its index, but not how many there are
        return _checked(number("JOB_COMPLETION_INDEX"), number("JOB_COMPLETIONS"), "JOB_COMPLETION_INDEX")
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        place = number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN")
        return _checked(place // step, number("SLURM_ARRAY_TASK_COUNT"), "SLURM_ARRAY_TASK_ID")
    if "SLURM_PROCID" in environment:
        return _checked(number("SLURM_PROCID"), number("SLURM_NTASKS"), "SLURM_PROCID")
    raise InputError(
        "--worker auto: this is neither a Kubernetes indexed job nor a SLURM job",
        "give --worker i/n, or set JOB_COMPLETION_INDEX and JOB_COMPLETIONS",
    )


def _checked(index: int, count: int, name: str) -> Share:
    if not 0 <= index < count:
        raise InputError(f"{name}: worker {index} of {count} does not exist", f"count from 0 to {max(count - 1, 0)}")
    return Share(index, count)
