"""The one shape of Apache Beam pipeline that the stages share: call a function with each of some numbers.

Elements are shard or batch numbers, never rows: what a number stands for is read and written by the function
itself, whole, so that a retried bundle does no harm.
"""

from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions


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
