"""The default optimiser: Adam with a clipped gradient, linear warm-up and linear decay at the end."""

import optax

WARMUP_STEPS = 1000  # upper limit; short runs warm up over WARMUP_FRACTION of their steps
WARMUP_FRACTION = 0.05
DECAY_FRACTION = 0.2  # the last fifth of the steps, down to 0
CLIP_NORM = 1.0
ADAM_EPSILON = 6.25e-10  # Gao et al. 2024, https://arxiv.org/abs/2406.04093, appendix A


def learning_rate_schedule(peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate by step: up from ``peak / warmup`` over the warm-up, constant, down to 0 over the last fifth."""
    warmup_steps = max(1, min(WARMUP_STEPS, round(WARMUP_FRACTION * total_steps)))
    decay_steps = max(1, round(DECAY_FRACTION * total_steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1)),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay_steps),
        ],
        [warmup_steps, max(warmup_steps, total_steps - decay_steps)],
    )


def adam(peak_learning_rate: float, total_steps: int) -> optax.GradientTransformation:
    """Clip to a global norm of 1, then Adam (0.9, 0.999) under ``learning_rate_schedule``."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=ADAM_EPSILON),
        optax.scale_by_learning_rate(learning_rate_schedule(peak_learning_rate, total_steps)),
    )
