"""What holds for every variant, as autoencoder and as transcoder between different widths."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.contract import DataStats, Params, Variant
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.train_step import TrainState, init_state, make_step
from saex_pipe.common.sae.variants import VARIANTS, build

WIDTH, TARGET_WIDTH, LATENTS, K, COEFFICIENT = 16, 10, 48, 4, 0.3
SETTINGS = {"topk": {"k": K}, "relu": {"sparsity_coefficient": COEFFICIENT}}
NONE_DEAD = np.zeros(LATENTS, bool)
FEW_DEAD, MANY_DEAD, ALL_DEAD = (np.arange(LATENTS) < n for n in (2, 30, LATENTS))

every_variant = pytest.mark.parametrize("name", sorted(VARIANTS))
both_kinds = pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "transcoder"])


def make(name: str, transcoder: bool) -> Variant:
    return build(name, LATENTS, **SETTINGS[name], transcoder=transcoder)


@pytest.fixture
def batch(toy_rows: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``batch(transcoder, seed)``: input and target."""
    mix_DD = np.random.default_rng(7).normal(size=(WIDTH, TARGET_WIDTH)).astype(np.float32) / 4

    def generate(transcoder: bool, seed: int = 0, rows: int = 96) -> tuple[jax.Array, jax.Array]:
        x_BD = toy_rows(seed, rows)
        return x_BD, jnp.tanh(x_BD @ mix_DD) if transcoder else x_BD

    return generate


@pytest.fixture
def start(batch: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Params]:
    def parameters(variant: Variant, seed: int = 0) -> Params:
        x_BD, target_BD = batch(variant.transcoder, seed=1, rows=512)
        return variant.init(jax.random.key(seed), DataStats(x_BD.mean(axis=0), target_BD.mean(axis=0)))

    return parameters


@every_variant
@both_kinds
def test_initial_parameters(name: str, transcoder: bool, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder)
    params = start(variant)
    out = TARGET_WIDTH if transcoder else WIDTH
    shapes = {"w_enc_DF": (WIDTH, LATENTS), "b_enc_F": (LATENTS,), "w_dec_FD": (LATENTS, out), "b_dec_D": (out,)}
    assert {key: value.shape for key, value in params.items()} == shapes
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
    norm = {"topk": 1.0, "relu": 0.1}[name]
    np.testing.assert_allclose(np.linalg.norm(params["w_dec_FD"], axis=1), norm, rtol=1e-5)
    x_BD, target_BD = batch(transcoder, seed=1, rows=512)
    np.testing.assert_allclose(params["b_dec_D"], target_BD.mean(axis=0), rtol=1e-6)
    if not transcoder:
        np.testing.assert_array_equal(params["w_enc_DF"], params["w_dec_FD"].T)
    # The mean input gives a pre-activation of 0 in every latent, so no latent starts out ahead.
    mean_1D = x_BD.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(variant.encode(params, mean_1D), 0.0, atol=1e-5)


@every_variant
@both_kinds
def test_codes_and_reconstruction(name: str, transcoder: bool, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder)
    params = start(variant)
    x_BD, target_BD = batch(transcoder)
    codes_BF, recon_BD = variant.encode(params, x_BD), variant.reconstruct(params, x_BD)
    assert codes_BF.shape == (len(x_BD), LATENTS)
    assert recon_BD.shape == target_BD.shape
    assert codes_BF.dtype == recon_BD.dtype == jnp.float32
    exact = {key: np.asarray(value, np.float64) for key, value in params.items()}
    expected_BF = reference_codes(name, exact, np.asarray(x_BD, np.float64), transcoder)
    np.testing.assert_allclose(codes_BF, expected_BF, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(recon_BD, expected_BF @ exact["w_dec_FD"] + exact["b_dec_D"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variant.decode(params, codes_BF), recon_BD, rtol=1e-4, atol=1e-5)
    _, terms = jax.jit(variant.loss)(params, x_BD, target_BD, jnp.asarray(NONE_DEAD))
    assert float(terms.l0) == pytest.approx((expected_BF > 0).sum(axis=1).mean())
    np.testing.assert_array_equal(terms.fired_F, (expected_BF > 0).any(axis=0))
    assert float(terms.fvu) == pytest.approx(
        unexplained(np.asarray(target_BD - recon_BD), np.asarray(target_BD)), rel=1e-4
    )
    half_BD = variant.reconstruct(params, x_BD, "bfloat16")
    assert half_BD.dtype == jnp.float32
    assert 0 < float(jnp.abs(half_BD - recon_BD).mean()) < 0.02


@every_variant
@both_kinds
def test_loss_and_gradients_equal_the_equations(name: str, transcoder: bool, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder)
    x_BD, target_BD = batch(transcoder)
    params = perturbed(start(variant))
    exact = {key: np.asarray(value, np.float64) for key, value in params.items()}
    fixed = (name, exact, np.asarray(x_BD, np.float64), np.asarray(target_BD, np.float64))
    loss = jax.jit(jax.value_and_grad(lambda params, dead_F: variant.loss(params, x_BD, target_BD, dead_F)[0]))
    rng = np.random.default_rng(3)
    for dead_F in (NONE_DEAD, FEW_DEAD, MANY_DEAD, ALL_DEAD):
        value, gradients = loss(params, jnp.asarray(dead_F))
        reference = partial(reference_loss, *fixed, dead_F, transcoder=transcoder)
        assert float(value) == pytest.approx(reference(exact), rel=1e-5)
        for key in params:
            direction = rng.normal(size=params[key].shape)
            direction *= 1e-6 / np.linalg.norm(direction)
            ahead, behind = (reference({**exact, key: exact[key] + sign * direction}) for sign in (1, -1))
            slope = float(np.sum(np.asarray(gradients[key], np.float64) * direction))
            limit = 1e-4 * 1e-6 * float(np.linalg.norm(gradients[key]))
            assert slope == pytest.approx((ahead - behind) / 2, abs=limit), f"{key}, {dead_F.sum()} dead"


@every_variant
def test_losses_of_a_stack_of_saes_equal_those_of_each(name: str, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder=False)
    x_BD, target_BD = batch(False)
    singles = [start(variant, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    dead_F = jnp.asarray(MANY_DEAD)

    def loss(params: Params) -> jax.Array:
        return variant.loss(params, x_BD, target_BD, dead_F)[0]

    single = jax.jit(jax.value_and_grad(loss))
    value_S, gradients_S = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    for i, params in enumerate(singles):
        value, gradients = single(params)
        assert float(value_S[i]) == pytest.approx(float(value), rel=1e-5)
        for key in params:
            np.testing.assert_allclose(gradients_S[key][i], gradients[key], rtol=1e-3, atol=1e-6)


@every_variant
@pytest.mark.parametrize(("transcoder", "compute_dtype"), [(False, "float32"), (False, "bfloat16"), (True, "float32")])
def test_training_learns_repeats_to_the_bit_and_compiles_once(
    name: str, transcoder: bool, compute_dtype: str, batch: Callable, start: Callable
) -> None:
    variant, steps = make(name, transcoder), 60
    optimiser = adam(1e-2, steps)
    step = jax.jit(make_step(variant, optimiser, 500, compute_dtype, sparsity_warmup_steps=5), donate_argnums=0)
    batches = [batch(transcoder, seed) for seed in range(4)]

    def train() -> tuple[TrainState, list[float]]:
        state, fvu = init_state(start(variant), optimiser), []
        for i in range(steps):
            state, terms = step(state, *batches[i % len(batches)])
            fvu.append(float(terms.fvu))
        return state, fvu

    state, fvu = train()
    assert fvu[-1] < 0.6 * fvu[0]
    assert step._cache_size() == 1
    assert int(state.step) == steps
    if name == "topk":
        np.testing.assert_allclose(np.linalg.norm(state.params["w_dec_FD"], axis=1), 1.0, rtol=1e-6)
    again, fvu_again = train()
    assert fvu == fvu_again
    jax.tree.map(np.testing.assert_array_equal, state, again)


def perturbed(params: Params) -> Params:
    """Away from the start, where the encoder is the decoder's transpose and biases are special."""
    rng = np.random.default_rng(5)
    return {key: value + 0.1 * rng.normal(size=value.shape).astype(np.float32) for key, value in params.items()}


# The equations in float64 NumPy, written from the papers and not from the code.


def unexplained(error_BD: np.ndarray, of_BD: np.ndarray) -> float:
    return float((error_BD**2).sum() / ((of_BD - of_BD.mean(axis=0)) ** 2).sum())


def kth_largest(z_BF: np.ndarray, k: int) -> np.ndarray:
    return np.sort(z_BF, axis=1)[:, ::-1][:, k - 1 : k]


def pre_activations(name: str, params: dict, x_BD: np.ndarray, transcoder: bool) -> np.ndarray:
    b_pre_D = params["b_dec_D"] if name == "topk" and not transcoder else 0
    return (x_BD - b_pre_D) @ params["w_enc_DF"] + params["b_enc_F"]


def reference_codes(name: str, params: dict, x_BD: np.ndarray, transcoder: bool) -> np.ndarray:
    z_BF = pre_activations(name, params, x_BD, transcoder)
    return np.maximum(z_BF, 0) * (z_BF >= kth_largest(z_BF, K) if name == "topk" else 1)


def reference_loss(
    name: str, fixed: dict, x_BD: np.ndarray, target_BD: np.ndarray, dead_F: np.ndarray, params: dict, transcoder: bool
) -> float:
    """The loss at ``params``; what the equations put under a stop-gradient is taken at ``fixed``."""
    codes_BF = reference_codes(name, params, x_BD, transcoder)
    error_BD = target_BD - codes_BF @ params["w_dec_FD"] - params["b_dec_D"]
    if name == "relu":
        penalty_B = codes_BF @ np.sqrt((params["w_dec_FD"] ** 2).sum(axis=1))
        return float((error_BD**2).sum(axis=1).mean() + COEFFICIENT * penalty_B.mean())
    total, dead, k_auxiliary = unexplained(error_BD, target_BD), int(dead_F.sum()), target_BD.shape[1] // 2
    if dead:
        residual_BD = target_BD - fixed["b_dec_D"]
        residual_BD = residual_BD - reference_codes(name, fixed, x_BD, transcoder) @ fixed["w_dec_FD"]
        z_BM = pre_activations(name, params, x_BD, transcoder)[:, dead_F]
        codes_BM = z_BM * (z_BM >= kth_largest(z_BM, min(k_auxiliary, dead)))
        left = unexplained(residual_BD - codes_BM @ params["w_dec_FD"][dead_F], residual_BD)
        total += min(1, dead / k_auxiliary) * left / 32
    return total
