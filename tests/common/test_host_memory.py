"""Freed memory stays in the process: seen in the page faults of a process of its own."""

import platform
import subprocess
import sys

import pytest

# Faults while 64 MB are allocated, written and freed once more.
PROGRAM = """
import resource, sys
import numpy as np
from saex_pipe.common.host_memory import keep_freed_memory
assert sys.argv[1] == "plain" or keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_large_buffers_cost_page_faults_once() -> None:
    def faults(mode: str) -> int:
        # numpy asks for huge pages otherwise, which hides most faults
        command = [sys.executable, "-c", PROGRAM, mode]
        environment = {"NUMPY_MADVISE_HUGEPAGE": "0"}
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    assert faults("plain") > 10_000
    assert faults("keep") < 100
