"""What only Matryoshka SAEs have: nested levels at the cost of one decode, on one device and over a mesh."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from saex_pipe.common.mesh import DATA, make_mesh
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import Moment
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.matryoshka import widths_at
from saex_pipe.common.sae.nested import decode_nested, decode_nested_pairs
from saex_pipe.common.sae.pairs import Pairs
from saex_pipe.common.sae.sharding import shardings
from saex_pipe.common.sae.variants import build

ROWS, WIDTH, LATENTS, WIDTHS = 24, 16, 48, (5, 20, 48)


def test_widths_of_the_levels() -> None:
    assert widths_at(9216, ()) == (288, 864, 2016, 4320, 9216)
    assert widths_at(4, ()) == (1, 2, 4)  # levels that are too narrow fall together
    assert widths_at(64, (32, 8)) == (8, 32, 64)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_levels_and_their_gradients_equal_decoding_each_by_itself() -> None:
    codes_BF, w_dec_FD, weights_GBD = random(ROWS, LATENTS), random(LATENTS, WIDTH), random(3, ROWS, WIDTH)
    codes_BF *= np.abs(codes_BF) > 1
    rows_P, latents_P = (jnp.asarray(at, jnp.int32) for at in np.nonzero(codes_BF))

    def dense(values_P: jax.Array, w_dec_FD: jax.Array) -> list[jax.Array]:
        codes_BF = jnp.zeros((ROWS, LATENTS)).at[rows_P, latents_P].set(values_P)
        return decode_nested(codes_BF, w_dec_FD, WIDTHS, PLAIN)

    def by_pairs(values_P: jax.Array, w_dec_FD: jax.Array) -> list[jax.Array]:
        levels, slot_FD = decode_nested_pairs(Pairs(values_P, rows_P, latents_P), w_dec_FD, WIDTHS, ROWS)
        assert slot_FD.shape == w_dec_FD.shape
        return levels

    each = [codes_BF[:, :width].astype(np.float64) @ w_dec_FD[:width] for width in WIDTHS]
    # Of sum_g weights_g (codes W)_g: a latent has the weights of all levels that hold it.
    summed_GBD = weights_GBD.astype(np.float64)[::-1].cumsum(axis=0)[::-1]
    level_F = np.searchsorted(WIDTHS, np.arange(LATENTS), side="right")
    dw_FD = np.einsum("bf,fbd->fd", codes_BF, summed_GBD[level_F])
    dvalues_P = np.einsum("fbd,fd->bf", summed_GBD[level_F], w_dec_FD)[rows_P, latents_P]
    arguments = jnp.asarray(codes_BF)[rows_P, latents_P], jnp.asarray(w_dec_FD)
    for decode in (dense, by_pairs):
        levels, pull = jax.jit(lambda *given, decode=decode: jax.vjp(decode, *given))(*arguments)
        for found, expected in zip(
            [*levels, *pull(list(jnp.asarray(weights_GBD)))], [*each, dvalues_P, dw_FD], strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_axis", [8, 2])  # the first two levels end on one shard, and within shards
def test_on_a_mesh_every_device_multiplies_its_latents_once(model_axis: int) -> None:
    mesh = make_mesh(model_axis)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))
        for shape, axes in (((256, 512), ("data", "model")), ((512, 64), ("model",)))
    ]
    compute, widths = Compute(codes="dense", mesh=mesh), (10, 30, 112, 240, 512)
    text = jax.jit(lambda codes, w: decode_nested(codes, w, widths, compute)).lower(*shapes).as_text()
    own = 512 // model_axis
    for branch in text.split("stablehlo.case")[1].split("}, {"):  # one for each shard
        inner = [int(size) for size in re.findall(r"dot_general.*tensor<(\d+)x64xf32>\)", branch)]
        assert sum(inner) == own, inner


def test_a_widest_level_that_is_not_all_latents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(9, 30\) is not all 40 latents"):
        decode_nested(jnp.zeros((4, 40)), jnp.zeros((40, 3)), (9, 30), PLAIN)


def test_all_levels_cost_as_much_as_the_last() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 512), (512, 64))]
    whole, nested = (
        jax.jit(lambda codes, w, widths=widths: decode_nested(codes, w, widths, Compute(codes="dense"))).lower(*shapes)
        for widths in ((512,), widths_at(512, ()))
    )
    products, sums = 2 * 256 * 512 * 64, 4 * 256 * 64
    assert whole.cost_analysis()["flops"] == products
    assert nested.cost_analysis()["flops"] == products + sums


@pytest.mark.parametrize("name", ["matryoshka_batchtopk", "matryoshka_jumprelu"])
def test_loss_and_gradients_over_a_mesh_equal_those_of_one_device(
    name: str, toy_rows: Callable[..., jax.Array]
) -> None:
    own = {"k": 3} if "batch" in name else {"sparsity_coefficient": 1.0, "threshold_start": 0.5}
    variant = build(name, LATENTS, levels=(5, 20), **own)
    x_BD, at = toy_rows(0, ROWS), Moment.plain(LATENTS)._replace(dead_F=jnp.arange(LATENTS) < 8)
    params = variant.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0), x_BD, x_BD))
    mesh = make_mesh(4)  # of eight devices: two ways to cut the rows, four to cut the latents

    def loss(compute: Compute) -> Callable:
        return jax.jit(jax.value_and_grad(lambda params, x_BD: variant.loss(params, x_BD, x_BD, at, compute)[0]))

    value, gradients = loss(Compute(codes="dense"))(params, x_BD)
    placed = jax.device_put(params, shardings(params, LATENTS, mesh))
    rows = jax.device_put(x_BD, NamedSharding(mesh, P(DATA)))
    sharded_value, sharded = loss(Compute(mesh=mesh))(placed, rows)
    assert float(sharded_value) == pytest.approx(float(value), rel=1e-5)
    for key, leaf in gradients.items():
        np.testing.assert_allclose(sharded[key], leaf, rtol=1e-4, atol=1e-5 * float(jnp.abs(leaf).max() + 1e-6))
