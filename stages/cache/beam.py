"""The feature statistics as a Beam pipeline: shard numbers in, one summary out."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import apache_beam as beam

from saex_pipe.common.beam import stoppable
from saex_pipe.stages.cache.summary import Summary, merge


class MergeSummaries(beam.CombineFn):
    """Merges the summaries of shards; the order does not matter (see ``summary``)."""

    def create_accumulator(self) -> Summary | None:
        """Nothing yet."""
        return None

    def add_input(self, accumulator: Summary | None, summary: Summary) -> Summary:
        """One more shard."""
        return summary if accumulator is None else merge(accumulator, summary)

    def merge_accumulators(self, accumulators: Iterable[Summary | None]) -> Summary | None:
        """Several groups of shards."""
        present = [accumulator for accumulator in accumulators if accumulator is not None]
        return reduce(merge, present) if present else None

    def extract_output(self, accumulator: Summary | None) -> Summary | None:
        """The summary of all."""
        return accumulator


def summarise_shards(
    shards: Sequence[int], summarise: Callable[[int], Summary], write: Callable[[Summary], None]
) -> Callable[[beam.Pipeline], object]:
    """A pipeline that calls ``write`` once, with the merged summaries of all ``shards``."""

    def build(pipeline: beam.Pipeline) -> object:
        return (
            pipeline
            | "Shards" >> beam.Create(list(shards))
            | beam.Reshuffle()
            | "Summarise" >> beam.Map(stoppable(summarise))
            | "Merge" >> beam.CombineGlobally(MergeSummaries())
            | "Write" >> beam.Map(write)
        )

    return build
