"""The sparse products against dense ones in float64 NumPy, and the exact selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.cuts import MOST_COUNTED, count_from, row_cuts
from saex_pipe.common.sae.select import GROUP, top_k
from saex_pipe.common.sae.sparse import (
    RUN_LENGTH,
    ActiveCodes,
    decode_active,
    gather_dot,
    gather_sum,
    runs_by_latent,
    scatter_sum,
    topk_codes,
)

ROWS, WIDTH, LATENTS, K = 70, 12, 40, 5  # no multiple of any block size


def random_codes(seed: int, rows: int = ROWS) -> tuple[ActiveCodes, np.ndarray]:
    """Codes by their active latents and as a dense float64 matrix; latent 3 is active in every row."""
    rng = np.random.default_rng(seed)
    latents_BK = np.stack([rng.permutation(np.delete(np.arange(LATENTS), 3))[:K] for _ in range(rows)]).astype(np.int32)
    latents_BK[:, 2] = 3
    values_BK = rng.normal(size=(rows, K)).astype(np.float32)
    codes_BF = np.zeros((rows, LATENTS))
    np.put_along_axis(codes_BF, latents_BK, values_BK, axis=1)
    return ActiveCodes(jnp.asarray(values_BK), jnp.asarray(latents_BK)), codes_BF


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("rows", "width"), [(1, WIDTH), (33, 64), (ROWS, 192), (300, WIDTH)])  # dots by lanes or rows
def test_products_equal_dense_ones(rows: int, width: int) -> None:
    active, codes_BF = random_codes(0, rows)
    w_FD, x_BD = normal(1, LATENTS, width), normal(2, rows, width)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(gather_sum(active, jnp.asarray(w_FD)), codes_BF @ w_FD, **close)
    np.testing.assert_allclose(
        gather_dot(jnp.asarray(x_BD), jnp.asarray(w_FD), active.latents_BK),
        np.take_along_axis(x_BD.astype(np.float64) @ w_FD.T, np.asarray(active.latents_BK), axis=1),
        **close,
    )
    runs = runs_by_latent(active.latents_BK, LATENTS)
    start_FD = normal(3, LATENTS, width)
    sums_FD = scatter_sum(active.values_BK, runs, jnp.asarray(x_BD), jnp.asarray(start_FD))
    np.testing.assert_allclose(sums_FD, start_FD + codes_BF.T @ x_BD, **close)


def test_runs_hold_every_pair_once_and_one_latent_each() -> None:
    active, _ = random_codes(3)
    runs = runs_by_latent(active.latents_BK, LATENTS)
    pairs_VR = np.asarray(runs.pairs_NVR).reshape(-1, RUN_LENGTH)
    latents_V = np.asarray(runs.latents_NV).reshape(-1)
    flat_P = np.asarray(active.latents_BK).reshape(-1)
    held = pairs_VR[pairs_VR < flat_P.size]
    assert sorted(held) == list(range(flat_P.size))
    for pairs_R, latent in zip(pairs_VR, latents_V, strict=True):
        assert set(flat_P[pairs_R[pairs_R < flat_P.size]]) <= {latent}


def test_a_stack_adds_its_runs_up_in_place() -> None:
    """A loop whose end differed within the stack would select between the old sums and the new in every block."""
    one, other = (random_codes(seed)[0] for seed in (0, 1))
    other = other._replace(latents_BK=jnp.full_like(other.latents_BK, 3))  # in few runs
    x_BD = jnp.asarray(normal(2, ROWS, WIDTH))

    def sums(active: ActiveCodes) -> jax.Array:
        return scatter_sum(
            active.values_BK, runs_by_latent(active.latents_BK, LATENTS), x_BD, jnp.zeros((LATENTS, WIDTH))
        )

    assert runs_by_latent(one.latents_BK, LATENTS).used != runs_by_latent(other.latents_BK, LATENTS).used
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    lowered = jax.jit(jax.vmap(sums)).lower(stacked)
    assert not [line for line in lowered.as_text().splitlines() if "select" in line and "tensor<2x40x12xf32>" in line]
    np.testing.assert_allclose(lowered.compile()(stacked), jnp.stack([sums(one), sums(other)]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("latents", [LATENTS, 64 * GROUP])  # one selection, and two
@pytest.mark.parametrize("codes", ["sparse", "dense"])
def test_autoencoder_and_gradients_equal_those_of_masked_codes(latents: int, codes: str) -> None:
    """Also with gradients of the weights that come by way of their slots."""
    compute = Compute(codes=codes)
    x_BD, b_pre_D = normal(4, ROWS, WIDTH), normal(5, WIDTH)
    b_enc_F = normal(6, latents) - 6  # so low that of 40 latents some of the chosen ones are below 0
    w_enc_FD, w_dec_FD, weight_BD = normal(7, latents, WIDTH), normal(8, latents, WIDTH), normal(9, ROWS, WIDTH)

    more_enc_FD, more_dec_FD = normal(10, latents, WIDTH), normal(11, latents, WIDTH)

    def sparse(x_BD, b_pre_D, w_enc_FD, b_enc_F, w_dec_FD):
        active, to_enc_FD = topk_codes(x_BD, b_pre_D, w_enc_FD, b_enc_F, K, compute)
        decoded_BD, to_dec_FD = decode_active(active, w_dec_FD, compute)
        more = jnp.sum(more_enc_FD * to_enc_FD) + jnp.sum(more_dec_FD * to_dec_FD)
        return more + jnp.sum(weight_BD * jnp.square(decoded_BD))

    def dense(x_BD, b_pre_D, w_enc_FD, b_enc_F, w_dec_FD):
        z_BF = (x_BD - b_pre_D[None]) @ w_enc_FD.T + b_enc_F[None]
        kth_B1 = jnp.sort(z_BF, axis=1)[:, -K, None]
        codes_BF = jnp.where(z_BF >= kth_B1, jax.nn.relu(z_BF), 0.0)
        more = jnp.sum(more_enc_FD * w_enc_FD) + jnp.sum(more_dec_FD * w_dec_FD)
        return more - jax.lax.stop_gradient(more) + jnp.sum(weight_BD * jnp.square(codes_BF @ w_dec_FD))

    arguments = tuple(jnp.asarray(a) for a in (x_BD, b_pre_D, w_enc_FD, b_enc_F, w_dec_FD))
    below_zero = topk_codes(*arguments[:4], K, PLAIN)[0].values_BK == 0
    assert below_zero.any() == (latents == LATENTS)
    ours = jax.jit(jax.value_and_grad(sparse, argnums=(0, 1, 2, 3, 4))).lower(*arguments)
    # Encoder, gradient of b_pre, gradient to the codes; or densely, with the decoder and four gradients.
    assert ours.as_text().count("stablehlo.dot_general") == {"sparse": 3, "dense": 7}[codes]
    value, gradients = ours.compile()(*arguments)
    dense_value, dense_gradients = jax.jit(jax.value_and_grad(dense, argnums=(0, 1, 2, 3, 4)))(*arguments)
    assert float(value) == pytest.approx(float(dense_value), rel=1e-5)
    for ours, theirs in zip(gradients, dense_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5 * float(jnp.abs(theirs).max()))


# Few columns; too few groups; chosen by a cut, from groups, and from groups of groups' maxima; too many for a cut.
@pytest.mark.parametrize(
    ("columns", "k"),
    [
        *[(37, 5), (32 * GROUP, 8), (32 * GROUP, 32), (200 * GROUP, 32), (200 * GROUP, 50), (1024, 16)],
        *[(2304 * GROUP, 32), (2307 * GROUP, 32)],
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_top_k_is_exact(columns: int, k: int, jitted: bool) -> None:
    z_BF = normal(10, 50, columns)
    z_BF[0] = np.arange(columns)  # the k largest share no group
    z_BF[1] = np.arange(columns)[::-1]
    z_BF[2, :: max(1, columns // GROUP)] += 10  # the largest share groups
    z_BF[3, k + 1 :] = -np.inf
    z_BF[4] = np.round(z_BF[4])  # many are equal, also at the end
    z_BF[5] = -1.0
    find = jax.jit(top_k, static_argnums=1) if jitted else top_k
    values_BK, columns_BK = find(jnp.asarray(z_BF), k)
    np.testing.assert_array_equal(values_BK, np.sort(z_BF, axis=1)[:, ::-1][:, :k])
    np.testing.assert_array_equal(np.take_along_axis(z_BF, np.asarray(columns_BK), axis=1), values_BK)
    assert all(len(set(row)) == k for row in np.asarray(columns_BK))
    assert columns_BK.dtype == jnp.int32


@pytest.mark.parametrize("sign", [1, -1])
def test_top_k_takes_what_is_not_a_number_so_that_it_is_seen(sign: int) -> None:
    z_BF = normal(15, 6, 200 * GROUP)
    z_BF[2, 77] = np.copysign(np.nan, sign)
    values_BK, _ = top_k(jnp.asarray(z_BF), 32)
    np.testing.assert_array_equal(np.isnan(values_BK).sum(axis=1), [0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("rows", [50, 64])  # in blocks of two and of 64
def test_top_k_of_scores_adds_what_the_scores_add(rows: int) -> None:
    z_BF, bias_F = normal(11, rows, 200 * GROUP), normal(12, 200 * GROUP)
    values_BK, columns_BK = top_k(jnp.asarray(z_BF), 32, lambda z, pick: z + pick(jnp.asarray(bias_F)))
    biased_BF = z_BF + bias_F
    np.testing.assert_array_equal(values_BK, np.sort(biased_BF, axis=1)[:, ::-1][:, :32])
    np.testing.assert_array_equal(np.take_along_axis(biased_BF, np.asarray(columns_BK), axis=1), values_BK)


@pytest.mark.parametrize(("rows", "columns", "k"), [(24, 100, 1), (7, 300, 299), (2048, 1100, 70)])
def test_row_cuts_leave_the_k_largest(rows: int, columns: int, k: int) -> None:
    values_BF = normal(13, rows, columns)
    values_BF[0] = -np.abs(values_BF[0])
    values_BF[1, k // 2 :] = -np.inf  # fewer than k that are finite
    values_BF[2] *= 1e-38  # subnormal too
    values_BF[3] = np.sign(values_BF[3])  # many are equal
    cuts_B1 = np.asarray(row_cuts(jnp.asarray(values_BF), k))
    last_B1 = np.sort(values_BF, axis=1)[:, columns - k, None]
    np.testing.assert_array_equal(values_BF >= cuts_B1, values_BF >= last_B1)


@pytest.mark.parametrize("latents", [50, 1 << 20, 1 << 21])  # with 3,000 pairs: in 31 bits, in 32, in more
def test_runs_keep_equal_latents_in_order(latents: int) -> None:
    latents_BK = jnp.asarray(np.random.default_rng(14).integers(0, latents, (1000, 3)).astype(np.int32) // 7 * 7)
    runs = runs_by_latent(latents_BK, latents)
    pairs_P = np.asarray(runs.pairs_NVR).reshape(-1)
    order_P = pairs_P[pairs_P < latents_BK.size]
    np.testing.assert_array_equal(order_P, np.argsort(np.asarray(latents_BK).reshape(-1), kind="stable"))


@pytest.mark.parametrize("columns", [50, 576, MOST_COUNTED, MOST_COUNTED + 64])  # in one sum; in slices
def test_entries_of_a_row_are_counted(columns: int) -> None:
    values_RN = np.random.default_rng(3).integers(-50, 50, (4, columns)).astype(np.int32)
    least_R1 = np.array([[-50], [50], [7], [7]], np.int32)
    found_R1 = count_from(jnp.asarray(values_RN), jnp.asarray(least_R1))
    np.testing.assert_array_equal(found_R1, (values_RN >= least_R1).sum(axis=1, keepdims=True))
