"""Learning rate and penalty over a run, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.schedules import RateSchedule, penalty_factor, steps_of


def factors(schedule: RateSchedule, total_steps: int) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(lambda step: schedule.factor(total_steps, step)))(jnp.arange(total_steps)))


def test_the_default_rises_stays_and_falls() -> None:
    rates = factors(RateSchedule(), 100)
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)  # 5 % of the steps
    np.testing.assert_allclose(rates[5:80], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rates[80:], np.linspace(1.0, 0.05, 20), rtol=1e-5)  # the next step would have 0
    assert float(RateSchedule().factor(10**6, jnp.asarray(499))) == pytest.approx(0.5)  # at most 1,000 warm-up steps


@pytest.mark.parametrize("shape", ["constant", "cosine"])
@pytest.mark.parametrize("total_steps", [1, 2, 7])
def test_the_shortest_runs_have_a_positive_rate(shape: str, total_steps: int) -> None:
    rates = factors(RateSchedule(shape=shape), total_steps)
    assert ((rates > 0) & (rates <= 1)).all()


def test_stretches_are_shares_or_steps() -> None:
    assert [steps_of(stretch, 200) for stretch in (0, 0.25, 1, 1.5, 30, 500)] == [0, 50, 200, 2, 30, 200]
    in_steps = factors(RateSchedule(warmup=20, decay=50), 200)
    np.testing.assert_array_equal(in_steps, factors(RateSchedule(warmup=0.1, decay=0.25), 200))
    np.testing.assert_allclose(in_steps[[0, 9, 19, 149, 175, 199]], [0.05, 0.5, 1, 1, 0.5, 0.02], rtol=1e-6)
    np.testing.assert_array_equal(factors(RateSchedule(warmup=0, decay=0), 50), 1.0)


def test_a_cosine_restarts_between_warm_up_and_end() -> None:
    rates = factors(RateSchedule(shape="cosine", warmup=10, cycles=3, floor=0.1), 310)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    cycle = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2
    np.testing.assert_allclose(rates[10:], np.tile(cycle, 3), rtol=1e-4)
    falling = factors(RateSchedule(shape="cosine", warmup=0, decay=0.5), 100)
    np.testing.assert_allclose(falling[75], 0.5 * (1 + np.cos(np.pi * 0.75)) / 2, rtol=1e-5)


def test_the_penalty_rises_over_steps_a_share_or_the_whole_run() -> None:
    done = jnp.arange(100, dtype=jnp.float32) / 100
    for warmup, steps in ((20, 20), (0.5, 50), (1, 100)):
        found = jax.vmap(lambda fraction, warmup=warmup: penalty_factor(warmup, 100, fraction))(done)
        np.testing.assert_allclose(found, np.minimum(1, np.arange(100) / steps), rtol=1e-6)
