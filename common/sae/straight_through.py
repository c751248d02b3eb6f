"""The jump of a JumpReLU and the step under an L0, with gradients that reach the threshold.

Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders. Senthooran Rajamanoharan,
Tom Lieberum, Nicolas Sonnerat, Arthur Conmy, Vikrant Varma, Janos Kramar, Neel Nanda. 2024.
https://arxiv.org/abs/2407.14435, equations 11 and 12

    jump(z) = z 1[z > theta]       d/dz = 1[z > theta]    d/dtheta = -(theta / eps) K((z - theta) / eps)
    step(z) =   1[z > theta]       d/dz = 0               d/dtheta = -(1 / eps)     K((z - theta) / eps)

with the rectangle K(u) = 1[|u| < 1/2] and the bandwidth eps. They estimate the gradient of the mean over rows, whose
true derivative by theta sees only the density of z at theta. With ``to_input`` the jump's d/dz gains the negative of
its d/dtheta, as a function of z - theta has it: the form of Anthropic's January 2025 update, which trains all
parameters through the estimate (https://transformer-circuits.pub/2025/january-update/index.html).

Both take theta itself, not its logarithm: a chain rule through exp would multiply d/dtheta by theta once more, and
Adam, which moves a parameter by about its learning rate a step, would hardly move a small theta.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex_pipe.common.sae.batch_sums import over_batch


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

    def estimate(z_BF: Array, out_BF: Array) -> Array:
        return _near(z_BF, threshold_F, bandwidth, out_BF) * threshold_F[None]

    passed_BF = jnp.where(z_BF > threshold_F[None], out_BF, 0.0)
    to_z_BF = passed_BF + estimate(z_BF, out_BF) if to_input else passed_BF
    return to_z_BF, -over_batch(estimate, z_BF, out_BF)


jump.defvjp(_jump_forward, _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_above(z_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"], bandwidth: float) -> Float[Array, " F"]:
    """The sum over rows of ``step``: on how many of them ``z`` is above the threshold, float32."""
    return over_batch(lambda z_BF: (z_BF > threshold_F[None]).astype(jnp.float32), z_BF)


def _rows_above_forward(z_BF: Array, threshold_F: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return rows_above(z_BF, threshold_F, bandwidth), (z_BF, threshold_F)


def _rows_above_backward(bandwidth: float, saved: tuple[Array, Array], out_F: Array) -> tuple[Array, Array]:
    z_BF, threshold_F = saved
    return jnp.zeros_like(z_BF), -over_batch(lambda z_BF: _near(z_BF, threshold_F, bandwidth, out_F[None]), z_BF)


rows_above.defvjp(_rows_above_forward, _rows_above_backward)


def near(z_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"], bandwidth: float) -> Bool[Array, "B F"]:
    """Where ``z`` is within half a bandwidth of its threshold: there ``jump`` asks for the gradient of the code, which
    below the threshold is 0."""
    return jnp.abs(z_BF - threshold_F[None]) < bandwidth / 2


def _near(z_BF: Array, threshold_F: Array, bandwidth: float, out_BF: Array) -> Array:
    """``out / eps`` within half a bandwidth of the threshold, else 0."""
    return jnp.where(near(z_BF, threshold_F, bandwidth), out_BF / bandwidth, 0.0)
