"""Text to windows of token ids."""

from functools import partial

import numpy as np

from saex_pipe.common import resources
from saex_pipe.common.beam import for_each, run_pipeline
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.stage_output import StageOutput, stage_output
from saex_pipe.common.formats.tokens import TokenStoreInfo, create_token_arrays
from saex_pipe.common.llm.chat_template import ChatTemplate
from saex_pipe.common.llm.tokenizer import Tokenizer, load_tokenizer
from saex_pipe.common.metrics_log import watched_progress
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.stages.corpus.beam import tokenise
from saex_pipe.stages.corpus.config import Config
from saex_pipe.stages.corpus.packing import Layout, Marks, lay_out
from saex_pipe.stages.corpus.parts import (
    ORDER,
    PARTS,
    batch_name,
    cut_batches,
    lengths_name,
    read_layout,
    write_layout,
)
from saex_pipe.stages.corpus.text import check_source
from saex_pipe.stages.corpus.work import CorpusWork, Order, marks_of

_CHARACTERS_PER_TOKEN = 6  # a first guess on the high side; another wave follows where it was too low
_SHARD_TOKENS = 1 << 22


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the token store at ``config.out``."""
    for uri in config.source:
        check_source(uri, with_fields=config.chat_field is not None)
    with stage_output(config, force=force) as output, graceful_stop(at_once=True):
        if output.manifest is not None:
            return output.manifest
        tokenizer = load_tokenizer(resources.fetch(config.tokenizer))
        template = None
        if config.chat_field is not None:
            template = ChatTemplate(tokenizer, config.tokenizer)
        marks = marks_of(config, tokenizer)
        work = CorpusWork(config, output.folder.uri, output.digest)
        order = _document_order(work, output)
        layout = read_layout(output.folder) or _tokenise_and_lay_out(work, output, order, marks)
        info = _info(config, tokenizer, template.digest if template else None, layout, len(order.documents))
        _write_shards(work, output, info, marks)
        output.folder.delete(PARTS)
        totals = {
            "tokens": info.windows * info.window_length,
            "documents": len(layout.documents),
            "bytes": 2 * 4 * info.windows * info.window_length,
        }
        return output.finish(contents=info.as_contents(), totals=totals)


def _document_order(work: CorpusWork, output: StageOutput) -> Order:
    """Count the documents of every source and put them in order."""
    config, folder = work.config, output.folder
    if (kept := folder.read_arrays(ORDER)) is not None:
        return Order(**kept)
    names = [lengths_name(i) for i in range(len(config.source))]
    missing = [i for i, name in enumerate(names) if folder.read(name) is None]
    with watched_progress("reading sources", names, "sources", folder.list, PARTS, output.metrics):
        run_pipeline(for_each(missing, work.measure_source), config.runner, config.runner_options)
    lengths_of = [found["lengths"] for name in names if (found := folder.read_arrays(name)) is not None]
    lengths = np.concatenate(lengths_of)
    if not lengths.any():
        folder.delete(PARTS)  # of no use to any later run
        raise InputError(
            f"corpus.source = {list(config.source)} holds no text", "give at least one document that is not empty"
        )
    documents = np.arange(len(lengths))
    if config.document_order == "shuffled":
        documents = np.random.Generator(np.random.Philox(key=config.seed)).permutation(len(lengths))
    starts = np.concatenate([[0], np.cumsum([len(found) for found in lengths_of])])
    order = Order(documents, lengths[documents], starts, cut_batches(lengths[documents]))
    folder.write_arrays(ORDER, order._asdict())
    return order


def _tokenise_and_lay_out(work: CorpusWork, output: StageOutput, order: Order, marks: Marks) -> Layout:
    """Tokenise batches of documents until there are enough tokens, and decide where each document goes."""
    config = work.config
    used = order.lengths
    if config.max_document_tokens is not None:
        used = np.minimum(used, config.max_document_tokens * _CHARACTERS_PER_TOKEN)
    batch_characters = np.add.reduceat(used, order.cuts[:-1])
    counts: list[np.ndarray] = []
    while len(counts) < len(batch_characters):
        tokens = sum(int(c.sum()) for c in counts)
        if config.max_tokens is not None and tokens >= config.max_tokens:
            break
        ahead = np.cumsum(batch_characters[len(counts) :])
        wanted = ahead[-1] if config.max_tokens is None else (config.max_tokens - tokens) * _CHARACTERS_PER_TOKEN
        stop = len(counts) + int(np.searchsorted(ahead, wanted)) + 1
        wave = range(len(counts), min(stop, len(batch_characters)))
        counts += _tokenise_wave(work, output, wave)
    token_counts = np.concatenate(counts)
    layout = lay_out(
        order.documents[: len(token_counts)],
        token_counts,
        slots=config.window_length - (marks.bos is not None),
        packed=config.packing == "packed",
        max_windows=None if config.max_tokens is None else config.max_tokens // config.window_length,
        holdout_fraction=config.holdout_fraction,
    )
    if layout.windows == 0:
        output.folder.delete(PARTS)
        raise InputError(
            f"the text has {int(token_counts.sum()):,} tokens, which fill no window of {config.window_length}",
            "give more text, set corpus.window_length lower or corpus.max_tokens higher",
        )
    write_layout(output.folder, layout)
    return layout


def _tokenise_wave(work: CorpusWork, output: StageOutput, wave: range) -> list[np.ndarray]:
    """Tokenise the batches of ``wave`` that are not there yet; token counts of each batch's documents."""
    config, folder = work.config, output.folder
    names = [batch_name(batch) for batch in wave]
    missing = frozenset(batch for batch in wave if folder.read(batch_name(batch)) is None)
    with watched_progress("tokenising", names, "batches", folder.list, PARTS, output.metrics):
        if missing:
            read = partial(work.read_source, wanted=missing)
            sources = range(len(config.source))
            run_pipeline(tokenise(sources, read, work.tokenise_batch), config.runner, config.runner_options)
    return [found["counts"] for name in names if (found := folder.read_arrays(name)) is not None]


def _write_shards(work: CorpusWork, output: StageOutput, info: TokenStoreInfo, marks: Marks) -> None:
    create_token_arrays(output.folder, info.shape)
    shards = info.shape.tiling.shards(info.windows)
    missing = sorted({*range(len(shards))} - output.finished_shards())
    names = [f"ledger/{shard:06d}.json" for shard in range(len(shards))]
    with watched_progress("writing windows", names, "shards", output.folder.list, "ledger/", output.metrics):
        write = partial(work.write_shard, shape=info.shape, marks=marks)
        run_pipeline(for_each(missing, write), work.config.runner, work.config.runner_options)


def _info(
    config: Config, tokenizer: Tokenizer, chat_template: str | None, layout: Layout, documents: int
) -> TokenStoreInfo:
    return TokenStoreInfo(
        windows=layout.windows,
        train_windows=layout.train_windows,
        window_length=config.window_length,
        packing=config.packing,
        shard_windows=max(1, min(_SHARD_TOKENS // config.window_length, layout.windows)),
        tokenizer={
            "uri": resources.absolute(config.tokenizer),
            "digest": tokenizer.digest,
            "vocabulary": tokenizer.vocabulary,
            "largest_id": tokenizer.largest_id,
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
            "pad": tokenizer.pad,
            "special_ids": sorted(tokenizer.special_ids),
            "chat_template": chat_template,  # the digest of the one that was applied
        },
        documents=documents,
    )
