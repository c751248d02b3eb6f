"""Matryoshka sparse autoencoders: nested dictionaries, each of which must reconstruct the target by itself.

Learning multi-level features with Matryoshka sparse autoencoders. Bart Bussmann, Noa Nabeshima, Adam Karvonen,
Neel Nanda. 2025. https://arxiv.org/abs/2503.17547

    L = sum_g loss(x, f_{1..m_g} W_dec,{1..m_g} + b_dec) + what BatchTopK or JumpReLU adds

One selection or one set of thresholds serves all levels, and the first latents, which every level uses, become the
general ones. The levels are summed, each counted once: with G levels a mean would make AuxK and penalties G times as
heavy (dictionary_learning divides by G twice). A trained SAE is its last level.
"""

from saex_pipe.common.sae.batchtopk import BatchTopK
from saex_pipe.common.sae.contract import variant
from saex_pipe.common.sae.jumprelu import SWEPT, JumpRelu

LEVEL_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)  # groups of a 32nd, 16th, eighth and quarter, and the rest


def widths_at(latents: int, given: tuple[int, ...]) -> tuple[int, ...]:
    """Latents of each level, ascending to all: those ``given``, or at ``LEVEL_SHARES``."""
    widths = given or tuple(max(1, round(share * latents)) for share in LEVEL_SHARES)
    return tuple(sorted({*widths, latents}))


@variant(swept=("auxiliary_coefficient",))
class MatryoshkaBatchTopK(BatchTopK):
    """Hyperparameters; the equations are at the head of the file and of ``batchtopk``."""

    levels: tuple[int, ...] = ()  # latents of the nested dictionaries; (): at LEVEL_SHARES

    @property
    def level_widths(self) -> tuple[int, ...]:
        """How many latents each nested dictionary has."""
        return widths_at(self.latents, self.levels)


@variant(swept=SWEPT)
class MatryoshkaJumpRelu(JumpRelu):
    """Hyperparameters; the equations are at the head of the file and of ``jumprelu``."""

    levels: tuple[int, ...] = ()  # latents of the nested dictionaries; (): at LEVEL_SHARES

    @property
    def level_widths(self) -> tuple[int, ...]:
        """How many latents each nested dictionary has."""
        return widths_at(self.latents, self.levels)
