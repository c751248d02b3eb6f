"""What variants have in common whose codes are dense: a ReLU decides what is active, a penalty how much.

    L = L_rec(y, y_hat) + lambda penalty(p) + a remedy(dead latents) + what the variant adds

with y the target, p the activations that are penalised. Penalties are those of ``penalties``, remedies for dead latents
those of ``auxk``, ``ghost`` and ``sparsity_threshold``.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex_pipe.common.sae.auxk import auxk_loss
from saex_pipe.common.sae.batch_sums import rows_above_zero
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import LossTerms, Moment, Params, Variant
from saex_pipe.common.sae.ghost import ghost_loss
from saex_pipe.common.sae.penalties import Penalty, mean_penalty
from saex_pipe.common.sae.reconstruction import Fit, fit, ratio_or_zero
from saex_pipe.common.sae.sparsity_threshold import starving_loss

DeadRemedy = Literal["none", "auxk", "ghost_exp", "ghost_softplus", "sparsity_threshold"]
# Coefficients and scales, which SAEs of one stack may differ in.
SWEPT = ("sparsity_coefficient", "auxiliary_coefficient", "frequency_threshold")
SWEPT_WITH_PENALTY = (*SWEPT, "penalty_scale")


class Activations(NamedTuple):
    """One pass through the encoder, float32."""

    pre_BF: Float[Array, "B F"]  # a latent is active where this is above 0
    penalised_BF: Float[Array, "B F"]  # not negative
    codes_BF: Float[Array, "B F"]


@dataclass(frozen=True, kw_only=True)
class Dense(Variant):
    """Hyperparameters of coefficient and remedy."""

    sparsity_coefficient: float  # lambda
    weighted_by_decoder_norms: bool = False  # the penalty
    dead_remedy: DeadRemedy = "none"
    auxiliary_coefficient: float | None = None  # of the remedy; None: 1/32 for AuxK, else 1
    k_auxiliary: int | None = None  # dead latents per row in AuxK; None: half the target's width
    auxiliary_stride: int = 1  # ghost gradients and AuxK read every n-th row
    ghost_by_share: bool = False  # ghost gradients weigh as much as the share of dead latents
    frequency_threshold: float | None = None  # tau of sparsity_threshold; None: a tenth of the mean frequency

    @abstractmethod
    def activations(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute) -> Activations:
        """What the encoder makes of the rows."""

    def encode(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN) -> Float[Array, "B F"]:
        """Codes of the rows."""
        return self.activations(params, x_BD, compute).codes_BF

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch."""
        found = self.activations(params, x_BD, compute)
        recon_BD = self.with_skip(params, x_BD, self.decode_few(params, found.codes_BF, compute), compute)
        fitted = fit(self.reconstruction, target_BD, recon_BD)
        coefficient = moment.sparsity_scale * self.sparsity_coefficient
        sparsity = coefficient * self.penalise(params, found.penalised_BF, moment)
        auxiliary = self.remedy(params, found, x_BD, target_BD - recon_BD, fitted, moment, compute)
        auxiliary += self.further_loss(params, found, x_BD, target_BD, compute)
        active_F = rows_above_zero(found.codes_BF)
        return LossTerms.of(fitted, active_F, x_BD.shape[0], sparsity=sparsity, auxiliary=auxiliary)

    @abstractmethod
    def penalise(self, params: Params, penalised_BF: Float[Array, "B F"], moment: Moment) -> Float[Array, ""]:
        """The penalty as a mean over rows, without its coefficient."""

    def remedy(
        self,
        params: Params,
        found: Activations,
        x_BD: Float[Array, "B D_in"],
        residual_BD: Float[Array, "B D_out"],
        fitted: Fit,
        moment: Moment,
        compute: Compute,
    ) -> Float[Array, ""]:
        """The loss for dead latents, with its coefficient, in the unit of the reconstruction loss."""
        default = 1 / 32 if self.dead_remedy == "auxk" else 1.0
        coefficient = default if self.auxiliary_coefficient is None else self.auxiliary_coefficient
        params, every = self.for_dead_latents(params), slice(None, None, self.auxiliary_stride)
        match self.dead_remedy:
            case "none":
                return jnp.zeros((), jnp.float32)
            case "auxk":  # a share of the residual's variance, to be compared with that of the target
                left = auxk_loss(
                    self, params, x_BD[every], residual_BD[every], moment.dead_F, compute, k=self.k_auxiliary
                )
                return coefficient * left * jax.lax.stop_gradient(ratio_or_zero(fitted.loss, fitted.fvu))
            case "sparsity_threshold":
                norms_F = self.decoder_norms(params)
                return coefficient * starving_loss(found.pre_BF, norms_F, moment.frequency_F, self.frequency_threshold)
            case "ghost_exp" | "ghost_softplus":
                return coefficient * ghost_loss(
                    "exp" if self.dead_remedy == "ghost_exp" else "softplus",
                    self,
                    params,
                    x_BD[every],
                    residual_BD[every],
                    fitted.loss,
                    moment.dead_F,
                    compute,
                    by_share=self.ghost_by_share,
                )

    def for_dead_latents(self, params: Params) -> Params:
        """Parameters with which a remedy takes pre-activations for codes."""
        return params

    def further_loss(
        self,
        params: Params,
        found: Activations,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        compute: Compute,
    ) -> Float[Array, ""]:
        """What else the variant minimises."""
        return jnp.zeros((), jnp.float32)

    def published_learning_rate(self) -> float:
        """5e-5 at every number of latents: the value of the April update and of its successors."""
        return 5e-5


@dataclass(frozen=True, kw_only=True)
class Penalised(Dense):
    """Hyperparameters of the penalty."""

    penalty: Penalty = "l1"
    penalty_scale: float | None = None  # of tanh, reciprocal and l0; None: ``penalties.DEFAULT_SCALES``

    def penalise(self, params: Params, penalised_BF: Float[Array, "B F"], moment: Moment) -> Float[Array, ""]:
        """The penalty chosen."""
        norms_F = self.decoder_norms(params) if self.weighted_by_decoder_norms else None
        return mean_penalty(self.penalty, penalised_BF, norms_F, self.penalty_scale, moment.fraction_done)
