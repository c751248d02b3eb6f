"""HTML built so that text cannot become markup: every string that is not ``Markup`` is escaped by ``escape``.

Tokens, model names and the like come from outside and may hold anything, from ``<script>`` to control characters
and codes that reverse the reading direction. All of it passes through ``escape``; nothing else may
turn a plain string into ``Markup``.
"""

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


# What would not be seen, or would disturb what is seen, gets a visible stand-in.
_VISIBLE: dict[int, str] = {code: f"⟨{code:02X}⟩" for code in (*range(0x20), *range(0x7F, 0xA0))}
_VISIBLE |= {code: f"⟨{code:04X}⟩" for code in (0x061C, *range(0x200B, 0x2010), *range(0x202A, 0x202F))}
_VISIBLE |= {code: f"⟨{code:04X}⟩" for code in (*range(0x2060, 0x2070), 0xFEFF, 0xFFFE, 0xFFFF)}
_VISIBLE |= dict.fromkeys(range(55296, 57344), "�")
_VISIBLE |= {ord("\n"): "↵", ord("\t"): "⇥", ord("\r"): "␍", 0x85: "↵", 0x2028: "↵", 0x2029: "↵"}
del _VISIBLE[0x200D]  # joins emoji


def escape(text: str) -> Markup:
    """``text`` as HTML for element content or a quoted attribute; Markup passes unchanged."""
    return text if isinstance(text, Markup) else Markup(html.escape(text.translate(_VISIBLE), quote=True))


def join(parts: Iterable[str]) -> Markup:
    """The parts, escaped where they are plain text, one after the other."""
    return Markup("".join(map(escape, parts)))


def tag(name: str, *children: str, **attributes: str | int | float | bool | None) -> Markup:
    """An element. ``class_`` stands for class, ``data_x`` for data-x; True is a bare attribute, None and False none."""
    opening = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            opening.append(key)
        elif value is not None and value is not False:
            opening.append(f'{key}="{escape(str(value))}"')
    return Markup(f"<{' '.join(opening)}>{join(children)}</{name}>")
