"""The SAE checkpoint: weights in the SAELens layout, provenance, and the state to resume from.

``cfg.json``, ``sae_weights.safetensors``  opened by SAELens' ``SAE.load_from_disk``, in units of the raw activations
``saex.json``                              full configuration and provenance
``state/STEP``                             Orbax: parameters, optimiser, dead-latent counters, step; resumes bit for bit
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder, explain_storage_error

SAE_FILES = ("cfg.json", "sae_weights.safetensors", "saex.json")


class SavedSae(NamedTuple):
    """What the three files of an SAE hold."""

    cfg: dict[str, Any]  # SAELens' configuration
    tensors: dict[str, np.ndarray]  # SAELens' names, float32
    saex: dict[str, Any]  # tap, variant, row policy, provenance


def write_sae(folder: Folder, sae: SavedSae) -> None:
    """Write the three files; the same SAE gives the same bytes."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(sae.tensors[name]) for name in sorted(sae.tensors)}
    for name, data in zip(SAE_FILES, (_json(sae.cfg), save(tensors), _json(sae.saex)), strict=True):
        folder.write(name, data)


def read_sae(uri: str) -> SavedSae:
    """Read an SAE written by ``write_sae``."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Folder(uri)
    found = [folder.read(name) for name in SAE_FILES]
    parts = []
    for name, data in zip(SAE_FILES, found, strict=True):
        if data is None:
            raise InputError(f"{uri} has no {name}", "give the folder that 'saex-pipe train' wrote")
        parts.append(data)
    try:
        return SavedSae(json.loads(parts[0]), load(parts[1]), json.loads(parts[2]))
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{uri} holds a damaged SAE ({error})", "train it again with --force") from None


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


class TrainingState:
    """The checkpoints of a training run, in ``state/`` of its folder; only the latest is kept."""

    def __init__(self, folder: Folder) -> None:
        import orbax.checkpoint as ocp

        # Orbax reports a failed save from each of its threads, with tracebacks, before it raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._orbax = ocp
        local = folder.local_path()
        path = f"{folder.uri}/state" if local is None else local / "state"
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True, enable_async_checkpointing=True)
        self._uri = f"{folder.uri}/state"
        with self._explained("opened"):
            self._manager = ocp.CheckpointManager(path, options=options)

    def save(self, step: int, tree: Any) -> None:
        """Start saving ``tree`` (arrays) as the state after ``step`` steps; earlier saves are finished first."""
        with self._explained("written"):
            self._manager.save(step, args=self._orbax.args.StandardSave(tree))

    def wait(self) -> None:
        """Return once the saves under way are durable."""
        with self._explained("written"):
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Step and tree of the latest checkpoint, with the shapes and shardings of ``like``; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._explained("read"):
            return step, self._manager.restore(step, args=self._orbax.args.StandardRestore(like))

    def __enter__(self) -> "TrainingState":
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for the saves under way."""
        with self._explained("written"):
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            explain_storage_error(error, self._uri, action)
