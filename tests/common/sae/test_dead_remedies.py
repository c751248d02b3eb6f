"""Losses for dead latents: gradients in closed form, in float64, and whether they revive."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.mesh import make_mesh
from saex_pipe.common.sae.auxk import auxk_loss
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import Moment, Params
from saex_pipe.common.sae.ghost import ghost_loss
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.sparse import Slots
from saex_pipe.common.sae.sparsity_threshold import starving_loss
from saex_pipe.common.sae.train_step import StepSettings, init_state, make_step
from saex_pipe.common.sae.variants import build
from saex_pipe.common.sae.wright import Wright

ROWS, WIDTH, LATENTS = 20, 6, 40
RELU = Relu(latents=LATENTS, sparsity_coefficient=1.0, centred=True)
# Compiled for less time, run for longer: these steps are small.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
Activation = Literal["exp", "softplus"]


def parameters() -> tuple[Params, np.ndarray, np.ndarray]:
    """Parameters, rows, residuals."""
    rng = np.random.default_rng(0)
    params = {
        "w_enc_FD": rng.normal(size=(LATENTS, WIDTH)) / 2,
        "b_enc_F": rng.normal(size=LATENTS) - 1,
        "w_dec_FD": rng.normal(size=(LATENTS, WIDTH)),
        "b_dec_D": rng.normal(size=WIDTH),
    }
    return params, *rng.normal(size=(2, ROWS, WIDTH))


def in_float32(params: Params) -> Params:
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}


@partial(jax.jit, compiler_options=QUICK)
def of_exp(params: Params, x_BD: jax.Array, residual_BD: jax.Array, dead_F: jax.Array) -> tuple:
    return _ghost("exp", params, x_BD, residual_BD, dead_F)


@partial(jax.jit, compiler_options=QUICK)
def of_softplus(params: Params, x_BD: jax.Array, residual_BD: jax.Array, dead_F: jax.Array) -> tuple:
    return _ghost("softplus", params, x_BD, residual_BD, dead_F)


def _ghost(activation: Activation, params: Params, x_BD: jax.Array, residual_BD: jax.Array, dead_F: jax.Array) -> tuple:
    def loss(params: Params, residual_BD: jax.Array, size: jax.Array) -> jax.Array:
        return ghost_loss(activation, RELU, params, x_BD, residual_BD, size, dead_F, PLAIN)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, residual_BD, jnp.float32(3.0))


@pytest.mark.parametrize("activation", ["exp", "softplus"])
@pytest.mark.parametrize("dead", [1, 8, LATENTS])
def test_ghost_gradients_equal_the_equations(activation: Activation, dead: int) -> None:
    params, x_BD, residual_BD = parameters()
    dead_F = np.arange(LATENTS) < dead
    args = (jnp.asarray(v, jnp.float32) for v in (x_BD, residual_BD))
    measure = of_exp if activation == "exp" else of_softplus
    value, (gradients, by_residual_BD, by_size) = measure(in_float32(params), *args, jnp.asarray(dead_F))
    assert float(value) == pytest.approx(3.0, rel=1e-5)  # as large as the reconstruction loss
    assert not by_residual_BD.any()
    assert float(by_size) == 0.0

    centred_BD = x_BD - params["b_dec_D"]
    z_BF = centred_BD @ params["w_enc_FD"].T + params["b_enc_F"]
    h_BF = dead_F * (np.exp(z_BF) if activation == "exp" else np.log1p(np.exp(z_BF)))
    slope_BF = dead_F * (np.exp(z_BF) if activation == "exp" else 1 / (1 + np.exp(-z_BF)))
    ghost_BD = h_BF @ params["w_dec_FD"]
    half_B1 = np.linalg.norm(residual_BD, axis=1, keepdims=True) / np.linalg.norm(ghost_BD, axis=1, keepdims=True) / 2
    error_BD = residual_BD - half_B1 * ghost_BD
    by_ghost_BD = 3.0 / (error_BD**2).sum() * -2 * half_B1 * error_BD
    by_z_BF = by_ghost_BD @ params["w_dec_FD"].T * slope_BF
    expected = {
        "w_dec_FD": h_BF.T @ by_ghost_BD,
        "w_enc_FD": by_z_BF.T @ centred_BD,
        "b_enc_F": by_z_BF.sum(axis=0),
        "b_dec_D": -(by_z_BF @ params["w_enc_FD"]).sum(axis=0),
    }
    for name, exact in expected.items():
        np.testing.assert_allclose(gradients[name], exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max(), err_msg=name)


def test_ghost_gradients_of_no_dead_latent_and_of_extreme_ones() -> None:
    params, x_BD, residual_BD = (jnp.asarray(v, jnp.float32) if isinstance(v, np.ndarray) else v for v in parameters())
    none_F, all_F = jnp.zeros(LATENTS, bool), jnp.ones(LATENTS, bool)
    value, (gradients, *_) = of_exp(in_float32(params), x_BD, residual_BD, none_F)
    assert float(value) == 0.0
    assert not any(np.any(leaf) for leaf in gradients.values())
    for shift in (-500.0, 500.0):  # exp would be 0 or infinite
        moved = in_float32({**params, "b_enc_F": params["b_enc_F"] + shift})
        value, (gradients, *_) = of_exp(moved, x_BD, residual_BD, all_F)
        assert float(value) == pytest.approx(3.0, rel=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in gradients.values())
        assert np.abs(gradients["b_enc_F"]).max() > 0
    for perfect_BD in (jnp.zeros_like(residual_BD), residual_BD.at[0].set(0.0)):
        _, (gradients, *_) = of_exp(in_float32(params), x_BD, perfect_BD, all_F)
        assert all(np.isfinite(leaf).all() for leaf in gradients.values())


def test_ghost_gradients_by_share_weigh_as_much_as_the_dead_latents() -> None:
    params, x_BD, residual_BD = parameters()
    args = RELU, in_float32(params), jnp.float32(x_BD), jnp.float32(residual_BD), jnp.float32(3.0)
    dead_F = jnp.arange(LATENTS) < LATENTS // 4
    value = ghost_loss("exp", *args, dead_F, PLAIN, by_share=True)
    assert float(value) == pytest.approx(3.0 / 4, rel=1e-5)


@pytest.mark.parametrize("dead", [1, 13])
def test_ghost_gradients_over_a_mesh_equal_those_of_one_device(dead: int) -> None:
    params, x_BD, residual_BD = parameters()
    dead_F = jnp.arange(LATENTS) * 3 % (LATENTS + 1) < dead  # 13: on some of four shards more than on others
    sharded = Compute(mesh=make_mesh(model=4))
    gradients = []
    for compute in (PLAIN, sharded):

        def loss(params: Params, compute: Compute = compute) -> jax.Array:
            args = RELU, params, jnp.float32(x_BD), jnp.float32(residual_BD), jnp.float32(3.0), dead_F, compute
            return ghost_loss("exp", *args)

        gradients.append(jax.jit(jax.grad(loss), compiler_options=QUICK)(in_float32(params)))
    for name, alone in gradients[0].items():
        assert np.abs(alone).max() > 0
        np.testing.assert_allclose(gradients[1][name], alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max(), err_msg=name)


@pytest.mark.parametrize("threshold", [0.02, None])
def test_starving_latents_are_raised_and_no_others(threshold: float | None) -> None:
    rng = np.random.default_rng(0)
    z_BF, norms_F = rng.normal(size=(ROWS, LATENTS)), rng.uniform(0.5, 2, LATENTS)
    frequency_F = np.where(np.arange(LATENTS) % 2, 0.3, 0.005)
    frequency_F[0] = 0.0
    least = threshold or 0.1 * frequency_F.mean()
    args = (jnp.asarray(v, jnp.float32) for v in (z_BF, norms_F, frequency_F))
    value, (by_z_BF, by_norms_F) = jax.value_and_grad(starving_loss, argnums=(0, 1))(*args, threshold)
    weight_F = np.maximum(0, 1 - frequency_F / least) * norms_F
    assert weight_F[0] == norms_F[0]  # never fires: the full weight
    assert (weight_F > 0).sum() == LATENTS // 2
    assert float(value) == pytest.approx(float((np.maximum(-z_BF, 0).mean(axis=0) * weight_F).sum()), rel=1e-5)
    np.testing.assert_allclose(by_z_BF, -weight_F * (z_BF < 0) / ROWS, rtol=1e-4, atol=1e-8)
    assert not by_norms_F.any()


def test_frequencies_that_are_not_known_yet_raise_nothing_by_default() -> None:
    z_BF = -jnp.ones((ROWS, LATENTS))
    assert float(starving_loss(z_BF, jnp.ones(LATENTS), jnp.zeros(LATENTS), None)) == 0.0


def test_auxk_of_a_dense_variant_is_in_the_unit_of_its_reconstruction_loss() -> None:
    params, x_BD, _ = parameters()
    params = in_float32(params | {"r_scale_F": np.linspace(-0.5, 0.5, LATENTS)})
    x_BD = jnp.float32(x_BD)
    variant = build("wright", LATENTS, sparsity_coefficient=1.0, dead_remedy="auxk", auxiliary_coefficient=0.5)
    assert isinstance(variant, Wright)
    at = Moment.plain(LATENTS)._replace(dead_F=jnp.arange(LATENTS) < 10)
    _, terms = jax.jit(variant.loss, compiler_options=QUICK)(params, x_BD, x_BD, at)
    scaled = {**params, "w_dec_FD": params["w_dec_FD"] * jnp.exp(params["r_scale_F"])[:, None]}
    left = auxk_loss(variant, scaled, x_BD, x_BD - variant.reconstruct(params, x_BD), at.dead_F, PLAIN)
    variance = ROWS * float(terms.reconstruction) / float(terms.fvu)
    assert variance == pytest.approx(float(np.square(np.asarray(x_BD) - np.asarray(x_BD).mean(axis=0)).sum()), rel=1e-5)
    assert float(terms.auxiliary) == pytest.approx(0.5 * float(left) * variance / ROWS, rel=1e-5)


def test_ghost_gradients_of_a_dense_variant_are_in_the_unit_of_its_reconstruction_loss() -> None:
    params, x_BD, residual_BD = parameters()
    params, x_BD, target_BD = in_float32(params), jnp.float32(x_BD), jnp.float32(residual_BD)
    at = Moment.plain(LATENTS)._replace(dead_F=jnp.arange(LATENTS) < LATENTS // 4)
    settings = {"sparsity_coefficient": 1.0, "auxiliary_coefficient": 0.5, "ghost_by_share": True}
    gradients = []
    for remedy in ("ghost_exp", "ghost_softplus"):
        variant = build("relu", LATENTS, **settings, dead_remedy=remedy)
        measure = jax.jit(jax.value_and_grad(variant.loss, has_aux=True), compiler_options=QUICK)
        (_, terms), gradient = measure(params, x_BD, target_BD, at)
        assert float(terms.auxiliary) == pytest.approx(0.5 * float(terms.reconstruction) / 4, rel=1e-5)
        gradients.append(gradient["b_enc_F"])
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3 * np.abs(gradients[0]).max()


@pytest.mark.parametrize("dead", [0, 1, 2, 3, 8, 9, 32, 33, LATENTS])  # sizes that are compiled for: 2, 8, 32, all
def test_auxk_gradients_equal_those_of_the_equations_directly_and_by_way_of_slots(dead: int) -> None:
    given, x_BD, residual_BD = parameters()
    params, x_BD, residual_BD = in_float32(given), jnp.float32(x_BD), jnp.float32(residual_BD)
    dead_F, k = jnp.arange(LATENTS) < dead, 2

    def equations(params: Params) -> jax.Array:
        z_BF = (x_BD - params["b_dec_D"][None]) @ params["w_enc_FD"].T + params["b_enc_F"][None]
        kth_B1 = jnp.sort(jnp.where(dead_F[None], z_BF, -jnp.inf), axis=1)[:, -k, None]
        e_hat_BD = jnp.where(dead_F[None] & (z_BF >= kth_B1), z_BF, 0.0) @ params["w_dec_FD"]
        variance = jnp.sum(jnp.square(residual_BD - residual_BD.mean(axis=0, keepdims=True)))
        return min(1.0, dead / k) * jnp.sum(jnp.square(residual_BD - e_hat_BD)) / variance

    def loss(params: Params, slots: Slots | None) -> jax.Array:
        return auxk_loss(RELU, params, x_BD, residual_BD, dead_F, PLAIN, k=k, slots=slots)

    expected = jax.jit(jax.grad(equations), compiler_options=QUICK)(params)
    directly = jax.jit(jax.grad(loss), compiler_options=QUICK)(params, None)
    slots = Slots(jnp.zeros((LATENTS, WIDTH)), jnp.zeros((LATENTS, WIDTH)))
    others, to_slots = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)(params, slots)
    assert not others["w_enc_FD"].any()
    assert not others["w_dec_FD"].any()
    by_slots = {**others, "w_enc_FD": to_slots.w_enc_FD, "w_dec_FD": to_slots.w_dec_FD}
    for name, exact in expected.items():
        limit = 1e-5 * float(jnp.abs(exact).max())
        np.testing.assert_allclose(directly[name], exact, rtol=1e-4, atol=limit, err_msg=name)
        np.testing.assert_allclose(by_slots[name], exact, rtol=1e-4, atol=limit, err_msg=name)


@pytest.mark.parametrize(
    ("name", "remedy", "revives"),
    [
        ("relu", "none", False),
        ("relu", "auxk", True),
        ("p_annealing", "sparsity_threshold", True),
    ],
)
def test_remedies_revive(name: str, remedy: str, revives: bool, toy_rows: Callable[..., jax.Array]) -> None:
    variant = build(name, 48, sparsity_coefficient=0.05, dead_remedy=remedy)
    batches = [toy_rows(seed) for seed in range(4)]
    mean_D = batches[0].mean(axis=0)
    params = variant.init(jax.random.key(0), DataStats(mean_D, mean_D))
    buried_F = jnp.arange(48) < 24
    params["b_enc_F"] = params["b_enc_F"] - jnp.where(buried_F, 3.0, 0.0)
    optimiser = adam(300)
    step = jax.jit(make_step(optimiser, StepSettings(total_steps=300, dead_after_rows=500)), compiler_options=QUICK)
    state, fired = init_state(params, optimiser, Normalisers(*(Normaliser(jnp.ones(16)) for _ in range(2)))), []
    for i in range(200):
        state, _ = step(variant, jnp.float32(2e-2), state, batches[i % 4], batches[i % 4])
        fired.append(float((state.rows_since_fired_F == 0)[buried_F].mean()))
    assert fired[0] < 0.1
    assert (max(fired) > 0.5) == revives, fired[::20]
