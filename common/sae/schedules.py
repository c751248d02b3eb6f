"""How the learning rate and the weight of the penalty go over a run: pure functions of the step.

A stretch of the run is one number: up to 1 it is a share of all steps, above 1 a number of steps.

Cosine: SGDR: Stochastic Gradient Descent with Warm Restarts. Ilya Loshchilov, Frank Hutter. 2016.
https://arxiv.org/abs/1608.03983
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

WARMUP_STEPS = 1000  # upper limit; short runs warm up over WARMUP_FRACTION of their steps
WARMUP_FRACTION = 0.05
DECAY_FRACTION = 0.2  # the last fifth of the steps, down to 0

RateShape = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """Linear warm-up, then constant or cosine, and a linear decay to 0 at the end."""

    warmup: float | None = None  # stretch; None: WARMUP_FRACTION, at most WARMUP_STEPS
    shape: RateShape = "constant"
    cycles: int = 1  # of the cosine, of equal length: all but the first are restarts
    floor: float = 0.0  # what the cosine falls to, as a share of the peak
    decay: float | None = None  # stretch; None: DECAY_FRACTION, and none for a cosine

    def factor(self, total_steps: int, step: Int[Array, ""]) -> Float[Array, ""]:
        """Share of the peak learning rate in a step, of which 0 is the first.

        min(1, (step + 1) / warmup, (total - step) / decay), and for a cosine times
        floor + (1 - floor) (1 + cos(pi p)) / 2, where p goes from 0 to 1 in each cycle between warm-up and end.
        """
        warmup = self._warmup_steps(total_steps)
        decay = DECAY_FRACTION if self.shape == "constant" else 0.0
        decay_steps = max(1, steps_of(decay if self.decay is None else self.decay, total_steps))
        done = step.astype(jnp.float32)
        edges = jnp.clip(jnp.minimum((done + 1) / max(1, warmup), (total_steps - done) / decay_steps), 0.0, 1.0)
        if self.shape == "constant":
            return edges
        place = jnp.maximum(done - warmup, 0.0) * (self.cycles / max(1, total_steps - warmup))
        return edges * (self.floor + (1 - self.floor) * 0.5 * (1 + jnp.cos(jnp.pi * (place % 1.0))))

    def _warmup_steps(self, total_steps: int) -> int:
        if self.warmup is None:
            return min(WARMUP_STEPS, round(WARMUP_FRACTION * total_steps))
        return steps_of(self.warmup, total_steps)


PLAIN_SCHEDULE = RateSchedule()


def steps_of(stretch: float, total_steps: int) -> int:
    """The steps of a stretch, at most all."""
    return min(total_steps, round(stretch * total_steps if stretch <= 1 else stretch))


def penalty_factor(warmup: float, total_steps: int, fraction_done: Float[Array, ""]) -> Float[Array, ""]:
    """Share of the sparsity coefficient once ``fraction_done`` of the steps are done: linear from 0 over ``warmup``."""
    return jnp.minimum(1.0, fraction_done * total_steps / max(1, steps_of(warmup, total_steps)))


def k_now(k: int, k_start: int | None, fraction: float, fraction_done: Float[Array, ""]) -> Float[Array, ""]:
    """Linear from ``k_start`` (None: k) at the first step to ``k`` when ``fraction`` of the steps are done, then k."""
    if k_start is None or k_start == k:
        return jnp.full((), float(k))
    done = jnp.minimum(fraction_done / fraction, 1.0)
    return k_start + (k - k_start) * done
