"""What holds for every variant, as autoencoder and as transcoder between different widths."""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sae_references import unexplained

from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import LossTerms, Moment, Params, Variant
from saex_pipe.common.sae.counted import SHARES
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.jumprelu import JumpRelu
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.straight_through import near
from saex_pipe.common.sae.train_step import StepSettings, TrainState, init_state, make_step
from saex_pipe.common.sae.variants import VARIANTS, build

# So that half of either width, the dead latents of AuxK, times four holds all latents: one size less to compile.
WIDTH, TARGET_WIDTH, LATENTS = 16, 20, 32
NONE_DEAD = np.zeros(LATENTS, bool)
FEW_DEAD, MANY_DEAD, ALL_DEAD = (np.arange(LATENTS) < n for n in (2, 20, LATENTS))
REFERENCES = {name: importlib.import_module(f"sae_references.{name}") for name in VARIANTS}

STEPS, DEAD_AFTER_ROWS = 60, 500
# Compiled for less time, run for longer: with arrays as small as these compilation is all that a test waits for.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
quick_jit = partial(jax.jit, compiler_options=QUICK)

every_variant = pytest.mark.parametrize("name", sorted(VARIANTS))
both_kinds = pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "transcoder"])


def make(name: str, transcoder: bool, **changes: Any) -> Variant:
    return build(name, LATENTS, **{**REFERENCES[name].SETTINGS, **changes}, transcoder=transcoder)


def moment(dead_F: np.ndarray, sparsity_scale: float = 1.0) -> Moment:
    return Moment.plain(LATENTS)._replace(dead_F=jnp.asarray(dead_F), sparsity_scale=jnp.asarray(sparsity_scale))


def unscaled(variant: Variant) -> Normalisers:
    return Normalisers(*(Normaliser(jnp.ones(n)) for n in (WIDTH, TARGET_WIDTH if variant.transcoder else WIDTH)))


@pytest.fixture(scope="module")
def batch(toy_rows: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``batch(transcoder, seed)``: input and target."""
    mix_DD = np.random.default_rng(7).normal(size=(WIDTH, TARGET_WIDTH)).astype(np.float32) / 4

    @cache
    def generate(transcoder: bool, seed: int = 0, rows: int = 96) -> tuple[jax.Array, jax.Array]:
        x_BD = toy_rows(seed, rows)
        return x_BD, jnp.tanh(x_BD @ mix_DD) if transcoder else x_BD

    return generate


@pytest.fixture(scope="module")
def start(batch: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Params]:
    @cache
    def parameters(variant: Variant, seed: int = 0) -> Params:
        x_BD, target_BD = batch(variant.transcoder, seed=1, rows=512)
        return variant.init(jax.random.key(seed), DataStats(x_BD.mean(axis=0), target_BD.mean(axis=0), x_BD, target_BD))

    return parameters


def loss(
    params: Params, variant: Variant, x_BD: jax.Array, target_BD: jax.Array, at: Moment
) -> tuple[jax.Array, LossTerms]:
    return variant.loss(params, x_BD, target_BD, at)


loss_and_gradients = jax.value_and_grad(loss, has_aux=True)
of_one = quick_jit(loss_and_gradients)  # shared: a variant and its kind are compiled once for all tests
of_stack = quick_jit(jax.vmap(loss_and_gradients, in_axes=(0, 0, None, None, None)))


@every_variant
@both_kinds
def test_initial_parameters(name: str, transcoder: bool, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder)
    params = start(variant)
    out = TARGET_WIDTH if transcoder else WIDTH
    shapes = {"w_enc_FD": (LATENTS, WIDTH), "b_enc_F": (LATENTS,), "w_dec_FD": (LATENTS, out), "b_dec_D": (out,)}
    assert {key: params[key].shape for key in shapes} == shapes
    assert all(leaf.shape == (LATENTS,) and key.endswith("_F") for key, leaf in params.items() if key not in shapes)
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.linalg.norm(params["w_dec_FD"], axis=1), variant.initial.decoder_norm, rtol=1e-5)
    _, target_BD = batch(transcoder, seed=1, rows=512)
    np.testing.assert_allclose(params["b_dec_D"], target_BD.mean(axis=0), rtol=1e-6)
    for leaf in jax.tree.leaves(variant.constrain(params)):
        assert np.isfinite(leaf).all()


@every_variant
@both_kinds
def test_codes_and_reconstruction(name: str, transcoder: bool, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder)
    params = perturbed(start(variant))
    x_BD, target_BD = batch(transcoder)
    codes_BF, recon_BD = variant.encode(params, x_BD), variant.reconstruct(params, x_BD)
    assert codes_BF.shape == (len(x_BD), LATENTS)
    assert recon_BD.shape == target_BD.shape
    assert codes_BF.dtype == recon_BD.dtype == jnp.float32
    exact = in_float64(params)
    expected_BF = REFERENCES[name].codes(exact, np.asarray(x_BD, np.float64), transcoder)
    assert 0 < (expected_BF > 0).mean() < 1
    np.testing.assert_allclose(codes_BF, expected_BF, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(recon_BD, expected_BF @ exact["w_dec_FD"] + exact["b_dec_D"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variant.decode(params, codes_BF), recon_BD, rtol=1e-4, atol=1e-5)
    half_BD = variant.reconstruct(params, x_BD, Compute(dtype="bfloat16"))
    assert half_BD.dtype == jnp.float32
    assert 0 < float(jnp.abs(half_BD - recon_BD).mean()) < 0.05


@every_variant
@both_kinds
def test_terms_of_the_loss(name: str, transcoder: bool, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder)
    params = perturbed(start(variant))
    x_BD, target_BD = batch(transcoder)
    (total, terms), _ = of_one(params, variant, x_BD, target_BD, moment(FEW_DEAD))
    assert all(leaf.dtype == jnp.float32 for key, leaf in terms._asdict().items() if key != "active_F")
    assert float(terms.total) == float(total)
    assert float(total) == pytest.approx(float(terms.reconstruction + terms.sparsity + terms.auxiliary), rel=1e-5)
    training_codes = getattr(REFERENCES[name], "training_codes", REFERENCES[name].codes)
    exact = in_float64(params)
    expected_BF = training_codes(exact, np.asarray(x_BD, np.float64), transcoder)
    assert float(terms.l0) == pytest.approx((expected_BF > 0).sum(axis=1).mean())
    np.testing.assert_array_equal(terms.active_F, (expected_BF > 0).sum(axis=0))
    error_BD = np.asarray(target_BD) - expected_BF @ exact["w_dec_FD"] - exact["b_dec_D"]
    assert float(terms.fvu) == pytest.approx(unexplained(error_BD, np.asarray(target_BD)), rel=1e-4)


@every_variant
@both_kinds
def test_loss_and_gradients_equal_the_equations(name: str, transcoder: bool, batch: Callable, start: Callable) -> None:
    variant, reference = make(name, transcoder), REFERENCES[name]
    x_BD, target_BD = batch(transcoder)
    params = perturbed(start(variant))
    exact = in_float64(params)
    data = np.asarray(x_BD, np.float64), np.asarray(target_BD, np.float64)
    rng = np.random.default_rng(3)
    for dead_F, scale in ((NONE_DEAD, 1.0), (FEW_DEAD, 0.5), (MANY_DEAD, 1.0), (ALL_DEAD, 1.0)):
        at = moment(dead_F, scale)
        (value, _), gradients = of_one(params, variant, x_BD, target_BD, at)
        assert float(value) == pytest.approx(reference.loss(exact, exact, *data, at, transcoder), rel=1e-5)
        if hasattr(reference, "gradients"):
            for key, expected in reference.gradients(exact, *data, at, transcoder).items():
                limit = 1e-5 * np.abs(expected).max() + 1e-7
                np.testing.assert_allclose(gradients[key], expected, rtol=1e-4, atol=limit, err_msg=key)
            continue
        for key in params:
            direction = rng.normal(size=params[key].shape)
            direction *= 1e-6 / np.linalg.norm(direction)
            moved = ({**exact, key: exact[key] + sign * direction} for sign in (1, -1))
            ahead, behind = (reference.loss(exact, there, *data, at, transcoder) for there in moved)
            slope = float(np.sum(np.asarray(gradients[key], np.float64) * direction))
            limit = 1e-4 * 1e-6 * float(np.linalg.norm(gradients[key]))
            assert slope == pytest.approx((ahead - behind) / 2, abs=limit), f"{key}, {dead_F.sum()} dead"


@every_variant
def test_gradients_by_way_of_few_active_codes_equal_the_dense_ones(name: str, batch: Callable) -> None:
    """Those that the equations are compared with have too few latents for the other way."""
    many, (x_BD, target_BD) = 1024, batch(False)
    narrow = {"bandwidth": 0.003} if "jumprelu" in name else {}
    variant = build(name, many, **{**REFERENCES[name].SETTINGS, **narrow})
    params = variant.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0), x_BD, x_BD))
    level_F = params.get("threshold_F", jnp.zeros(many))
    shift = jnp.quantile(variant.pre_activations(params, x_BD, Compute()) - level_F[None], 1 - 3 / many)
    params = params if hasattr(variant, "k") else variant.shift_pre_activations(params, jnp.full(many, -shift))
    # AuxK reads dead latents apart; one that is pulled to its threshold gets a gradient on every row.
    at = Moment.plain(many)._replace(dead_F=jnp.arange(many) % (50 if hasattr(variant, "k") else many) == 3)

    def gradients(codes: Any) -> tuple[Params, LossTerms]:
        compute = Compute(codes=codes)
        return quick_jit(jax.grad(lambda p: variant.loss(p, x_BD, target_BD, at, compute), has_aux=True))(params)

    (sparse, terms), (dense, _) = gradients("auto"), gradients("dense")
    reached = int(terms.active_F.sum())
    if isinstance(variant, JumpRelu):
        near_BF = near(variant.pre_activations(params, x_BD, Compute()), params["threshold_F"], variant.bandwidth)
        assert int(near_BF.sum()) > 0
        reached += int((near_BF | at.dead_F[None]).sum())
    assert 0 < reached / x_BD.shape[0] < many / SHARES[-1]
    for key, leaf in dense.items():
        np.testing.assert_allclose(sparse[key], leaf, rtol=1e-4, atol=1e-6 * np.abs(leaf).max(), err_msg=key)


@every_variant
def test_losses_of_a_stack_of_saes_equal_those_of_each(name: str, batch: Callable, start: Callable) -> None:
    variant = make(name, transcoder=False)
    x_BD, target_BD = batch(False)
    singles = [perturbed(start(variant, seed), seed) for seed in range(3)]
    swept, rest = jax.tree.flatten(variant)
    scales = [1.0, 0.5, 2.0]
    variants = [jax.tree.unflatten(rest, [leaf * scale for leaf in swept]) for scale in scales]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    variant_S = jax.tree.map(lambda *leaves: jnp.stack([jnp.float32(leaf) for leaf in leaves]), *variants)
    at = moment(MANY_DEAD)
    (value_S, _), gradients_S = of_stack(stacked, variant_S, x_BD, target_BD, at)
    for i, params in enumerate(singles):
        (value, _), gradients = of_one(params, variants[i], x_BD, target_BD, at)
        assert float(value_S[i]) == pytest.approx(float(value), rel=1e-5)
        for key in params:
            np.testing.assert_allclose(gradients_S[key][i], gradients[key], rtol=1e-3, atol=1e-6)


@every_variant
@pytest.mark.parametrize(("transcoder", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_training_learns_repeats_to_the_bit_and_compiles_once(
    name: str, transcoder: bool, dtype: str, batch: Callable, start: Callable
) -> None:
    variant, optimiser = make(name, transcoder), adam(STEPS)
    settings = StepSettings(total_steps=STEPS, dead_after_rows=DEAD_AFTER_ROWS, compute=Compute(dtype=dtype))
    step = quick_jit(make_step(optimiser, settings))
    batches = [batch(transcoder, seed) for seed in range(4)]

    def train() -> tuple[TrainState, list[float]]:
        state, fvu = init_state(start(variant), optimiser, unscaled(variant)), []
        for i in range(STEPS):
            state, terms = step(variant, jnp.float32(1e-2), state, *batches[i % len(batches)])
            fvu.append(terms.fvu)
        return state, [float(value) for value in fvu]

    state, fvu = train()
    assert fvu[-1] < 0.6 * fvu[0]
    assert step._cache_size() == 1
    assert int(state.step) == STEPS
    norms = np.linalg.norm(state.params["w_dec_FD"], axis=1)
    if variant.decoder_rows == "unit":
        np.testing.assert_allclose(norms, 1.0, rtol=1e-6)
    if variant.decoder_rows == "at_most_unit":
        assert norms.max() < 1 + 1e-6
    again, fvu_again = train()
    assert fvu == fvu_again
    jax.tree.map(np.testing.assert_array_equal, state, again)


def perturbed(params: Params, seed: int = 5) -> Params:
    """Away from the start, where the encoder is the decoder's transpose and biases are special."""
    rng = np.random.default_rng(seed)
    return {key: value + 0.1 * rng.normal(size=value.shape).astype(np.float32) for key, value in params.items()}


def in_float64(params: Params) -> dict[str, np.ndarray]:
    return {key: np.asarray(value, np.float64) for key, value in params.items()}
