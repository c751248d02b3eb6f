"""Gradients through attention, which end-to-end training needs: those of softmax attention written out densely."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.llm import attention

LENGTH, SCALE = 11, 0.5


def dense(query_NLGrd, key_NLGd, value_NLGd, *, cap, window):
    scores = SCALE * jnp.einsum("nqgrd,nkgd->ngrqk", query_NLGrd, key_NLGd)
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    distance_QK = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None]
    visible_QK = (distance_QK >= 0) & (distance_QK < (window or LENGTH))
    weights = jax.nn.softmax(jnp.where(visible_QK[None, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("ngrqk,nkgd->nqgrd", weights, value_NLGd)


@pytest.mark.parametrize("block", [4, 128], ids=["three blocks", "one block"])
@pytest.mark.parametrize(("cap", "window"), [(0.0, None), (3.0, None), (0.0, 3), (0.0, 6)])
def test_gradients_equal_those_of_dense_attention(block, cap, window, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    rng = np.random.default_rng(0)
    shapes = (2, LENGTH, 2, 3, 4), (2, LENGTH, 2, 4), (2, LENGTH, 2, 4)
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    # As in a scan over blocks of alternating windows, where the window is an array.
    traced = None if window is None else jnp.int32(window)

    def ours(*inputs):
        found = attention.causal_attention(*inputs, scale=SCALE, cap=cap, window=traced, dtype=jnp.float32)
        return jnp.sum(weights * found)

    def theirs(*inputs):
        return jnp.sum(weights * partial(dense, cap=cap, window=window)(*inputs))

    with jax.default_matmul_precision("highest"):
        found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*inputs) for f in (ours, theirs))
    for ours_, theirs_ in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours_, theirs_, rtol=1e-4, atol=1e-5 * np.abs(theirs_).max())
