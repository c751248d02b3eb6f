"""Tokenizers: from ``tokenizer.json`` of a Hugging Face folder, or from the metadata of a GGUF file.

Neither jax nor torch is imported. A GGUF file's tokenizer is converted once (see ``gguf_tokenizer``) and kept as
``tokenizer.json`` in the cache folder.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

from saex_pipe.common.errors import InputError
from saex_pipe.common.resources import cache_folder

# Part of the cache key: raise it when the conversion from GGUF changes.
_CONVERSION = 2


class SpecialTokens(NamedTuple):
    """Ids with a role, None where the model names none, and whether a text starts with ``bos``."""

    bos: int | None
    eos: int | None
    pad: int | None
    adds_bos: bool


class Tokenizer:
    """Text to ids and back. Encoding never adds special tokens: who packs windows decides where they go."""

    def __init__(self, tokenizer_json: str, special: SpecialTokens, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.bos, self.eos, self.pad, self.adds_bos = special
        self.chat_template = chat_template  # as the model spells it, None where it has none (see ``chat_template``)
        self.digest = hashlib.sha256(tokenizer_json.encode()).hexdigest()  # of tokenizer.json
        self.vocabulary: int = self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def largest_id(self) -> int:
        """The largest id there is; with gaps in the numbering it is above ``vocabulary``."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def role_texts(self) -> dict[str, str]:
        """The spelling of ``bos``, ``eos`` and ``pad``, of those that there are."""
        roles = {"bos": self.bos, "eos": self.eos, "pad": self.pad}
        found = {role: self._tokenizer.id_to_token(number) for role, number in roles.items() if number is not None}
        return {role: text for role, text in found.items() if text is not None}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Every id that stands for structure rather than text: control tokens, and bos, eos and pad."""
        named = {token for token in (self.bos, self.eos, self.pad) if token is not None}
        return frozenset(named | {number for number, token in self._added.items() if token.special})

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens that are spelled as in text, whatever the alphabet of the others."""
        return self._tokenizer.get_added_tokens_decoder()

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " length"]]:
        """Ids (int32) of each text, without special tokens; ones spelled out in a text are encoded as such."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " length"]) -> str:
        """The text of a run of ids, special tokens spelled out."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)

    def token_text(self, number: int) -> str:
        """One token for display: its text with its leading space, bytes of a broken character as \\xNN."""
        piece = self._tokenizer.id_to_token(int(number))
        if piece is None:
            return f"<id {number}>"
        if number in self._added:
            return piece
        if self._is_byte_level:
            raw = b"".join(_BYTES.get(letter, letter.encode()) for letter in piece)
            return raw.decode("utf-8", errors="backslashreplace")
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)]).decode("utf-8", errors="backslashreplace")
        return piece.replace("▁", " ")

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a ``.gguf`` file, a Hugging Face folder, or a ``tokenizer.json`` in such a folder.

    Raises an ``InputError`` where there is none, or it cannot be read.
    """
    if path.is_dir() or path.suffix == ".json":
        from saex_pipe.common.llm.hugging_face_tokenizer import read

        record = read(path / "tokenizer.json" if path.is_dir() else path)
    else:
        record = _from_gguf(path)
    return Tokenizer(record["tokenizer_json"], SpecialTokens(**record["special"]), record["chat_template"])


def _from_gguf(path: Path) -> dict[str, Any]:
    kept = _cache_file(path)
    try:
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        from saex_pipe.common.llm.gguf_tokenizer import convert

        record = convert(path)
        _keep(kept, json.dumps(record))
        return record


def _cache_file(path: Path) -> Path:
    """Where the tokenizer of this very file is kept: another size or time of change is another file."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
    identity = f"{_CONVERSION} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return cache_folder() / "tokenizers" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"


def _keep(path: Path, text: str) -> None:
    """Write whole or not at all. A cache that cannot be written costs time, not the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        pass


def _byte_alphabet() -> dict[str, bytes]:
    """The letters by which byte-level BPE spells bytes: printable Latin-1 as itself, the others from U+0100 on.

    Radford et al. 2019, https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
