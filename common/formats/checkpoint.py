"""The SAE checkpoint: weights in the SAELens layout, provenance, and the state to resume from.

``cfg.json``, ``sae_weights.safetensors``  opened by SAELens' ``SAE.load_from_disk``, in units of the raw activations
``saex.json``                              full configuration and provenance
``state/STEP``                             Orbax: parameters, optimiser, dead-latent counters, step; resumes bit for bit
"""

import itertools
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.bucket_checkpoints import BucketCheckpoints
from saex_pipe.common.formats.folder import Folder, explain_storage_error

KEPT = 2  # checkpoints
_OPENED = itertools.count()
SAE_FILES = ("cfg.json", "sae_weights.safetensors", "saex.json")


class SavedSae(NamedTuple):
    """What the three files of an SAE hold."""

    cfg: dict[str, Any]  # SAELens' configuration
    tensors: dict[str, np.ndarray]  # SAELens' names, float32
    saex: dict[str, Any]  # taps, variant, row policy, provenance

    @property
    def taps(self) -> tuple[str, ...]:
        """What is read: one tap, or several whose rows a crosscoder takes concatenated."""
        return tuple(self.saex["taps"]) if "taps" in self.saex else (self.saex["tap"],)

    @property
    def target_taps(self) -> tuple[str, ...]:
        """What is predicted, likewise; the same but for a transcoder."""
        return tuple(self.saex["taps"]) if "taps" in self.saex else (self.saex["target_tap"],)


def write_sae(folder: Folder, sae: SavedSae) -> None:
    """Write the three files; the same SAE gives the same bytes."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(sae.tensors[name]) for name in sorted(sae.tensors)}
    for name, data in zip(SAE_FILES, (_json(sae.cfg), save(tensors), _json(sae.saex)), strict=True):
        folder.write(name, data)


def read_sae(uri: str) -> SavedSae:
    """Read an SAE written by ``write_sae``."""
    return _read(uri, SAE_FILES, "give the folder that 'saex-pipe train' wrote")


def read_any_sae(path: Path) -> SavedSae:
    """Read an SAE that SAELens or ``write_sae`` wrote to a local folder; its ``saex`` is empty."""
    return _read(str(path), SAE_FILES[:2], "give a folder in the layout of SAELens")


def _read(uri: str, names: Sequence[str], remedy: str) -> SavedSae:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Folder(uri)
    parts = [b"", b"", b"{}"]
    for place, name in enumerate(names):
        data = folder.read(name)
        if data is None:
            raise InputError(f"{uri} has no {name}", remedy)
        parts[place] = data
    try:
        return SavedSae(json.loads(parts[0]), load(parts[1]), json.loads(parts[2]))
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{uri} holds a damaged SAE ({error})", "write or fetch it again") from None


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


class TrainingState:
    """The checkpoints of a training run, in ``state/`` of its folder; the latest two are kept.

    Several SAEs trained together are saved one after another, and a kill between two of them must leave a step that
    all of them have.

    Several processes that train together save and read together, on a disk that they share or in a bucket.
    """

    def __init__(self, folder: Folder) -> None:
        import orbax.checkpoint as ocp

        # Orbax reports a failed save from each of its threads, with tracebacks, before it raises; the event loops that
        # it closes with the rest of that save in them do so when the process ends.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
        self._orbax = ocp
        local = folder.local_path()
        self._scratch = tempfile.TemporaryDirectory() if local is None else None
        path = Path(self._scratch.name) if self._scratch is not None else Path(f"{local}/state")
        self._uri = f"{folder.uri}/state"
        with self._explained("opened"):
            self._bucket = None if local is not None else BucketCheckpoints(folder, path, KEPT)
            # Saves of several SAEs overlap, so each needs names of its own for where the processes meet: the same on
            # all, which open their folders in the same order.
            processes = ocp.options.MultiprocessingOptions(
                primary_host=0 if self._bucket is None else None, barrier_sync_key_prefix=f"state{next(_OPENED)}"
            )
            # In the background a process takes the folders that another has made for its own.
            background = ocp.AsyncOptions(create_directories_asynchronously=self._bucket is None)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=KEPT,
                create=self._bucket is None,
                enable_async_checkpointing=True,
                async_options=background,
                multiprocessing_options=processes,
            )
            handler = _handler(processes, own_disks=self._bucket is not None)
            self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handler)

    def save(self, step: int, tree: Any) -> None:
        """Start saving ``tree`` (arrays) as the state after ``step`` steps; earlier saves are finished first."""
        with self._explained("written"):
            begun = self._manager.save(step, args=self._orbax.args.PyTreeSave(tree))
            assert begun, f"{self._uri}: {step} is not beyond {self.steps()}"
            if self._bucket is not None:
                self._bucket.upload(step, self._manager.wait_until_finished)

    def wait(self) -> None:
        """Return once the saves under way are durable."""
        with self._explained("written"):
            self._manager.wait_until_finished()
            if self._bucket is not None:
                self._bucket.wait()

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are or are being written, ascending, after 0, which needs none."""
        in_bucket = self._bucket.steps if self._bucket is not None else []
        return [0, *sorted({*self._manager.all_steps(), *in_bucket})]

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints after ``step``: training goes through those steps again."""
        with self._explained("deleted"):
            for later in sorted(self._manager.all_steps()):
                if later > step:
                    self._manager.delete(later)
            if self._bucket is not None:
                self._bucket.forget_after(step)

    def restore(self, step: int, like: Any) -> Any:
        """The tree that was saved as the state after ``step`` steps, with the shapes and shardings of ``like``.

        Raises:
            InputError: its leaves have other names than those of ``like``.
        """
        with self._explained("read"):
            if self._bucket is not None and step not in self._manager.all_steps():
                self._bucket.download(step)
                self._manager.reload()
            wanted = self._orbax.checkpoint_utils.construct_restore_args(like)
            try:
                return self._manager.restore(step, args=self._orbax.args.PyTreeRestore(like, restore_args=wanted))
            except ValueError as error:
                # Each leaf that one side lacks is a paragraph that begins with its place, and that ends in its name.
                names = re.findall(
                    r"^(?:\S+\.)?(\w+):\n(?: +- Source: .*\n)? +- (?:Source|Target): MISSING", str(error), re.MULTILINE
                )
                if not names:
                    raise
                raise InputError(
                    f"{self._uri}/{step} holds a training of another version of saex-pipe, which differs in "
                    f"{', '.join(sorted(set(names)))}",
                    f"go on with that version, or delete {self._uri} to train from the start",
                ) from None

    def __enter__(self) -> "TrainingState":
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for the saves under way."""
        self.wait()
        with self._explained("written"):
            self._manager.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            explain_storage_error(error, self._uri, action)


def _handler(processes: Any, *, own_disks: bool) -> Any:
    """What saves and reads arrays.

    Where each process has a disk of its own, it writes its shards there; of those that several have, one does. No disk
    then holds all arrays of several processes, so that Orbax must not look for them there.
    """
    import orbax.checkpoint as ocp

    if not own_disks:
        return ocp.PyTreeCheckpointHandler(multiprocessing_options=processes)
    arrays = ocp.type_handlers.ArrayHandler(primary_host=None)
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=processes,
        handler_impl=ocp.BasePyTreeCheckpointHandler(
            multiprocessing_options=processes,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
            enable_post_merge_validation=jax.process_count() == 1,
        ),
    )
