"""The corpus stage against a plain reading of the same text: tokens, documents, order, runner."""

import json

import numpy as np
import pytest
import tiny_run

from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.llm.tokenizer import load_tokenizer
from saex_pipe.stages.corpus import run as corpus
from saex_pipe.stages.corpus.config import Config
from saex_pipe.stages.corpus.parts import cut_batches


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny_run.write_model(folder / "model")
    texts = tiny_run.texts()
    for name, part in (("one", texts[:25]), ("two", texts[25:])):
        with open(folder / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    return folder


def make(place, out, **settings):
    values = {
        "out": str(out),
        "source": [str(place / "one.jsonl"), str(place / "two.jsonl")],
        "tokenizer": str(place / "model"),
        "window_length": 16,
    }
    config = Config.create(values | settings)
    corpus.run(config)
    return TokenStore(str(out))


def test_text_comes_back_out_of_the_windows(place, tmp_path):
    store = make(place, tmp_path / "a", document_order="source", holdout_fraction=0)
    tokenizer = load_tokenizer(place / "model")
    encoded = [np.append(tokens, tokenizer.eos) for tokens in tokenizer.encode_batch(tiny_run.texts())]
    windows = range(store.info.windows)
    stream = np.concatenate(encoded)[: store.info.windows * 16]
    np.testing.assert_array_equal(store.tokens(windows).ravel(), stream)
    documents = np.repeat(np.arange(len(encoded)), [len(tokens) for tokens in encoded])[: len(stream)]
    np.testing.assert_array_equal(store.documents(windows).ravel(), documents)
    assert len(np.concatenate(encoded)) - len(stream) < 16


def test_a_shuffled_order_takes_documents_from_everywhere(place, tmp_path):
    store = make(place, tmp_path / "a", max_tokens=3200, seed=1)
    documents = np.unique(store.documents(range(store.info.windows)))
    assert len(documents) < 25
    assert documents.max() > 30
    other = make(place, tmp_path / "b", max_tokens=3200, seed=2)
    assert not np.array_equal(documents, np.unique(other.documents(range(other.info.windows))))


def test_max_tokens_is_a_prefix_of_the_same_order(place, tmp_path):
    small = make(place, tmp_path / "a", max_tokens=1600, holdout_fraction=0)
    large = make(place, tmp_path / "b", max_tokens=4800, holdout_fraction=0)
    assert (small.info.windows, large.info.windows) == (100, 300)
    np.testing.assert_array_equal(small.tokens(range(100)), large.tokens(range(100)))


def test_a_long_document_gives_its_first_tokens_only(place, tmp_path):
    whole = make(place, tmp_path / "a", holdout_fraction=0)
    store = make(place, tmp_path / "b", holdout_fraction=0, max_document_tokens=50)
    windows = range(store.info.windows)
    documents, counts = np.unique(store.documents(windows), return_counts=True)
    assert counts.max() == 51, "fifty and the separator"
    number = documents[5]
    everything = whole.tokens(range(whole.info.windows))[whole.documents(range(whole.info.windows)) == number]
    np.testing.assert_array_equal(store.tokens(windows)[store.documents(windows) == number][:50], everything[:50])


def test_batches_are_tokenised_in_waves_until_there_is_enough(place, tmp_path, monkeypatch):
    whole = make(place, tmp_path / "a", max_tokens=4800)
    monkeypatch.setattr("saex_pipe.stages.corpus.parts._BATCH_CHARACTERS", 3000)
    monkeypatch.setattr("saex_pipe.stages.corpus.run._CHARACTERS_PER_TOKEN", 0.5)
    waves = make(place, tmp_path / "b", max_tokens=4800)
    windows = range(whole.info.windows)
    np.testing.assert_array_equal(waves.tokens(windows), whole.tokens(windows))
    np.testing.assert_array_equal(waves.documents(windows), whole.documents(windows))


def test_worker_processes_give_the_same_store(place, tmp_path):
    here = make(place, tmp_path / "a", max_tokens=1600)
    options = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    there = make(place, tmp_path / "b", max_tokens=1600, runner="FnApiRunner", runner_options=options)
    windows = range(here.info.windows)
    np.testing.assert_array_equal(here.tokens(windows), there.tokens(windows))
    assert here.manifest.digest == there.manifest.digest


def test_batches_are_cut_between_documents():
    lengths = np.array([10, 1 << 20, 5, 5, 3 << 20, 1])
    cuts = cut_batches(lengths)
    assert cuts[0] == 0
    assert cuts[-1] == len(lengths)
    assert (np.diff(cuts) > 0).all()
    assert np.add.reduceat(lengths, cuts[:-1]).max() < 5 << 20
