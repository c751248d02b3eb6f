"""The statistics of an activation store as one page: for every tap the norms of its rows, and its largest channels."""

from collections.abc import Sequence

import numpy as np

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.markup import Markup, tag

_WIDTH, _HEIGHT, _FLOOR = 640.0, 180.0, 150.0
_CHANNELS = 128
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; } text { font-size: 12px; fill: currentColor; }
rect { fill: #3b6ea8; } line { stroke: currentColor; } h2 { overflow-wrap: anywhere; }
"""


def report(store: ActivationStore) -> str:
    """The page, self-contained."""
    sections = []
    for tap, width in store.info.taps.items():
        found = store.statistics(tap)
        middles, counts = found.norms()
        moments = np.sort(found.sum_square_D / max(float(found.sum_square_D.sum()), 1e-300))[::-1][:_CHANNELS]
        summary = (
            f"{found.count:,} rows of {width:,} in {store.info.dtypes[tap]}; root mean square norm "
            f"{np.sqrt(found.mean_square_norm):.4g}; the mean lies {found.mean_to_spread:.2g} spreads off zero"
        )
        if (outliers := store.manifest.contents.get("tap_outlier_share", {}).get(tap)) is not None:
            summary += f"; {outliers:.3%} of the tokens are outliers here"
        norms = [f"{middle:.4g}: {count:,} rows" for middle, count in zip(middles, counts, strict=True)]
        shares = [f"channel of rank {rank}: {share:.3%}" for rank, share in enumerate(moments, 1)]
        sections.append(
            tag(
                "section",
                tag("h2", tap),
                tag("p", summary),
                tag("h3", "Norms of rows"),
                _bars(counts, norms, *((f"{middles[0]:.3g}", f"{middles[-1]:.3g}") if len(middles) else ("", ""))),
                tag("h3", "Shares of the largest channels in the second moment"),
                _bars(moments, shares, "largest", f"rank {len(moments)}"),
            )
        )
    head = tag("head", Markup('<meta charset="utf-8">'), tag("title", store.uri), tag("style", Markup(_STYLE)))
    outliers = f"{store.manifest.contents['outlier_share']:.3%} of the tokens are left out as outliers."
    body = tag("body", tag("h1", "Activation store"), tag("p", f"{store.uri}. {outliers}"), *sections)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _bars(heights: Sequence[float] | np.ndarray, tips: Sequence[str], first: str, last: str) -> Markup:
    """Bars side by side, the tallest as high as there is room; what each one is on pointing at it."""
    top = max(float(np.max(heights, initial=0.0)), 1e-300)
    step = _WIDTH / max(len(heights), 1)
    shapes = [
        tag(
            "rect",
            tag("title", tip),
            x=f"{place * step + 0.5:.1f}",
            y=f"{_FLOOR - max(140 * height / top, 1):.1f}",
            width=f"{max(step - 1, 0.5):.1f}",
            height=f"{max(140 * height / top, 1):.1f}",
        )
        for place, (height, tip) in enumerate(zip(heights, tips, strict=True))
    ]
    shapes.append(tag("line", x1=0, x2=f"{_WIDTH:g}", y1=f"{_FLOOR:g}", y2=f"{_FLOOR:g}"))
    shapes.append(tag("text", first, x=0, y=f"{_FLOOR + 16:g}"))
    shapes.append(tag("text", last, x=f"{_WIDTH:g}", y=f"{_FLOOR + 16:g}", text_anchor="end"))
    return tag("svg", *shapes, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img")
