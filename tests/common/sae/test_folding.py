"""Folding: raw rows with a large mean give the codes and reconstructions of the scaled rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.folding import fold
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.variants import build

WIDTH, LATENTS, ROWS = 16, 64, 50
RAW_NORM = 150.0


def variants() -> dict[str, Variant]:
    kinds = {"topk": {"k": 5}, "relu": {"sparsity_coefficient": 1.0}}
    return {
        f"{name} transcoder={transcoder}": build(name, LATENTS, **settings, transcoder=transcoder)
        for name, settings in kinds.items()
        for transcoder in (False, True)
    }


def trained(variant: Variant, width_out: int) -> tuple[Params, jax.Array]:
    """Parameters as after training, and raw rows whose mean is as large as their spread."""
    rng = np.random.default_rng(0)
    raw_BD = jnp.asarray(RAW_NORM * (rng.normal(size=(ROWS, WIDTH)) / WIDTH**0.5 + 1), jnp.float32)
    mean_D = jnp.full(WIDTH, WIDTH**0.5, jnp.float32)
    params = variant.init(jax.random.key(0), DataStats(mean_D, jnp.full(width_out, 2.0)))
    return {key: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in params.items()}, raw_BD


@pytest.mark.parametrize("name", variants())
def test_raw_rows_give_what_scaled_rows_gave(name: str) -> None:
    variant = variants()[name]
    width_out = 10 if variant.transcoder else WIDTH
    params, raw_BD = trained(variant, width_out)
    scale_in = WIDTH**0.5 / RAW_NORM
    scale_out = 3.7 if variant.transcoder else scale_in
    normalisers = Normalisers(Normaliser(jnp.full(WIDTH, scale_in)), Normaliser(jnp.full(width_out, scale_out)))
    sae = Sae(variant, fold(variant, params, normalisers))
    np.testing.assert_allclose(sae.encode(raw_BD), variant.encode(params, scale_in * raw_BD), rtol=1e-4, atol=1e-4)
    expected_BD = np.asarray(variant.reconstruct(params, scale_in * raw_BD)) / scale_out
    np.testing.assert_allclose(sae.reconstruct(raw_BD), expected_BD, rtol=1e-4, atol=1e-5 * np.abs(expected_BD).max())
    twice = Sae(variant, fold(variant, sae.params, normalisers))
    assert not np.allclose(twice.reconstruct(raw_BD), expected_BD, rtol=0.1)


def test_scales_that_cannot_be_are_refused() -> None:
    topk = variants()["topk transcoder=False"]
    params, _ = trained(topk, WIDTH)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        bad = Normaliser(jnp.full(WIDTH, 1.0).at[3].set(scale))
        with pytest.raises(InputError, match="a factor of the input's normalisation is not above 0"):
            fold(topk, params, Normalisers(bad, bad))
    with pytest.raises(InputError, match="input and target are normalised differently"):
        fold(topk, params, Normalisers(Normaliser(jnp.ones(WIDTH)), Normaliser(jnp.full(WIDTH, 2.0))))
