"""What the workers of the corpus pipelines do, one method an element. Instances travel between processes.

Every method writes its result whole under a name of its own, so a repeated or retried element does no harm.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import commit_shard
from saex_pipe.common.formats.tokens import StoreShape, create_token_arrays, write_token_shard
from saex_pipe.common.llm.chat_template import ChatTemplate
from saex_pipe.common.llm.tokenizer import Tokenizer, load_tokenizer
from saex_pipe.common.preemption import raise_if_stopping
from saex_pipe.stages.corpus.config import Config
from saex_pipe.stages.corpus.packing import Layout, Marks, fill_windows
from saex_pipe.stages.corpus.parts import (
    ORDER,
    TokenisedParts,
    batch_name,
    lengths_name,
    read_layout,
)
from saex_pipe.stages.corpus.text import Content, conversations, plain_text, read_documents


class Order(NamedTuple):
    """All documents in the order they are taken; sources follow one another in the numbering."""

    documents: Int64[np.ndarray, " documents"]  # number of the document at each place
    lengths: Int64[np.ndarray, " documents"]  # its characters
    source_starts: Int64[np.ndarray, " sources_1"]  # first document number of each source, then the total
    cuts: Int64[np.ndarray, " batches_1"]  # places at which batches begin and end


@dataclass(frozen=True)
class CorpusWork:
    """The work on one corpus, written to the folder ``out``."""

    config: Config
    out: str
    digest: str  # of the corpus: what one process keeps in memory must not serve another corpus at the same place

    def measure_source(self, source: int) -> None:
        """Write the document lengths of one source."""
        lengths = np.fromiter((len(text) for text in self._texts(source)), np.int64)
        Folder(self.out).write_arrays(lengths_name(source), {"lengths": lengths})

    def read_source(self, source: int, wanted: frozenset[int]) -> Iterator[tuple[int, tuple[int, str]]]:
        """Yield ``(batch, (place, text))`` for the documents of one source that are in the batches ``wanted``."""
        order, places = _read_order(self.out, self.digest), _places(self.out, self.digest)
        for i, text in enumerate(self._texts(source)):
            place = int(places[int(order.source_starts[source]) + i])
            batch = int(np.searchsorted(order.cuts, place, side="right")) - 1
            if batch in wanted:
                yield batch, (place, text)

    def _texts(self, source: int) -> Iterator[str]:
        for text in read_documents(self.config.source[source], self._content()):
            raise_if_stopping()
            yield text

    def _content(self) -> Content:
        if self.config.chat_field is None:
            return plain_text(self.config.text_field)
        tokenizer = _load_tokenizer_once(self.config.tokenizer, self.digest)
        template = ChatTemplate(tokenizer, self.config.tokenizer)
        return conversations(self.config.chat_field, template.render)

    def tokenise_batch(self, batch: int, texts: list[str]) -> None:
        """Write the tokens of one batch of documents."""
        tokenizer = _load_tokenizer_once(self.config.tokenizer, self.digest)
        encoded = tokenizer.encode_batch(texts)
        if self.config.chat_field is not None:
            encoded = [_without_bos(tokens, marks_of(self.config, tokenizer).bos) for tokens in encoded]
        encoded = [tokens[: self.config.max_document_tokens] for tokens in encoded]
        if self.config.packing == "packed" and tokenizer.eos is not None:
            encoded = [self._with_separator(tokens, tokenizer.eos) for tokens in encoded]
        counts = np.asarray([len(tokens) for tokens in encoded], np.int64)
        tokens = np.concatenate(encoded).astype(np.int32)
        Folder(self.out).write_arrays(batch_name(batch), {"tokens": tokens, "counts": counts})

    def _with_separator(self, tokens: Int32[np.ndarray, " tokens"], eos: int) -> Int32[np.ndarray, " tokens_1"]:
        """End a document with ``eos``, unless a chat template did so already."""
        ended = self.config.chat_field is not None and tokens[-1:].tolist() == [eos]
        return tokens if ended else np.append(tokens, np.int32(eos))

    def write_shard(self, shard: int, shape: StoreShape, marks: Marks) -> None:
        """Write one shard of the token store and its ledger entry."""
        arrays, layout, parts = _open_shards(self.out, self.digest, shape)
        windows = shape.tiling.shards(shape.windows)[shard]
        tokens_NL, documents_NL = fill_windows(layout, parts.tokens_of, windows, shape.window_length, marks)
        write_token_shard(arrays, windows, tokens_NL, documents_NL)
        commit_shard(Folder(self.out), shard, {"windows": [windows.start, windows.stop], "tokens": tokens_NL.size})


def marks_of(config: Config, tokenizer: Tokenizer) -> Marks:
    """The ids that windows are filled with beside the text."""
    wanted = config.prepend_bos == "always" or (config.prepend_bos == "auto" and tokenizer.adds_bos)
    if wanted and tokenizer.bos is None:
        raise InputError("corpus.prepend_bos = 'always', and the tokenizer has no BOS token", "set it to 'never'")
    pad = next((mark for mark in (tokenizer.pad, tokenizer.eos) if mark is not None), 0)
    return Marks(tokenizer.bos if wanted else None, pad)


def _without_bos(tokens: Int32[np.ndarray, " tokens"], bos: int | None) -> Int32[np.ndarray, " fewer"]:
    """Leave out the BOS that a chat template wrote, where every window starts with one anyway."""
    return tokens[1:] if tokens[:1].tolist() == [bos] else tokens


@lru_cache(maxsize=1)
def _load_tokenizer_once(uri: str, digest: str) -> Tokenizer:
    return load_tokenizer(resources.fetch(uri))


@lru_cache(maxsize=1)
def _read_order(out: str, digest: str) -> Order:
    arrays = Folder(out).read_arrays(ORDER)
    assert arrays is not None, "the order is written before any document is tokenised"
    return Order(**arrays)


@lru_cache(maxsize=1)
def _places(out: str, digest: str) -> np.ndarray:
    """The place of each document in the order."""
    return np.argsort(_read_order(out, digest).documents)


@lru_cache(maxsize=1)
def _open_shards(out: str, digest: str, shape: StoreShape) -> tuple[tuple[Any, Any], Layout, TokenisedParts]:
    folder = Folder(out)
    layout = read_layout(folder)
    assert layout is not None, "the layout is written before any shard"
    return create_token_arrays(folder, shape), layout, TokenisedParts(folder, _read_order(out, digest).cuts)
