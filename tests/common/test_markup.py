"""Text never becomes markup, and what cannot be seen becomes visible."""

import html

import pytest

from saex_pipe.common.markup import Markup, escape, join, tag


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x>', "' onclick='x", "&lt;", "a & b"])
def test_text_is_escaped_in_content_and_attributes(text: str) -> None:
    for markup in (escape(text), join([text]), tag("p", text)[3:-4], tag("p", title=text)[10:-6]):
        assert not set("<>\"'") & set(markup)
        assert html.unescape(markup) == text


def test_markup_is_not_escaped_again() -> None:
    assert tag("p", tag("b", "1 < 2"), " & ") == "<p><b>1 &lt; 2</b> &amp; </p>"
    assert isinstance(join(["a"]), Markup)


def test_what_cannot_be_seen_becomes_visible() -> None:
    assert escape("a\n\tb\r") == "a↵⇥b␍"
    assert escape("\x00\x1b\x7f\x9b\u202e\u200b\ufeff") == "⟨00⟩⟨1B⟩⟨7F⟩⟨9B⟩⟨202E⟩⟨200B⟩⟨FEFF⟩"
    assert escape("\ud800") == "\ufffd"
    assert escape("née 👩\u200d🚀 日本") == "née 👩\u200d🚀 日本"


def test_attributes() -> None:
    assert tag("a", class_="x", data_v=3, hidden=True, title=None, lang=False) == (
        '<a class="x" data-v="3" hidden></a>'
    )
