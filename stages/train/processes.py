"""A run of one process, or of several that train together: the first writes what all of them make.

All must do the same in the same order wherever devices exchange data, saving included: what only one of them knows,
whether the output is to be had and whether to stop, is told to all first.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest, fingerprint, found_fingerprint
from saex_pipe.common.formats.stage_output import StageOutput, beside, stage_output
from saex_pipe.common.metrics_log import MetricsLog
from saex_pipe.common.preemption import StopRequest
from saex_pipe.common.worker import read_share
from saex_pipe.stages.train.config import Config

POLL_SECONDS = 1.0  # between looks for what is waited for


def join(config: Config) -> None:
    """Meet the other processes, where the run has several."""
    if config.worker is not None:
        read_share(config.worker)


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def agreed_to_stop(stop: StopRequest, *, may_ask: bool) -> bool:
    """Whether to stop after this step: alone, as soon as a signal has arrived.

    Several processes ask one another where ``may_ask``, the same for all of them; any one's signal is that of all.
    """
    if jax.process_count() == 1:
        return stop.requested
    if not may_ask:
        return False
    return _agreed(stop, lacking=False)[0]


def arrived(lacking: Callable[[], bool], stop: StopRequest) -> bool:
    """Return once no process of the run is ``lacking`` what all need; False once they are to stop instead."""
    while True:
        stopping, waiting = _agreed(stop, lacking())
        if stopping or not waiting:
            return not stopping
        time.sleep(POLL_SECONDS)


def _agreed(stop: StopRequest, lacking: bool) -> tuple[bool, bool]:
    """Whether to stop, and whether anyone is lacking something: the answers of all processes in one."""
    own = np.array([stop.signal or 0, lacking], np.int32)
    signal, waiting = own if jax.process_count() == 1 else multihost_utils.process_allgather(own).max(axis=0)
    if signal:  # else one may have arrived meanwhile, which the others hear of the next time
        stop.signal = int(signal)
    return bool(signal), bool(waiting)


def wait_for_all() -> None:
    """Return once every process of the run has got here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("train: all are here")


@contextmanager
def output_of_all(config: Config, *, force: bool) -> Iterator[StageOutput]:
    """``stage_output`` of the first process; the others get one that writes nothing."""
    if jax.process_count() == 1:
        with stage_output(config, force=force) as output:
            yield output
        return
    opened = _opened_by_first(config, force) if is_first() else _onlooker(config)
    with opened as output:
        yield output
        multihost_utils.sync_global_devices("train: outputs closed")


@contextmanager
def _opened_by_first(config: Config, force: bool) -> Iterator[StageOutput]:
    told = False
    try:
        with stage_output(config, force=force) as output:
            told = bool(multihost_utils.broadcast_one_to_all(np.int32(1)))
            yield output
    except SaexError:
        if not told:
            multihost_utils.broadcast_one_to_all(np.int32(0))
        raise


@contextmanager
def _onlooker(config: Config) -> Iterator[StageOutput]:
    if not multihost_utils.broadcast_one_to_all(np.int32(0)):
        raise SaexError(f"the first process could not open {config.out}; see what it says")
    fields = fingerprint(config)
    target = _ReadOnly(config.out)
    places = target, _ReadOnly(beside(target, "saex-new").uri)
    found = [place for place in places if found_fingerprint(place) == fields]
    output = StageOutput(config, found[0] if found else places[0], target, fields)
    output.metrics = MetricsLog(None, lambda data: None, lambda: None)
    output.manifest = Manifest.read(output.folder)
    yield output


class _ReadOnly(Folder):
    """A folder in which another process writes."""

    def write_pieces(self, name: str, pieces: Sequence[Any], over: bytes | None = None) -> bool:
        """Write nothing."""
        return False
