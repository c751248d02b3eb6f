"""What changes during training in Wright's variant and in p-annealing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.contract import Moment, Params
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.p_annealing import PAnnealing
from saex_pipe.common.sae.wright import Wright

LATENTS, COEFFICIENT = 40, 2.0
WRIGHT = Wright(latents=LATENTS, sparsity_coefficient=COEFFICIENT, finetune_fraction=0.25)
P_ANNEALING = PAnnealing(latents=LATENTS, sparsity_coefficient=COEFFICIENT, p_end=0.5, anneal_start=0.2)


def after(fraction: float) -> Moment:
    return Moment.plain(LATENTS)._replace(fraction_done=jnp.float32(fraction))


def started(variant: Wright | PAnnealing, x_BD: jax.Array) -> Params:
    return variant.init(jax.random.key(0), DataStats(x_BD.mean(axis=0), x_BD.mean(axis=0)))


def test_scales_learn_and_the_encoder_rests_in_the_last_steps(toy_rows: Callable[..., jax.Array]) -> None:
    x_BD = toy_rows(0)
    params = started(WRIGHT, x_BD)
    measure = jax.jit(jax.value_and_grad(WRIGHT.loss, has_aux=True))
    for fraction, resting in ((0.0, {"r_scale_F"}), (0.74, {"r_scale_F"}), (0.75, {"w_enc_FD", "b_enc_F"})):
        (_, terms), gradients = measure(params, x_BD, x_BD, after(fraction))
        assert {name for name, leaf in gradients.items() if not np.any(leaf)} == resting
        penalty = float(WRIGHT.encode(params, x_BD).sum(axis=1).mean())  # the scales are 1
        assert float(terms.sparsity) == pytest.approx(0.0 if fraction == 0.75 else COEFFICIENT * penalty, rel=1e-5)


def test_exponent_falls_from_1_after_the_start() -> None:
    exponents = [float(P_ANNEALING.exponent(jnp.float32(done))) for done in (0, 0.2, 0.6, 1)]
    np.testing.assert_allclose(exponents, [1, 1, 0.75, 0.5], rtol=1e-6)


def test_penalty_stays_as_large_as_l1_while_its_gradient_turns_to_small_codes(
    toy_rows: Callable[..., jax.Array],
) -> None:
    x_BD = toy_rows(0)
    params = started(P_ANNEALING, x_BD)
    codes_BF = np.asarray(P_ANNEALING.encode(params, x_BD), np.float64)
    measure = jax.jit(jax.value_and_grad(P_ANNEALING.penalise, argnums=1))
    for fraction, p in ((0.1, 1.0), (0.6, 0.75), (1.0, 0.5)):
        value, gradient_BF = measure(params, jnp.asarray(codes_BF, jnp.float32), after(fraction))
        assert float(value) == pytest.approx(codes_BF.sum(axis=1).mean(), rel=1e-5)
        ratio = codes_BF.sum() / (codes_BF**p).sum()
        large_BF = codes_BF > 1e-5
        expected = ratio * p * codes_BF[large_BF] ** (p - 1) / len(codes_BF)
        np.testing.assert_allclose(np.asarray(gradient_BF)[large_BF], expected, rtol=1e-4)
        assert np.isfinite(gradient_BF).all()
