"""What every SAE variant has in common: its parameters, the statistics it starts from, its loss terms.

A variant is a frozen dataclass of hyperparameters whose methods are pure functions of a parameter dict, so
that a stack of S parameter dicts can go through ``jax.vmap``. ``variants.VARIANTS`` lists them.

Input and target may differ (a transcoder): ``D_in`` is the width of the input, ``D_out`` that of the target.
"""

from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

# float32 arrays w_enc_DF [D_in, F], b_enc_F [F], w_dec_FD [F, D_out], b_dec_D [D_out].
Params = dict[str, Array]

# What matmuls read. They always accumulate in float32; weights, biases and statistics stay float32.
ComputeDtype = Literal["float32", "bfloat16"]


class DataStats(NamedTuple):
    """Statistics of the training rows, in the (normalised) units the SAE is trained in."""

    input_mean_D: Float[Array, " D_in"]
    target_mean_D: Float[Array, " D_out"]  # equals input_mean_D except for a transcoder


class LossTerms(NamedTuple):
    """The loss of one batch and what it is made of. A term that a variant does not have is 0."""

    total: Float[Array, ""]  # what is minimised
    reconstruction: Float[Array, ""]  # topk: fraction of the batch variance; relu: squared error per row
    sparsity: Float[Array, ""]  # penalty as it enters ``total``
    auxiliary: Float[Array, ""]  # dead-latent loss as it enters ``total``
    l0: Float[Array, ""]  # active latents per row
    fvu: Float[Array, ""]  # fraction of the batch's variance left unexplained
    fired_F: Bool[Array, " F"]  # latent was active on at least one row


class Variant(Protocol):
    """The contract; ``tests/common/sae/test_contract.py`` holds every variant to it."""

    @property
    def latents(self) -> int:
        """Number of latents F."""

    @property
    def transcoder(self) -> bool:
        """True if input and target are different activations."""

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """Parameters at step 0."""

    def encode(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B F"]:
        """Codes of the rows, non-negative, float32."""

    def decode(
        self, params: Params, codes_BF: Float[Array, "B F"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B D_out"]:
        """Reconstruction from codes, float32."""

    def reconstruct(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute_dtype: ComputeDtype = "float32"
    ) -> Float[Array, "B D_out"]:
        """``decode(encode(x))``, float32."""

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        dead_F: Bool[Array, " F"],
        compute_dtype: ComputeDtype = "float32",
        sparsity_scale: float | Float[Array, ""] = 1.0,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch; ``sparsity_scale`` multiplies the sparsity penalty (its warm-up)."""

    def project_gradients(self, params: Params, gradients: Params) -> Params:
        """Remove the part of the gradients that ``constrain`` would undo."""

    def constrain(self, params: Params) -> Params:
        """Bring the parameters back onto the variant's constraint after an update."""

    def default_learning_rate(self) -> float:
        """Peak learning rate for Adam, scaled with the number of latents."""


def unit_rows(w_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """``w_FD`` with every row scaled to length 1."""
    return w_FD / jnp.linalg.norm(w_FD, axis=1, keepdims=True)


def without_parallel(w_FD: Float[Array, "F D"], gradient_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """``gradient_FD`` without its component along the rows of ``w_FD``, which have unit length."""
    return gradient_FD - jnp.sum(gradient_FD * w_FD, axis=1, keepdims=True) * w_FD


def squared_error_and_variance(
    target_BD: Float[Array, "B D"], recon_BD: Float[Array, "B D"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over rows and axes of (target - recon)^2 and of (target - batch mean)^2."""
    centred_BD = target_BD - jnp.mean(target_BD, axis=0, keepdims=True)
    return jnp.sum(jnp.square(target_BD - recon_BD)), jnp.sum(jnp.square(centred_BD))


def ratio_or_zero(numerator: Float[Array, ""], denominator: Float[Array, ""]) -> Float[Array, ""]:
    """numerator / denominator, and 0 (with a gradient of 0) where the denominator is 0."""
    usable = denominator > 0
    return jnp.where(usable, numerator, 0.0) / jnp.where(usable, denominator, 1.0)
