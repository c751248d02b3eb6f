"""Training starts from what the store says of its rows; it makes no pass of its own over them."""

import json

import numpy as np
from small_store import whole_store

from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import read_sae
from saex_pipe.common.formats.statistics import floats_to_text
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config

SETTINGS = {"k": 2, "latents": 16, "batch_rows": 32, "rows": 32, "compute_dtype": "float32", "learning_rate": 1e-8}


def test_the_decoder_bias_starts_at_the_mean_that_the_manifest_states(tmp_path):
    store = whole_store(tmp_path / "store", windows=48, length=32, tiling=Tiling(8, 4))
    path = tmp_path / "store" / "manifest.json"
    mean_D = ActivationStore(store.uri).statistics("a").mean_D
    for name, shift in (("true", 0.0), ("shifted", 30.0)):
        manifest = json.loads(path.read_text())
        stated = manifest["contents"]["statistics"]["a"]
        stated["sum"] = floats_to_text((mean_D + shift) * stated["count"])
        path.write_text(json.dumps(manifest))
        train.run(Config.create({"store": store.uri, "out": str(tmp_path / name)} | SETTINGS))
        np.testing.assert_allclose(read_sae(str(tmp_path / name)).tensors["b_dec"], mean_D + shift, rtol=1e-3)
