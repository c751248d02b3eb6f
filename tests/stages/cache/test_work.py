"""Reading codes for the feature statistics: every active latent, shards without rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.variants import build
from saex_pipe.stages.cache import work
from saex_pipe.stages.cache.summary import Codes, summarise


@pytest.mark.parametrize("variant", [build("relu", 40, sparsity_coefficient=1.0), build("topk", 40, k=9)])
@pytest.mark.parametrize("first_limit", [1, 4, 64])
def test_every_active_latent_is_found_whatever_the_first_limit(monkeypatch, variant, first_limit):
    monkeypatch.setattr(work, "_FIRST_LIMIT", first_limit)
    mean_D = jnp.zeros(8)
    sae = Sae(variant, variant.init(jax.random.key(0), DataStats(mean_D, mean_D)))
    rows_BD = np.random.default_rng(0).standard_normal((30, 8), np.float32)
    found = work._all_codes(sae, rows_BD)
    codes_BF = np.zeros((30, 40), np.float32)
    np.put_along_axis(codes_BF, np.asarray(found.latents_BK), np.asarray(found.values_BK), axis=1)
    expected_BF = np.asarray(sae.encode(rows_BD))
    assert (expected_BF > 0).sum(axis=1).max() > 4
    np.testing.assert_allclose(codes_BF, expected_BF, rtol=1e-6)


def test_batches_of_different_width_are_stacked():
    stacked = work._stacked([np.ones((2, 1)), np.ones((1, 3)), np.ones((0, 2))])
    np.testing.assert_array_equal(stacked, [[1, 0, 0], [1, 0, 0], [1, 1, 1]])


def test_a_shard_without_rows_has_a_summary():
    codes = Codes(np.zeros(0, np.int64), work._stacked([np.zeros((0, 0), np.float32)]), np.zeros((0, 0), np.int32))
    summary = summarise(codes, latents=5, window_length=4, examples=2)
    assert summary.rows == 0
    assert (summary.strongest.keys_FE == -1).all()
