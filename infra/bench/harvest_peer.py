"""The other end of ``peers_harvest.py``: a process of another Python that computes when it is asked to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # As in common/host_memory.py, for both sides alike.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_ARENA_MAX": "1",
}


class PeerError(Exception):
    """What a peer answered in place of a result."""


class PeerProcess:
    """Keeps the process alive between requests, its messages in ``place/peers.log``."""

    def __init__(self, python: str, place: Path) -> None:
        homes = {"HF_HOME": str(place / "hf"), "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor")}
        self.log = place / "peers.log"
        self._log = self.log.open("w")
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("peers_harvest.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | _ENVIRONMENT | homes,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request; a PeerError says what went wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"the process has ended: {self._last_words()}") from None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"the process has ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text().strip().splitlines()
        return lines[-1] if lines else "without a word"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def note(text: str, script: str = "harvest.py") -> None:
    """A remark beside the results."""
    print(f"{script}: {text}", file=sys.stderr, flush=True)
