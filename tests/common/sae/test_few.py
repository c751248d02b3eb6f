"""Products with few active codes against the dense ones, whichever way they take."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.mesh import make_mesh
from saex_pipe.common.sae import counted, few
from saex_pipe.common.sae.batch_sums import over_batch, rows_above_zero, scaled, shifted, summed
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.matmul import over_rows, written_out

ROWS, WIDTH, LATENTS = 16, 24, 1024
LIMITS = [ROWS * (LATENTS // share) for share in counted.SHARES]  # 32, 64, 128 and 256 entries


def sparse_codes(active: int, seed: int = 0) -> np.ndarray:
    """Of both signs, several in one group of columns, none in some rows."""
    generator = np.random.default_rng(seed)
    codes_BF = np.zeros((ROWS, LATENTS), np.float32)
    codes_BF[3, ::64][: min(16, active)] = 1.5
    while (missing := active - np.count_nonzero(codes_BF)) > 0:
        rows, latents = generator.integers(0, ROWS - 2, missing), generator.integers(0, LATENTS, missing)
        codes_BF[rows, latents] = generator.standard_normal(missing) + 3 * generator.choice([-1, 1], missing)
    return codes_BF


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def close(found: jax.Array, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("active", [0, 1, LIMITS[0], LIMITS[0] + 1, LIMITS[-1], LIMITS[-1] + 1, 3000])
@pytest.mark.parametrize("held", [False, True])
def test_decoding_and_its_gradients(active: int, held: bool) -> None:
    codes_BF = sparse_codes(active)
    w_FD, out_BD = arrays(1, (LATENTS, WIDTH), (ROWS, WIDTH))

    @jax.jit
    def both(codes_BF: jax.Array, w_FD: jax.Array, out_BD: jax.Array) -> tuple:
        recon_BD, back = jax.vjp(lambda codes, w: few.decoded(codes, w, PLAIN, held=held), codes_BF, w_FD)
        return recon_BD, *back(out_BD)

    recon_BD, dcodes_BF, dw_FD = both(codes_BF, w_FD, out_BD)
    close(recon_BD, codes_BF @ w_FD)
    dense = out_BD @ w_FD.T
    close(dcodes_BF, dense if active > LIMITS[-1] else np.where(codes_BF != 0, dense, 0))
    close(dw_FD, np.zeros_like(w_FD) if held else codes_BF.T @ out_BD)


@pytest.mark.parametrize(("row", "active", "dense"), [(0, 32, False), (0, 33, True), (1, 33, False), (1, 500, True)])
def test_where_a_sample_of_the_rows_has_many_they_are_not_counted(row: int, active: int, dense: bool) -> None:
    """Here the sample is the first row, and a 32th of the latents is many."""
    codes_BF = np.zeros((ROWS, LATENTS), np.float32)
    codes_BF[row, :active] = 2.0
    w_FD, out_BD = arrays(1, (LATENTS, WIDTH), (ROWS, WIDTH))

    @jax.jit
    def both(codes_BF: jax.Array, w_FD: jax.Array, out_BD: jax.Array) -> tuple:
        recon_BD, back = jax.vjp(lambda codes: few.decoded(codes, w_FD, PLAIN), codes_BF)
        return recon_BD, *back(out_BD)

    recon_BD, dcodes_BF = both(codes_BF, w_FD, out_BD)
    close(recon_BD, codes_BF @ w_FD)
    expected_BF = out_BD @ w_FD.T
    close(dcodes_BF, expected_BF if dense else np.where(codes_BF != 0, expected_BF, 0))


def test_codes_of_0_get_the_gradient_that_is_wanted() -> None:
    wanted_BF = np.zeros((ROWS, LATENTS), bool)
    wanted_BF.ravel()[:: wanted_BF.size // (LIMITS[-1] // 2)] = True
    w_FD, out_BD = arrays(8, (LATENTS, WIDTH), (ROWS, WIDTH))

    @jax.jit
    def both(codes_BF: jax.Array, w_FD: jax.Array, out_BD: jax.Array) -> tuple:
        decode = partial(few.decoded_groups, starts=(), compute=PLAIN, wanted_BF=jnp.asarray(wanted_BF))
        (recon_BD,), back = jax.vjp(decode, codes_BF, w_FD)
        return recon_BD, *back(out_BD[None])

    for active in (0, LIMITS[0] // 2, LIMITS[-1] // 2, 3000):
        codes_BF = sparse_codes(active)
        recon_BD, dcodes_BF, dw_FD = both(codes_BF, w_FD, out_BD)
        close(recon_BD, codes_BF @ w_FD)
        dense = out_BD @ w_FD.T
        close(dcodes_BF, dense if active == 3000 else np.where((codes_BF != 0) | wanted_BF, dense, 0))
        close(dw_FD, codes_BF.T @ out_BD)


@pytest.mark.parametrize("model_axis", [8, 4, 1])
def test_each_device_of_a_mesh_goes_by_what_is_active_of_its_own(model_axis: int) -> None:
    mesh = make_mesh(model_axis)
    compute, data = Compute(mesh=mesh), mesh.shape["data"]
    x_BD, b_D, w_enc_FD, w_FD, out_BD = arrays(
        9, (ROWS, WIDTH), (WIDTH,), (LATENTS, WIDTH), (LATENTS, WIDTH), (ROWS, WIDTH)
    )

    @jax.jit
    def both(codes_BF: jax.Array, x_BD: jax.Array, b_D: jax.Array, w_enc_FD: jax.Array, w_FD: jax.Array) -> tuple:
        recon_BD, back = jax.vjp(lambda codes, w: few.decoded(codes, w, compute), codes_BF, w_FD)
        u_BF, back_to_x = jax.vjp(lambda x, b, w: few.encoded(x, b, w, compute), x_BD, b_D, w_enc_FD)
        return recon_BD, *back(out_BD), u_BF, *back_to_x(codes_BF)

    for active in (0, LIMITS[0], LIMITS[-1], 3000):
        codes_BF = sparse_codes(active)
        codes_BF[: ROWS // 2, : LATENTS // 8] = 1.0  # where no device has few
        recon_BD, dcodes_BF, dw_FD, u_BF, dx_BD, db_D, dw_enc_FD = both(codes_BF, x_BD, b_D, w_enc_FD, w_FD)
        close(recon_BD, codes_BF @ w_FD)
        close(dw_FD, codes_BF.T @ out_BD)
        parts = codes_BF.reshape(data, ROWS // data, model_axis, LATENTS // model_axis)
        most = ROWS // data * (LATENTS // model_axis // counted.SHARES[-1])
        is_dense = np.broadcast_to(np.count_nonzero(parts, axis=(1, 3), keepdims=True) > most, parts.shape)
        assert is_dense.any()
        assert active == 3000 or not is_dense.all()
        close(dcodes_BF, np.where(is_dense.reshape(codes_BF.shape) | (codes_BF != 0), out_BD @ w_FD.T, 0))
        close(u_BF, (x_BD - b_D) @ w_enc_FD.T)
        close(dx_BD, codes_BF @ w_enc_FD)
        close(db_D, -(codes_BF @ w_enc_FD).sum(axis=0))
        close(dw_enc_FD, codes_BF.T @ (x_BD - b_D))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(("model_axis", "stack"), [(1, 0), (4, 0), (8, 0), (4, 2)])
def test_groups_of_latents_that_begin_anywhere_among_the_shards(
    model_axis: int, stack: int, wanted: bool, held: bool
) -> None:
    """Whole groups and parts of them on a shard, wanted codes and held weights, where some devices have few and others
    many."""
    mesh = make_mesh(model_axis)
    data, starts = mesh.shape["data"], (100, 130, 300)
    compute = Compute(mesh=mesh)
    w_FD, out_GBD = arrays(10, (LATENTS, WIDTH), (len(starts) + 1, ROWS, WIDTH))
    wanted_BF = np.zeros((ROWS, LATENTS), bool)
    wanted_BF.ravel()[::211] = wanted
    codes_BF = sparse_codes(LIMITS[0])
    codes_BF[: ROWS // 2, 100 : 100 + LATENTS // 4] = 1.0
    given_BF = jnp.asarray(wanted_BF) if wanted else None

    def both(codes_BF: jax.Array, w_FD: jax.Array) -> tuple:
        def decode(codes_BF: jax.Array, w_FD: jax.Array) -> jax.Array:
            return few.decoded_groups(codes_BF, w_FD, starts, compute, wanted_BF=given_BF, held=held)

        groups_GBD, back = jax.vjp(decode, codes_BF, w_FD)
        return groups_GBD, *back(jnp.asarray(out_GBD))

    if stack:  # which takes the way of its fullest
        again = jax.jit(jax.vmap(both))
        found = again(np.stack([codes_BF, np.zeros_like(codes_BF)]), np.stack([w_FD] * stack))
        groups_GBD, dcodes_BF, dw_FD = (each[0] for each in found)
    else:
        groups_GBD, dcodes_BF, dw_FD = jax.jit(both)(codes_BF, w_FD)
    group_F = np.searchsorted(starts, np.arange(LATENTS), side="right")
    own_GBF = codes_BF * (group_F == np.arange(len(starts) + 1)[:, None])[:, None]
    close(groups_GBD, own_GBF @ w_FD)
    close(dw_FD, np.zeros_like(w_FD) if held else np.einsum("gbf,gbd->fd", own_GBF, out_GBD))
    reached_BF = (codes_BF != 0) | wanted_BF
    parts = reached_BF.reshape(data, ROWS // data, model_axis, LATENTS // model_axis)
    most = ROWS // data * (LATENTS // model_axis // counted.SHARES[-1])
    is_dense = np.broadcast_to(np.count_nonzero(parts, axis=(1, 3), keepdims=True) > most, parts.shape)
    assert is_dense.any()
    assert not is_dense.all()
    dense = np.einsum("fd,fbd->bf", w_FD, out_GBD[group_F])
    close(dcodes_BF, np.where(is_dense.reshape(codes_BF.shape) | reached_BF, dense, 0))


@pytest.mark.parametrize("active", [0, LIMITS[0], LIMITS[-1], 3000])
@pytest.mark.parametrize("codes", ["auto", "dense"])
def test_the_gradients_of_encoding(active: int, codes: str) -> None:
    out_BF = sparse_codes(active)
    x_BD, b_D, w_enc_FD = arrays(2, (ROWS, WIDTH), (WIDTH,), (LATENTS, WIDTH))

    @jax.jit
    def both(*given: jax.Array) -> tuple:
        u_BF, back = jax.vjp(lambda x, b, w: few.encoded(x, b, w, Compute(codes=codes)), *given)
        return u_BF, *back(jnp.asarray(out_BF))

    u_BF, dx_BD, db_D, dw_enc_FD = both(x_BD, b_D, w_enc_FD)
    close(u_BF, (x_BD - b_D) @ w_enc_FD.T)
    close(dx_BD, out_BF @ w_enc_FD)
    close(db_D, -(out_BF @ w_enc_FD).sum(axis=0))
    close(dw_enc_FD, out_BF.T @ (x_BD - b_D))


def test_a_stack_takes_the_way_of_its_fullest() -> None:
    codes_SBF = np.stack([sparse_codes(active, seed) for seed, active in enumerate((5, LIMITS[-1] + 1, LIMITS[0]))])
    w_SFD, out_SBD = arrays(3, (3, LATENTS, WIDTH), (3, ROWS, WIDTH))

    @jax.jit
    @jax.vmap
    def both(codes_BF: jax.Array, w_FD: jax.Array, out_BD: jax.Array) -> tuple:
        recon_BD, back = jax.vjp(lambda codes, w: few.decoded(codes, w, PLAIN), codes_BF, w_FD)
        return recon_BD, *back(out_BD)

    recon_SBD, dcodes_SBF, dw_SFD = both(codes_SBF, w_SFD, out_SBD)
    close(recon_SBD, codes_SBF @ w_SFD)
    close(dcodes_SBF, out_SBD @ w_SFD.transpose(0, 2, 1))  # densely, as one of them is full
    close(dw_SFD, codes_SBF.transpose(0, 2, 1) @ out_SBD)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows", [7, 16, 48, 512])
def test_sums_over_a_batch(rows: int, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    (values_BF,) = arrays(4, (rows, 33))
    np.testing.assert_array_equal(rows_above_zero(jnp.asarray(values_BF)), (values_BF > 0).sum(axis=0))
    close(over_batch(jnp.square, jnp.asarray(values_BF)), np.square(values_BF).sum(axis=0))


@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_that_are_sums_over_a_batch(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    values_BF, out_BF = arrays(6, (48, 33), (48, 33))
    by_F, out_F = arrays(7, (33,), (33,))
    moved_BF, back = jax.vjp(shifted, jnp.asarray(values_BF), jnp.asarray(by_F))
    close(moved_BF, values_BF + by_F)
    for found, expected in zip(back(jnp.asarray(out_BF)), (out_BF, out_BF.sum(axis=0)), strict=True):
        close(found, expected)
    longer_BF, back = jax.vjp(scaled, jnp.asarray(values_BF), jnp.asarray(by_F))
    close(longer_BF, values_BF * by_F)
    expected_sides = out_BF * by_F, (out_BF * values_BF).sum(axis=0)
    for found, expected in zip(back(jnp.asarray(out_BF)), expected_sides, strict=True):
        close(found, expected)
    sum_F, back = jax.vjp(summed, jnp.asarray(values_BF))
    close(sum_F, values_BF.sum(axis=0))
    close(back(jnp.asarray(out_F))[0], np.tile(out_F, (48, 1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("width", "columns"), [(24, 40), (40, 24)])  # the narrower side is the one transposed
def test_products_over_rows_on_one_device(
    width: int, columns: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    a_BM, b_BP = (np.asarray(jnp.asarray(each, dtype), np.float32) for each in arrays(5, (64, width), (64, columns)))
    product = jax.jit(over_rows, static_argnums=2)
    assert "LayoutConstraint" in product.lower(a_BM, b_BP, dtype).as_text()
    close(product(a_BM, b_BP, dtype), a_BM.T @ b_BP)
    stacked = jax.jit(jax.vmap(lambda a, b: over_rows(a, b, dtype)))(np.stack([a_BM] * 2), np.stack([b_BP, -b_BP]))
    close(stacked[1], -a_BM.T @ b_BP)


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_written_out_stays_as_it_is(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    (a_SMN,) = arrays(9, (2, 24, 40))
    lowered = jax.jit(jax.vmap(written_out)).lower(a_SMN)
    assert ("LayoutConstraint" in lowered.as_text()) == (devices == 1)
    np.testing.assert_array_equal(lowered.compile()(a_SMN), a_SMN)
