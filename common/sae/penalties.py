"""Sparsity penalties: pure functions of codes, which are not negative.

Of one row of codes f, summed over latents:

    l1          sum f
    sqrt_l1     sum sqrt(f)
    tanh        sum tanh(c f)
    hoyer       (sum f)^2 / sum f^2
    reciprocal  sum f / (f + eps)
    l0          sum 1[f > 0], with the pseudo-gradient (1/h) 1[f < h/2] where f > 0

l1          Towards monosemanticity. Trenton Bricken et al. 2023.
            https://transformer-circuits.pub/2023/monosemantic-features/index.html
sqrt_l1     Improving SAE's by sqrt()-ing L1 and removing lowest activating features. Logan Riggs, Jannik Brinkmann.
            2024. https://www.lesswrong.com/posts/YiGs8qJ8aNBgwt2YN
tanh        Circuits updates, February 2024: tanh penalty in dictionary learning. Adam Jermyn et al.
            https://transformer-circuits.pub/2024/feb-update/index.html; c = 4 is that of January 2025.
hoyer       DeepHoyer: learning sparser neural network with differentiable scale-invariant sparsity measures.
            Huanrui Yang, Wei Wen, Hai Li. 2019. https://arxiv.org/abs/1908.09979
reciprocal  Experiments with an alternative method to promote sparsity in sparse autoencoders. Eoin Farrell. 2024.
            https://www.lesswrong.com/posts/cYA3ePxy8JQ8ajo8B; eps falls in steps while training goes on, as in saex.
l0          Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders. Senthooran Rajamanoharan
            et al. 2024. https://arxiv.org/abs/2407.14435: a rectangle of width h in place of the delta function.

Weighting by decoder norms puts f_i ||W_dec,i|| in the place of f_i, which makes each of them indifferent to a latent's
code and decoder row being scaled against each other.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex_pipe.common.sae.batch_sums import scaled, summed

Penalty = Literal["l1", "sqrt_l1", "tanh", "hoyer", "reciprocal", "l0"]
# c of tanh (per unit of code), eps of reciprocal at the end and bandwidth h of l0 (units of code). The paper's h is
# 0.001, for codes that a learned threshold keeps away from 0; here nothing but the kernel moves a small code to 0.
DEFAULT_SCALES: dict[Penalty, float] = {"tanh": 4.0, "reciprocal": 0.05, "l0": 0.1}
# Until which fraction of all steps eps is how many times its last value: saex's 0.2, 0.1, 0.05 over 100,000 steps.
RECIPROCAL_STEPS = ((0.1, 4.0), (0.2, 2.0))
# Codes below this count linearly where the true derivative has no bound, and rows below it towards 0.
SMALL_CODE = 1e-5


def mean_penalty(
    kind: Penalty,
    codes_BF: Float[Array, "B F"],
    norms_F: Float[Array, " F"] | None,
    scale: float | Float[Array, ""] | None,
    fraction_done: Float[Array, ""],
) -> Float[Array, ""]:
    """The penalty of that kind as a mean over rows, float32.

    Args:
        kind: the equations are at the head of the file.
        codes_BF: not negative, float32.
        norms_F: lengths of the decoder's rows to weight codes with; None: no weighting.
        scale: c, eps or h, above 0; None: ``DEFAULT_SCALES``. Kinds that have none ignore it.
        fraction_done: of all steps, for the schedule of ``reciprocal``.
    """
    if kind == "l1" and norms_F is not None:  # rows are summed first: one pass over the codes, for the gradient too
        return jnp.dot(summed(codes_BF), norms_F) / codes_BF.shape[0]
    weighted_BF = codes_BF if norms_F is None else scaled(codes_BF, norms_F)
    scale = jnp.asarray(DEFAULT_SCALES.get(kind, 1.0) if scale is None else scale, jnp.float32)
    match kind:
        case "l1":
            penalty_B = jnp.sum(weighted_BF, axis=1)
        case "sqrt_l1":
            penalty_B = power(weighted_BF, jnp.float32(0.5))
        case "tanh":
            penalty_B = jnp.sum(jnp.tanh(scale * weighted_BF), axis=1)
        case "hoyer":
            penalty_B = hoyer(weighted_BF)
        case "reciprocal":
            penalty_B = jnp.sum(weighted_BF / (weighted_BF + scale * reciprocal_factor(fraction_done)), axis=1)
        case "l0":
            penalty_B = l0(weighted_BF, scale)
    return jnp.mean(penalty_B)


def power(codes_BF: Float[Array, "B F"], p: Float[Array, ""]) -> Float[Array, " B"]:
    """sum f^p for 0 < p <= 1; below ``SMALL_CODE`` f SMALL_CODE^(p - 1), so that the derivative stays finite at 0."""
    return jnp.sum(codes_BF * jnp.maximum(codes_BF, SMALL_CODE) ** (p - 1), axis=1)


def hoyer(codes_BF: Float[Array, "B F"]) -> Float[Array, " B"]:
    """(sum f)^2 / sum f^2, between 1 and the number of active latents; 0 for a row without any."""
    return jnp.square(jnp.sum(codes_BF, axis=1)) / (jnp.sum(jnp.square(codes_BF), axis=1) + SMALL_CODE**2)


def l0(codes_BF: Float[Array, "B F"], bandwidth: Float[Array, ""]) -> Float[Array, " B"]:
    """Number of active latents; its gradient is that of a ramp of height 1/2 over ``bandwidth`` / 2."""
    active_BF = (codes_BF > 0).astype(jnp.float32)
    ramp_BF = jnp.minimum(codes_BF / jax.lax.stop_gradient(bandwidth), 0.5)
    return jnp.sum(ramp_BF + jax.lax.stop_gradient(active_BF - ramp_BF), axis=1)


def reciprocal_factor(fraction_done: Float[Array, ""]) -> Float[Array, ""]:
    """How many times its last value eps is at this point of the training."""
    factor = jnp.ones((), jnp.float32)
    for until, times in reversed(RECIPROCAL_STEPS):
        factor = jnp.where(fraction_done < until, times, factor)
    return factor
