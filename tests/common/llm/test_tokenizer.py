import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import gguf_tokenizer, tokenizer
from saex_pipe.common.llm.load import read_architecture
from saex_pipe.common.llm.tokenizer import load_tokenizer

TRICKY = "Hello   12 years  1984, naïve 日本 🙂\n\n<|im_start|>user\t x=1;  \r\n "


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def smollm2(quickstart_path, cache):
    return load_tokenizer(quickstart_path)


def test_gguf_tokenizer_round_trip(smollm2):
    texts = [TRICKY, "", "The United States"]
    batch = smollm2.encode_batch(texts)
    assert [ids.dtype for ids in batch] == [np.int32] * 3
    assert [smollm2.decode(ids) for ids in batch] == texts
    assert (smollm2.bos, smollm2.eos, smollm2.pad, smollm2.adds_bos) == (1, 2, 2, False)
    assert smollm2.vocabulary == 49152
    assert smollm2.special_ids == frozenset(range(17))


def test_an_added_token_is_shown_as_it_is_spelled(folder):
    """Not by the alphabet of the byte-level tokens, in which "é" is a byte of its own."""
    made = tokenizers.Tokenizer(models.BPE({"Ã": 0, "é": 1}, []))
    made.decoder = decoders.ByteLevel()
    made.add_tokens([tokenizers.AddedToken("é", normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    found = load_tokenizer(folder)
    assert [found.token_text(number) for number in (0, 1)] == ["\\xc3", "é"]


def test_text_is_split_by_the_rule_that_the_file_names(smollm2):
    """llama.cpp's rule "smollm": every digit by itself, so that no blank joins a digit; not so with GPT-2's."""
    ids = smollm2.encode_batch(["in  1984 (a)", "<|im_start|>user"])
    pieces = [smollm2.token_text(number) for number in ids[0]]
    assert pieces == ["in", "  ", "1", "9", "8", "4", " (", "a", ")"]
    assert list(ids[1]) == [1, 4093]


def test_token_text_is_readable(smollm2):
    (ids,) = smollm2.encode_batch(["naïve 日本\n\n"])
    texts = [smollm2.token_text(number) for number in ids]
    assert "\n\n" in texts
    assert "本" in texts
    assert any(text.startswith(" \\x") for text in texts)  # the first bytes of a character that was cut
    assert smollm2.token_text(1) == "<|im_start|>"
    assert smollm2.token_text(10**6) == "<id 1000000>"


def test_second_load_comes_from_the_cache_and_is_the_same(smollm2, quickstart_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "convert", lambda path: pytest.fail("converted again"))
    again = load_tokenizer(quickstart_path)
    assert again.digest == smollm2.digest
    assert again.bos == smollm2.bos


def test_a_damaged_cache_entry_is_made_again(smollm2, quickstart_path):
    kept = tokenizer._cache_file(quickstart_path)
    kept.write_text("{")
    assert load_tokenizer(quickstart_path).digest == smollm2.digest
    assert json.loads(kept.read_text())["special"]["bos"] == 1


def test_a_cache_that_cannot_be_written_does_not_matter(quickstart_path, smollm2, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAEX_CACHE", str(tmp_path / "file" / "below"))
    assert load_tokenizer(quickstart_path).digest == smollm2.digest


def test_a_replaced_file_is_not_served_from_the_cache(quickstart_path, cache, tmp_path):
    copy = tmp_path / "model.gguf"
    shutil.copyfile(quickstart_path, copy)
    load_tokenizer(copy)
    copy.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="truncated or damaged"):
        load_tokenizer(copy)


def test_it_fits_the_model_or_is_refused(smollm2, quickstart_path):
    from dataclasses import replace

    architecture = read_architecture(quickstart_path)
    architecture.check_largest_id(smollm2.largest_id)
    with pytest.raises(InputError, match="largest id 49151 does not fit the model's 49151 embeddings"):
        replace(architecture, vocabulary=49151).check_largest_id(smollm2.largest_id)


@pytest.fixture
def folder(tmp_path):
    """A word-level Hugging Face tokenizer that truncates and adds BOS by itself, both of which must not happen."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "▁b": 3, "<0x0A>": 4, "?": 5}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.add_special_tokens(["<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Metaspace()
    made.enable_truncation(2)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_hugging_face_folder(folder):
    found = load_tokenizer(folder)
    assert [list(ids) for ids in found.encode_batch(["a a a", ""])] == [[2, 2, 2], []]
    assert (found.bos, found.eos, found.pad, found.adds_bos) == (0, 1, None, True)
    assert found.special_ids == frozenset({0, 1})
    assert [found.token_text(number) for number in (2, 3, 4)] == ["a", " b", "\n"]
    assert load_tokenizer(folder / "tokenizer.json").digest == found.digest


def test_refusals(folder, tiny_llama, tmp_path, cache):
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tiny_llama().write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(InputError, match=r"no\.gguf cannot be read: No such file"):
        load_tokenizer(tmp_path / "no.gguf")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(folder)


def test_importing_it_is_light():
    heavy = "{'jax', 'torch', 'transformers', 'gguf'}"
    program = f"import sys, saex_pipe.common.llm.tokenizer; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
