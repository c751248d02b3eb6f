"""Initial parameters.

encoder   decoder_transpose   columns of W_enc along rows of W_dec (of directions of their own where input and target
                              differ in width)
          kaiming             uniform with variance 2/D. Delving deep into rectifiers. Kaiming He, Xiangyu Zhang,
                              Shaoqing Ren, Jian Sun. 2015. https://arxiv.org/abs/1502.01852
          orthogonal          orthonormal bases of the input, one after another, each drawn anew
decoder   unit                rows of random directions
          kaiming, orthogonal as above; for kaiming D is the width of a row, as SAELens and Gemma Scope have it
          pseudo_inverse      of the encoder: every input is reconstructed while all latents are linear
          zero                nothing but b_dec is predicted: sparsify's transcoders. Transcoders beat sparse
                              autoencoders for interpretability. Goncalo Paulo, Stepan Shabalin, Nora Belrose. 2025.
                              https://arxiv.org/abs/2501.18823
b_dec     zero, mean, geometric_median of the target's rows (Bricken et al. 2023, Towards monosemanticity)
b_enc     zero
          centred             pre-activations have mean 0
          firing_share        every latent fires on a given share of the rows; 10,000 / F unless set. Circuits updates,
                              January 2025. https://transformer-circuits.pub/2025/january-update/index.html

All are functions of normalised rows, may be jitted, and hold no array of F but those they return and their like, so
that parameters are born where they lie; orthogonal bases are an exception, each device draws all of them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.geometric_median import geometric_median

Draw = Literal["unit", "kaiming", "orthogonal"]
FIRING_ROWS = 4096  # of the sample, at most: they are encoded at once
LATENTS_FIRING = 10_000  # a row, by default, where that is no more than
MOST_FIRING = 0.1  # of the rows: the source's rule asks for more than all of them below 10,000 latents


class DataStats(NamedTuple):
    """Statistics of the training rows, in the (normalised) units the SAE is trained in."""

    input_mean_D: Float[Array, " D_in"]
    target_mean_D: Float[Array, " D_out"]  # equals input_mean_D except for a transcoder
    input_rows_ND: Float[Array, "N D_in"] | None = None  # a sample, where ``Initial.needs_rows``
    target_rows_ND: Float[Array, "N D_out"] | None = None


@dataclass(frozen=True, kw_only=True)
class Initial:
    """How the parameters of an SAE start; the kinds are at the head of the file."""

    decoder_norm: float = 1.0  # length of the decoder's rows, unless they are a pseudo-inverse or zero
    encoder_norm: float | None = None  # length of the encoder's columns, of decoder_transpose; None: ``_fitting_norm``
    encoder: Literal["decoder_transpose", "kaiming", "orthogonal"] = "decoder_transpose"
    decoder: Literal["unit", "kaiming", "orthogonal", "pseudo_inverse", "zero"] = "unit"
    decoder_bias: Literal["zero", "mean", "geometric_median"] = "mean"
    encoder_bias: Literal["zero", "centred", "firing_share"] = "centred"
    firing_share: float | None = None  # of the rows

    def __post_init__(self) -> None:
        if self.encoder == "decoder_transpose" and self.decoder in ("pseudo_inverse", "zero"):
            raise InputError(
                f"a {self.decoder} decoder and an encoder that is its transpose", "set initial_encoder to kaiming"
            )

    @property
    def needs_rows(self) -> bool:
        """Whether statistics must hold a sample of rows."""
        return self.decoder_bias == "geometric_median" or self.encoder_bias == "firing_share"


# Sums of the largest of random directions are about twice as long as what fits the input best.
FOR_LARGEST = Initial(encoder_norm=0.5)


def initial_params(
    initial: Initial,
    key: PRNGKeyArray,
    latents: int,
    stats: DataStats,
    *,
    centred: bool,
    skip: bool,
    firing_level: float = 0.0,
) -> dict[str, Array]:
    """Parameters at step 0.

    Args:
        initial: kinds.
        key: of the random draws.
        latents: F.
        stats: of normalised rows.
        centred: the variant subtracts ``b_dec`` from its input.
        skip: there is a path from input to target, which starts at 0.
        firing_level: what a pre-activation is above where its latent fires.

    Raises:
        InputError: a pseudo-inverse between different widths.
    """
    width_in, width_out = stats.input_mean_D.shape[0], stats.target_mean_D.shape[0]
    w_enc_FD, w_dec_FD = _weights(initial, key, latents, width_in, width_out)
    b_dec_D = stats.target_mean_D.astype(jnp.float32)
    if initial.decoder_bias == "zero":
        b_dec_D = jnp.zeros_like(b_dec_D)
    if initial.decoder_bias == "geometric_median":
        assert stats.target_rows_ND is not None, "a geometric median needs rows"
        b_dec_D = geometric_median(stats.target_rows_ND)
    params = {
        "w_enc_FD": w_enc_FD,
        "b_enc_F": _encoder_bias(initial, w_enc_FD, b_dec_D if centred else None, stats, firing_level),
        "w_dec_FD": w_dec_FD,
        "b_dec_D": b_dec_D,
    }
    return params | ({"w_skip_DD": jnp.zeros((width_in, width_out), jnp.float32)} if skip else {})


def _weights(
    initial: Initial, key: PRNGKeyArray, latents: int, width_in: int, width_out: int
) -> tuple[Float[Array, "F D_in"], Float[Array, "F D_out"]]:
    decoder_key, encoder_key = jax.random.split(key)
    if initial.encoder != "decoder_transpose":
        w_enc_FD = _drawn(initial.encoder, encoder_key, latents, width_in)
    if initial.decoder == "zero":
        return w_enc_FD, jnp.zeros((latents, width_out), jnp.float32)
    if initial.decoder == "pseudo_inverse":
        if width_in != width_out:
            raise InputError(
                f"a pseudo-inverse of the encoder has rows of {width_in}, the target has {width_out}",
                "set initial_decoder to unit",
            )
        return w_enc_FD, _pseudo_inverse(w_enc_FD.T)
    w_dec_FD = initial.decoder_norm * _unit_rows(_drawn(initial.decoder, decoder_key, latents, width_out))
    if initial.encoder == "decoder_transpose":
        w_enc_FD = w_dec_FD
        if width_in != width_out:
            w_enc_FD = initial.decoder_norm * _unit_rows(_drawn(initial.decoder, encoder_key, latents, width_in))
        norm = initial.encoder_norm or _fitting_norm(initial.decoder_norm, latents, width_in)
        w_enc_FD = norm / initial.decoder_norm * w_enc_FD
    return w_enc_FD, w_dec_FD


def _fitting_norm(decoder_norm: float, latents: int, width: int) -> float:
    """Length of the encoder's columns: the decoder's, or less where the reconstruction would be longer than the input.

    Columns of length a and rows of length b along F random directions, of which half are active on a row, sum up to
    a b F / (2 D) times the input. With a = b = 1 that is 9 for F = 4608 and D = 256, and must first be
    unlearnt.
    """
    return min(decoder_norm, 2 * width / (latents * decoder_norm))


def _encoder_bias(
    initial: Initial,
    w_enc_FD: Float[Array, "F D"],
    subtracted_D: Float[Array, " D"] | None,
    stats: DataStats,
    firing_level: float,
) -> Float[Array, " F"]:
    latents = w_enc_FD.shape[0]
    if initial.encoder_bias == "firing_share":
        assert stats.input_rows_ND is not None, "a share of the rows needs rows"
        rows_ND = stats.input_rows_ND[:FIRING_ROWS]
        rows_ND = rows_ND if subtracted_D is None else rows_ND - subtracted_D[None]
        share = initial.firing_share or min(LATENTS_FIRING / latents, MOST_FIRING)
        firing = min(max(round(share * len(rows_ND)), 1), len(rows_ND) - 1)
        z_NF = jnp.sort(rows_ND @ w_enc_FD.T, axis=0, descending=True)
        return firing_level - (z_NF[firing - 1] + z_NF[firing]) / 2
    # With b_dec at the mean, what is subtracted centres the rows already.
    if initial.encoder_bias == "zero" or (subtracted_D is not None and initial.decoder_bias == "mean"):
        return jnp.zeros(latents, jnp.float32)
    mean_D = stats.input_mean_D if subtracted_D is None else stats.input_mean_D - subtracted_D
    return -(w_enc_FD @ mean_D)


def _drawn(kind: Draw, key: PRNGKeyArray, latents: int, width: int) -> Float[Array, "F D"]:
    if kind == "kaiming":
        limit = (6 / width) ** 0.5
        return jax.random.uniform(key, (latents, width), jnp.float32, -limit, limit)
    if kind == "orthogonal":
        bases = jax.random.orthogonal(key, width, (-(-latents // width),), dtype=jnp.float32)
        return bases.reshape(-1, width)[:latents]
    return _unit_rows(jax.random.normal(key, (latents, width), jnp.float32))


def _pseudo_inverse(w_DF: Float[Array, "D F"]) -> Float[Array, "F D"]:
    """Moore and Penrose's, of a matrix of full rank, by way of the smaller of its two Gram matrices."""
    if w_DF.shape[0] <= w_DF.shape[1]:
        return jnp.linalg.solve(jnp.matmul(w_DF, w_DF.T, precision="highest"), w_DF).T
    return jnp.linalg.solve(jnp.matmul(w_DF.T, w_DF, precision="highest"), w_DF.T)


def _unit_rows(w_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    return w_FD / jnp.linalg.norm(w_FD, axis=1, keepdims=True)
