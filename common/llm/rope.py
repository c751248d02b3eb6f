"""Rotary positions: how fast each pair of a head's dimensions turns, whatever scaling stretches the context.

Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864. Every published scaling comes down to a divisor for each
frequency and a factor on cosine and sine, so that is all that a ``Rope`` holds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from saex_pipe.common.errors import InputError


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer. Hashable, as a part of an ``Architecture``."""

    theta: float  # the slowest pair turns about theta times slower than the fastest
    dims: int  # the leading dimensions of a head that turn; the others stay
    divisors: tuple[float, ...] = ()  # of the frequencies, dims / 2 of them; none: all 1
    long_divisors: tuple[float, ...] = ()  # instead, in windows of more than long_above tokens
    long_above: int = 0
    magnitude: float = 1.0  # on cosine and sine

    def frequencies(self, length: int) -> Float64[np.ndarray, " half"]:
        """Radians per position, fastest first, in windows of ``length`` tokens."""
        frequencies = self.theta ** (-np.arange(0, self.dims, 2) / self.dims)
        divisors = self.long_divisors if self.long_divisors and length > self.long_above else self.divisors
        return frequencies / np.asarray(divisors) if divisors else frequencies


def from_hugging_face(
    parameters: Mapping[str, Any], *, head_dim: int, max_positions: int, default_theta: float, where: str
) -> Rope:
    """A ``Rope`` from ``rope_parameters`` of ``config.json`` (or ``rope_scaling`` and ``rope_theta`` joined).

    Raises an ``InputError`` for a scaling or field that is not known; ``where`` is for its message.
    """
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters.get("rope_theta", default_theta))
    dims = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if kind == "mrope" or kind not in _SCALINGS:
        raise InputError(
            f"{where}: rotary scaling {kind!r} is not one this version runs", f"known ones are {', '.join(_SCALINGS)}"
        )
    fields = {name: value for name, value in parameters.items() if name not in known and value is not None}
    if unknown := sorted(set(fields) - _SCALINGS[kind]):
        raise InputError(
            f"{where}: field {unknown[0]!r} of rotary scaling {kind!r} is not known to this version",
            f"known ones are {', '.join(sorted(_SCALINGS[kind])) or 'none'}",
        )
    try:
        return _scaled(kind, fields, theta, dims, max_positions)
    except KeyError as error:
        raise InputError(f"{where}: rotary scaling {kind!r} lacks {error}", "get an intact copy of the model") from None


_LENGTH = "original_max_position_embeddings"
# The fields that each kind reads.
_SCALINGS: dict[str, frozenset[str]] = {
    "default": frozenset({_LENGTH}),  # Phi-3 names the length without scaling by it
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _LENGTH}),
    "longrope": frozenset({"factor", "attention_factor", "short_factor", "long_factor", _LENGTH}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _LENGTH}
    ),
}
_SCALINGS["su"] = _SCALINGS["longrope"]  # its name in Phi-3's first files


def _scaled(kind: str, fields: Mapping[str, Any], theta: float, dims: int, max_positions: int) -> Rope:
    original = int(fields.get(_LENGTH, max_positions))
    if kind == "linear":
        return linear(theta, dims, fields["factor"])
    if kind == "llama3":
        return llama3(theta, dims, fields["factor"], fields["low_freq_factor"], fields["high_freq_factor"], original)
    if kind in ("longrope", "su"):
        magnitude = fields.get("attention_factor") or longrope_magnitude(
            fields.get("factor") or max_positions / original, original
        )
        return longrope(theta, dims, fields["short_factor"], fields["long_factor"], original, magnitude)
    if kind == "yarn":
        factor = fields.get("factor") or max_positions / original
        magnitude = fields.get("attention_factor") or _yarn_magnitude(factor, fields)
        slow, fast = fields.get("beta_slow") or 1, fields.get("beta_fast") or 32
        return yarn(theta, dims, factor, original, slow, fast, magnitude, fields.get("truncate", True))
    return Rope(theta, dims)


def linear(theta: float, dims: int, factor: float) -> Rope:
    """Positions divided by ``factor``. Chen et al. 2023, https://arxiv.org/abs/2306.15595"""
    return Rope(theta, dims, (float(factor),) * (dims // 2))


def llama3(theta: float, dims: int, factor: float, low: float, high: float, original: int) -> Rope:
    """Slow pairs divided by ``factor``, fast ones kept, a ramp between.

    A pair is slow that turns fewer than ``low`` times in the ``original`` context, fast with more than ``high``.
    The Llama 3 Herd of Models, https://arxiv.org/abs/2407.21783
    """
    turns = original * Rope(theta, dims).frequencies(0) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return Rope(theta, dims, _tuple(1 / ((1 - kept) / factor + kept)))


def longrope(theta: float, dims: int, short: list[float], long: list[float], original: int, magnitude: float) -> Rope:
    """A searched divisor for each pair, others beyond the ``original`` context. https://arxiv.org/abs/2402.13753"""
    if not len(short) == len(long) == dims // 2:
        raise InputError(
            f"longrope has {len(short)} short and {len(long)} long factors for heads that turn in {dims} dimensions",
            "get an intact copy of the model",
        )
    return Rope(theta, dims, _tuple(short), _tuple(long), original, float(magnitude))


def longrope_magnitude(factor: float, original: int) -> float:
    """The factor on cosine and sine that LongRoPE derives from how far the context is stretched."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def yarn(
    theta: float,
    dims: int,
    factor: float,
    original: int,
    slow: float = 1,
    fast: float = 32,
    magnitude: float | None = None,
    truncate: bool = True,
) -> Rope:
    """Divisors on a ramp over the pairs between those of ``fast`` and of ``slow`` turns in the ``original`` context.

    Peng et al. 2023, YaRN, https://arxiv.org/abs/2309.00071
    """
    low, high = (dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low or 0.001), 0, 1)
    magnitude = _yarn_magnitude(factor, {}) if magnitude is None else magnitude
    return Rope(theta, dims, _tuple(1 / (ramp / factor + 1 - ramp)), magnitude=float(magnitude))


def _yarn_magnitude(factor: float, fields: Mapping[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    weight, weight_all = fields.get("mscale"), fields.get("mscale_all_dim")
    return scale(weight) / scale(weight_all) if weight and weight_all else scale(1)


def _tuple(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
