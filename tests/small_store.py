"""Small activation stores whose rows say which token they belong to."""

import json

import numpy as np

from saex_pipe.common.formats.activations import SCHEMA_VERSION, ActivationWriter, StoreInfo, finish_contents
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.store_info import DTYPES
from saex_pipe.common.formats.zarr_array import Tiling

STARTED = {"stage": "harvest", "seed": 0}


class SmallStore:
    """``windows`` of ``length`` tokens; tap ``a`` [.., 8] holds in its first coordinate which token a row is of."""

    def __init__(self, path, *, windows=24, length=6, dtype="float32", tiling=None, first_token=0, share_kept=0.7):
        tiling = tiling or Tiling(4, 2)
        self.uri = str(path)
        self.folder = Folder(self.uri)
        self.info = StoreInfo(
            windows, windows, length, {"a": 8}, {"a": dtype}, tiling, RowPolicy(), {"model": "m", "tokenizer": {}}
        )
        random = np.random.Generator(np.random.Philox(key=first_token))
        self.tokens_NL = (first_token + np.arange(windows * length, dtype=np.int32)).reshape(windows, length)
        self.keep_NL = random.random((windows, length)) < share_kept
        self.acts_NLD = random.normal(0, 1, (windows, length, 8)).astype(DTYPES[dtype])
        self.acts_NLD[..., 0] = self.tokens_NL
        self.shards = tiling.shards(windows)
        self.ledger = {}

    def start(self):
        self.folder.write("started.json", json.dumps(STARTED).encode())
        self.writer = ActivationWriter(self.folder, self.info)
        return self

    def write(self, *shards):
        for shard in shards:
            windows = self.shards[shard]
            part = slice(windows.start, windows.stop)
            acts = {"a": self.acts_NLD[part]}
            entry = self.writer.write_shard(windows, self.tokens_NL[part], self.keep_NL[part], acts)
            self.ledger[shard] = json.loads(json.dumps(entry))
            self.folder.write(f"ledger/{shard:06d}.json", json.dumps(entry).encode())
        return self

    def finish(self, digest="d"):
        contents = finish_contents(self.folder, self.info, self.ledger)
        manifest = Manifest("harvest", SCHEMA_VERSION, digest, {}, {}, {}, contents, {}, {}, "")
        self.folder.write("manifest.json", json.dumps(manifest.__dict__).encode())
        return self

    def kept_ids(self, *shards):
        """Which tokens are rows, of these shards or of all."""
        chosen = shards or range(len(self.shards))
        return sorted(
            int(token) for n in chosen for w in self.shards[n] for token in self.tokens_NL[w][self.keep_NL[w]]
        )


def whole_store(path, **changes):
    """A finished one."""
    store = SmallStore(path, **changes).start()
    return store.write(*range(len(store.shards))).finish()
