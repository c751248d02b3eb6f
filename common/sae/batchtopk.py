"""BatchTopK sparse autoencoder: k active latents per row on average, shared out over the rows of a batch.

BatchTopK sparse autoencoders. Bart Bussmann, Patrick Leask, Neel Nanda. 2024. https://arxiv.org/abs/2412.06410

    z     = (x - b_pre) W_enc + b_enc            b_pre = b_dec, except for a transcoder: b_pre = 0
    f     = the k B largest relu(z) of the B rows of a batch
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 / ||x - mean||^2 + a L_aux                     AuxK: see ``auxk``, a = 1/32

Rows of W_dec have unit length. Where they have not, ``rank_by_decoder_norm`` compares relu(z_i) ||W_dec,i|| instead, as
SAELens does. Codes of a trained SAE must not depend on what else is in the batch: they are f_i = z_i 1[z_i > theta_i],
with thresholds that are set once, after training (``calibration``). Until then they are 0.

k may fall: with ``k_start`` it goes linearly from there to k over the first ``k_fraction`` of the steps.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from saex_pipe.common.sae.auxk import auxk_loss
from saex_pipe.common.sae.batch_select import cut, largest
from saex_pipe.common.sae.batch_sums import rows_above_zero
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.contract import DecoderRows, LossTerms, Moment, Params, Variant, variant
from saex_pipe.common.sae.crossover import Sizes
from saex_pipe.common.sae.initial import FOR_LARGEST, DataStats, Initial
from saex_pipe.common.sae.matmul import centred_matmul
from saex_pipe.common.sae.nested import decode_nested, decode_nested_pairs, fit_nested, with_bias
from saex_pipe.common.sae.pairs import Pairs, encoded, pays
from saex_pipe.common.sae.reconstruction import Reconstruction
from saex_pipe.common.sae.schedules import k_now
from saex_pipe.common.sae.select import every_column
from saex_pipe.common.sae.sparse import Slots
from saex_pipe.common.sae.straight_through import above


@variant(swept=("auxiliary_coefficient",))
class BatchTopK(Variant):
    """Hyperparameters; the equations are at the head of the file."""

    k: int  # active latents per row, on average
    k_start: int | None = None  # its first value; None: k
    k_fraction: float = 0.1  # share of the steps over which it falls to k
    rank_by_decoder_norm: bool = False
    auxiliary_coefficient: float = 1 / 32
    k_auxiliary: int | None = None  # dead latents per row in the auxiliary loss; None: half the target's width
    auxiliary_stride: int = 1  # the auxiliary loss reads every n-th row
    decoder_rows: DecoderRows = "unit"
    reconstruction: Reconstruction = "variance_normalised"
    initial: Initial = FOR_LARGEST

    @property
    def level_widths(self) -> tuple[int, ...]:
        """How many latents each nested dictionary has: one that has all."""
        return (self.latents,)

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """Parameters at step 0."""
        return {**super().init(key, stats), "threshold_F": jnp.zeros(self.latents, jnp.float32)}

    def encode(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN) -> Float[Array, "B F"]:
        """Codes of the rows, each by itself: those above the thresholds."""
        return above(self.pre_activations(params, x_BD, compute), params["threshold_F"])

    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch, with the codes that the batch selects. ``sparsity_scale`` has nothing to scale here."""
        rows = x_BD.shape[0]
        count = jnp.round(rows * k_now(self.k, self.k_start, self.k_fraction, moment.fraction_done)).astype(jnp.int32)
        sizes = Sizes(rows, target_BD.shape[1], self.latents, self.most)
        product = self._by_pairs if pays(compute, sizes) else self._by_matrices
        levels, active_F, slots = product(params, x_BD, count, compute)
        levels = with_bias(self, params, x_BD, levels, compute)
        fitted = fit_nested(self.reconstruction, target_BD, levels)
        auxk = partial(auxk_loss, k=self.k_auxiliary, stride=self.auxiliary_stride, slots=slots)
        auxiliary = auxk(self, params, x_BD, target_BD - levels[-1], moment.dead_F, compute)
        auxiliary *= self.auxiliary_coefficient
        return LossTerms.of(fitted, active_F, rows, auxiliary=auxiliary)

    @property
    def most(self) -> int:
        """Active latents per row at most, on average."""
        return max(self.k, self.k_start or self.k)

    def scores(
        self, params: Params, z_BC: Float[Array, "B C"], pick: Callable[[Array], Array] = every_column
    ) -> Float[Array, "B C"]:
        """By what the latents of a batch are compared, of those that ``pick`` picks; without gradient."""
        scores_BC = jax.nn.relu(z_BC)
        if self.rank_by_decoder_norm:
            scores_BC = scores_BC * pick(self.decoder_norms(params))
        return jax.lax.stop_gradient(scores_BC)

    def _by_matrices(
        self, params: Params, x_BD: Array, count: Int[Array, ""], compute: Compute
    ) -> tuple[list[Array], Int[Array, " F"], Slots | None]:
        """Reconstructions of all levels without bias, on how many rows each latent was active, and the slots of the
        weights, None where there are none. By matrices of codes: few of them are gone by where they pay (``few``)."""
        z_BF = self.pre_activations(params, x_BD, compute)
        scores_BF = self.scores(params, z_BF)
        codes_BF = jnp.where(scores_BF >= cut(scores_BF, count), z_BF, 0.0)
        levels = decode_nested(codes_BF, params["w_dec_FD"], self.level_widths, compute)
        return levels, rows_above_zero(codes_BF), None

    def _by_pairs(
        self, params: Params, x_BD: Array, count: Int[Array, ""], compute: Compute
    ) -> tuple[list[Array], Int[Array, " F"], Slots | None]:
        """The same by way of the active latents only."""
        rows = x_BD.shape[0]
        held = jax.lax.stop_gradient(params)
        u_BF = centred_matmul(x_BD, self.b_pre(held), held["w_enc_FD"], compute.dtype)

        def scores(u_BC: Array, pick: Callable[[Array], Array]) -> Array:
            return self.scores(held, u_BC + pick(held["b_enc_F"]), pick)

        places_P, taken_P = largest(u_BF, rows * self.most, count, scores)
        latents_P = places_P % self.latents
        values_P = jnp.where(taken_P, u_BF.reshape(-1)[places_P] + held["b_enc_F"][latents_P], 0.0)
        pairs = Pairs(values_P, places_P // self.latents, latents_P)
        codes_P, to_enc_FD = encoded(x_BD, self.b_pre(params), params["w_enc_FD"], params["b_enc_F"], pairs)
        pairs = pairs._replace(values_P=codes_P)
        levels, to_dec_FD = decode_nested_pairs(pairs, params["w_dec_FD"], self.level_widths, rows)
        positive_P = (values_P > 0).astype(jnp.int32)
        active_F = jnp.zeros(self.latents, jnp.int32).at[pairs.latents_P].add(positive_P)
        return levels, active_F, Slots(to_enc_FD, to_dec_FD)

    def published_learning_rate(self) -> float:
        """3e-4, that of Bussmann's nested BatchTopK (https://arxiv.org/abs/2503.17547), at every number of latents."""
        return 3e-4
