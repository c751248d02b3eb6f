"""What becomes of the decoder's rows and of the gradient along them in each published form of the ReLU SAE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.sae.contract import Params
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.variants import build

LATENTS, WIDTH = 6, 5
LENGTHS_F = np.array([1.0, 1.0, 0.5, 0.999, 1.0, 1.0])
# The gradient along each row; an update goes against it, so that the row grows where it is below 0.
ALONG_F = np.array([-0.7, 0.7, -0.7, -0.7, 0.0, -2.0])


def relu(decoder_rows: str) -> Relu:
    made = build("relu", LATENTS, sparsity_coefficient=1.0, decoder_rows=decoder_rows)
    assert isinstance(made, Relu)
    return made


def rows_and_gradients() -> tuple[Params, Params, np.ndarray, np.ndarray]:
    """Parameters, gradients; unit directions and the part of the gradient across them, float64."""
    rng = np.random.default_rng(0)
    unit_FD, any_FD = rng.normal(size=(2, LATENTS, WIDTH))
    unit_FD /= np.linalg.norm(unit_FD, axis=1, keepdims=True)
    across_FD = any_FD - (any_FD * unit_FD).sum(axis=1, keepdims=True) * unit_FD
    rest = {"w_enc_FD": jnp.ones((LATENTS, WIDTH)), "b_enc_F": jnp.ones(LATENTS), "b_dec_D": jnp.ones(WIDTH)}
    params = {**rest, "w_dec_FD": jnp.asarray(LENGTHS_F[:, None] * unit_FD, jnp.float32)}
    gradients = {**rest, "w_dec_FD": jnp.asarray(across_FD + ALONG_F[:, None] * unit_FD, jnp.float32)}
    return params, gradients, unit_FD, across_FD


@pytest.mark.parametrize(
    ("decoder_rows", "kept_F"),
    [
        ("free", ALONG_F),
        ("unit", np.zeros(LATENTS)),
        # Only what would make a row longer than 1 is taken away.
        ("at_most_unit", np.array([0, 0.7, -0.7, -0.7, 0, 0])),
    ],
)
def test_the_gradient_keeps_what_the_constraint_lets_it_do(decoder_rows: str, kept_F: np.ndarray) -> None:
    params, gradients, unit_FD, across_FD = rows_and_gradients()
    projected = relu(decoder_rows).project_gradients(params, gradients)
    np.testing.assert_allclose(projected["w_dec_FD"], across_FD + kept_F[:, None] * unit_FD, atol=2e-6)
    for name in ("w_enc_FD", "b_enc_F", "b_dec_D"):
        assert projected[name] is gradients[name]


@pytest.mark.parametrize(
    ("decoder_rows", "lengths_F"),
    [("free", [0.2, 1, 3]), ("unit", [1, 1, 1]), ("at_most_unit", [0.2, 1, 1])],
)
def test_rows_are_brought_back(decoder_rows: str, lengths_F: list[float]) -> None:
    unit_FD = rows_and_gradients()[2][:3]
    params = {"w_dec_FD": jnp.asarray(np.array([[0.2], [1], [3]]) * unit_FD, jnp.float32)}
    constrained = relu(decoder_rows).constrain(params)
    np.testing.assert_allclose(constrained["w_dec_FD"], np.array(lengths_F)[:, None] * unit_FD, rtol=1e-6)


def test_a_row_of_zeros_stays_without_nan() -> None:
    params = {"w_dec_FD": jnp.zeros((LATENTS, WIDTH))}
    for decoder_rows in ("unit", "at_most_unit"):
        np.testing.assert_array_equal(relu(decoder_rows).constrain(params)["w_dec_FD"], 0.0)
        projected = relu(decoder_rows).project_gradients(params, {"w_dec_FD": jnp.ones((LATENTS, WIDTH))})
        np.testing.assert_array_equal(projected["w_dec_FD"], 1.0)


def test_forms_start_and_read_their_input_as_published() -> None:
    stats = DataStats(jnp.ones(WIDTH), jnp.ones(WIDTH))
    for decoder_rows, length, centred, weighted in (
        ("free", 0.1, False, True),
        ("unit", 1.0, True, False),
        ("at_most_unit", 1.0, True, False),
    ):
        variant = relu(decoder_rows)
        assert (variant.centred, variant.weighted_by_decoder_norms) == (centred, weighted)
        params = variant.init(jax.random.key(0), stats)
        np.testing.assert_allclose(np.linalg.norm(params["w_dec_FD"], axis=1), length, rtol=1e-5)
        np.testing.assert_array_equal(params["w_enc_FD"], params["w_dec_FD"])
        # The mean of the data encodes to 0 either way.
        np.testing.assert_allclose(variant.encode(params, jnp.ones((1, WIDTH))), 0.0, atol=1e-6)
