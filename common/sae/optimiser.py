"""The optimisers and the one way to build one.

What is not written out here or in ``adam`` and ``adam_8bit`` is optax's.

Adafactor: Adaptive Learning Rates with Sublinear Memory Cost. Noam Shazeer, Mitchell Stern. 2018.
https://arxiv.org/abs/1804.04235 - the second moment of a matrix as the outer product of those of its rows and columns.

Muon: An optimizer for hidden layers in neural networks. Keller Jordan and others. 2024.
https://kellerjordan.github.io/posts/muon/ - the momentum of a matrix, orthogonalised by Newton-Schulz iterations.
Muon is Scalable for LLM Training. Jingyuan Liu and others. 2025. https://arxiv.org/abs/2502.16982 - the factor
0.2 sqrt(max(rows, columns)), with which an update is as large as Adam's and takes Adam's learning rate.

signSGD: Compressed Optimisation for Non-Convex Problems. Jeremy Bernstein, Yu-Xiang Wang, Kamyar Azizzadenesheli,
Anima Anandkumar. 2018. https://arxiv.org/abs/1802.04434 - Signum: the sign of the momentum. A latent that no longer
fires keeps moving at full rate, since the sign of a momentum does not fade.
"""

from dataclasses import dataclass
from typing import Literal

import optax

from saex_pipe.common.sae.adam import adam_by
from saex_pipe.common.sae.adam_8bit import adam_8bit
from saex_pipe.common.sae.schedules import PLAIN_SCHEDULE, RateSchedule

ADAM_EPSILON = 6.25e-10  # Gao et al. 2024, https://arxiv.org/abs/2406.04093, appendix A
MUON_RMS = 0.2  # of an update; Liu et al. 2025
MOMENTUM = {"adam": 0.9, "adam_8bit": 0.9, "adafactor": 0.0, "muon": 0.95, "signum": 0.9}

OptimiserName = Literal["adam", "adam_8bit", "adafactor", "muon", "signum"]


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """Which optimiser, and its constants."""

    name: OptimiserName = "adam"
    momentum: float | None = None  # decay of the first moment; 0: none is kept; None: the value in MOMENTUM
    beta_square: float = 0.999  # decay of Adam's second moment
    epsilon: float = ADAM_EPSILON  # of Adam
    clip_norm: float | None = 1.0  # gradients are scaled down to this global norm; None: never
    schedule: RateSchedule = PLAIN_SCHEDULE

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """Updates for a peak learning rate of 1, to be multiplied by the peak and added to the parameters."""

        def rate(step: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
            return self.schedule.factor(total_steps, step)

        momentum = MOMENTUM[self.name] if self.momentum is None else self.momentum
        if self.name in ("adam", "adam_8bit"):
            adam = adam_by if self.name == "adam" else adam_8bit
            return adam(
                rate,
                momentum=momentum,
                beta_square=self.beta_square,
                epsilon=self.epsilon,
                clip_norm=self.clip_norm,
            )
        if self.name == "adafactor":
            # Without the factor of a parameter's own size, so that learning rates mean what they mean to Adam.
            core = optax.adafactor(rate, multiply_by_parameter_scale=False, momentum=momentum or None)
        elif self.name == "muon":
            core = optax.contrib.muon(rate, beta=momentum, adam_b2=self.beta_square, consistent_rms=MUON_RMS)
        else:
            core = optax.signum(rate, beta=momentum)
        return core if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), core)


def adam(total_steps: int) -> optax.GradientTransformation:
    """The default: Adam (0.9, 0.999, 6.25e-10), clipped to 1, warm-up, constant, linear decay over the last fifth."""
    return Optimiser().build(total_steps)
