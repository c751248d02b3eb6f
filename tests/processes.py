"""Several processes of one computation, on loopback."""

import json
import socket
import subprocess
import sys
from pathlib import Path


def run_processes(script: str, count: int, folder: Path) -> list[dict]:
    """``script PORT COUNT FOLDER NUMBER`` in ``count`` processes; the JSON object that each prints last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, script, str(port), str(count), str(folder)]
    running = [
        subprocess.Popen([*command, str(process)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for process in range(count)
    ]
    try:
        ended = [process.communicate(timeout=900) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, complaint) in zip(running, ended, strict=True):
        assert process.returncode == 0, complaint[-2000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]
