"""Processes that tests start: several of one computation on loopback, and commands that are there at once."""

import json
import multiprocessing
import socket
import subprocess
import sys
from pathlib import Path

# Commands are forked from one process that has imported everything and computed nothing.
_FORKS = multiprocessing.get_context("forkserver")
_STAGES = ("corpus", "toy", "harvest", "train", "evaluate", "cache", "view")
_PRELOAD = ("pytest", "orbax.checkpoint", "transformers", "saex_pipe.pipelines.console")
_CHILD = """
import os
for stream, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(f"{output}.{{name}}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
from saex_pipe.pipelines.cli import main
main({arguments})
"""


def fork_command(arguments: list[str], output: Path, before: str = "") -> multiprocessing.Process:
    """Start ``saex-pipe ARGUMENTS``; what it prints goes to ``output.stdout`` and ``output.stderr``.

    ``before`` is Python that the process runs first.
    """
    _FORKS.set_forkserver_preload([*_PRELOAD, *(f"saex_pipe.stages.{stage}.run" for stage in _STAGES)])
    process = _FORKS.Process(target=exec, args=(before + _CHILD.format(output=output, arguments=arguments), {}))
    process.start()
    return process


def run_processes(script: str, count: int, what: Path | str) -> list[dict]:
    """``script PORT COUNT WHAT NUMBER`` in ``count`` processes; the JSON object that each prints last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, script, str(port), str(count), str(what)]
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
