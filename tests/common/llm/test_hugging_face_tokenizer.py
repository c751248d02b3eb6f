"""Tokenizers of Hugging Face folders: tokens that have a role, whether BOS goes first, which chat template counts."""

import json
import logging

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.tokenizer import load_tokenizer

BYTES = processors.ByteLevel()


def template(*special):
    return processors.TemplateProcessing(
        " ".join([*special, "$A"]), None, [(token, TOKENS.index(token)) for token in special]
    )


TOKENS = ["<s>", "</s>", "<pad>", "<|endoftext|>", "<unk>", "a", "b"]
# Post-processor, tokenizer_config.json, special_tokens_map.json, config.json; bos, eos, pad, whether BOS is added.
FOLDERS = {
    "GPT-2": (BYTES, {}, None, {"model_type": "gpt2", "bos_token_id": 3, "eos_token_id": [3, 1]}, (3, 3, None, False)),
    "Llama 2": (
        template("<s>"),
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "pad_token": None,
        },
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1},
        (0, 1, None, True),
    ),
    "Llama 3": (
        processors.Sequence([BYTES, template("<s>")]),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        None,
        {"model_type": "llama", "eos_token_id": [1, 3]},
        (0, 1, None, True),
    ),
    "Gemma": (
        template("<s>"),
        {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
        },
        None,
        {"model_type": "gemma2"},
        (0, 1, 2, True),
    ),
    "Qwen2": (
        BYTES,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "</s>",
            "pad_token": "<|endoftext|>",
        },
        None,
        {"model_type": "qwen2", "bos_token_id": 0, "eos_token_id": 1},
        (None, 1, 3, False),
    ),
    "Phi-3": (
        template(),
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "<|endoftext|>"},
        None,
        {"model_type": "phi3"},
        (0, 3, None, False),
    ),
    "OLMo, which says nothing of BOS": (
        BYTES,
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        None,
        {"model_type": "gpt_neox"},
        (0, 1, None, False),
    ),
    "an older folder": (
        template("<s>"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<pad>"},
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        {"model_type": "llama"},
        (0, 1, None, True),
    ),
    "its successor, where the older file is not read": (
        template("<s>"),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<pad>",
            "added_tokens_decoder": {"2": {"content": "<pad>", "special": True}},
        },
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"model_type": "llama"},
        (0, 2, None, True),
    ),
}


def write(folder, processor, tokenizer_config, special_tokens_map, config):
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in TOKENS[:5]])
    made.post_processor = processor
    made.save(str(folder / "tokenizer.json"))
    contents = {"tokenizer_config": tokenizer_config, "special_tokens_map": special_tokens_map, "config": config}
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_roles_and_bos(name, tmp_path):
    *files, expected = FOLDERS[name]
    found = load_tokenizer(write(tmp_path, *files))
    assert (found.bos, found.eos, found.pad, found.adds_bos) == expected
    assert [list(ids) for ids in found.encode_batch(["abababab", ""])] == [[5, 6] * 4, []]


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_agrees(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    *files, expected = FOLDERS[name]
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, *files))
    adds_bos = theirs.encode("a")[0] == theirs.bos_token_id
    roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (*roles, adds_bos) == expected


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": '{"chat_template": "one"}'}, "one"),
        ({"tokenizer_config.json": '{"chat_template": "one"}', "chat_template.jinja": "two\n"}, "two\n"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "three"}]}
                )
            },
            "three",
        ),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "x"}]}'}, None),
    ],
)
def test_which_chat_template_counts(files, template, tmp_path):
    write(tmp_path, BYTES, None, None, None)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert load_tokenizer(tmp_path).chat_template == template


def test_files_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path, BYTES, None, None, None)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer(tmp_path)


@pytest.fixture
def older_folder(tmp_path):
    """GPT-2's first files: a vocabulary and merges, and no ``tokenizer.json``."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ["the quick brown fox jumps over the lazy dog's 12 34 tails"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(["<|endoftext|>"])
    model = json.loads(made.to_str())["model"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    end = made.token_to_id("<|endoftext|>")
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": end}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": end, "eos_token_id": end}))
    return tmp_path, made


def test_a_folder_from_before_tokenizer_json(older_folder):
    folder, made = older_folder
    found = load_tokenizer(folder)
    text = "The quick  fox's 123\n\n dög<|endoftext|>tail"
    assert list(found.encode_batch([text])[0]) == made.encode(text).ids
    assert found.decode(made.encode(text).ids) == text
    assert (found.bos, found.eos, found.adds_bos) == (made.token_to_id("<|endoftext|>"),) * 2 + (False,)


def test_older_files_that_cannot_be_converted(older_folder):
    folder, _ = older_folder
    (folder / "vocab.json").write_text("[")
    with pytest.raises(InputError, match=r"has no tokenizer\.json, and its older files cannot be converted"):
        load_tokenizer(folder)
