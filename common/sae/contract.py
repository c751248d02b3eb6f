"""What every SAE variant has in common: its parameters, the statistics it starts from, its loss terms.

A variant is a frozen dataclass of hyperparameters whose methods are pure functions of a parameter dict. It is a pytree
as well: the hyperparameters that ``variant(swept=...)`` names are leaves, so that SAEs which differ in them alone go
through ``jax.vmap`` as one stack, and all others are static. ``variants.VARIANTS`` lists the variants.

Input and target may differ (a transcoder): ``D_in`` is the width of the input, ``D_out`` that of the target. A
crosscoder reads and writes several taps, concatenated: both are the sum of ``tap_widths``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae import few
from saex_pipe.common.sae.batch_sums import shifted
from saex_pipe.common.sae.compute import PLAIN, Compute
from saex_pipe.common.sae.initial import DataStats, Initial, initial_params
from saex_pipe.common.sae.matmul import matmul, written_out
from saex_pipe.common.sae.reconstruction import Fit, Reconstruction

# Float32 arrays w_enc_FD [F, D_in] (the transpose of W_enc in equations), b_enc_F [F], w_dec_FD [F, D_out] and b_dec_D
# [D_out]; with ``skip`` w_skip_DD [D_in, D_out] too, and whatever else a variant has. Latents are the axis called F
# in the name, and the first.
Params = dict[str, Array]

DecoderRows = Literal["unit", "at_most_unit", "free"]
V = TypeVar("V")
PLAIN_START = Initial()
FASTEST_TURN = 0.1  # radians a step, of a row of unit length


class Moment(NamedTuple):
    """What a loss may know of the training around its batch. Float32 scalars and counts of one SAE."""

    dead_F: Bool[Array, " F"]  # has not fired for so long that it counts as dead
    frequency_F: Float[Array, " F"]  # share of the recent rows on which the latent fired
    sparsity_scale: Float[Array, ""]  # multiplies the sparsity coefficient: its schedule
    fraction_done: Float[Array, ""]  # of all steps, 0 at the first

    @staticmethod
    def plain(latents: int) -> "Moment":
        """No latent dead, all firing rarely, full penalty, at the end of training."""
        return Moment(jnp.zeros(latents, bool), jnp.full(latents, 1e-3), jnp.ones(()), jnp.ones(()))


class LossTerms(NamedTuple):
    """The loss of one batch and what it is made of. A term that a variant does not have is 0."""

    total: Float[Array, ""]  # what is minimised
    reconstruction: Float[Array, ""]  # as it enters ``total``, in the unit of the variant's ``reconstruction``
    sparsity: Float[Array, ""]  # penalty as it enters ``total``
    auxiliary: Float[Array, ""]  # dead-latent and other losses as they enter ``total``
    l0: Float[Array, ""]  # active latents per row
    fvu: Float[Array, ""]  # fraction of the batch's variance left unexplained
    active_F: Int[Array, " F"]  # rows of the batch on which the latent was active

    @staticmethod
    def of(
        fitted: Fit,
        active_F: Int[Array, " F"],
        rows: int,
        *,
        sparsity: Float[Array, ""] | None = None,
        auxiliary: Float[Array, ""] | None = None,
    ) -> "tuple[Float[Array, ''], LossTerms]":
        """The loss, which is the sum of its parts, and the terms of a batch of ``rows``; None is a part of 0."""
        sparsity = jnp.zeros((), jnp.float32) if sparsity is None else sparsity
        auxiliary = jnp.zeros((), jnp.float32) if auxiliary is None else auxiliary
        total = fitted.loss + sparsity + auxiliary
        l0 = jnp.sum(active_F).astype(jnp.float32) / rows
        return total, LossTerms(total, fitted.loss, sparsity, auxiliary, l0, fitted.fvu, active_F)


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """The contract; ``tests/common/sae/test_contract.py`` holds every variant to it."""

    latents: int  # F
    transcoder: bool = False  # input and target are different activations
    skip: bool = False  # a transcoder's linear path from input to target beside the latents
    tap_widths: tuple[int, ...] = ()  # of a crosscoder's taps, which input and target are concatenations of
    decoder_rows: DecoderRows = "free"  # what ``constrain`` keeps the lengths of the decoder's rows at
    centred: bool = True  # encode x - b_dec rather than x; a transcoder never does
    reconstruction: Reconstruction = "squared"
    initial: Initial = PLAIN_START

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that depend on the settings ``given``, by field; those of the fields hold for the rest."""
        del given
        return {}

    def init(self, key: PRNGKeyArray, stats: DataStats) -> Params:
        """Parameters at step 0. A decoder whose rows are constrained starts at the limit.

        Raises:
            InputError: ``initial`` has a decoder of zeros whose rows are to have unit length, or does not fit the data.
        """
        if self.decoder_rows == "unit" and self.initial.decoder == "zero":
            raise InputError("a decoder of zeros cannot have rows of unit length", "set decoder_rows to free")
        initial = self.initial if self.decoder_rows == "free" else replace(self.initial, decoder_norm=1.0)
        return initial_params(
            initial,
            key,
            self.latents,
            stats,
            centred=self.subtracts_decoder_bias,
            skip=self.skip,
            firing_level=self.firing_level,
        )

    @property
    def firing_level(self) -> float:
        """What a latent's pre-activation must be above at the start for it to fire."""
        return 0.0

    @abstractmethod
    def encode(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN) -> Float[Array, "B F"]:
        """Codes of the rows, non-negative, float32."""

    @abstractmethod
    def loss(
        self,
        params: Params,
        x_BD: Float[Array, "B D_in"],
        target_BD: Float[Array, "B D_out"],
        moment: Moment,
        compute: Compute = PLAIN,
    ) -> tuple[Float[Array, ""], LossTerms]:
        """Loss of one batch."""

    @abstractmethod
    def published_learning_rate(self) -> float:
        """Peak learning rate for Adam, scaled with the number of latents where the source says so."""

    def published_sparsity_warmup(self) -> float:
        """Share of the run over which the sparsity penalty rises from 0."""
        return 0.0

    def default_learning_rate(self, width: int, steps: int) -> float:
        """Peak learning rate for a run of ``steps`` on rows of ``width``: the published one, or more for a short run.

        A step of Adam at rate r moves each of D weights by about r, and so turns a row of unit length by r sqrt(D).
        Directions start at random and must turn by about a right angle, for which runs shorter than the published ones
        leave no time at their rate. Turns of 0.1 a step reconstructed better than 0.05 and 0.2 after 244 steps on toy
        data (D=256) and after 448 on a language model (D=576), and little worse than 0.2 after 112. 2 / sqrt(steps)
        joins that to the published rates: 3e-4 for D=768 and 60,000 steps.
        """
        turn = min(FASTEST_TURN, 2 / steps**0.5)
        return max(self.published_learning_rate(), turn / width**0.5)

    def decode(
        self, params: Params, codes_BF: Float[Array, "B F"], compute: Compute = PLAIN
    ) -> Float[Array, "B D_out"]:
        """Reconstruction from codes, float32, without the skip path."""
        return matmul(codes_BF, params["w_dec_FD"], compute.dtype) + params["b_dec_D"][None]

    def decode_few(
        self,
        params: Params,
        codes_BF: Float[Array, "B F"],
        compute: Compute,
        *,
        held: bool = False,
    ) -> Float[Array, "B D_out"]:
        """The same, by way of the active codes alone where they are few; no gradient reaches codes that are 0, nor the
        parameters where they are ``held``."""
        recon_BD = few.decoded(codes_BF, params["w_dec_FD"], compute, held=held)
        return recon_BD + params["b_dec_D"][None]

    def reconstruct(
        self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute = PLAIN
    ) -> Float[Array, "B D_out"]:
        """``decode(encode(x))`` and the skip path, float32."""
        return self.with_skip(params, x_BD, self.decode(params, self.encode(params, x_BD, compute), compute), compute)

    @property
    def subtracts_decoder_bias(self) -> bool:
        """Whether ``b_dec`` is taken off the input before it is encoded."""
        return self.centred and not self.transcoder

    def b_pre(self, params: Params) -> Float[Array, " D_in"]:
        """What is taken off the input before the encoder's matrix reads it."""
        return params["b_dec_D"] if self.subtracts_decoder_bias else jnp.zeros(params["w_enc_FD"].shape[1], jnp.float32)

    def pre_activations(self, params: Params, x_BD: Float[Array, "B D_in"], compute: Compute) -> Float[Array, "B F"]:
        """``(x - b_pre) W_enc + b_enc``, float32."""
        z_BF = few.encoded(x_BD, self.b_pre(params), params["w_enc_FD"], compute)
        return shifted(z_BF, params["b_enc_F"])

    def shift_pre_activations(self, params: Params, shift_F: Float[Array, " F"]) -> Params:
        """Parameters whose every encoder adds ``shift_F`` to what ``x W_enc`` gives it."""
        return {**params, "b_enc_F": params["b_enc_F"] + shift_F}

    def with_skip(
        self, params: Params, x_BD: Float[Array, "B D_in"], recon_BD: Float[Array, "B D_out"], compute: Compute
    ) -> Float[Array, "B D_out"]:
        """``recon_BD``, and with ``skip`` the linear path from the input."""
        return recon_BD + matmul(x_BD, params["w_skip_DD"], compute.dtype) if self.skip else recon_BD

    def decoder_norms(self, params: Params) -> Float[Array, " F"]:
        """Lengths of the decoder's rows; of a crosscoder the sum of the lengths in each of its taps."""
        return row_norms(params["w_dec_FD"], self.tap_widths)

    def project_gradients(self, params: Params, gradients: Params) -> Params:
        """Remove the part of the gradients that ``constrain`` would undo."""
        if self.decoder_rows == "free":
            return gradients
        w_dec_FD, gradient_FD = params["w_dec_FD"], gradients["w_dec_FD"]
        along_F = jnp.sum(gradient_FD * w_dec_FD, axis=1)
        square_F = jnp.sum(jnp.square(w_dec_FD), axis=1)
        if self.decoder_rows == "at_most_unit":  # only at the limit, and only what points out of it
            along_F = jnp.where((square_F >= 1 - 1e-6) & (along_F < 0), along_F, 0.0)
        scale_F1 = (along_F / jnp.maximum(square_F, 1e-30))[:, None]
        return {**gradients, "w_dec_FD": gradient_FD - scale_F1 * w_dec_FD}

    def constrain(self, params: Params) -> Params:
        """Bring the parameters back onto the variant's constraint after an update."""
        if self.decoder_rows == "free":
            return params
        w_dec_FD = written_out(params["w_dec_FD"])
        norms_F1 = jnp.linalg.norm(w_dec_FD, axis=1, keepdims=True)
        limit_F1 = norms_F1 if self.decoder_rows == "unit" else jnp.maximum(norms_F1, 1.0)
        return {**params, "w_dec_FD": w_dec_FD / jnp.maximum(limit_F1, 1e-30)}

    def learning_rate_factors(self) -> dict[str, float]:
        """Parameters that learn at another rate than the others, and how many times that rate."""
        return {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def variant(*, swept: tuple[str, ...] = ()) -> Callable[[type[V]], type[V]]:
    """Make a class a variant: a frozen dataclass, and a pytree whose leaves are the fields ``swept`` (floats)."""

    def register(cls: type[V]) -> type[V]:
        made = dataclass(frozen=True, kw_only=True)(cls)
        static = [field.name for field in fields(made) if field.name not in swept]  # type: ignore[arg-type]
        return jax.tree_util.register_dataclass(made, data_fields=list(swept), meta_fields=static)

    return register


def axes_of(name: str) -> str:
    """The axes in which the name of an array ends: ``"FD"`` of ``w_enc_FD``, ``""`` where there are none."""
    axes = name.rpartition("_")[2]
    return axes if axes.isalpha() and axes.isupper() else ""


def has_latents(name: str) -> bool:
    """Whether the parameter of that name has a row, or an entry, for each latent: they come first in all that do."""
    return axes_of(name).startswith("F")


def row_norms(w_FD: Float[Array, "F D"], tap_widths: tuple[int, ...] = ()) -> Float[Array, " F"]:
    """Lengths of the rows, or sums over ``tap_widths`` of the lengths of their parts. A row of zeros has gradient 0."""
    if not tap_widths:
        square_F = jnp.sum(jnp.square(w_FD), axis=1)
        return jnp.where(square_F > 0, jnp.sqrt(jnp.where(square_F > 0, square_F, 1.0)), 0.0)
    norms, start = [], 0
    for width in tap_widths:
        norms.append(row_norms(w_FD[:, start : start + width]))
        start += width
    return jnp.sum(jnp.stack(norms), axis=0)
