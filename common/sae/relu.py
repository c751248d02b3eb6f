"""ReLU sparse autoencoder with a sparsity penalty.

    f     = relu((x - b_pre) W_enc + b_enc)
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + lambda penalty(f)

as a mean over rows and a sum over axes. A penalty of codes alone could be had for nothing by small codes and long rows
of W_dec. There are three published ways to prevent that:

free           sum_i f_i ||W_dec,i||, b_pre = 0: indifferent to that exchange (``weighted_by_decoder_norms``). The
               default. Circuits Updates, April 2024: "Update on how we train SAEs". Tom Conerly, Adly Templeton,
               Trenton Bricken, Jonathan Marcus, Tom Henighan.
               https://transformer-circuits.pub/2024/april-update/index.html#training-saes
               For inputs scaled to a mean norm of sqrt(D), lambda is about 5 and rises over the first 5 % of the steps.
unit           ||W_dec,i|| = 1 after every step, b_pre = b_dec. The part of the gradient along W_dec,i, which that would
               undo, is removed before Adam sees it. Towards monosemanticity. Trenton Bricken et al. 2023.
               https://transformer-circuits.pub/2023/monosemantic-features/index.html#appendix-autoencoder
at_most_unit   ||W_dec,i|| <= 1, saex's "lte" (https://github.com/neverix/saex): a row may shrink, and a latent fade.

``variants.build`` gives the last two, which are ``decoder_rows``, what they are published with.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Params, variant
from saex_pipe.common.sae.dense import SWEPT_WITH_PENALTY, Activations, Penalised
from saex_pipe.common.sae.initial import Initial


@variant(swept=SWEPT_WITH_PENALTY)
class Relu(Penalised):
    """Hyperparameters; the equations are at the head of the file.

    The update starts its biases at 0; here they start so that they centre input and output, which spares the first
    steps of learning it.
    """

    weighted_by_decoder_norms: bool = True
    centred: bool = False
    initial: Initial = Initial(decoder_norm=0.1)

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What each way to fix the decoder's rows is published with."""
        free = given.get("decoder_rows", "free") == "free"
        return {} if free else {"centred": True, "weighted_by_decoder_norms": False}

    def published_sparsity_warmup(self) -> float:
        """That of the April update."""
        return 0.05

    def activations(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute) -> Activations:
        """Penalised are the codes."""
        pre_BF = self.pre_activations(params, x_BD, compute)
        codes_BF = jax.nn.relu(pre_BF)
        return Activations(pre_BF, codes_BF, codes_BF)
