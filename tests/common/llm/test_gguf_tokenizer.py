"""Tokenizers from GGUF metadata, against the model's own ``tokenizer.json`` and against sentencepiece's rule.

The references are put together here, from what the models publish: the expressions are those of their
``tokenizer.json``. They are trained on a page of text and written as llama.cpp's converter writes them.
"""

import json
import random

import gguf
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TRICKY = [
    "",
    " ",
    "Hello   12 years  1984, naïve cafe\u0301 日本語 🙂\n\n\tx=1;  \r\n ",
    "it's IT'S we'll WE'LL I'd've 'tis don't-don't",
    "12345678 3.14159 1,000,000 x1y22z333 ٣٤٥ ²³",
    "camelCaseHTTPServer SCREAMING snake_case/path\\to//file\n/next",
    "  leading,    four,     five \n \n  \n\n\n\ttab\t\ttabs ",
    "a<|im_start|>user\nhi<|im_end|> <think>so</think><think",
    "¿Qué? «où» — naïve… 한국어 Привет мир ünïcödé \u200d zero\u00a0width",
    "x" + " " * 40 + "y" + "\n" * 40 + "z",
    "unreachable unreachable",
    "if (x != y) { return f'{z}'; } // done!!!???",
]
TEXT = (
    " ".join(TRICKY[2:10]) * 3
    + (
        " The people of the Union, in the year 1984, asked for peace; they'd 1500 ships and 22,000 men."
        " IT'S SAID THAT the river's law isn't theirs. Straße, œuvre, año, 東京, Москва."
    )
    * 5
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NFC = {"type": "NFC"}
WHOLE = {"ignore_merges": True}


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(pattern):
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        byte_level(False),
    ]


DIGITS = [{"type": "Digits", "individual_digits": True}, byte_level(True)]
# What tokenizer.ggml.pre and general.architecture say, and normalizer, pre-tokenizer and model of the model's own.
BYTE_LEVEL = {
    "GPT-2": ("gpt-2", "gpt2", None, [byte_level(True)], {}),
    "GPT-2, older": (None, "gpt2", None, [byte_level(True)], {}),
    "GPT-2, unknown to the converter": ("default", "gpt2", None, [byte_level(True)], {}),
    "Phi-2": ("phi-2", "phi2", None, [byte_level(True)], {}),
    "Pythia": ("olmo", "gptneox", NFC, [byte_level(True)], {}),
    "Pythia, older": (None, "gptneox", NFC, [byte_level(True)], {}),
    "SmolLM2": ("smollm", "llama", None, DIGITS, {}),
    "StarCoder": ("starcoder", "llama", None, DIGITS, {}),
    "Llama 3": ("llama-bpe", "llama", None, split(LLAMA3), WHOLE),
    "Phi-4": ("dbrx", "phi3", None, split(LLAMA3), {}),
    "Phi-4-mini": ("gpt-4o", "phi3", None, split(O200K), {}),
    "Qwen2": ("qwen2", "qwen2", NFC, split(QWEN2), {}),
    "Qwen3": ("qwen2", "qwen3", NFC, split(QWEN2), {}),
    "Qwen3, unknown to the converter": ("default", "qwen3", NFC, split(QWEN2), {}),
    "Mistral Nemo": ("tekken", "llama", None, split(TEKKEN), WHOLE),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEX_CACHE", str(tmp_path / "cache"))


def write(path, architecture, fields):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if value is not None:
            kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(f"tokenizer.{key}", value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(path)


def trained(normalizer, words, model):
    """A byte-level BPE with the given parts, trained on ``TEXT``, and its special tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    parts = json.loads(made.to_str())
    parts |= {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": words}}
    made = tokenizers.Tokenizer.from_str(json.dumps(parts))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    parts = json.loads(made.to_str())
    size = len(parts["model"]["vocab"])
    parts["model"]["vocab"] |= {"unreachable": size, "Ġunreachable": size + 1}  # which no merge makes
    parts["model"] |= model
    made = tokenizers.Tokenizer.from_str(json.dumps(parts))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    made.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", " " * 24, " " * 8)])
    return made


def converted(made, pre, architecture, path, **more):
    """As ``get_vocab_base`` of llama.cpp's converter does, in an embedding with two rows to spare."""
    vocabulary, added = made.get_vocab(), made.get_added_tokens_decoder()
    by_id = {number: token for token, number in vocabulary.items()}
    tokens, kinds = [], []
    for number in range(len(by_id) + 2):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        kinds.append(NORMAL if number in by_id else UNUSED)
        if number in added:
            kinds[-1] = CONTROL if added[number].special else USER_DEFINED
    merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges, **more}
    return write(path, architecture, {f"ggml.{key}": value for key, value in fields.items()})


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_gives_the_ids_of_the_models_own_tokenizer(name, tmp_path):
    pre, architecture, normalizer, words, model = BYTE_LEVEL[name]
    made = trained(normalizer, words, model)
    found = converted(made, pre, architecture, tmp_path / "x.gguf")
    for text, ids in zip(TRICKY, found.encode_batch(TRICKY), strict=True):
        assert list(ids) == made.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids) == made.decode(list(ids), skip_special_tokens=False)
    special = {token for token, kind in made.get_added_tokens_decoder().items() if kind.special}
    assert found.special_ids == special
    assert found.largest_id == made.get_vocab_size() + 1


def test_the_rules_differ_on_the_texts():
    """Else the comparisons above would pass with any rule."""
    rules = {json.dumps([words, normalizer]) for _, _, normalizer, words, _ in BYTE_LEVEL.values()}
    seen = set()
    for rule in rules:
        words, normalizer = json.loads(rule)
        made = trained(normalizer, words, {})
        pieces = [made.pre_tokenizer.pre_tokenize_str(text) for text in TRICKY if text]
        seen.add(json.dumps([[piece for piece, _ in found] for found in pieces]) + str(normalizer))
    assert len(seen) == len(rules) == 7


@pytest.mark.parametrize(
    ("pre", "architecture", "said", "adds_bos"),
    [
        ("gpt-2", "gpt2", None, False),
        ("gpt-2", "gpt2", True, True),
        ("qwen2", "qwen2", False, False),
        ("llama-bpe", "llama", None, True),  # what older files of Llama 3 leave out
        ("llama-bpe", "llama", False, False),
        ("tekken", "llama", None, True),
    ],
)
def test_whether_a_text_begins_with_bos(pre, architecture, said, adds_bos, tmp_path):
    made = trained(None, [byte_level(True)], {})
    bos = made.token_to_id("<|im_start|>")
    found = converted(made, pre, architecture, tmp_path / "x.gguf", add_bos_token=said, bos_token_id=bos)
    assert (found.bos, found.adds_bos) == (bos, adds_bos)
    found = converted(made, pre, architecture, tmp_path / "y.gguf", add_bos_token=said, padding_token_id=2**32 - 1)
    assert (found.bos, found.pad, found.adds_bos) == (None, None, False)


# ---- sentencepiece


def pieces_of_text():
    """Pieces in the order in which they are merged, as sentencepiece trains them: blanks only in front."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    made.train_from_iterator([TEXT.replace("\n", " ")], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    by_id = sorted(made.get_vocab().items(), key=lambda entry: entry[1])
    single = [token for token, _ in by_id if len(token) == 1]
    return [token for token, _ in by_id if len(token) > 1], single


def sentencepiece(text, score, ids):
    """Merge the neighbours whose piece scores best, leftmost first; what is no piece is spelled in bytes."""
    symbols = list(text)
    while True:
        pairs = [
            (score[symbols[i] + symbols[i + 1]], -i)
            for i in range(len(symbols) - 1)
            if symbols[i] + symbols[i + 1] in score
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def strings(number=300):
    rng = random.Random(0)
    letters = [*"  \n\t", *"theanofpIT'S198é日🙂▁,.;<>s"]
    return ["".join(rng.choice(letters) for _ in range(rng.randint(1, 30))) for _ in range(number)]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_llama_gives_the_ids_of_sentencepiece(prefix, tmp_path):
    merged, single = pieces_of_text()
    spare = ["▁▁", "▁▁▁▁"]
    run = "   "  # the converter's spelling, and score, of one that was defined by hand: merged as soon as it can be
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *spare, run, *merged, *single]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, NORMAL, NORMAL, USER_DEFINED, *[NORMAL] * (len(tokens) - 262)]
    scores = [0.0] * 259 + [-0.5, -1.5, -1000.0] + [-float(number) for number in range(len(tokens) - 262)]
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds}
    fields |= {"add_space_prefix": prefix, "bos_token_id": 1, "eos_token_id": 2}
    found = write(tmp_path / "x.gguf", "llama", {f"ggml.{key}": value for key, value in fields.items()})
    ids = {token.replace(" ", "▁"): number for number, token in enumerate(tokens)}
    score = dict(zip(list(ids)[259:], scores[259:], strict=True)) | {"▁▁▁": 1.0}
    texts = [text for text in [*TRICKY, *strings()] if text]
    for text, mine in zip(texts, found.encode_batch(texts), strict=True):
        spelled = ("" if prefix is False else "▁") + text.replace(" ", "▁")
        assert list(mine) == sentencepiece(spelled, score, ids), text
        assert found.decode(mine) == text.replace("▁", " ")
    assert (found.bos, found.eos, found.pad, found.adds_bos) == (1, 2, None, True)
    assert found.special_ids == {0, 1, 2}
    assert [found.token_text(number) for number in (ids["<0x0A>"], ids["▁▁"])] == ["\n", "  "]
    (spelled_out,) = found.encode_batch(["</s>"])
    assert list(spelled_out) == [2]


@pytest.mark.parametrize("said", [None, False])
def test_gemma_puts_nothing_before_a_text_and_merges_by_order(said, tmp_path):
    """Runs of blanks come as text, with a score of the converter's; runs of line breaks stand for themselves."""
    merged, single = pieces_of_text()
    blanks, breaks = ["  ", "   ", "    "], ["\n", "\n\n", "\n\n\n"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
    tokens = [*special, *breaks, *blanks, *[f"<0x{byte:02X}>" for byte in range(256)], *merged, *single]
    kinds = [CONTROL] * 3 + [UNKNOWN, CONTROL] + [USER_DEFINED] * 6 + [BYTE] * 256
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    scores = [-1000.0] * 267 + [0.0] * (len(tokens) - 267)
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds}
    fields |= {
        "add_space_prefix": said,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "add_bos_token": True,
    }
    found = write(tmp_path / "x.gguf", "gemma2", {f"ggml.{key}": value for key, value in fields.items()})
    ids = {token.replace(" ", "▁"): number for number, token in enumerate(tokens)}
    score = {token: -number for token, number in ids.items() if token not in (*special, *breaks)}
    texts = [text for text in [*TRICKY, *strings()] if text]
    for text, mine in zip(texts, found.encode_batch(texts), strict=True):
        expected, rest = [], text.replace(" ", "▁")
        while rest:  # the longest run of line breaks that is a token, or what lies before the next one
            run = next((run for run in reversed(breaks) if rest.startswith(run)), None)
            stop = len(run) if run else (rest + "\n").index("\n")
            expected += [ids[run]] if run else sentencepiece(rest[:stop], score, ids)
            rest = rest[stop:]
        assert list(mine) == expected, text
    assert (found.bos, found.eos, found.adds_bos) == (2, 1, True)
    assert found.special_ids == {0, 1, 2, 3, 4}


def test_phi3_swallows_the_blanks_after_its_marks(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "h", "i", "hi", "▁hi"]
    tokens += ["<|user|>", "<|endoftext|>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5, CONTROL, CONTROL]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [-float(i) for i in range(len(tokens))],
        "token_type": kinds,
    }
    ids = {token: number for number, token in enumerate(tokens)}
    for architecture, after in (("phi3", ["▁hi"]), ("llama", ["▁", "<0x0A>", "hi"])):
        found = write(tmp_path / f"{architecture}.gguf", architecture, {f"ggml.{k}": v for k, v in fields.items()})
        first, second = found.encode_batch(["<|user|>\nhi", "<|endoftext|> hi"])
        assert list(first) == [ids[token] for token in ("<|user|>", *after)]
        assert list(second) == [ids[token] for token in ("<|endoftext|>", "▁", "▁hi")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "holds no tokenizer"),
        ({"model": "gpt2"}, "holds no tokenizer"),
        ({"model": "bert", "tokens": ["a"]}, "the tokenizer is of the unknown kind 'bert'"),
        ({"model": "gpt2", "pre": "viking", "tokens": ["a"], "merges": []}, "splits text by the unknown rule 'viking'"),
        ({"model": "gpt2", "tokens": ["a"], "merges": ["a b"]}, "splits text by the unknown rule None"),
        ({"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "merges": ["a b"]}, r"cannot be converted \(.*`b`"),
        ({"model": "gpt2", "pre": "gpt-2", "tokens": ["a"]}, r"cannot be converted \('merges'\)"),
        ({"model": "gpt2", "pre": "gpt-2", "tokens": [1, 2], "merges": ["a b"]}, "cannot be converted"),
        ({"model": "llama", "tokens": ["a", "b"], "scores": [0.0], "token_type": [1, 1]}, "cannot be converted"),
        ({"model": "llama", "tokens": ["a", "b"], "unknown_token_id": 7}, "cannot be converted"),
    ],
)
def test_what_cannot_be_converted_is_named(fields, message, tmp_path):
    fields = {f"ggml.{key}": value for key, value in fields.items() if value != []}
    with pytest.raises(InputError, match=message) as caught:
        write(tmp_path / "x.gguf", "llama", fields)
    assert "\n" not in str(caught.value)
