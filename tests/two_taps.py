"""A store of two taps, of different widths and scales, that say the same in two languages."""

import json

import numpy as np

from saex_pipe.common.formats.activations import SCHEMA_VERSION, ActivationWriter, StoreInfo, finish_contents
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.zarr_array import Tiling

TAPS = ("layer.0", "layer.1")
WIDTHS, SCALES = (12, 8), (50.0, 1.0)
WINDOWS, LENGTH, FEATURES, ACTIVE = 256, 16, 24, 3


def write_store(path):
    """Every row has ``ACTIVE`` features of 24, with a direction in either tap."""
    rng = np.random.default_rng(0)
    codes_BF = np.zeros((WINDOWS * LENGTH, FEATURES))
    for row_F in codes_BF:
        row_F[rng.choice(FEATURES, ACTIVE, replace=False)] = rng.uniform(0.5, 1.5, ACTIVE)
    taps = dict(zip(TAPS, WIDTHS, strict=True))
    tiling = Tiling(64, 4)
    info = StoreInfo(
        WINDOWS, WINDOWS, LENGTH, taps, dict.fromkeys(TAPS, "float32"), tiling, RowPolicy(), {"model": None}
    )
    acts = {}
    for (tap, width), scale in zip(taps.items(), SCALES, strict=True):
        directions_FD = rng.normal(size=(FEATURES, width)) / width**0.5
        rows_BD = scale * (codes_BF @ directions_FD + 0.5)
        acts[tap] = rows_BD.reshape(WINDOWS, LENGTH, width).astype(np.float32)
    folder, ledger = Folder(str(path)), {}
    writer = ActivationWriter(folder, info)
    for shard, windows in enumerate(tiling.shards(WINDOWS)):
        part = slice(windows.start, windows.stop)
        tokens_NL = np.zeros((len(windows), LENGTH), np.int32)
        keep_NL = np.ones((len(windows), LENGTH), bool)
        entry = writer.write_shard(windows, tokens_NL, keep_NL, {tap: acts_NLD[part] for tap, acts_NLD in acts.items()})
        ledger[shard] = json.loads(json.dumps(entry))
    contents = finish_contents(folder, info, ledger)
    manifest = Manifest("harvest", SCHEMA_VERSION, "two", {}, {}, {}, contents, {}, {}, "")
    folder.write("manifest.json", json.dumps(manifest.__dict__).encode())
    return str(path)
