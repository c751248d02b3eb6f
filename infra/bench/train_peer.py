"""The other end of ``peers_train.py``: a process of another Python that trains when it is asked to."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harvest_peer import PeerError

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no processes of its own
    # As in common/host_memory.py, for both sides alike.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_ARENA_MAX": "1",
}


class TrainPeer:
    """Trains one case after another, its messages in ``place/peers_train.log``; computes between a call and its end."""

    def __init__(self, python: str, place: Path) -> None:
        homes = {"HF_HOME": str(place / "hf"), "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"), "TMPDIR": str(place)}
        self.log = place / "peers_train.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("peers_train.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | _ENVIRONMENT | homes,
                start_new_session=True,  # a group of its own, to be ended as one
            )

    def send(self, **case: Any) -> None:
        """Begin a case, whose fields ``peers_train.Case`` tells; the one before it is over."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"the process has ended: {self._last_words()}") from None

    def ready(self) -> dict[str, Any]:
        """Wait for the warm steps of the case that was sent: its ``name``, and ``ms`` of each of them."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"the process has ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def time(self, n: int) -> list[float]:
        """Milliseconds of each of ``n`` consecutive steps."""
        self.send(go=n)
        found: list[float] = self.ready()["ms"]
        return found

    def close(self) -> None:
        """End the process and all that it has started, in the middle of a step if need be."""
        if self._process.returncode is not None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout):
            assert end is not None
            with contextlib.suppress(BrokenPipeError):
                end.close()

    def _last_words(self) -> str:
        lines = self.log.read_text().strip().splitlines()
        return lines[-1] if lines else "without a word"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
