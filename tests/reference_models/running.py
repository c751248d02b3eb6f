"""Our decoder on the tiny models, and how far its values are from the reference's."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from reference_models.folders import KEPT, tokens_NL
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.llm.taps import all_names

LIMIT = 1e-5  # the relative error that rounding in float32 explains
Values = dict[str, np.ndarray]


def compile_forward() -> Callable[[LanguageModel, np.ndarray], dict[str, jax.Array]]:
    """Every tap and ``logits``; each call gives a function with compilations of its own."""

    def forward(model: LanguageModel, tokens_NL: jax.Array) -> dict[str, jax.Array]:
        output = apply(model, tokens_NL, taps=all_names(model.architecture))
        return {**output.taps, "logits": output.logits_NLV}

    # The code generator's own optimisations take as long as everything else and gain nothing at this size.
    return jax.jit(forward, compiler_options={"xla_backend_optimization_level": 0})


# One function for all tests, so that equal architectures share a compilation.
_FORWARD = compile_forward()


def compute(path: Path, dtype: str = "float32", forward: Callable = _FORWARD) -> Values:
    """Every tap of both windows, and ``logits``."""
    return {name: np.asarray(value) for name, value in forward(load_model(path, dtype=dtype), tokens_NL()).items()}


def kept(values: Mapping[str, np.ndarray]) -> Values:
    """The values of the window that is recorded."""
    return {name: value[KEPT] for name, value in values.items()}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def errors(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The relative error of every value; both must have the same ones."""
    assert set(found) == set(expected)
    return {name: relative_error(found[name], value) for name, value in expected.items()}


def check_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], limit: float = LIMIT) -> None:
    """Fail with the first value, in the order of computation, that is further away than ``limit``."""
    for name, error in errors(found, expected).items():
        assert error <= limit, f"{name}: relative error {error:.1e}"
