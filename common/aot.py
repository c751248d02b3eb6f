"""Compiling ahead of time for TPUs that are not here: what a step needs of a chip, from its shapes alone.

Needs libtpu, the TPU compiler and runtime in one library, but no TPU. The process that plans must not run on TPUs
itself: libtpu is told not to look for any.
"""

import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from saex_pipe.common.errors import InputError, SaexError

GIB = 2**30


class Chip(NamedTuple):
    """What one JAX device of a kind of TPU offers: a chip, except that a chip of tpu7x is two devices.

    ``hbm_bytes`` is what programs may use, the limit that libtpu 0.0.50 names when it refuses one. The rates are
    those of ``jax._src.tpu_info`` of JAX 0.12 and, for the links, of "How to Scale Your Model" (Austin et al. 2025,
    chapter 2); https://docs.cloud.google.com/tpu/docs says the same but for v5p's 2,765 GB/s.
    """

    hbm_bytes: int
    peak_bf16_flops: float  # a second
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # of one interconnect link, one way


CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1.23e12, 45e9),
    "v5e": Chip(int(15.75 * GIB), 197e12, 0.82e12, 45e9),
    "v5p": Chip(int(95.73 * GIB), 459e12, 2.46e12, 90e9),
    "v6e": Chip(int(31.24 * GIB), 918e12, 1.638e12, 90e9),
    "tpu7x": Chip(int(94.74 * GIB), 1153.5e12, 3.69e12, 90e9),
}
_DEVICES_PER_CHIP = {"tpu7x": 2}
# libtpu asks the metadata server of Google Cloud for what is not in the environment, and complains on stderr that there
# is none; and it lets one process at a time load it, though here none takes a TPU.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_EXAMPLES = "v5e:2x4, v5p:2x2x1 or v6e:4x4"


class Topology(NamedTuple):
    """A TPU slice by name."""

    name: str
    kind: str
    chips: int
    devices: Sequence[jax.Device]

    @property
    def chip(self) -> Chip:
        """What each of ``devices`` offers."""
        return CHIPS[self.kind]


class Compiled(NamedTuple):
    """What a compiled program needs of each device, in bytes, and what the compiler made of it."""

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    peak_bytes: int  # the most at any moment, all of the above and the program itself included
    collectives: dict[str, int]  # instructions in the program by kind; those of a loop's body count once
    seconds: float  # that compiling took


def topology(name: str) -> Topology:
    """The devices of the TPU slice ``name``, such as ``v5e:2x4``: a kind of TPU and the grid of its chips.

    Raises:
        InputError: an unknown kind or a grid it does not come in.
        SaexError: libtpu is not installed or cannot be loaded.
    """
    match = re.fullmatch(rf"({'|'.join(CHIPS)}):(\d+(?:x\d+){{1,2}})", name)
    if match is None:
        raise InputError(
            f"there is no TPU topology {name!r}",
            f"give one of {', '.join(CHIPS)} and the grid of chips, for instance {_EXAMPLES}",
        )
    kind, grid = match.groups()
    sizes = [int(size) for size in grid.split("x")]
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if sizes == [1] * len(sizes):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{name} is no TPU topology ({_first_line(error)})", f"for instance {_EXAMPLES} are") from None
    except (RuntimeError, ImportError, ValueError) as error:
        raise SaexError(
            f"libtpu cannot be used ({_first_line(error)}); planning needs it, though no TPU: "
            "install saex-pipe[tpu] on Linux x86_64"
        ) from None
    devices = described.devices
    return Topology(name, kind, len(devices) // _DEVICES_PER_CHIP.get(kind, 1), devices)


def compile_ahead(lowered: jax.stages.Lowered, *, remedy: str) -> Compiled:
    """Compile a program for the devices that its arguments' shardings name.

    Args:
        lowered: of a jitted function and pytrees of ``jax.ShapeDtypeStruct`` with shardings on a ``Topology``.
        remedy: what to change where the program does not fit, for the message.

    Raises:
        InputError: the program needs more memory than a device has.
    """
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # What JAX's folder of compiled programs holds cannot be read back without a TPU; it is compiled anew.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry", UserWarning)
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _out_of_memory(error, remedy) from None
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        collectives=count_collectives(compiled.as_text() or ""),
        seconds=seconds,
    )


def count_collectives(hlo: str) -> dict[str, int]:
    """How often each collective stands in the text of a compiled program. One in a loop's body counts once."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    # A collective that runs beside other work is a pair, NAME-start and NAME-done.
    return dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo)))


def _out_of_memory(error: Exception, remedy: str) -> Exception:
    """The compiler's complaint as an ``InputError`` where it is about memory; else as it is."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        return error
    found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    found = found or re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    if found is None:
        return InputError(f"the program does not fit in the memory of a chip ({_first_line(error)})", remedy)
    needed, available = (f"{size[:-1]} {size[-1]}iB" for size in found.groups())
    return InputError(f"the program needs {needed} of memory on each chip, which has {available}", remedy)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
