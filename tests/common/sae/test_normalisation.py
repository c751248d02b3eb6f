"""Normalisation against its equations in float64, and what the folded SAE makes of raw rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.folding import fold, unfold
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers, whitening
from saex_pipe.common.sae.variants import build

WIDTH, OUT, LATENTS, ROWS = 16, 10, 48, 200
AFFINE = ("mean_square", "clipped", "ema", "whitening_pca", "whitening_zca")
VARIANTS = {
    "topk": build("topk", LATENTS, k=5),
    "relu": build("relu", LATENTS, sparsity_coefficient=1.0),
    "topk transcoder": build("topk", LATENTS, k=5, transcoder=True),
    "gated transcoder": build("gated", LATENTS, sparsity_coefficient=1.0, transcoder=True),
    "relu skip transcoder": build("relu", LATENTS, sparsity_coefficient=1.0, transcoder=True, skip=True),
}


def raw(width: int, seed: int = 0) -> np.ndarray:
    """Rows of norm about 150 with correlated axes and a mean, in float64; the last is ten times as long."""
    rng = np.random.default_rng(seed)
    mix_DD = rng.normal(size=(width, width)) / width**0.5
    rows_ND = 30 * (rng.normal(size=(ROWS, width)) @ mix_DD + 1)
    rows_ND[-1] *= 10
    return rows_ND


def normaliser(kind: str, rows_ND: np.ndarray) -> Normaliser:
    ones_D = jnp.ones(rows_ND.shape[1])
    if kind.startswith("whitening"):
        return Normaliser(ones_D, whitening=whitening([rows_ND], kind))
    if kind == "layer_norm":
        return Normaliser(ones_D, per_row=True)
    scale_D = ones_D / jnp.float32(np.sqrt(np.square(rows_ND).mean()))
    settings = {"mean_square": {}, "clipped": {"longest": 3.0}, "ema": {"decay": 0.9}}[kind]
    return Normaliser(scale_D, **settings).observe(jnp.asarray(rows_ND, jnp.float32))


def trained(variant: Variant, width_out: int) -> Params:
    params = variant.init(jax.random.key(0), DataStats(jnp.ones(WIDTH), jnp.ones(width_out)))
    rng = np.random.default_rng(1)
    return {name: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in params.items()}


def test_scaled_and_clipped_rows() -> None:
    rows_ND = raw(WIDTH)
    scale = 1 / np.sqrt(np.square(rows_ND).mean())
    plain_ND = np.asarray(normaliser("mean_square", rows_ND).apply(jnp.asarray(rows_ND, jnp.float32)))
    np.testing.assert_allclose(plain_ND, rows_ND * scale, rtol=1e-5, atol=1e-6)
    clipped_ND = np.asarray(normaliser("clipped", rows_ND).apply(jnp.asarray(rows_ND, jnp.float32)))
    np.testing.assert_allclose(clipped_ND[:-1], rows_ND[:-1] * scale, rtol=1e-5, atol=1e-6)
    limit = 3 * WIDTH**0.5
    assert np.linalg.norm(plain_ND[-1]) > 1.5 * limit
    np.testing.assert_allclose(clipped_ND[-1], plain_ND[-1] * limit / np.linalg.norm(plain_ND[-1]), rtol=1e-5)


def test_each_tap_of_a_crosscoder_is_clipped_and_tracked_by_itself() -> None:
    rows_ND = np.concatenate([raw(6), raw(10, seed=1) / 10], axis=1)
    start = Normaliser(jnp.full(16, 0.5), decay=0.9, longest=2.0, tap_widths=(6, 10))
    seen = start.observe(jnp.asarray(rows_ND, jnp.float32))
    for part in (slice(0, 6), slice(6, 16)):
        expected = 1 / np.sqrt(0.9 / 0.5**2 + 0.1 * np.square(rows_ND[:, part]).mean())
        np.testing.assert_allclose(seen.scale_D[part], expected, rtol=1e-5)
        scaled_ND = rows_ND[:, part] * expected
        length_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
        limit = 2 * scaled_ND.shape[1] ** 0.5
        assert 0 < (length_N1 > limit).mean() < 1
        found_ND = np.asarray(seen.apply(jnp.asarray(rows_ND, jnp.float32)))[:, part]
        np.testing.assert_allclose(found_ND, scaled_ND * np.minimum(1, limit / length_N1), rtol=1e-5, atol=1e-6)


def test_the_tracked_mean_square_forgets_where_it_started() -> None:
    tracked = Normaliser(jnp.full(4, 100.0), decay=0.5)
    for _ in range(40):
        tracked = tracked.observe(jnp.full((8, 4), 2.0))
    np.testing.assert_allclose(tracked.scale_D, 0.5, rtol=1e-5)
    fixed = Normaliser(jnp.full(4, 100.0))
    assert fixed.observe(jnp.full((8, 4), 2.0)) is fixed


@pytest.mark.parametrize("kind", ["whitening_pca", "whitening_zca"])
def test_whitened_rows_are_uncorrelated(kind: str) -> None:
    rows_ND = raw(WIDTH)
    found_ND = np.asarray(normaliser(kind, rows_ND).apply(jnp.asarray(rows_ND, jnp.float32)), np.float64)
    np.testing.assert_allclose(found_ND.mean(axis=0), 0, atol=1e-4)
    variance_D, axes_DD = np.linalg.eigh(np.cov(rows_ND.T))
    ridge = 1e-3 * variance_D.mean()
    if kind == "whitening_pca":
        expected_DD = np.diag(variance_D / (variance_D + ridge))
    else:
        expected_DD = (axes_DD * variance_D / (variance_D + ridge)) @ axes_DD.T
        root_DD = (axes_DD / np.sqrt(variance_D + ridge)) @ axes_DD.T
        np.testing.assert_allclose(found_ND, (rows_ND - rows_ND.mean(axis=0)) @ root_DD, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.cov(found_ND.T), expected_DD, atol=1e-4)


def test_taps_are_whitened_each_by_itself() -> None:
    a_ND, b_ND = raw(6), raw(10, seed=1)
    both = Normaliser(jnp.ones(16), whitening=whitening([a_ND, b_ND], "whitening_zca"), tap_widths=(6, 10))
    found_ND = both.apply(jnp.asarray(np.concatenate([a_ND, b_ND], axis=1), jnp.float32))
    for rows_ND, part in ((a_ND, slice(0, 6)), (b_ND, slice(6, 16))):
        alone_ND = normaliser("whitening_zca", rows_ND).apply(jnp.asarray(rows_ND, jnp.float32))
        np.testing.assert_allclose(found_ND[:, part], alone_ND, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize("name", VARIANTS)
def test_raw_rows_give_what_normalised_rows_gave_in_training(name: str, kind: str) -> None:
    variant = VARIANTS[name]
    width_out = OUT if variant.transcoder else WIDTH
    x_ND, y_ND = raw(WIDTH), raw(width_out, seed=int(variant.transcoder))
    normalisers = Normalisers(normaliser(kind, x_ND), normaliser(kind, y_ND))
    params = trained(variant, width_out)
    x_ND = jnp.asarray(x_ND[:-1], jnp.float32)  # the last row is clipped where rows are
    in_training_ND = normalisers.input.apply(x_ND)
    sae = Sae(variant, fold(variant, params, normalisers))
    codes_NF = np.asarray(variant.encode(params, in_training_ND))
    np.testing.assert_allclose(sae.encode(x_ND), codes_NF, rtol=2e-3, atol=2e-4 * codes_NF.max())
    recon_ND = np.asarray(variant.reconstruct(params, in_training_ND), np.float64)
    target = normalisers.target
    if target.whitening is None:
        expected_ND = recon_ND / np.asarray(target.scale_D)
    else:
        expected_ND = np.linalg.solve(np.asarray(target.whitening.matrix_DD, np.float64).T, recon_ND.T).T
        expected_ND += np.asarray(target.whitening.mean_D)
    np.testing.assert_allclose(sae.reconstruct(x_ND), expected_ND, rtol=1e-3, atol=1e-3 * np.abs(expected_ND).max())
    again = unfold(variant, sae.params, normalisers)
    for key, leaf in params.items():
        np.testing.assert_allclose(again[key], leaf, rtol=1e-3, atol=1e-3 * np.abs(leaf).max(), err_msg=key)


@pytest.mark.parametrize("name", ["topk", "relu"])
def test_layer_norm_is_taken_off_each_row_and_put_back(name: str) -> None:
    variant, x_ND = VARIANTS[name], raw(WIDTH)
    side = normaliser("layer_norm", x_ND)
    params = trained(variant, WIDTH)
    mean_N1, std_N1 = x_ND.mean(axis=1, keepdims=True), x_ND.std(axis=1, ddof=1, keepdims=True)
    raw_ND = jnp.asarray(x_ND, jnp.float32)
    normal_ND = side.apply(raw_ND)
    np.testing.assert_allclose(normal_ND, (x_ND - mean_N1) / (std_N1 + 1e-5), rtol=1e-4, atol=1e-5)
    sae = Sae(variant, fold(variant, params, Normalisers(side, side)), row_norm=True)
    np.testing.assert_allclose(sae.encode(raw_ND), variant.encode(params, normal_ND), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sae.codes_sparse(raw_ND, limit=3).values_BK, jax.lax.top_k(sae.encode(raw_ND), 3)[0])
    expected_ND = np.asarray(variant.reconstruct(params, normal_ND), np.float64) * std_N1 + mean_N1
    np.testing.assert_allclose(sae.reconstruct(raw_ND), expected_ND, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["topk", "relu"])
def test_layer_norm_of_a_crosscoder_is_that_of_each_tap(name: str) -> None:
    settings = {"k": 5} if name == "topk" else {"sparsity_coefficient": 1.0}
    variant, parts = build(name, LATENTS, **settings, tap_widths=(6, 10)), (slice(0, 6), slice(6, 16))
    x_ND = np.concatenate([raw(6), raw(10, seed=1) / 10], axis=1)
    mean_ND, std_ND = (
        np.concatenate(
            [np.repeat(of(x_ND[:, part], axis=1)[:, None], part.stop - part.start, axis=1) for part in parts], axis=1
        )
        for of in (np.mean, partial(np.std, ddof=1))
    )
    normal_ND = (x_ND - mean_ND) / (std_ND + 1e-5)
    side = Normaliser(jnp.ones(WIDTH), per_row=True, tap_widths=(6, 10))
    raw_ND = jnp.asarray(x_ND, jnp.float32)
    np.testing.assert_allclose(side.apply(raw_ND), normal_ND, rtol=1e-5, atol=1e-5)

    params = trained(variant, WIDTH)
    of = {key: np.asarray(leaf, np.float64) for key, leaf in params.items()}
    subtracted_D = of["b_dec_D"] if variant.subtracts_decoder_bias else 0
    z_NF = (normal_ND - subtracted_D) @ of["w_enc_FD"].T + of["b_enc_F"]
    codes_NF = np.maximum(z_NF, 0)
    if name == "topk":
        codes_NF *= z_NF >= np.sort(z_NF, axis=1)[:, -5:-4]
    expected_ND = (codes_NF @ of["w_dec_FD"] + of["b_dec_D"]) * std_ND + mean_ND
    sae = Sae(variant, fold(variant, params, Normalisers(side, side)), row_norm=True)
    np.testing.assert_allclose(sae.encode(raw_ND), codes_NF, rtol=1e-5, atol=1e-5)
    undone_ND = side.undo(variant.reconstruct(params, side.apply(raw_ND)), raw_ND)
    for recon_ND in (np.asarray(sae.reconstruct(raw_ND)), np.asarray(undone_ND)):
        for part in parts:
            off_ND = np.abs(recon_ND[:, part] - expected_ND[:, part])
            assert off_ND.max() < 2e-6 * np.abs(expected_ND[:, part]).max()


def test_layer_norm_of_a_transcoder_is_refused() -> None:
    variant = VARIANTS["topk transcoder"]
    side = Normaliser(jnp.ones(WIDTH), per_row=True)
    with pytest.raises(InputError, match="the target's own row, which a transcoder does not see"):
        fold(variant, trained(variant, WIDTH), Normalisers(side, side))
