"""Adam whose moments of matrices take a byte each: 2 bytes a parameter in place of 8.

8-bit Optimizers via Block-wise Quantization. Tim Dettmers, Mike Lewis, Sam Shleifer, Luke Zettlemoyer. 2021.
https://arxiv.org/abs/2110.02861

The equations are Adam's (``adam``). Between two steps m lies as int8 and sqrt(v) as uint8, each a multiple of one
scale per latent: the power of two that brings the latent's largest entry to 64 to 127, or 128 to 255. Four things keep
it sound:

- sqrt(v), not v: a linear map of v sends every entry below sqrt(1/510) of the row's largest root to 0, and the next
  update divides a first moment that is not 0 by epsilon: NaN within a few steps. The root sends 1/510 to 0.
- such an entry counts as one level in the update: a level of m over it is at most 4 times what the largest entries
  of the row move by.
- stochastic rounding: sqrt(v) falls by 0.05 % a step at most, and half a level is at least 0.2 % of it, so that
  rounding to the nearest would keep an entry where it is for ever.
- powers of two: a scale that followed the largest entry would move every level in every step, and each time round by
  a third of a level; one that stays leaves a level as it is but for the little that Adam changes.

Vectors (biases, thresholds) stay float32: they are one parameter in 2 D, and their entries differ too widely for one
scale.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Int8, UInt8

from saex_pipe.common.sae.adam import Rate, clip_factor

TINY = float(jnp.finfo(jnp.float32).tiny)


class Levels(NamedTuple):
    """A matrix as levels times a scale per latent; the scale has the matrix's axes, 1 long but for the latents'."""

    level: Int8[Array, "..."] | UInt8[Array, "..."]
    scale: Float[Array, "..."]

    def value(self) -> Float[Array, "..."]:
        """The matrix, float32."""
        return self.level.astype(jnp.float32) * self.scale


class Adam8BitState(NamedTuple):
    """Moments by parameter: ``Levels`` of a matrix, float32 of a vector."""

    updates_done: Int[Array, ""]  # int32
    mean: dict[str, Any]  # {} without momentum
    root: dict[str, Any]  # square root of the second moment


def adam_8bit(
    rate: Rate, *, momentum: float, beta_square: float, epsilon: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """Updates of a dict of parameters whose names end in their axes; ``rate`` and the rest as of ``adam_by``."""

    def init(params: dict[str, Array]) -> Adam8BitState:
        mean = {name: _zeros(leaf, jnp.int8) for name, leaf in params.items()} if momentum else {}
        root = {name: _zeros(leaf, jnp.uint8) for name, leaf in params.items()}
        return Adam8BitState(jnp.zeros((), jnp.int32), mean, root)

    def update(gradients: dict[str, Array], state: Adam8BitState, params: Any = None) -> tuple[Any, Adam8BitState]:
        del params
        clip = clip_factor(gradients, clip_norm)
        count = (state.updates_done + 1).astype(jnp.float32)
        scale = rate(state.updates_done) / (1 - momentum**count)
        unbias_root = jax.lax.rsqrt(1 - beta_square**count)
        key = jax.random.fold_in(jax.random.key(0), state.updates_done)
        updates: dict[str, Array] = {}
        means: dict[str, Levels | Array] = {}
        roots: dict[str, Levels | Array] = {}
        for number, (name, gradient) in enumerate(sorted(gradients.items())):
            root = state.root[name]
            least: Array | float = root.scale if isinstance(root, Levels) else 0.0
            g = clip * gradient
            m = momentum * _value(state.mean[name]) + (1 - momentum) * g if momentum else g
            r = jnp.sqrt(beta_square * jnp.square(_value(root)) + (1 - beta_square) * jnp.square(g))
            updates[name] = -scale * m / (unbias_root * jnp.maximum(r, least) + epsilon)
            if isinstance(root, Levels):
                bits = jax.random.bits(jax.random.fold_in(key, number), g.shape)
                means[name], roots[name] = _levels(m, 127, bits & 0xFFFF), _levels(r, 255, bits >> 16)
            else:
                means[name], roots[name] = m, r
        return updates, Adam8BitState(state.updates_done + 1, means if momentum else {}, roots)

    return optax.GradientTransformation(init, update)


def _zeros(leaf: Array, dtype: Any) -> Levels | Array:
    if leaf.ndim < 2:
        return jnp.zeros_like(leaf)
    return Levels(jnp.zeros(leaf.shape, dtype), jnp.zeros(_largest(leaf).shape, jnp.float32))


def _value(moment: Levels | Array) -> Array:
    return moment.value() if isinstance(moment, Levels) else moment


def _largest(leaf: Array) -> Array:
    """The largest absolute entry of each row."""
    return jnp.max(jnp.abs(leaf), axis=1, keepdims=True)


def _levels(leaf: Array, top: int, noise: Array) -> Levels:
    """``leaf`` rounded stochastically to ``top`` levels of its sign; ``noise`` is uniform in 0 to 65535."""
    largest = _largest(leaf)
    scale = jnp.where(largest > 0, jnp.ldexp(1.0, jnp.frexp(largest / top)[1]), 0.0)
    part = (noise.astype(jnp.float32) + 0.5) / 65536
    level = jnp.clip(jnp.floor(leaf / jnp.maximum(scale, TINY) + part), -top, top)
    return Levels(level.astype(jnp.int8 if top == 127 else jnp.uint8), scale)
