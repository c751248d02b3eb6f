"""Training that goes on from an SAE: the same function at the start, a better one after a while, refusals."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.checkpoint import SAE_FILES, read_sae
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import fingerprint
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.saelens import from_saelens
from saex_pipe.stages.toy import run as toy
from saex_pipe.stages.toy.config import Config as ToyConfig
from saex_pipe.stages.train import run as train
from saex_pipe.stages.train.config import Config

TOPK = {"variant": "topk", "k": 2}
RELU = {"variant": "relu", "sparsity_coefficient": 0.1}
JUMPRELU = {"variant": "jumprelu", "jumprelu_form": "l0", "sparsity_coefficient": 0.1, "decoder_rows": "free"}
SHARED = {"latents": 32, "batch_rows": 128, "compute_dtype": "float32", "sample_rows": 500}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A toy store, and an SAE of each kind trained on it for a while."""
    place = tmp_path_factory.mktemp("start")
    toy.run(ToyConfig(out=f"{place}/store", latents=24, width=12, active=2.0, rows=8192))
    for name, settings in (("topk", TOPK), ("relu", RELU), ("jumprelu", JUMPRELU)):
        run(place, f"{place}/{name}", rows=128 * 30, learning_rate=5e-3, **settings)
    return place


def config(place, out, **settings):
    return Config.create({"store": f"{place}/store", "out": str(out)} | SHARED | settings)


def run(place, out, **settings):
    return train.run(config(place, out, **settings))


def fvu(place, uri):
    saved = read_sae(str(uri))
    rows_BD = ActivationStore(f"{place}/store").acts("toy", range(8)).reshape(-1, 12)
    recon_BD = np.asarray(Sae(*from_saelens(saved.cfg, saved.tensors)).reconstruct(rows_BD))
    return np.square(rows_BD - recon_BD).sum() / np.square(rows_BD - rows_BD.mean(axis=0)).sum()


@pytest.mark.parametrize(
    ("name", "settings", "tolerance"),
    [
        ("topk", TOPK, 1e-6),
        ("relu", RELU, 1e-6),
        ("relu", {**RELU, "normalise": "expected_norm"}, 1e-6),
        ("relu", {**RELU, "normalise": "whitening_zca"}, 1e-4),
        ("relu", {**RELU, "centred": True}, 1e-5),
        ("jumprelu", JUMPRELU, 1e-6),
    ],
    ids=["topk", "relu", "other scale", "whitened", "centred", "jumprelu"],
)
def test_an_sae_that_learns_nothing_more_is_saved_as_it_was(place, tmp_path, name, settings, tolerance):
    settings = dict(settings)
    if settings.pop("centred", False):
        _write_centred(f"{place}/{name}", tmp_path / "from")
        source = tmp_path / "from"
    else:
        source = f"{place}/{name}"
    run(place, tmp_path / "on", rows=128, learning_rate=1e-30, start_from=str(source), **settings)
    before, after = read_sae(f"{place}/{name}").tensors, read_sae(str(tmp_path / "on")).tensors
    for key, expected in before.items():
        np.testing.assert_allclose(after[key], expected, atol=tolerance * np.abs(expected).max(), err_msg=key)


def _write_centred(source, target):
    """The same function, as SAELens writes it where ``b_dec`` is subtracted; without our own file beside it."""

    saved = read_sae(source)
    shifted = saved.tensors["b_enc"] + saved.tensors["b_dec"] @ saved.tensors["W_enc"]
    folder = Folder(str(target))
    folder.write("cfg.json", json.dumps({**saved.cfg, "apply_b_dec_to_input": True}).encode())
    folder.write("sae_weights.safetensors", save({**saved.tensors, "b_enc": shifted}))


def test_it_goes_on_learning_from_where_it_was(place, tmp_path):
    start = {"rows": 128 * 30, "learning_rate": 5e-3}
    run(place, tmp_path / "on", start_from=f"{place}/topk", **start, **TOPK)
    assert fvu(place, tmp_path / "on") < 0.9 * fvu(place, f"{place}/topk")


def test_the_sae_it_starts_from_is_part_of_what_the_result_depends_on(place, tmp_path):
    copies = [tmp_path / "a", tmp_path / "b"]
    for copy in copies:
        for name in SAE_FILES[:2]:
            Folder(str(copy)).write(name, Folder(f"{place}/topk").read(name))
    found = [fingerprint(config(place, tmp_path, rows=128, start_from=str(copy))) for copy in copies]
    assert found[0] == found[1] != fingerprint(config(place, tmp_path, rows=128))
    Folder(str(copies[1])).write("cfg.json", Folder(str(copies[1])).read("cfg.json") + b"\n")
    changed = fingerprint(config(place, tmp_path, rows=128, start_from=str(copies[1])))
    assert {name for name in changed if changed[name] != found[0][name]} == {"start_from"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**TOPK, "latents": 33}, "its latents is 32, that of this training 33"),
        (RELU, "its architecture is topk, that of this training standard"),
        ({**TOPK, "normalise": "layer_norm"}, "its layer_norm is False, that of this training True"),
        ({**TOPK, "normalise": "none"}, "and train.decoder_rows = unit would change what it computes"),
        ({**TOPK, "start_from": "{place}/store"}, "has no cfg.json; give a folder in the layout of SAELens"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused(place, tmp_path, changes, message):
    changes = {"start_from": "{place}/topk"} | changes
    changes["start_from"] = changes["start_from"].format(place=place)
    with pytest.raises(InputError) as refusal:
        run(place, tmp_path / "sae", rows=128, **changes)
    assert message in str(refusal.value)
    assert not (tmp_path / "sae").exists()
