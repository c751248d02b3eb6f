"""What the workers of the cache pipelines do, one method a shard. Instances travel between processes.

Intermediate files live in ``parts/`` of the stage's folder, each written whole: the codes of a shard, the merged
summary, the contexts of the examples in a shard.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.inference import Sae, SparseCodes
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.stages.cache.summary import Codes, Examples, Summary, summarise

PARTS = "parts/"
_SUMMARY = "parts/summary.npz"
_BATCH_ROWS = 2048
_FIRST_LIMIT = 256  # codes asked for a row where the variant does not bound them; more are asked for when they fire
_EXAMPLES_AT_ONCE = 4096


class Chosen(NamedTuple):
    """The examples of all features that lie in one shard."""

    feature: Int64[np.ndarray, " examples"]
    key: Int64[np.ndarray, " examples"]


def codes_name(shard: int) -> str:
    """Object that holds the codes of a shard."""
    return f"parts/codes-{shard:06d}.npz"


def contexts_name(shard: int) -> str:
    """Object that holds the contexts of the examples in a shard."""
    return f"parts/contexts-{shard:06d}.npz"


@dataclass(frozen=True)
class CacheWork:
    """The work on one feature cache, written to the folder ``out``."""

    store: str
    sae: str
    out: str
    digest: str  # of the cache: what one process keeps in memory must not serve another cache at the same place
    windows: int  # of the store that are used
    examples: int
    context: int

    def shard_windows(self, shard: int) -> range:
        """The windows of one shard of the store, as far as they are used."""
        size = self._open()[0].info.tiling.shard_windows
        return range(shard * size, min((shard + 1) * size, self.windows))

    def summarise(self, shard: int) -> Summary:
        """Encode one shard, keep its codes for the contexts, and sum it up."""
        store, sae, _ = self._open()
        codes = self.codes(shard)
        return summarise(codes, sae.latents, store.info.window_length, self.examples)

    def codes(self, shard: int) -> Codes:
        """The codes of the kept rows of one shard."""
        folder = Folder(self.out)
        if (kept := folder.read_arrays(codes_name(shard))) is not None:
            return Codes(**kept)
        store, sae, taps = self._open()
        windows = self.shard_windows(shard)
        acts = [store.acts(tap, windows) for tap in taps]
        acts_NLD = acts[0] if len(acts) == 1 else np.concatenate(acts, axis=-1)
        flat = np.flatnonzero(store.keep(windows))
        rows_BD = acts_NLD.reshape(-1, acts_NLD.shape[-1])[flat]
        parts = [(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int32))]
        for start in range(0, len(rows_BD), _BATCH_ROWS):
            batch_BD = rows_BD[start : start + _BATCH_ROWS]
            padded_BD = np.pad(batch_BD, ((0, _BATCH_ROWS - len(batch_BD)), (0, 0)))
            found = _all_codes(sae, padded_BD)
            parts.append((np.asarray(found.values_BK)[: len(batch_BD)], np.asarray(found.latents_BK)[: len(batch_BD)]))
        codes = Codes(
            flat.astype(np.int64) + windows.start * store.info.window_length,
            _stacked([values_BK for values_BK, _ in parts]),
            _stacked([latents_BK for _, latents_BK in parts]),
        )
        folder.write_arrays(codes_name(shard), codes._asdict())
        return codes

    def write_summary(self, summary: Summary | None) -> None:
        """Keep the merged summary."""
        assert summary is not None, "there is at least one shard"
        arrays = {
            name: np.asarray(value) for name, value in summary._asdict().items() if not isinstance(value, Examples)
        }
        for name in ("strongest", "sample"):
            arrays |= {f"{name}_{field}": value for field, value in getattr(summary, name)._asdict().items()}
        Folder(self.out).write_arrays(_SUMMARY, arrays)

    def write_contexts(self, shard: int) -> None:
        """Look up activations and tokens around every example in one shard; token -1 is outside its window."""
        store, (chosen, codes) = self._open()[0], (self.chosen(shard), self.codes(shard))
        windows, length = self.shard_windows(shard), store.info.window_length
        keys_EC = chosen.key[:, None] + np.arange(-self.context, self.context + 1)
        inside_EC = keys_EC // length == chosen.key[:, None] // length
        acts_EC = np.zeros(keys_EC.shape, np.float32)
        for start in range(0, len(keys_EC), _EXAMPLES_AT_ONCE):
            part = slice(start, start + _EXAMPLES_AT_ONCE)
            acts_EC[part] = _activations(codes, chosen.feature[part, None], keys_EC[part])
        tokens = store.tokens(windows).reshape(-1)
        place_EC = np.clip(keys_EC - windows.start * length, 0, len(tokens) - 1)
        tokens_EC = np.where(inside_EC, tokens[place_EC], -1)
        arrays = {"feature": chosen.feature, "key": chosen.key, "activations": acts_EC, "tokens": tokens_EC}
        Folder(self.out).write_arrays(contexts_name(shard), arrays)

    def chosen(self, shard: int) -> Chosen:
        """The examples in one shard, sorted by feature and place; each stands there once."""
        summary = read_summary(self.out, self.digest)
        length = self._open()[0].info.window_length
        windows = self.shard_windows(shard)
        keys = np.concatenate([summary.strongest.keys_FE, summary.sample.keys_FE], axis=1)
        feature, place = np.nonzero((keys >= windows.start * length) & (keys < windows.stop * length))
        pairs = np.unique(np.stack([feature, keys[feature, place]]), axis=1)
        return Chosen(pairs[0], pairs[1])

    def _open(self) -> "_Opened":
        return _open(self.store, self.sae, self.digest)


def _all_codes(sae: Sae, rows_BD: np.ndarray) -> SparseCodes:
    """Every active latent of every row, in as few columns as a power of two allows."""
    limit = min(_FIRST_LIMIT, sae.latents)
    while True:
        found = sae.codes_sparse(rows_BD, limit=limit)
        most = int(np.max(found.active_B))
        if most <= found.values_BK.shape[1]:
            return found
        limit = min(1 << (most - 1).bit_length(), sae.latents)


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Batches of rows one below the other; missing columns are zero, which is padding."""
    columns = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, columns - part.shape[1]))) for part in parts])


def _activations(codes: Codes, feature_E1: np.ndarray, keys_EC: np.ndarray) -> np.ndarray:
    """Activation of each example's feature at the tokens ``keys_EC``, 0 where the token is no row."""
    row = np.minimum(np.searchsorted(codes.keys_B, keys_EC), len(codes.keys_B) - 1)
    is_row = codes.keys_B[row] == keys_EC
    same = codes.latents_BK[row] == feature_E1[..., None]
    return np.where(is_row, (codes.values_BK[row] * same).sum(axis=-1), 0)


class _Opened(NamedTuple):
    store: ActivationStore
    sae: Sae
    taps: tuple[str, ...]  # whose rows the SAE reads, one beside the other


def has_summary(folder: Folder) -> bool:
    """Whether the merged summary is written."""
    return bool(folder.list(_SUMMARY))


@lru_cache(maxsize=1)
def read_summary(out: str, digest: str) -> Summary:
    """The merged summary; ``digest`` is that of the cache, so that another one at this place is read afresh."""
    arrays = Folder(out).read_arrays(_SUMMARY)
    assert arrays is not None, "the summary is written before it is read"
    return Summary(
        rows=int(arrays["rows"]),
        count_F=arrays["count_F"],
        sum_F=arrays["sum_F"],
        max_F=arrays["max_F"],
        histogram_FJ=arrays["histogram_FJ"],
        strongest=Examples(arrays["strongest_keys_FE"], arrays["strongest_values_FE"]),
        sample=Examples(arrays["sample_keys_FE"], arrays["sample_values_FE"]),
    )


@lru_cache(maxsize=1)
def _open(store_uri: str, sae_uri: str, digest: str) -> _Opened:
    saved = read_sae(sae_uri)
    sae = Sae(*from_saelens(saved.cfg, saved.tensors), Compute(dtype="bfloat16"))
    return _Opened(ActivationStore(store_uri, saved.taps), sae, saved.taps)
