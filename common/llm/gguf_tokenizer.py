"""A GGUF file's tokenizer as ``tokenizer.json``, put together as the model's own on the Hugging Face hub is.

A GGUF file holds the vocabulary, the kind of every token, merges or scores, and the name of the rule by which text is
split into words; the rest is agreement. Which name means what: ``llama_vocab`` in
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp. The expressions are those of the models' own
``tokenizer.json``, which that file quotes. Where llama.cpp and the hub differ (Unicode normalisation, runs of blanks)
the hub's is taken, since the activations of a model belong to the ids it was trained on.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.gguf import GgufFile

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # kinds of tokens
_BLANK = "▁"  # how sentencepiece spells a blank
_REMEDY = "use the model's Hugging Face tokenizer: set corpus.tokenizer to a folder or URI with tokenizer.json"

# Words as in cl100k (Llama 3), with one and three digits at a time; in tekken and o200k also by upper and lower case.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    rf"|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


class _Rule(NamedTuple):
    """How a byte-level vocabulary's text is cut into words before any merge."""

    words: str | None = None  # an expression; None is GPT-2's rule
    digits_apart: bool = False  # before anything else
    composed: bool = False  # Unicode's form NFC first
    whole_words: bool = False  # a word that is a token stands for itself, whatever the merges say
    adds_bos: bool = False  # where the file does not say


_RULES = {
    **dict.fromkeys(("gpt-2", "phi-2"), _Rule()),
    **dict.fromkeys(("olmo", "mpt"), _Rule(composed=True)),  # GPT-NeoX's
    **dict.fromkeys(("smollm", "starcoder", "refact"), _Rule(digits_apart=True)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"), _Rule(_WORDS % "{1,3}", whole_words=True, adds_bos=True)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Rule(_WORDS % "{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Rule(_WORDS % "", composed=True)),
    "tekken": _Rule(_CASED % ("", "", ""), whole_words=True, adds_bos=True),
    "gpt-4o": _Rule(_CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", "{1,3}")),
}
# "default" and silence are said by converters that did not know the rule. These families never had but one.
_RULE_OF_FAMILY = {"gpt2": "gpt-2", "gptneox": "olmo", "qwen2": "qwen2", "qwen3": "qwen2"}


def convert(path: Path) -> dict[str, Any]:
    """The arguments of ``Tokenizer``, as JSON values.

    Raises an ``InputError`` where the file holds no tokenizer, or one that would be split differently here than
    by its model.
    """
    metadata = GgufFile(path).metadata
    fields = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    kind, family = fields.get("model"), str(metadata.get("general.architecture"))
    if kind is None or not fields.get("tokens"):
        raise InputError(f"{path} holds no tokenizer", _REMEDY)
    if kind not in (_BYTE_LEVEL, _SENTENCEPIECE):
        raise InputError(f"{path}: the tokenizer is of the unknown kind {kind!r}", _REMEDY)
    try:
        if kind == _BYTE_LEVEL:
            rule = _rule(fields.get("pre"), family, path)
            tokenizer, adds_bos, defaults = _byte_level(fields, rule), rule.adds_bos, {}
        else:
            tokenizer, adds_bos, defaults = _sentencepiece(fields, family), True, {"bos": 1, "eos": 2}
        _add_tokens(tokenizer, fields, family)
        special = _special(fields, adds_bos, defaults)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, and a damaged field may be of any type
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: the tokenizer cannot be converted ({reason})", _REMEDY) from None
    return {
        "tokenizer_json": tokenizer.to_str(),
        "special": special,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _rule(name: Any, family: str, path: Path) -> _Rule:
    if name in (None, "default"):
        name = _RULE_OF_FAMILY.get(family, name)
    if name not in _RULES:
        raise InputError(f"{path}: the tokenizer splits text by the unknown rule {name!r}", _REMEDY)
    return _RULES[name]


def _byte_level(fields: Mapping[str, Any], rule: _Rule) -> Tokenizer:
    """Byte-level BPE (see ``tokenizer.byte_alphabet``)."""
    merges = [_pair(merge) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(_ids(fields["tokens"]), merges, ignore_merges=rule.whole_words))
    words: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits_apart else []
    words += [pre_tokenizers.Split(Regex(rule.words), "isolated")] if rule.words else []
    words.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    if rule.composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], family: str) -> Tokenizer:
    """BPE over characters, bytes standing in for those that the vocabulary lacks; a blank is put before every text."""
    tokens = _respelled(fields["tokens"])
    merges = [_pair(merge) for merge in fields["merges"]] if "merges" in fields else _merges(tokens, fields, family)
    unknown = tokens[fields.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(_ids(tokens), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("add_space_prefix", not _is_gemma(family))
    replace = normalizers.Replace(" ", _BLANK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), replace]) if prefix else replace
    back = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def _respelled(tokens: list[str]) -> list[str]:
    """llama.cpp writes runs of blanks as they are in text; they are tokens like others, reached by merges."""
    return [_BLANK * len(token) if token and not token.strip(" ") else token for token in tokens]


def _merges(tokens: list[str], fields: Mapping[str, Any], family: str) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the token that is merged first in front.

    That is the one of the highest score, except that llama.cpp writes a score of its own (-1000) for tokens of the
    kind "user defined". Of Gemma the hub's tokenizer goes by the tokens' order (``generate_merges`` of transformers).
    """
    ids = _ids(tokens)
    rank = dict.fromkeys(tokens, 0.0)
    if "scores" in fields and not _is_gemma(family):
        for token, score, kind in zip(tokens, fields["scores"], _kinds(fields), strict=True):
            rank[token] = -math.inf if kind == _USER_DEFINED else -score
    return [
        (token[:cut], token[cut:])
        for token in sorted(ids, key=lambda token: (rank[token], ids[token]))
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]


def _add_tokens(tokenizer: Tokenizer, fields: Mapping[str, Any], family: str) -> None:
    """Mark the tokens that stand for themselves wherever a text spells them; control tokens are special."""
    sentencepiece = fields["model"] == _SENTENCEPIECE
    tokens = _respelled(fields["tokens"]) if sentencepiece else fields["tokens"]
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for token, kind in zip(tokens, _kinds(fields), strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token.strip(_BLANK):
            # Phi-3's swallow the blanks after them, which its GGUF files do not say; llama.cpp knows it as well.
            strips = sentencepiece and family == "phi3" and token not in ("<unk>", "<s>", "<|endoftext|>")
            (plain if kind == _USER_DEFINED else special).append(AddedToken(token, normalized=False, rstrip=strips))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _special(fields: Mapping[str, Any], adds_bos: bool, defaults: Mapping[str, int]) -> dict[str, Any]:
    """The fields of ``SpecialTokens``. An id beyond the vocabulary is how some converters write none."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    ids = {role: fields.get(name, defaults.get(role)) for role, name in names.items()}
    known = {role: number if number in range(len(fields["tokens"])) else None for role, number in ids.items()}
    return {**known, "adds_bos": bool(fields.get("add_bos_token", adds_bos)) and known["bos"] is not None}


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _kinds(fields: Mapping[str, Any]) -> list[int]:
    return fields.get("token_type", [1] * len(fields["tokens"]))


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")
    return merge[0] + left, right


def _is_gemma(family: str) -> bool:
    return family.startswith("gemma")
