"""A report as one page that needs nothing else: no script, no network, light and dark."""

from collections.abc import Iterable, Sequence

from saex_pipe.common.markup import Markup, join, tag

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #1d1c1a; --quiet: #6d6a64; --line: #e4e1da;
  --accent: #a8480a; --bar: #c9a38a; --s0: #a8480a; --s1: #2f6f9f; --s2: #4c7d3c; --s3: #8a5aa8; }
@media (prefers-color-scheme: dark) { :root { --paper: #161513; --ink: #e9e5dd; --quiet: #9c968b; --line: #34312c;
  --accent: #f5a65b; --bar: #8f6440; --s0: #f5a65b; --s1: #7db7e4; --s2: #94c67f; --s3: #c79be6; } }
*, *::before { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 0.9375rem/1.5 ui-sans-serif, system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1, h2, p, dl, dd, figure { margin: 0; }
h1 { font-size: 1.8rem; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 0.75rem; }
.about { color: var(--quiet); margin-top: 0.5rem; max-width: 44rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1.25rem; margin-top: 1.75rem; }
.tiles > div { border-top: 2px solid var(--ink); padding-top: 0.4rem; }
dt, figcaption, .note { color: var(--quiet); font-size: 0.85rem; }
.tiles dd { font-size: 1.6rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 2rem 2.5rem; }
figcaption { font-weight: 600; color: var(--ink); margin-bottom: 0.25rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.axis { stroke: var(--quiet); } .grid { stroke: var(--line); }
.line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
.front { fill: none; stroke: var(--accent); stroke-width: 1.25; stroke-dasharray: 4 3; }
.point { fill: var(--paper); stroke: var(--quiet); stroke-width: 1.5; }
.point.best { fill: var(--accent); stroke: var(--accent); }
.bar { fill: var(--bar); } .cell { fill: var(--accent); } .bar:hover, .cell:hover { stroke: var(--ink); }
.s0 { --of: var(--s0); } .s1 { --of: var(--s1); } .s2 { --of: var(--s2); } .s3 { --of: var(--s3); }
path.line { stroke: var(--of); } circle { fill: var(--of); }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; font-size: 0.8rem; padding-left: 3.25rem; }
.key::before { content: ""; display: inline-block; width: 1em; height: 3px; margin-right: 0.4em; vertical-align: middle;
  background: var(--of); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 1.5rem 0.3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td { overflow-wrap: anywhere; } .number { text-align: right; }
"""


def page(title: str, about: str, *body: Markup) -> str:
    """The whole document."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    inside = tag("body", tag("h1", title), tag("p", about, class_="about"), *body)
    return f"<!doctype html>\n{tag('html', head, inside, lang='en')}\n"


def tiles(numbers: Iterable[tuple[str, str]]) -> Markup:
    """Names and what they came to, large."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in numbers), class_="tiles")


def section(title: str, *inside: Markup) -> Markup:
    """A heading and what is below it."""
    return tag("section", tag("h2", title), *inside)


def charts(figures: Iterable[Markup]) -> Markup:
    """Figures side by side where there is room."""
    return tag("div", *figures, class_="charts")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> Markup:
    """A table; with ``numbers`` all columns but the first are set flush right."""

    def line(cell: str, texts: Sequence[str]) -> Markup:
        return tag("tr", *(tag(cell, text, class_="number" if numbers and i else None) for i, text in enumerate(texts)))

    inside = [tag("thead", line("th", heads)) if heads else join([]), tag("tbody", *(line("td", row) for row in rows))]
    return tag("div", tag("table", *inside), class_="wide")
