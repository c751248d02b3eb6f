"""What only BatchTopK has: the selection over a batch, the list of active latents, nested levels, a k that falls."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.aot import topology
from saex_pipe.common.errors import InputError
from saex_pipe.common.mesh import make_mesh
from saex_pipe.common.sae.batch_select import TRIED, capped_sum, cut, largest, narrowed
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Moment, Params, Variant
from saex_pipe.common.sae.crossover import CPU_LATENTS_PER_ACTIVE, Sizes
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.pairs import Pairs, decoded, pays
from saex_pipe.common.sae.sharding import shardings
from saex_pipe.common.sae.variants import build

ROWS, WIDTH, LATENTS = 24, 16, 1024  # 64 groups of 16 columns a row: two selections


def positive(seed: int, columns: int) -> np.ndarray:
    return np.maximum(np.random.default_rng(seed).normal(size=(ROWS, columns)), 0).astype(np.float32)


@pytest.mark.parametrize("columns", [37, LATENTS])  # one selection, and two
@pytest.mark.parametrize("case", ["plain", "ties", "few", "one row"])
def test_the_largest_of_a_batch_are_those_of_a_sort(columns: int, case: str) -> None:
    values_BF, most, count = positive(0, columns), 70, 60
    if case == "ties":  # 72 entries share the 60th place and cannot all be taken; three are above them
        values_BF[:, [0, 7, 20]] = 5.0
        values_BF[:3, 1] = 6.0
    if case == "few":
        values_BF = np.where(np.arange(columns) == 3, values_BF, 0)
    if case == "one row":
        values_BF[4] += 100
    places_P, taken_P = jax.jit(largest, static_argnums=1)(jnp.asarray(values_BF), most, count)
    chosen = np.asarray(places_P)[np.asarray(taken_P)]
    assert len(set(chosen)) == len(chosen) == min(count, (values_BF > 0).sum())
    assert (np.asarray(places_P)[~np.asarray(taken_P)] == 0).all()
    np.testing.assert_array_equal(np.sort(values_BF.ravel()[chosen]), np.sort(values_BF, axis=None)[-len(chosen) :])


def test_a_cut_has_as_many_entries_above_it_as_asked_for() -> None:
    values_BF = jnp.asarray(positive(1, 40))
    for count in (1, 2, 100, 400):
        assert int(jnp.sum(values_BF >= jax.jit(cut)(values_BF, count))) == count
    assert int(jnp.sum(values_BF >= jax.jit(cut)(values_BF, 960))) == int(jnp.sum(values_BF > 0))  # not one that is 0
    assert float(cut(jnp.zeros(5), 2)) > 0
    with_ties_N = jnp.asarray(np.repeat(np.float32([0, 1e-30, 0.5, 1, 1 + 2**-23, 3e38]), 4))
    for count in range(1, 21):  # four that are equal come together, of positive ones alone
        assert int(jnp.sum(with_ties_N >= cut(with_ties_N, count))) == min(-(-count // 4) * 4, 20)
    many = jax.ShapeDtypeStruct((1 << 16, 1 << 20), jnp.float32)
    assert jax.eval_shape(lambda values: cut(values, 1), many).shape == ()  # on a mesh
    with pytest.raises(InputError, match="140,737,488,355,328 codes is too large"):
        jax.eval_shape(lambda values: cut(values, 1), jax.ShapeDtypeStruct((1 << 17, 1 << 30), jnp.float32))
    with pytest.raises(InputError, match="2,147,483,648 codes is too large"):
        jax.eval_shape(lambda values: largest(values, 1, 1), jax.ShapeDtypeStruct((1 << 16, 1 << 15), jnp.float32))


@pytest.mark.parametrize("tried", [2, 7])  # TPUs count for seven
@pytest.mark.parametrize("columns", [1, 40])
def test_several_thresholds_a_pass_find_the_same_cut(tried: int, columns: int) -> None:
    values_BF = positive(5, columns)
    bits_BF, every_N = jnp.asarray(values_BF.view(np.int32)), np.sort(values_BF[values_BF > 0])
    find = jax.jit(narrowed, static_argnums=2)
    for count in sorted({1, 2, len(every_N) // 2, len(every_N), len(every_N) + 5}):
        found = np.asarray(find(bits_BF, count, tried)).view(np.float32)
        assert (every_N >= found).sum() == min(count, len(every_N)), count


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_tpus_count_for_seven_thresholds_in_one_pass() -> None:
    device = jax.sharding.SingleDeviceSharding(topology("v5e:1x1").devices[0])
    bits_BF = jax.ShapeDtypeStruct((2048, 1 << 16), jnp.int32, sharding=device)

    def bytes_of(find: Callable[[jax.Array], jax.Array]) -> float:  # the pass over the values is counted once
        return jax.jit(find).lower(bits_BF).compile().cost_analysis()["bytes accessed"]

    one = bytes_of(lambda bits_BF: narrowed(bits_BF, jnp.int32(1000)))
    assert one >= 2 * 2**29  # for the largest, and for a count
    assert bytes_of(lambda bits_BF: narrowed(bits_BF, jnp.int32(1000), TRIED)) < 1.01 * one
    values_BF = jax.ShapeDtypeStruct(bits_BF.shape, jnp.float32, sharding=device)
    assert f"tensor<{TRIED}xi32>" in jax.jit(partial(cut, count=1000)).lower(values_BF).as_text()


@pytest.mark.parametrize(
    "counts",
    [
        [0],
        [5, 7],
        [1 << 16, (1 << 16) - 1, 3],
        [(1 << 31) - 2],
        [(1 << 31) - 2, 1],
        [(1 << 31) - 1] * 3,
        [1 << 20] * 4096,
    ],
    ids=["none", "few", "both halves", "most less one", "most", "more", "a million latents"],
)
def test_counts_of_a_batch_stop_at_the_most_that_there_is(counts: list[int]) -> None:
    expected = min(sum(counts), (1 << 31) - 1)
    assert int(jax.jit(capped_sum)(jnp.array(counts, jnp.int32))) == expected
    full = jnp.full(1 << 16, (1 << 16) - 1, jnp.int32)  # lower halves go beyond an int32
    assert int(capped_sum(full)) == (1 << 31) - 1
    assert int(capped_sum(full.at[1 << 15 :].set(0))) == ((1 << 16) - 1) << 15


def start(variant: Variant, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    params = variant.init(jax.random.key(seed), DataStats(jnp.full(WIDTH, 0.5), jnp.full(WIDTH, 0.5)))
    return {key: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for key, leaf in params.items()}


def test_loss_and_gradients_by_pairs_equal_the_dense_ones(toy_rows: Callable[..., jax.Array]) -> None:
    """Of a stack of two SAEs with three levels, free decoder rows and dead latents: all there is at once, as each
    compiles long."""
    variant = build(
        "matryoshka_batchtopk", LATENTS, k=4, levels=(9, 300), decoder_rows="free", rank_by_decoder_norm=True
    )
    x_BD, latents_F = toy_rows(0, ROWS), jnp.arange(LATENTS)
    at = Moment.plain(LATENTS)._replace(dead_F=(latents_F > 5) & (latents_F < 12))
    few = start(variant, 1)  # fifteen latents can be active: fewer codes are positive than asked for
    few["b_enc_F"] = jnp.where(latents_F < 15, few["b_enc_F"] - 0.5, -100.0)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), start(variant, 0), few)

    def loss(codes: Any) -> Callable:
        return jax.value_and_grad(
            lambda params, x_BD: variant.loss(params, x_BD, x_BD, at, Compute(codes=codes)), has_aux=True
        )

    by_pairs = jax.jit(jax.vmap(loss("sparse"), in_axes=(0, None)))(stack, x_BD)
    dense = jax.jit(jax.vmap(loss("dense"), in_axes=(0, None)))(stack, x_BD)
    (_, terms), gradients = by_pairs
    enough, fewer = np.asarray(terms.active_F).sum(axis=1)
    assert 0 < fewer < enough == 4 * ROWS
    assert (np.asarray(terms.auxiliary) > 1e-4).all()
    np.testing.assert_array_equal(terms.active_F, dense[0][1].active_F)
    np.testing.assert_allclose(terms.total, dense[0][0], rtol=1e-5)
    for key, leaf in dense[1].items():
        limit = 1e-6 * float(jnp.abs(leaf).max())
        np.testing.assert_allclose(gradients[key], leaf, rtol=1e-4, atol=limit, err_msg=key)
    assert float(jnp.abs(gradients["b_dec_D"]).max()) > 0


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_on_a_mesh_few_active_latents_give_the_dense_loss_and_gradients(
    name: str, toy_rows: Callable[..., jax.Array]
) -> None:
    levels = {"levels": (9, 300)} if name.startswith("matryoshka") else {}
    variant, mesh = build(name, LATENTS, k=2, **levels), make_mesh(4)
    x_BD, params = toy_rows(0, ROWS), start(variant)
    at = Moment.plain(LATENTS)._replace(dead_F=jnp.arange(LATENTS) % 100 == 7)

    def loss(compute: Compute) -> Any:
        return jax.jit(jax.value_and_grad(lambda params: variant.loss(params, x_BD, x_BD, at, compute), has_aux=True))

    placed = jax.device_put(params, shardings(params, LATENTS, mesh))
    sparse, dense = loss(Compute(mesh=mesh)), loss(Compute(codes="dense"))
    on_mesh = loss(Compute(mesh=mesh, codes="dense"))
    assert sparse.lower(placed).as_text().count("stablehlo.case") > on_mesh.lower(placed).as_text().count(
        "stablehlo.case"
    )
    (found, terms), gradients = sparse(placed)
    (expected, expected_terms), expected_gradients = dense(params)
    assert float(terms.active_F.sum()) == 2 * ROWS
    np.testing.assert_array_equal(terms.active_F, expected_terms.active_F)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for key, leaf in expected_gradients.items():
        limit = 1e-6 * float(jnp.abs(leaf).max())
        np.testing.assert_allclose(gradients[key], leaf, rtol=1e-4, atol=limit, err_msg=key)


def test_products_of_pairs_and_their_gradients_equal_dense_ones() -> None:
    rng = np.random.default_rng(2)
    places = rng.permutation(ROWS * 40)[:100].astype(np.int32)
    values_P = rng.normal(size=100).astype(np.float32) * (np.arange(100) < 90)  # ten are padding
    w_FD, weight_BD = (rng.normal(size=(n, 5)).astype(np.float32) for n in (40, ROWS))
    codes_BF = np.zeros((ROWS, 40))
    codes_BF[places // 40, places % 40] = values_P
    more_FD = rng.normal(size=(40, 5)).astype(np.float32)

    def total(values_P: jax.Array, w_FD: jax.Array) -> jax.Array:
        pairs = Pairs(values_P, jnp.asarray(places // 40), jnp.asarray(places % 40))
        decoded_BD, slot_FD = decoded(pairs, w_FD, ROWS)
        return jnp.sum(weight_BD * decoded_BD) + jnp.sum(more_FD * slot_FD)

    value, (dvalues_P, dw_FD) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(
        jnp.asarray(values_P), jnp.asarray(w_FD)
    )
    assert float(value) == pytest.approx((weight_BD * (codes_BF @ w_FD)).sum(), rel=1e-5)
    np.testing.assert_allclose(dw_FD, more_FD + codes_BF.T @ weight_BD, rtol=1e-5, atol=1e-5)
    expected_P = (weight_BD.astype(np.float64) @ w_FD.T)[places // 40, places % 40]
    np.testing.assert_allclose(dvalues_P, expected_P, rtol=1e-5, atol=1e-5)


def test_ranks_by_decoder_norm_select_what_adds_most(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0, ROWS)
    variant = build("batchtopk", 48, k=3, rank_by_decoder_norm=True, decoder_rows="free")
    params = start(variant)
    params["w_dec_FD"] *= jnp.where(jnp.arange(48) < 10, 100.0, 1.0)[:, None]
    terms = jax.jit(variant.loss)(params, x_BD, x_BD, Moment.plain(48))[1]
    z_BF = np.asarray(variant.pre_activations(params, x_BD, Compute()), np.float64)
    scores_BF = np.maximum(z_BF, 0) * np.linalg.norm(np.asarray(params["w_dec_FD"], np.float64), axis=1)
    expected_BF = scores_BF >= np.sort(scores_BF, axis=None)[-3 * ROWS]
    np.testing.assert_array_equal(terms.active_F, expected_BF.sum(axis=0))
    assert expected_BF[:, :10].sum() > 0.8 * expected_BF.sum()


@pytest.mark.parametrize(("name", "codes"), [("topk", "auto"), ("batchtopk", "sparse"), ("batchtopk", "dense")])
def test_k_changes_linearly_to_its_last_value(name: str, codes: Any, toy_rows: Callable[..., jax.Array]) -> None:
    x_BD, compute, at = toy_rows(0, ROWS), Compute(codes=codes), Moment.plain(48)
    variant = build(name, 48, k=2, k_start=10, k_fraction=0.5)
    params = start(variant)
    params["b_enc_F"] += 10.0  # all positive
    z_BF = np.asarray(variant.pre_activations(params, x_BD, compute))
    loss = jax.jit(lambda done: variant.loss(params, x_BD, x_BD, at._replace(fraction_done=done), compute)[1])
    for done, k in ((0.0, 10), (0.25, 6), (0.375, 4), (0.5, 2), (0.9, 2)):
        terms = loss(done)
        assert float(terms.l0) == k
        by_row = np.sort(z_BF, axis=1)[:, -k, None] if name == "topk" else np.sort(z_BF, axis=None)[-k * ROWS]
        np.testing.assert_array_equal(terms.active_F, (z_BF >= by_row).sum(axis=0))


def test_pairs_are_taken_where_few_latents_are_active_on_one_device() -> None:
    few = LATENTS // CPU_LATENTS_PER_ACTIVE

    def chosen(k: int, **compute: Any) -> bool:
        return pays(Compute(**compute), Sizes(ROWS, WIDTH, LATENTS, k))

    assert [chosen(few), chosen(few + 1)] == [True, False]
    assert [chosen(900, codes="sparse"), chosen(1, codes="dense")] == [True, False]
    assert not chosen(1, codes="sparse", mesh=make_mesh(4))
