"""The jump of a JumpReLU and the step under an L0, with gradients that reach the threshold.

Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders. Senthooran Rajamanoharan,
Tom Lieberum, Nicolas Sonnerat, Arthur Conmy, Vikrant Varma, Janos Kramar, Neel Nanda. 2024.
https://arxiv.org/abs/2407.14435, equations 11 and 12

    jump(z) = z 1[z > theta]       d/dz = 1[z > theta]    d/dtheta = -(theta / eps) K((z - theta) / eps)
    step(z) =   1[z > theta]       d/dz = 0               d/dtheta = -(1 / eps)     K((z - theta) / eps)

with the rectangle K(u) = 1[|u| < 1/2] and the bandwidth eps. They estimate the gradient of the mean over rows, whose
true derivative by theta sees only the density of z at theta. With ``to_input`` both d/dz gain the negative of
d/dtheta, as a function of z - theta has it: the form of Anthropic's January 2025 update, which trains all parameters
through the estimate (https://transformer-circuits.pub/2025/january-update/index.html).

Both take theta itself, not its logarithm: a chain rule through exp would multiply d/dtheta by theta once more, and
Adam, which moves a parameter by about its learning rate a step, would hardly move a small theta.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def above(z_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"]) -> Float[Array, "B F"]:
    """Codes of a trained SAE: ``z`` where it is above threshold and 0, else 0."""
    return jnp.where(z_BF > jnp.maximum(threshold_F, 0.0)[None], z_BF, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump(
    z_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"], bandwidth: float, to_input: bool
) -> Float[Array, "B F"]:
    """``z`` where it is above the threshold (of at least 0), else 0."""
    return jnp.where(z_BF > threshold_F[None], z_BF, 0.0)


def _jump_forward(z_BF: Array, threshold_F: Array, bandwidth: float, to_input: bool) -> tuple[Array, tuple]:
    return jump(z_BF, threshold_F, bandwidth, to_input), (z_BF, threshold_F)


def _jump_backward(bandwidth: float, to_input: bool, saved: tuple, out_BF: Array) -> tuple[Array, Array]:
    z_BF, threshold_F = saved
    estimate_BF = _near(z_BF, threshold_F, bandwidth, out_BF) * threshold_F[None]
    passed_BF = jnp.where(z_BF > threshold_F[None], out_BF, 0.0)
    return passed_BF + estimate_BF if to_input else passed_BF, -jnp.sum(estimate_BF, axis=0)


jump.defvjp(_jump_forward, _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def step(
    z_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"], bandwidth: float, to_input: bool
) -> Float[Array, "B F"]:
    """1 where ``z`` is above the threshold, else 0, float32."""
    return (z_BF > threshold_F[None]).astype(jnp.float32)


def _step_forward(z_BF: Array, threshold_F: Array, bandwidth: float, to_input: bool) -> tuple[Array, tuple]:
    return step(z_BF, threshold_F, bandwidth, to_input), (z_BF, threshold_F)


def _step_backward(bandwidth: float, to_input: bool, saved: tuple, out_BF: Array) -> tuple[Array, Array]:
    z_BF, threshold_F = saved
    estimate_BF = _near(z_BF, threshold_F, bandwidth, out_BF)
    return estimate_BF if to_input else jnp.zeros_like(estimate_BF), -jnp.sum(estimate_BF, axis=0)


step.defvjp(_step_forward, _step_backward)


def _near(z_BF: Array, threshold_F: Array, bandwidth: float, out_BF: Array) -> Array:
    """``out / eps`` within half a bandwidth of the threshold, else 0."""
    return jnp.where(jnp.abs(z_BF - threshold_F[None]) < bandwidth / 2, out_BF / bandwidth, 0.0)
