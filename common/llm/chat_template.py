"""Conversations as a model reads them: its own chat template, a Jinja program, filled with messages.

The template is set up as ``render_jinja_template`` of ``transformers`` does, in Jinja's sandbox since it comes from
outside, with two differences: ``strftime_now`` always tells the same day, so that the text does not depend on when it
is written, and there are no tools, documents or generation prompts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.tokenizer import Tokenizer

_TODAY = datetime(2024, 7, 26)  # what the template of Llama 3.1 to 3.3 writes where nothing tells it the day
_ANOTHER = "use the tokenizer of a model that was trained to converse, or unset corpus.chat_field"


class ChatTemplate:
    """The chat template of a tokenizer, ready to be filled.

    Raises an ``InputError`` where the tokenizer has none, or one that is not a template.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        """``name`` is what messages call the tokenizer."""
        if tokenizer.chat_template is None:
            raise InputError(f"{name} has no chat template", _ANOTHER)
        self.digest = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _TODAY.strftime
        self._names = {f"{role}_token": text for role, text in tokenizer.role_texts.items()}
        try:
            self._template = environment.from_string(tokenizer.chat_template)
        except jinja2.TemplateError as error:
            raise InputError(f"{name}: the chat template cannot be used ({error})", _ANOTHER) from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation; a ``ValueError`` that says why where the template refuses it.

        Args:
            messages: at least one, each an object with a ``role``; fields that are None count as absent.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError("it is not a list of messages")
        if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
            raise ValueError("a message is not an object with a role")
        present = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                messages=present, tools=None, documents=None, add_generation_prompt=False, **self._names
            )
        except Exception as error:  # whatever a program may raise
            raise ValueError(f"the chat template refuses it: {' '.join(str(error).split())}") from None


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; the text is that of its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
