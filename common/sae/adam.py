"""Adam in one pass over the parameters, with the clipping and the learning rate.

Adam: a method for stochastic optimization. Diederik P. Kingma, Jimmy Ba. 2014. https://arxiv.org/abs/1412.6980

    g      = clip * gradient                      clip = min(1, clip_norm / ||all gradients||)
    m      = b1 m + (1 - b1) g                    v = b2 v + (1 - b2) g^2
    update = -rate m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Without momentum, b1 = 0, m is g and is not kept: half the memory, and a latent that stops firing stops moving at once
rather than being carried on by what it last learnt, which is why several recipes take it against dead latents
(Rajamanoharan et al. 2024, https://arxiv.org/abs/2407.14435).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Rate = Callable[[Int[Array, ""]], Float[Array, ""]]  # learning rate of a step, of which 0 is the first


class AdamState(NamedTuple):
    """Running moments of the gradient, float32, in the structure of the parameters."""

    updates_done: Int[Array, ""]  # int32
    mean: Any  # None without momentum
    square: Any


def clip_factor(gradients: Any, clip_norm: float | None) -> Float[Array, ""] | float:
    """What brings the length of all gradients, taken as one vector, down to ``clip_norm``; 1 if that is None."""
    if clip_norm is None:
        return 1.0
    return jnp.minimum(1.0, clip_norm / jnp.maximum(optax.tree.norm(gradients), jnp.finfo(jnp.float32).tiny))


def adam_by(
    rate: Rate, *, momentum: float, beta_square: float, epsilon: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """Equals ``optax.chain(clip_by_global_norm, scale_by_adam, scale_by_learning_rate)``.

    Written out because that chain takes 28 ms where one pass over the parameters takes 16 (5.3 million parameters on
    two cores).
    """

    def init(params: Any) -> AdamState:
        mean = jax.tree.map(jnp.zeros_like, params) if momentum else None
        return AdamState(jnp.zeros((), jnp.int32), mean, jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        del params
        clip = clip_factor(gradients, clip_norm)
        updates_done = state.updates_done + 1
        count = updates_done.astype(jnp.float32)
        scale = rate(state.updates_done) / (1 - momentum**count)
        unbias_square = 1 / (1 - beta_square**count)
        square = jax.tree.map(
            lambda s, g: beta_square * s + (1 - beta_square) * jnp.square(clip * g), state.square, gradients
        )
        if momentum:
            mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * clip * g, state.mean, gradients)
        else:
            mean = jax.tree.map(lambda g: clip * g, gradients)
        updates = jax.tree.map(lambda m, s: -scale * m / (jnp.sqrt(unbias_square * s) + epsilon), mean, square)
        return updates, AdamState(updates_done, mean if momentum else None, square)

    return optax.GradientTransformation(init, update)
