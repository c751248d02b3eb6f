"""The tokenizer of a Hugging Face folder: ``tokenizer.json``, and what the files beside it say of its tokens' roles.

The files are read as ``transformers`` 5 reads them (``PreTrainedTokenizerBase._from_pretrained``). Folders from before
there was a ``tokenizer.json`` go through its converters, which know every older format.
"""

import logging
from pathlib import Path
from typing import Any

import tokenizers

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.hugging_face import read_json

_ROLES = ("bos", "eos", "pad")
_OLDER = ("tokenizer.model", "spiece.model", "vocab.json")


def read(path: Path) -> dict[str, Any]:
    """The arguments of ``Tokenizer``, as JSON values, for the ``tokenizer.json`` at ``path`` or what precedes it there.

    Raises an ``InputError`` where it, or a file beside it, cannot be read.
    """
    text, vocabulary = _vocabulary(path)
    config = _optional_json(path.with_name("tokenizer_config.json"))
    ids = _role_ids(vocabulary, config, path.parent)
    return {
        "tokenizer_json": text,
        "special": {**ids, "adds_bos": ids["bos"] is not None and _first_id(vocabulary) == ids["bos"]},
        "chat_template": _chat_template(config, path.parent),
    }


def _vocabulary(path: Path) -> tuple[str, tokenizers.Tokenizer]:
    if not path.exists() and any((path.parent / name).is_file() for name in _OLDER):
        return _converted(path.parent)
    try:
        text = path.read_text(encoding="utf-8")
        return text, tokenizers.Tokenizer.from_str(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "name a tokenizer with tokenizer.json") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a tokenizer.json", "get an intact copy of it") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path} is not a tokenizer.json: {error}", "get an intact copy of it") from None


def _converted(folder: Path) -> tuple[str, tokenizers.Tokenizer]:
    # transformers remarks at import that torch is missing, which is how we want it.
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    from transformers import AutoTokenizer  # slow to import (2 s)

    try:
        vocabulary = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # whatever a converter may raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder} has no tokenizer.json, and its older files cannot be converted ({reason})",
            "name another tokenizer, a folder with tokenizer.json",
        ) from None
    return vocabulary.to_str(), vocabulary


def _role_ids(vocabulary: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> dict[str, int | None]:
    """Ids by role, None where the model names none.

    Older folders spell the roles in ``special_tokens_map.json``. The oldest (GPT-2's) leave them to the code of their
    tokenizer, which agrees with the ids in ``config.json``.
    """
    spelled = (
        config if "added_tokens_decoder" in config else config | _optional_json(folder / "special_tokens_map.json")
    )
    model = _optional_json(folder / "config.json")
    ids: dict[str, int | None] = {}
    for role in _ROLES:
        if f"{role}_token" in spelled:
            token = spelled[f"{role}_token"]
            token = token.get("content") if isinstance(token, dict) else token
            ids[role] = vocabulary.token_to_id(token) if isinstance(token, str) else None
        else:
            named = model.get(f"{role}_token_id")
            number: Any = named[0] if isinstance(named, list) and named else named
            known = type(number) is int and number >= 0 and vocabulary.id_to_token(number) is not None
            ids[role] = number if known else None
    return ids


def _first_id(vocabulary: tokenizers.Tokenizer) -> int | None:
    """What ``tokenizer.json`` itself puts before a text. ``transformers`` 5 goes by that, not by ``add_bos_token``."""
    vocabulary.no_padding()
    vocabulary.no_truncation()
    ids = vocabulary.encode("").ids
    return ids[0] if ids else None


def _chat_template(config: dict[str, Any], folder: Path) -> str | None:
    """A file of its own goes before ``tokenizer_config.json``; of several templates the one named "default" counts."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError(f"{file} cannot be read", "get an intact copy of it") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
