"""Chat templates against the renderer of ``transformers``, and messages that a template does not take."""

import datetime

import pytest
import tokenizers
from tokenizers import models

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import chat_template
from saex_pipe.common.llm.chat_template import ChatTemplate
from saex_pipe.common.llm.tokenizer import SpecialTokens, Tokenizer, load_tokenizer

# In the manner of Llama 3: BOS, headers, the day, filters, white space by trim_blocks and lstrip_blocks.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "none" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string }}
{{- "\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# In the manner of Gemma: other names for roles, an order that is insisted on.
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {{ raise_exception('System role not supported') }}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
"""
# In the manner of Qwen: a namespace, a loop that is left, JSON, what was defined or not, and marks for training.
QWEN = """{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- 'tools' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- generation %}{%- set body = message.content %}{{- '<|im_start|>assistant\\n' + body }}{%- endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
        {%- if body is defined %}{{- 'leaked' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + ('!' if loop.index0 == ns.last else '') + '\\n' + message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- documents is none }} {{ pad_token }}
"""
CONVERSATIONS = [
    [
        {"role": "user", "content": "  Hi <b>there</b> & you \n"},
        {"role": "assistant", "content": "Yö 🙂", "name": None},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
    [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"é": "<1>"}}}]},
        {"role": "user", "content": "again"},
    ],
]


def tokenizer_with(template):
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}))
    return Tokenizer(made.to_str(), SpecialTokens(0, 1, 2, False), template)


def theirs(template):
    """``apply_chat_template`` of ``transformers``, on the day that ours always tells."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    from transformers.utils import chat_template_utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls):
            return chat_template._TODAY

    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )

    def render(messages):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_template_utils, "datetime", Day)
            return tokenizer.apply_chat_template(messages, tokenize=False)

    return render


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, QWEN], ids=["Llama 3", "Gemma", "Qwen"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "system", "tools"])
def test_the_text_is_that_of_transformers(template, messages):
    ours = ChatTemplate(tokenizer_with(template), "here").render
    if template == GEMMA and messages[0]["role"] == "system":
        with pytest.raises(ValueError, match="the chat template refuses it: System role not supported"):
            ours(messages)
        with pytest.raises(Exception, match="System role not supported"):
            theirs(template)(messages)
    else:
        assert ours(messages) == theirs(template)(messages)


def test_the_quickstart_models_template(quickstart_path, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEX_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(quickstart_path)
    ours = ChatTemplate(tokenizer, "here")
    for messages in CONVERSATIONS:
        text = ours.render(messages)
        assert text == theirs(tokenizer.chat_template)(messages)
        (ids,) = tokenizer.encode_batch([text])
        assert list(ids).count(1) == text.count("<|im_start|>")
        assert tokenizer.decode(ids) == text
    assert load_tokenizer(quickstart_path).chat_template == tokenizer.chat_template, "from the cache as well"


def test_the_day_does_not_pass():
    assert (
        ChatTemplate(tokenizer_with("{{ strftime_now('%d %b %Y') }}"), "here").render(CONVERSATIONS[0]) == "26 Jul 2024"
    )


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (GEMMA, None, "it is not a list of messages"),
        (GEMMA, [], "it is not a list of messages"),
        (GEMMA, "text", "it is not a list of messages"),
        (GEMMA, ["text"], "a message is not an object with a role"),
        (GEMMA, [{"content": "x"}], "a message is not an object with a role"),
        (GEMMA, [{"role": "assistant", "content": "x"}], r"refuses it: Roles must alternate user/assistant/user"),
        (QWEN, [{"role": "user"}], "refuses it: 'dict object' has no attribute 'content'"),
        (QWEN, [{"role": "user", "content": None}], "refuses it: 'dict object' has no attribute 'content'"),
        (QWEN, [{"role": "user", "content": 7}], "refuses it: can only concatenate str"),
        ("{{ raise_exception('a\nb') }}", CONVERSATIONS[0], "refuses it: a b"),
    ],
)
def test_messages_that_are_refused(template, messages, reason):
    with pytest.raises(ValueError, match=reason):
        ChatTemplate(tokenizer_with(template), "here").render(messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "here has no chat template; use the tokenizer of a model that was trained to converse"),
        ("{% for %}", "here: the chat template cannot be used"),
        ("{{ messages | nothing }}", "here: the chat template cannot be used .*nothing"),
    ],
)
def test_templates_that_are_refused(template, message):
    with pytest.raises(InputError, match=message):
        ChatTemplate(tokenizer_with(template), "here")


def test_a_template_stays_in_its_box():
    for escape in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ strftime_now.__self__ }}"):
        template = ChatTemplate(tokenizer_with(escape), "here")
        try:
            text = template.render(CONVERSATIONS[0])
        except ValueError as error:
            text = str(error)
        assert "unsafe" in text or text == ""


def test_the_digest_is_the_templates():
    assert ChatTemplate(tokenizer_with("a"), "x").digest == ChatTemplate(tokenizer_with("a"), "y").digest
    assert ChatTemplate(tokenizer_with("a"), "x").digest != ChatTemplate(tokenizer_with("b"), "x").digest
