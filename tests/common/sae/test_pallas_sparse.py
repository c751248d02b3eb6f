"""The TPU kernels: interpreted on the CPU against float64 NumPy, and compiled for TPUs that are not here.

Interpreted as on a TPU, copies happen when they are waited for, at the latest moment, and memory starts as NaN: a
missing wait, a slot overwritten too early or a row left out changes the result.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from saex_pipe.common.aot import compile_ahead, topology
from saex_pipe.common.mesh import make_mesh
from saex_pipe.common.sae import compute as compute_module
from saex_pipe.common.sae import pallas_sparse, sharded
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.sparse import ActiveCodes, decode_active

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
LATENTS, WIDTH = 48, 128
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture
def as_on_a_tpu() -> Iterator[None]:
    late = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(late):
        yield


def inputs(rows: int, k: int) -> tuple[jax.Array, ...]:
    """Codes, latents (some of them twice in a row), batch rows, table."""
    rng = np.random.default_rng(rows)
    latents_BK = rng.integers(0, LATENTS, (rows, k), np.int32)
    latents_BK[:, -1] = latents_BK[:, 0]
    floats = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, k), (rows, WIDTH), (LATENTS, WIDTH)))
    values_BK, rows_BD, rows_FD = floats
    return jnp.asarray(values_BK), jnp.asarray(latents_BK), jnp.asarray(rows_BD), jnp.asarray(rows_FD)


def check(values_BK: jax.Array, latents_BK: jax.Array, rows_BD: jax.Array, rows_FD: jax.Array) -> None:
    exact_BKD = np.asarray(rows_FD.astype(jnp.float32), np.float64)[np.asarray(latents_BK)]
    sum_BD = jax.jit(pallas_sparse.gather_sum)(values_BK, latents_BK, rows_FD)
    np.testing.assert_allclose(sum_BD, np.einsum("bk,bkd->bd", np.asarray(values_BK, np.float64), exact_BKD), **CLOSE)
    dot_BK = jax.jit(pallas_sparse.gather_dot)(rows_BD, rows_FD, latents_BK)
    np.testing.assert_allclose(dot_BK, np.einsum("bd,bkd->bk", np.asarray(rows_BD, np.float64), exact_BKD), **CLOSE)


@pytest.mark.usefixtures("as_on_a_tpu")
def test_products_equal_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_sparse, "BLOCK_BYTES", 16 * WIDTH * 4)  # two blocks, of which one is mostly padding
    monkeypatch.setattr(pallas_sparse, "MOST_WAVES_AHEAD", 4)  # six waves a block, so that slots are used again
    check(*inputs(17, 3))


def test_rows_of_bfloat16_are_read_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The simulator of a TPU does not know bit casts of references, the plain interpreter does.
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    values_BK, latents_BK, rows_BD, rows_FD = inputs(9, 3)
    assert set(np.asarray(latents_BK).ravel() % 2) == {0, 1}
    check(values_BK, latents_BK, rows_BD, rows_FD.astype(jnp.bfloat16))


@pytest.mark.usefixtures("as_on_a_tpu")
def test_a_stack_of_saes_goes_through_vmap() -> None:
    values_BK, latents_BK, _, rows_FD = inputs(4, 2)
    stacked = values_BK[None] * jnp.array([1.0, -2.0])[:, None, None], jnp.stack([latents_BK, latents_BK[::-1]])
    sums_SBD = jax.vmap(pallas_sparse.gather_sum, in_axes=(0, 0, None))(*stacked, rows_FD)
    for values, latents, sum_BD in zip(*map(np.asarray, (*stacked, sums_SBD)), strict=True):
        np.testing.assert_allclose(sum_BD, np.einsum("bk,bkd->bd", values, np.asarray(rows_FD)[latents]), **CLOSE)


@pytest.mark.usefixtures("as_on_a_tpu")
def test_decoding_and_its_gradients_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "tpu_kind", lambda device: "v5p")
    values_BK, latents_BK, weight_BD, w_dec_FD = inputs(4, 3)
    calls = []
    for name in ("gather_sum", "gather_dot"):
        kernel = getattr(pallas_sparse, name)
        monkeypatch.setattr(
            pallas_sparse, name, lambda *given, name=name, kernel=kernel: (calls.append(name), kernel(*given))[1]
        )

    def loss(values_BK: jax.Array, w_dec_FD: jax.Array) -> jax.Array:
        decoded_BD = decode_active(ActiveCodes(values_BK, latents_BK), w_dec_FD, Compute(codes="sparse"))[0]
        return jnp.sum(weight_BD * jnp.square(decoded_BD))

    dvalues_BK, dw_dec_FD = jax.jit(jax.grad(loss, argnums=(0, 1)))(values_BK, w_dec_FD)
    assert calls == ["gather_sum", "gather_dot"]
    values, latents, table = np.asarray(values_BK, np.float64), np.asarray(latents_BK), np.asarray(w_dec_FD, np.float64)
    out_BD = 2 * np.asarray(weight_BD) * np.einsum("bk,bkd->bd", values, table[latents])
    codes_BF = np.zeros((4, LATENTS))
    np.add.at(codes_BF, (np.arange(4)[:, None], latents), values)
    np.testing.assert_allclose(dvalues_BK, np.einsum("bd,bkd->bk", out_BD, table[latents]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dw_dec_FD, codes_BF.T @ out_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("k", "latents", "width", "dtype", "runs"),
    [
        (32, 48, 128, jnp.float32, True),
        (32, 48, 130, jnp.float32, False),
        (32, 48, 2**17, jnp.float32, False),
        (5000, 9000, 128, jnp.float32, False),
        (32, 48, 128, jnp.bfloat16, True),
        (32, 47, 128, jnp.bfloat16, False),
        (32, 47, 128, jnp.float32, True),
        (32, 48, 128, jnp.float16, False),
    ],
)
def test_what_the_kernels_take(k: int, latents: int, width: int, dtype: jnp.dtype, runs: bool) -> None:
    taken = pallas_sparse.can_run(
        jax.ShapeDtypeStruct((8, k), jnp.int32), jax.ShapeDtypeStruct((latents, width), dtype)
    )
    assert taken == runs


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:2x2x1"])
@pytest.mark.parametrize(("rows", "width", "k", "latents"), [(4096, 2304, 64, 65536), (100, 18432, 33, 1024)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_compile_and_copy_no_table(
    name: str, rows: int, width: int, k: int, latents: int, dtype: jnp.dtype
) -> None:
    device = jax.sharding.SingleDeviceSharding(topology(name).devices[0])

    def array(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    latents_BK, table = array(jnp.int32, rows, k), array(dtype, latents, width)
    summed = jax.jit(pallas_sparse.gather_sum).lower(array(jnp.float32, rows, k), latents_BK, table)
    dotted = jax.jit(pallas_sparse.gather_dot).lower(array(jnp.float32, rows, width), table, latents_BK)
    # At most copies of what the batch has, padded to whole blocks and lanes: nothing as large as the table or its rows.
    padded = 4 * -(-rows // 64) * 64 * (width + 3 * 128)
    assert padded < latents * width * dtype.dtype.itemsize
    for lowered in (summed, dotted):
        assert "tpu_custom_call" in lowered.as_text()
        assert compile_ahead(lowered, remedy="").temporary_bytes <= padded


@needs_libtpu
@pytest.mark.parametrize(("name", "kernels"), [("v5e:2x4", 1), ("v5p:2x2x1", 2)])  # decoder; gradient to the codes
def test_decoding_on_a_mesh_takes_the_kernels(name: str, kernels: int) -> None:
    mesh = make_mesh(2, devices=topology(name).devices)

    def array(dtype: jnp.dtype, shape: tuple[int, int], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    active = ActiveCodes(
        array(jnp.float32, (1024, 64), PartitionSpec("data", "model")),
        array(jnp.int32, (1024, 64), PartitionSpec("data", "model")),
    )
    w_dec_FD = array(jnp.float32, (65536, 1024), PartitionSpec("model"))

    def loss(values_BK: jax.Array, latents_BK: jax.Array, w_dec_FD: jax.Array) -> jax.Array:
        decoded_BD, _ = sharded.decode_active(ActiveCodes(values_BK, latents_BK), w_dec_FD, Compute(mesh=mesh))
        return jnp.sum(jnp.square(decoded_BD))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(*active, w_dec_FD)
    assert lowered.as_text().count("tpu_custom_call") == kernels
    assert compile_ahead(lowered, remedy="").collectives.keys() == {"all-reduce"}
