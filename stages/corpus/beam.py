"""The tokenisation of the corpus as a Beam pipeline. Elements are sources and documents in batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import apache_beam as beam

from saex_pipe.common.beam import stoppable


def tokenise(
    sources: Sequence[int],
    read: Callable[[int], Iterator[tuple[int, tuple[int, str]]]],
    tokenise_batch: Callable[[int, list[str]], None],
) -> Callable[[beam.Pipeline], object]:
    """A pipeline that reads ``sources`` and calls ``tokenise_batch(batch, texts in order)`` once a batch.

    ``read(source)`` yields ``(batch, (place, text))`` for the wanted documents of one source.
    """

    def in_order(batch: int, documents: Iterable[tuple[int, str]]) -> None:
        tokenise_batch(batch, [text for _, text in sorted(documents)])

    def build(pipeline: beam.Pipeline) -> object:
        return (
            pipeline
            | "Sources" >> beam.Create(list(sources))
            | beam.Reshuffle()
            | "ReadDocuments" >> beam.FlatMap(stoppable(read))
            | "GatherBatches" >> beam.GroupByKey()
            | "TokeniseBatch" >> beam.MapTuple(stoppable(in_order))
        )

    return build
