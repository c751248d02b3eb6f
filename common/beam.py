"""The one shape of Apache Beam pipeline that the stages share: call a function with each of some numbers.

Elements are shard or batch numbers, never rows: what a number stands for is read and written by the function
itself, whole, so that a retried bundle does no harm.
"""

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

# Beam logs a warning about a BigQuery client that nobody here asked for.
logging.disable(logging.WARNING)
import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from saex_pipe.common.errors import InputError, SaexError  # noqa: E402
from saex_pipe.common.preemption import graceful_stop, raise_if_stopping  # noqa: E402

logging.disable(logging.NOTSET)
# What a worker raises reaches the caller; Beam's own report of it would only repeat it as a traceback.
logging.getLogger("apache_beam").setLevel(logging.CRITICAL)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def run_pipeline(build: Callable[[beam.Pipeline], object], runner: str, options: Sequence[str]) -> None:
    """Run the pipeline that ``build`` wires, on ``runner`` with its own ``options``, to the end."""
    try:
        pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(list(options)))
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(
            f"runner = {runner!r} with runner_options = {list(options)} is not one of Apache Beam's ({error})",
            "see 'Runners' in its documentation; FnApiRunner works in this process",
        ) from None
    build(pipeline)
    with graceful_stop(interrupts="hold") as stop:
        try:
            pipeline.run().wait_until_finish()
        except Exception as error:
            stop.raise_if_requested()  # rather than what Beam makes of it
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, SaexError):
                    cause.args = (str(cause).partition(" [while running ")[0],)  # which Beam adds
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            raise


def stoppable(work: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``work``, refused once a signal to stop has arrived: between two elements everything finished is committed."""

    @wraps(work)
    def checked(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        raise_if_stopping()
        return work(*arguments, **options)

    return checked


def for_each(numbers: Sequence[int], work: Callable[[int], None]) -> Callable[[beam.Pipeline], object]:
    """A pipeline that calls ``work`` with each of ``numbers``."""

    def build(pipeline: beam.Pipeline) -> object:
        return (
            pipeline | "Numbers" >> beam.Create(list(numbers)) | beam.Reshuffle() | "Work" >> beam.Map(stoppable(work))
        )

    return build
