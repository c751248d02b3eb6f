"""A GGUF file's tokenizer as ``tokenizer.json``, through the converters of transformers (which need no torch)."""

import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.gguf import GgufFile

_BYTE_LEVEL = "gpt2"
_REMEDY = "use the model's Hugging Face tokenizer: set corpus.tokenizer to a folder or URI with tokenizer.json"


def convert(path: Path) -> tuple[str, dict[str, Any]]:
    """``tokenizer.json`` as text, and the fields of ``SpecialTokens``.

    Raises an ``InputError`` where the file holds no tokenizer, or one that would be split differently here than
    by its model.
    """
    metadata = GgufFile(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        raise InputError(f"{path} holds no tokenizer", _REMEDY)
    # transformers remarks at import that torch is missing, which is how we want it.
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    splitter = metadata.get("tokenizer.ggml.pre")
    if kind == _BYTE_LEVEL and splitter not in {*GGUF_PRE_TOKENIZER_SPLITS, *_SPLITS}:
        raise InputError(f"{path}: the tokenizer splits text by the unknown rule {splitter!r}", _REMEDY)
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    fields = {ours: metadata[f"tokenizer.{key}"] for key, ours in names.items() if f"tokenizer.{key}" in metadata}
    try:
        tokenizer, _ = convert_gguf_tokenizer(metadata["general.architecture"], fields)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: the tokenizer cannot be converted ({error})", _REMEDY) from None
    if kind == _BYTE_LEVEL and splitter in _SPLITS:
        tokenizer.pre_tokenizer = _SPLITS[splitter]()
    _check_ids(tokenizer, metadata["tokenizer.ggml.tokens"], path)
    special = {
        "bos": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad": metadata.get("tokenizer.ggml.padding_token_id"),
        # llama.cpp adds BOS to a sentencepiece vocabulary whose file does not say otherwise.
        "adds_bos": bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")),
    }
    return tokenizer.to_str(), special


def _digits_apart() -> pre_tokenizers.PreTokenizer:
    """SmolLM: every digit by itself, before GPT-2's rule. transformers leaves the digits together."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)


# Rules that transformers does not name. "default" of llama.cpp is none of them, and is refused.
_SPLITS = {"smollm": _digits_apart, "gpt-2": _gpt2}


def _check_ids(tokenizer: Tokenizer, tokens: list[str], path: Path) -> None:
    """A converter that renumbers tokens would pair texts with the wrong embeddings."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= len(tokens):
        raise InputError(f"{path}: conversion gives token id {largest}, the file holds {len(tokens)} tokens", _REMEDY)
