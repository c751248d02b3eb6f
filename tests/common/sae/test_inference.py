"""A trained SAE as a value: any leading axes, sparse codes, no recompilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.variants import build

WIDTH, LATENTS, K = 16, 64, 5


def sae(name: str) -> Sae:
    settings = {"sparsity_coefficient": 1.0} if name in ("relu", "jumprelu") else {"k": K}
    variant = build(name, LATENTS, **settings)
    mean_D, x_ND = jnp.zeros(WIDTH), acts_NLD()[0]
    params = variant.init(jax.random.key(0), DataStats(mean_D, mean_D, x_ND, x_ND))
    if "threshold_F" in params:  # rows differ in how many codes are above it
        params["threshold_F"] = jnp.full(LATENTS, 1.0)
    return Sae(variant, params)


def acts_NLD() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (3, 7, WIDTH))


@pytest.mark.parametrize("name", ["topk", "relu"])
def test_leading_axes_pass_through(name: str) -> None:
    it, x_NLD = sae(name), acts_NLD()
    x_BD = x_NLD.reshape(-1, WIDTH)
    codes_NLF = it.encode(x_NLD)
    assert codes_NLF.shape == (3, 7, LATENTS)
    np.testing.assert_array_equal(codes_NLF.reshape(-1, LATENTS), it.encode(x_BD))
    np.testing.assert_allclose(it.decode(codes_NLF), it.reconstruct(x_NLD), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(it.reconstruct(x_NLD).reshape(-1, WIDTH), it.reconstruct(x_BD))
    half = it.encode(x_NLD.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "limit"), [("topk", None), ("topk", 3), ("relu", None), ("relu", 3), ("batchtopk", None), ("jumprelu", 3)]
)
def test_sparse_codes_are_the_largest_of_the_dense_ones(name: str, limit: int | None) -> None:
    it = sae(name)
    x_BD = acts_NLD().reshape(-1, WIDTH)
    codes_BF = np.asarray(it.encode(x_BD))
    sparse = it.codes_sparse(x_BD, limit)
    kept = limit or (K if name == "topk" else LATENTS)
    assert sparse.values_BK.shape == sparse.latents_BK.shape == (len(x_BD), kept)
    np.testing.assert_array_equal(sparse.values_BK, np.sort(codes_BF, axis=1)[:, ::-1][:, :kept])
    np.testing.assert_array_equal(np.take_along_axis(codes_BF, np.asarray(sparse.latents_BK), axis=1), sparse.values_BK)
    np.testing.assert_array_equal(sparse.active_B, (codes_BF > 0).sum(axis=1))


def test_an_sae_is_a_pytree_and_compiles_once_for_all_weights() -> None:
    it = sae("topk")
    again = jax.tree.map(lambda leaf: 2 * leaf, it)
    assert isinstance(again, Sae)
    traces = 0

    @jax.jit
    def spliced(it: Sae, x_NLD: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return it.reconstruct(x_NLD)

    first, second = spliced(it, acts_NLD()), spliced(again, acts_NLD())
    assert traces == 1
    assert not np.allclose(first, second)
