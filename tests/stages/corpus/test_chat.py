"""Conversations through the model's chat template into the token store."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import tokenizers

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.stages.corpus import run as corpus
from saex_pipe.stages.corpus.config import Config

# It writes BOS itself and ends with EOS, as those of Llama 3 do.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}{{ eos_token }}"
)
BOS, EOS = 1, 0
TALKS = [
    [{"role": "user", "content": f"the law of the river {i}"}, {"role": "assistant", "content": "peace " * (i % 7 + 1)}]
    for i in range(40)
]


def rendered(talk):
    return "<start>" + "".join(f"{message['role']}: {message['content']}\n" for message in talk) + "<end>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose tokenizer puts BOS before a text, and the talks as JSON lines and as a Parquet file."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_run.write_model(folder / "model")
    path = folder / "model" / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    made.post_processor = tokenizers.processors.TemplateProcessing("<start> $A", None, [("<start>", BOS)])
    made.save(str(path))
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "talks.jsonl").write_text("".join(json.dumps({"id": 1, "talk": talk}) + "\n" for talk in TALKS))
    pq.write_table(pa.table({"talk": TALKS}), folder / "talks.parquet")
    return folder


def make(place, out, **settings):
    values = {
        "out": str(out),
        "source": [str(place / "talks.jsonl")],
        "chat_field": "talk",
        "tokenizer": str(place / "model"),
        "window_length": 32,
        "holdout_fraction": 0,
        "document_order": "source",
    }
    corpus.run(Config.create(values | settings))
    return TokenStore(str(out))


def encoded(place, talk):
    made = tokenizers.Tokenizer.from_file(str(place / "model" / "tokenizer.json"))
    return made.encode(rendered(talk), add_special_tokens=False).ids


def test_windows_begin_with_one_bos_and_talks_end_with_one_eos(place, tmp_path):
    store = make(place, tmp_path / "packed")
    windows = store.tokens(range(store.info.windows))
    talks = [encoded(place, talk) for talk in TALKS]
    assert all(talk[0] == BOS and talk[-1] == EOS and talk.count(BOS) == 1 for talk in talks)
    stream = [token for talk in talks for token in talk[1:]][: windows.shape[0] * 31]
    np.testing.assert_array_equal(windows[:, 1:].ravel(), stream)
    assert (windows[:, 0] == BOS).all()
    template = store.info.tokenizer["chat_template"]
    assert template == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_a_padded_window_is_what_the_template_writes(place, tmp_path):
    store = make(place, tmp_path / "padded", packing="padded", source=[str(place / "talks.parquet")])
    windows = store.tokens(range(store.info.windows))
    documents = store.documents(range(store.info.windows))
    for number, talk in enumerate(TALKS):
        window = windows[documents[:, 1] == number][0]
        talk_ids = encoded(place, talk)[:32]
        np.testing.assert_array_equal(window[: len(talk_ids)], talk_ids)


def test_where_no_window_begins_with_bos_the_templates_stays(place, tmp_path):
    store = make(place, tmp_path / "never", prepend_bos="never")
    stream = [token for talk in TALKS for token in encoded(place, talk)]
    windows = store.tokens(range(store.info.windows))
    np.testing.assert_array_equal(windows.ravel(), stream[: windows.size])


def test_text_is_not_a_conversation(place, tmp_path):
    """Without the setting nothing changes, and no template is named."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "<start>the law " * 60}) + "\n")
    store = make(place, tmp_path / "text", source=[str(tmp_path / "text.jsonl")], chat_field=None)
    assert store.info.tokenizer["chat_template"] is None
    assert (store.tokens(range(1))[0, :2] == BOS).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}',
            r"a\.jsonl: line 1 has no messages in field 'talk'; set corpus.chat_field; .* text",
        ),
        ("a.jsonl", '{"talk": null}', "line 1 has no messages in field 'talk'"),
        ("a.jsonl", '{"talk": "x"}', "line 1: 'talk' gives no text: it is not a list of messages; correct or remove"),
        ("a.jsonl", '{"talk": []}', "line 1: 'talk' gives no text: it is not a list of messages"),
        (
            "a.jsonl",
            json.dumps({"talk": TALKS[0]}) + "\n" + json.dumps({"talk": [{"role": "system", "content": "x"}]}),
            r"a\.jsonl: line 2: 'talk' gives no text: the chat template refuses it: no system role; correct or remove",
        ),
        ("a.txt", "x", r"a\.txt' has no field for messages; give \.jsonl or \.parquet"),
    ],
)
def test_documents_that_are_no_conversation_are_named(name, content, message, place, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        make(place, tmp_path / "out", source=[str(tmp_path / name)])
    assert "\n" not in str(caught.value)


def test_a_parquet_row_is_named(place, tmp_path):
    pq.write_table(pa.table({"talk": [TALKS[0], None]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: row 2: 'talk' gives no text: it is not a list of messages"):
        make(place, tmp_path / "out", source=[str(tmp_path / "a.parquet")])


def test_a_tokenizer_without_a_template_ends_the_command(place, tmp_path):
    tiny_run.write_model(tmp_path / "model")
    settings = [f"source={place}/talks.jsonl", f"tokenizer={tmp_path}/model", "chat_field=talk"]
    done = tiny_run.saex_pipe(
        "corpus", "--out", tmp_path / "out", *(word for setting in settings for word in ("--set", setting))
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"{tmp_path}/model has no chat template; use the tokenizer of a model that was trained to converse, "
        "or unset corpus.chat_field"
    )
