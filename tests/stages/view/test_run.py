"""The view stage from its inputs on disk to the page on disk."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.stages.view import run as view
from saex_pipe.stages.view.config import Config


def test_page_is_written_once_and_is_the_same_every_time(
    make_cache: Callable[..., Folder], scores: Folder, tmp_path: Path
) -> None:
    inputs = {"cache": make_cache().uri, "scores": scores.uri, "features": 5}
    first = view.run(Config(out=str(tmp_path / "page"), **inputs))
    page = tmp_path / "page" / "index.html"
    assert first.totals == {"features_shown": 5, "bytes": page.stat().st_size}
    assert page.read_text().count('class="card"') == 5
    assert "97.3 %" in page.read_text()

    written = page.stat().st_mtime_ns
    assert view.run(Config(out=str(tmp_path / "page"), **inputs)) == first
    assert page.stat().st_mtime_ns == written

    view.run(Config(out=str(tmp_path / "elsewhere"), **inputs))
    assert (tmp_path / "elsewhere" / "index.html").read_bytes() == page.read_bytes()


def test_another_setting_is_refused_unless_forced(make_cache: Callable[..., Folder], tmp_path: Path) -> None:
    inputs = {"out": str(tmp_path / "page"), "cache": make_cache().uri}
    view.run(Config(features=5, **inputs))
    with pytest.raises(InputError, match=r"features \(5 there, 6 now\); --force"):
        view.run(Config(features=6, **inputs))
    view.run(Config(features=6, **inputs), force=True)
    assert (tmp_path / "page" / "index.html").read_text().count('class="card"') == 6


def test_serving_an_up_to_date_page_shows_the_same_features(
    make_cache: Callable[..., Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: dict[str, Any] = {"out": str(tmp_path / "page"), "cache": make_cache().uri, "features": 5}
    first = view.run(Config(**inputs))
    served: list[tuple[str, int]] = []
    monkeypatch.setattr(view, "serve", lambda cache, index, port: served.append((index, port)))
    assert view.run(Config(serve=True, port=0, **inputs)) == first
    assert [(index.count('class="card"'), port) for index, port in served] == [(5, 0)]
    assert 'action="/feature"' in served[0][0]
    assert 'action="/feature"' not in (tmp_path / "page" / "index.html").read_text()


def test_unusable_inputs_say_what_to_do(make_cache: Callable[..., Folder], scores: Folder, tmp_path: Path) -> None:
    cache = make_cache()
    out = str(tmp_path / "page")
    with pytest.raises(InputError, match=r"view\.cache = .*nowhere' holds no finished output"):
        view.run(Config(out=out, cache=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="was written by evaluate; give the output of cache"):
        view.run(Config(out=out, cache=scores.uri))
    scores.write("scores.json", b"[1]")
    with pytest.raises(InputError, match=r"scores\.json does not hold scores; run 'saex-pipe evaluate' again"):
        view.run(Config(out=str(tmp_path / "page2"), cache=cache.uri, scores=scores.uri))
    scores.delete("scores.json")
    with pytest.raises(InputError, match=r"scores\.json does not exist; run 'saex-pipe evaluate'"):
        view.run(Config(out=str(tmp_path / "page2"), cache=cache.uri, scores=scores.uri))
    cache.write("examples.parquet", b"not parquet")
    with pytest.raises(InputError, match=r"examples\.parquet is not a readable Parquet file"):
        view.run(Config(out=str(tmp_path / "page3"), cache=cache.uri))
    assert not list(tmp_path.rglob("index.html"))


@pytest.mark.parametrize(("key", "value"), [("features", 0), ("port", 70000), ("serve", "maybe"), ("colour", 1)])
def test_settings_out_of_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        Config.create({"out": "o", "cache": "c", key: value})


def test_configuration_imports_nothing_heavy() -> None:
    program = (
        "import sys, saex_pipe.stages.view.config; "
        "print(sorted({'pyarrow', 'numpy', 'jax', 'tensorstore'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
