"""The one shape of Apache Beam pipeline that the stages share: call a function with each of some numbers.

Elements are shard or batch numbers, never rows: what a number stands for is read and written by the function
itself, whole, so that a retried bundle does no harm.
"""

import logging
from collections.abc import Callable, Sequence

# Beam logs a warning about a BigQuery client that nobody here asked for.
logging.disable(logging.WARNING)
import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

logging.disable(logging.NOTSET)


def run_pipeline(build: Callable[[beam.Pipeline], object], runner: str, options: Sequence[str]) -> None:
    """Run the pipeline that ``build`` wires, on ``runner`` with its own ``options``, to the end."""
    pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(list(options)))
    build(pipeline)
    pipeline.run().wait_until_finish()


def for_each(numbers: Sequence[int], work: Callable[[int], None]) -> Callable[[beam.Pipeline], object]:
    """A pipeline that calls ``work`` with each of ``numbers``."""

    def build(pipeline: beam.Pipeline) -> object:
        return pipeline | "Numbers" >> beam.Create(list(numbers)) | beam.Reshuffle() | "Work" >> beam.Map(work)

    return build
