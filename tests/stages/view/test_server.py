"""The local server: any feature on demand, on this machine alone, and nothing else."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.feature_cache import FeatureCache
from saex_pipe.common.formats.folder import Folder
from saex_pipe.stages.view import server
from saex_pipe.stages.view.page import feature_page


@pytest.fixture
def port(make_cache: Callable[..., Folder]) -> Iterator[int]:
    with FeatureCache(make_cache()) as cache, server.open_server(cache, "<p>index</p>", 0) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield opened.server_port
        opened.shutdown()
        thread.join()


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def test_index_and_every_feature(port: int) -> None:
    assert get(port, "/")[:2] == (200, "<p>index</p>")
    status, text, headers = get(port, "/feature/239")
    assert status == 200
    assert '<section id="f239" class="card">' in text
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    status, _, headers = get(port, "/feature?n=12")
    assert (status, headers["Location"]) == (303, "/feature/12")


@pytest.mark.parametrize("number", ["240", "-1", "x", "", "1/2", "9" * 5000, "%C2%B2", "<b>"])
def test_unknown_features_are_404_with_the_range(port: int, number: str) -> None:
    status, text, headers = get(port, f"/feature/{number}")
    assert status == 404
    assert "features are /feature/0 to /feature/239" in text or "/feature/0 to /feature/239" in text
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/etc/passwd", "/../../etc/passwd", "/features.parquet", "/other/3", "/feature?n=x"])
def test_other_paths_are_404(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


def test_other_host_names_are_refused(port: int) -> None:
    assert get(port, "/", host="localhost")[0] == 200
    assert get(port, "/", host="attacker.example")[0] == 403


def test_many_readers_at_once_take_turns_at_the_cache(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    overlaps: list[int] = []

    def watched_page(cache: FeatureCache, feature: int) -> str:
        inside.append(feature)
        overlaps.append(len(inside) - 1)
        time.sleep(0.005)
        page = feature_page(cache, feature)
        inside.remove(feature)
        return page

    monkeypatch.setattr(server, "feature_page", watched_page)
    answers: list[bool] = []
    readers = [
        threading.Thread(target=lambda i=i: answers.append(f'id="f{i}"' in get(port, f"/feature/{i}")[1]))
        for i in range(20, 36)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert answers == [True] * len(readers)
    assert overlaps == [0] * len(readers)


def test_a_connection_that_says_nothing_blocks_nobody(port: int) -> None:
    silent = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    silent.connect()
    assert get(port, "/")[0] == 200
    silent.close()


def test_taken_port_says_what_to_do(port: int, make_cache: Callable[..., Folder]) -> None:
    with (
        FeatureCache(make_cache(text=False)) as cache,
        pytest.raises(InputError, match=rf"view\.port = {port} cannot be opened .*; choose another"),
    ):
        server.open_server(cache, "", port)


def test_ctrl_c_ends_cleanly(make_cache: Callable[..., Folder]) -> None:
    program = """
import signal, sys
from saex_pipe.common.formats.feature_cache import FeatureCache
from saex_pipe.common.formats.folder import Folder
from saex_pipe.stages.view.server import serve
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
with FeatureCache(Folder(sys.argv[1])) as cache:
    serve(cache, "index", 0)
print("ended")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, make_cache().uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.strip(), err) == (0, "ended", "")
