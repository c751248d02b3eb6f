import jax
import numpy as np
import pytest

from saex_pipe.common.llm.cross_entropy import kl_divergence, next_token_cross_entropy, next_token_losses
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def logits_NLV():
    return np.random.default_rng(0).normal(size=(3, 7, 29)).astype(np.float32) * 8


def test_cross_entropy_equals_numpy(logits_NLV):
    tokens_NL = np.random.default_rng(1).integers(0, 29, (3, 7))
    expected = [[-log_softmax(logits_NLV)[n, i, tokens_NL[n, i + 1]] for i in range(6)] for n in range(3)]
    np.testing.assert_allclose(next_token_cross_entropy(logits_NLV, tokens_NL), expected, rtol=2e-6)


def test_cross_entropy_of_huge_and_of_even_logits():
    tokens_NL = np.array([[0, 1, 2]])
    logits_NLV = np.zeros((1, 3, 4), np.float32)
    np.testing.assert_allclose(next_token_cross_entropy(logits_NLV, tokens_NL), np.log(4) * np.ones((1, 2)), rtol=1e-6)
    logits_NLV[0, 0, 1] = 1e5
    assert next_token_cross_entropy(logits_NLV, tokens_NL)[0, 0] == 0


def test_kl_equals_numpy_and_has_a_direction(logits_NLV):
    other_NLV = logits_NLV[::-1] * 0.5
    log_p, log_q = log_softmax(logits_NLV), log_softmax(other_NLV)
    np.testing.assert_allclose(
        kl_divergence(logits_NLV, other_NLV), (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-4
    )
    np.testing.assert_allclose(kl_divergence(logits_NLV, logits_NLV), np.zeros((3, 7)), atol=1e-6)
    assert not np.allclose(kl_divergence(logits_NLV, other_NLV), kl_divergence(other_NLV, logits_NLV), rtol=0.1)


@pytest.mark.parametrize("rows", [4, 256])
def test_losses_in_pieces_equal_those_of_all_logits(rows, tiny_llama, tmp_path, monkeypatch):
    """22 tokens in pieces of 4 (with a remainder), and in less than one."""
    monkeypatch.setattr("saex_pipe.common.llm.cross_entropy.ROWS_AT_ONCE", rows)
    tiny = tiny_llama(tied=False)
    model = load_model(tiny.write_folder(tmp_path), dtype="float32")
    tokens_NL = tiny.tokens_NL()
    halve = {"blocks.1.mlp_out": lambda value, _: value / 2}

    @jax.jit
    def run(model, tokens_NL):
        clean = apply(model, tokens_NL, taps=["final_norm"])
        edited = apply(model, tokens_NL, taps=["final_norm"], edits=halve)
        both = next_token_losses(model, edited.taps["final_norm"], tokens_NL, clean.taps["final_norm"])
        return clean, edited, both, next_token_losses(model, edited.taps["final_norm"], tokens_NL)

    clean, edited, losses, alone = run(model, tokens_NL)
    assert alone.kl_NL is None
    assert alone.reference_NL1 is None
    of_clean = next_token_cross_entropy(clean.logits_NLV, tokens_NL)
    np.testing.assert_allclose(losses.reference_NL1, of_clean, rtol=1e-5)
    for found in (losses, alone):
        expected = next_token_cross_entropy(edited.logits_NLV, tokens_NL)
        np.testing.assert_allclose(found.cross_entropy_NL1, expected, rtol=1e-5)
    np.testing.assert_allclose(losses.kl_NL, kl_divergence(clean.logits_NLV, edited.logits_NLV), rtol=1e-4, atol=1e-6)
    assert losses.kl_NL.min() > 1e-4
