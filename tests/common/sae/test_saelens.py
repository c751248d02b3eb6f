"""The layout of SAELens: a round trip here, and SAELens itself on the same raw rows where it is installed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.folding import fold
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.jumprelu import JumpRelu
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.saelens import from_saelens, hook_name, to_saelens
from saex_pipe.common.sae.variants import build

WIDTH, LATENTS, ROWS, RAW_NORM = 16, 64, 50, 150.0
METADATA = {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_pre", "context_size": 128, "prepend_bos": True}

JUMPS = {"sparsity_coefficient": 1.0, "threshold_start": 1.0}
SAELENS_CLASSES = {
    "topk": "TopKSAE",
    "standard": "StandardSAE",
    "transcoder": "Transcoder",
    "jumprelu": "JumpReLUSAE",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "gated": "GatedSAE",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}
PENALISED = {"sparsity_coefficient": 1.0}
COME_BACK_AS = {
    **dict.fromkeys(("wright", "wright transcoder", "p-annealing"), Relu),
    **dict.fromkeys(("batchtopk", "batchtopk transcoder", "matryoshka", "matryoshka jumprelu"), JumpRelu),
}
CASES: dict[str, tuple[Variant, int, str]] = {
    "topk": (build("topk", LATENTS, k=5), WIDTH, "topk"),
    "relu": (build("relu", LATENTS, sparsity_coefficient=1.0), WIDTH, "standard"),
    "topk transcoder": (build("topk", LATENTS, k=5, transcoder=True), WIDTH, "topk"),
    "topk transcoder to another width": (build("topk", LATENTS, k=5, transcoder=True), 10, "topk_transcoder"),
    "jumprelu": (build("jumprelu", LATENTS, **JUMPS), WIDTH, "jumprelu"),
    "jumprelu with b_dec in its input": (build("jumprelu", LATENTS, **JUMPS, jumprelu_form="l0"), WIDTH, "jumprelu"),
    "jumprelu transcoder": (build("jumprelu", LATENTS, **JUMPS, transcoder=True), 10, "jumprelu_transcoder"),
    "batchtopk": (build("batchtopk", LATENTS, k=5), WIDTH, "jumprelu"),
    "batchtopk transcoder": (build("batchtopk", LATENTS, k=5, transcoder=True), 10, "jumprelu_transcoder"),
    "matryoshka": (build("matryoshka_batchtopk", LATENTS, k=5), WIDTH, "jumprelu"),
    "matryoshka jumprelu": (build("matryoshka_jumprelu", LATENTS, **JUMPS), WIDTH, "jumprelu"),
    "relu transcoder": (build("relu", LATENTS, sparsity_coefficient=1.0, transcoder=True), 10, "transcoder"),
    "relu of unit decoder rows": (build("relu", LATENTS, **PENALISED, decoder_rows="unit"), WIDTH, "standard"),
    "wright": (build("wright", LATENTS, **PENALISED), WIDTH, "standard"),
    "wright transcoder": (build("wright", LATENTS, **PENALISED, transcoder=True), 10, "transcoder"),
    "p-annealing": (build("p_annealing", LATENTS, **PENALISED), WIDTH, "standard"),
    "gated": (build("gated", LATENTS, **PENALISED), WIDTH, "gated"),
    "gated transcoder": (build("gated", LATENTS, **PENALISED, transcoder=True), WIDTH, "gated"),
    "gated transcoder to another width": (
        build("gated", LATENTS, **PENALISED, transcoder=True),
        10,
        "gated_transcoder",
    ),
    "relu skip transcoder": (
        build("relu", LATENTS, sparsity_coefficient=1.0, transcoder=True, skip=True),
        10,
        "skip_transcoder",
    ),
    "topk skip transcoder": (build("topk", LATENTS, k=5, transcoder=True, skip=True), WIDTH, "topk_skip_transcoder"),
    "jumprelu skip transcoder": (
        build("jumprelu", LATENTS, **JUMPS, transcoder=True, skip=True),
        10,
        "jumprelu_skip_transcoder",
    ),
    "relu crosscoder": (build("relu", LATENTS, sparsity_coefficient=1.0, tap_widths=(6, 10)), WIDTH, "crosscoder"),
    "topk crosscoder": (build("topk", LATENTS, k=5, tap_widths=(6, 10)), WIDTH, "topk_crosscoder"),
}
ROW_NORM_CASES = ("topk", "relu", "topk crosscoder", "relu crosscoder")


def exported(case: str) -> tuple[Sae, jax.Array]:
    """A folded SAE, and raw rows whose mean is larger than their spread."""
    variant, width_out, _ = CASES[case]
    rng = np.random.default_rng(0)
    raw_BD = jnp.asarray(RAW_NORM / WIDTH**0.5 * (rng.normal(size=(ROWS, WIDTH)) + 3), jnp.float32)
    rows = (jnp.asarray(rng.normal(3, 1, (ROWS, width)), jnp.float32) for width in (WIDTH, width_out))
    params = variant.init(jax.random.key(0), DataStats(jnp.full(WIDTH, 3.0), jnp.full(width_out, 3.0), *rows))
    params = {key: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in params.items()}
    scale = WIDTH**0.5 / RAW_NORM
    normalisers = Normalisers(
        Normaliser(jnp.full(WIDTH, scale)), Normaliser(jnp.full(width_out, scale * (2 if variant.transcoder else 1)))
    )
    return Sae(variant, fold(variant, params, normalisers)), raw_BD


@pytest.mark.parametrize(
    ("case", "row_norm"),
    [*((case, False) for case in CASES), *((case, True) for case in ROW_NORM_CASES)],
)
def test_round_trip(case: str, row_norm: bool, tmp_path: Path) -> None:
    sae, raw_BD = exported(case)
    sae = replace(sae, row_norm=row_norm)
    cfg, tensors = to_saelens(sae.variant, sae.params, METADATA, row_norm=row_norm)
    assert cfg["architecture"] == CASES[case][2]
    assert cfg["metadata"]["hook_name"] == METADATA["hook_name"]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    cfg = json.loads(json.dumps(cfg))
    again = Sae(*from_saelens(cfg, load_file(tmp_path / "sae_weights.safetensors")))
    assert again.row_norm == row_norm
    assert type(again.variant) is COME_BACK_AS.get(case, type(sae.variant))
    for name in ("transcoder", "skip", "tap_widths"):
        assert getattr(again.variant, name) == getattr(sae.variant, name), name
    np.testing.assert_array_equal(again.variant.decoder_norms(again.params), sae.variant.decoder_norms(sae.params))
    tolerance = 1e-5 if case.startswith("wright") else 0.0  # its scales are folded into the encoder
    for before, after in ((sae.encode, again.encode), (sae.reconstruct, again.reconstruct)):
        np.testing.assert_allclose(after(raw_BD), before(raw_BD), rtol=tolerance, atol=tolerance * RAW_NORM)


@pytest.mark.parametrize("case", ["relu transcoder", "gated transcoder"])
def test_a_transcoder_that_subtracts_its_decoder_bias_has_it_moved_into_the_encoder(case: str) -> None:
    family = CASES[case][0]
    raw_BD = exported(case)[1]
    params = {
        key: jax.random.normal(jax.random.key(len(key)), leaf.shape)
        for key, leaf in family.init(jax.random.key(0), DataStats(jnp.zeros(WIDTH), jnp.zeros(WIDTH))).items()
    }
    cfg, tensors = to_saelens(family, params, METADATA)
    again = Sae(*from_saelens({**cfg, "apply_b_dec_to_input": True}, tensors))
    expected_BF = family.encode(params, raw_BD - params["b_dec_D"][None])
    np.testing.assert_allclose(again.encode(raw_BD), expected_BF, rtol=1e-4, atol=1e-4)


def test_a_topk_with_layer_norm_is_no_transcoder_whether_it_subtracts_its_decoder_bias_or_not() -> None:
    cfg, tensors = to_saelens(exported("topk")[0].variant, exported("topk")[0].params, METADATA)
    cfg["apply_b_dec_to_input"] = False
    assert from_saelens(cfg, tensors)[0].transcoder
    variant = from_saelens({**cfg, "normalize_activations": "layer_norm"}, tensors)[0]
    assert not variant.transcoder
    assert not variant.subtracts_decoder_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not known; known are standard, topk"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' is not supported"),
        (
            {"normalize_activations": "layer_norm", "architecture": "topk_transcoder"},
            "normalize_activations = 'layer_norm' is not supported for a transcoder: the mean and spread to put back",
        ),
        ({"normalize_activations": "layer_norm", "d_out": WIDTH}, "'layer_norm' is not supported for a transcoder"),
        ({"architecture": "topk_skip_transcoder"}, "sae_weights lacks W_skip"),
        ({"architecture": "crosscoder", "tap_widths": [6, 9]}, "tap_widths = [6, 9] do not add up to d_in = 16"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm = True is not supported"),
        ({"d_sae": 63}, "W_enc has shape (16, 64), cfg.json says (16, 63)"),
        ({"k": None}, "cfg.json lacks k"),
        ({"d_in": None}, "cfg.json lacks d_in"),
    ],
)
def test_what_is_not_computed_here_is_refused(change: dict[str, Any], message: str) -> None:
    sae, _ = exported("topk")
    cfg, tensors = to_saelens(sae.variant, sae.params, METADATA)
    cfg = {key: value for key, value in {**cfg, **change}.items() if value is not None}
    with pytest.raises(InputError) as refusal:
        from_saelens(cfg, tensors)
    assert message in str(refusal.value)


def test_missing_tensors_are_named() -> None:
    sae, _ = exported("topk")
    cfg, tensors = to_saelens(sae.variant, sae.params, METADATA)
    del tensors["b_enc"]
    with pytest.raises(InputError, match="lacks b_enc"):
        from_saelens(cfg, tensors)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("case", "row_norm"),
    [
        *((case, False) for case in CASES if CASES[case][2] in SAELENS_CLASSES),
        *((case, True) for case in ("topk", "relu")),
    ],
)
def test_saelens_computes_the_same(case: str, row_norm: bool, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    import torch

    sae, raw_BD = exported(case)
    sae = Sae(sae.variant, sae.params, row_norm)
    cfg, tensors = to_saelens(sae.variant, sae.params, METADATA, row_norm=row_norm)
    assert from_saelens(cfg, tensors)[2] == row_norm
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        codes_BF = theirs.encode(torch.from_numpy(np.array(raw_BD)))
        recon_BD = theirs.decode(codes_BF)
        whole_BD = theirs(torch.from_numpy(np.array(raw_BD)))
    if sae.variant.skip:
        recon_BD = whole_BD  # SAELens' decode leaves the skip path out
    assert type(theirs).__name__ == SAELENS_CLASSES[CASES[case][2]]
    assert theirs.cfg.metadata.hook_name == METADATA["hook_name"]
    for ours, torchs in ((sae.encode(raw_BD), codes_BF), (sae.reconstruct(raw_BD), recon_BD), (recon_BD, whole_BD)):
        ours, torchs = np.asarray(ours, np.float64), torchs.numpy().astype(np.float64)
        assert np.abs(ours - torchs).max() <= 1e-5 * np.abs(torchs).max()
    assert math.isclose((codes_BF > 0).sum().item(), float((sae.encode(raw_BD) > 0).sum()))


@pytest.mark.parametrize(
    ("tap", "hook"),
    [
        ("blocks.15.resid_pre", "blocks.15.hook_resid_pre"),
        ("blocks.0.mlp_in", "blocks.0.ln2.hook_normalized"),
        ("blocks.3.attn_z", "blocks.3.attn.hook_z"),
        ("embed", "hook_embed"),
        ("final_norm", "ln_final.hook_normalized"),
        ("toy", "toy"),
    ],
)
def test_taps_have_transformer_lens_names(tap, hook):
    assert hook_name(tap) == hook
