"""Freed memory stays in the process, in huge pages: seen in the page faults and the pages of a process of its own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Faults while 64 MB are allocated, written and freed once more, and kB in huge pages.
PROGRAM = """
import re, resource, sys
from pathlib import Path
import numpy as np
from saex_pipe.common.host_memory import keep_freed_memory
assert sys.argv[1] == "plain" or keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(re.search("AnonHugePages: *([0-9]+)", Path("/proc/self/smaps_rollup").read_text()).group(1))
"""
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")


def measured(mode: str) -> tuple[int, int]:
    """Page faults and kB in huge pages."""
    # numpy asks for huge pages otherwise, which hides most faults
    command, environment = [sys.executable, "-c", PROGRAM, mode], {"NUMPY_MADVISE_HUGEPAGE": "0"}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    faults, huge = map(int, run.stdout.split())
    return faults, huge


@glibc_only
@pytest.mark.skipif(not ENABLED.exists() or "[always]" in ENABLED.read_text(), reason="huge pages without a request")
def test_large_buffers_cost_page_faults_once() -> None:
    assert measured("plain")[0] > 10_000
    assert measured("keep")[0] < 100


@glibc_only
@pytest.mark.skipif(not ENABLED.exists() or "[madvise]" not in ENABLED.read_text(), reason="no huge pages on request")
def test_large_buffers_are_in_huge_pages() -> None:
    assert measured("plain")[1] == 0
    assert measured("keep")[1] >= 60_000
