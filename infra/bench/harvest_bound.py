"""What the harvest benchmark measures against: the matmuls of the forward pass alone, and nothing else of it.

Counted are, for every block that is computed: the projections of queries, keys and values, of the attention's output,
into the MLP and out of it, on all tokens; and attention's two products for each block of 128 queries against all keys
up to the last that one of them sees. Inputs are in the compute dtype, sums in float32. Norms, rotary positions,
softmax, activations and the residual stream are not counted; between its two products attention's scores are rounded
to the compute dtype. The weights are those of the model, so that as many bytes of them are read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from saex_pipe.common.llm.params import LanguageModel

QUERIES = 128  # to a block


def bare_matmuls(model: LanguageModel, windows: int, length: int) -> Callable[[], object]:
    """The matmuls of all loaded blocks on ``windows`` windows of ``length`` tokens."""
    a, blocks = model.architecture, model.blocks
    layers, dtype = blocks.layers, blocks.w_down.dtype
    weights = [
        blocks.w_qkv[...].reshape(layers, a.width, -1),
        blocks.w_attn_out[...],
        blocks.w_in[...].reshape(layers, a.width, -1),
        blocks.w_down[...],
    ]
    inputs = [jnp.ones((windows * length, w.shape[1]), dtype) for w in weights]
    keys = jnp.zeros((windows, a.kv_heads, length, a.head_dim), dtype)  # zeros, so that nothing overflows
    heads = (windows, a.kv_heads, a.query_heads // a.kv_heads, length, a.head_dim)

    @jax.jit
    def run(inputs: list[jax.Array], weights: list[jax.Array], keys: jax.Array) -> list[jax.Array]:
        def layer(carried: list[jax.Array], weights: list[jax.Array]) -> tuple[list[jax.Array], None]:
            mixed = attention(carried[-1].astype(dtype), keys)  # carried on, or it would be computed once for all
            pairs = zip(inputs, weights, strict=True)
            return [*(jnp.matmul(x, w, preferred_element_type=jnp.float32) for x, w in pairs), mixed], None

        start = [jnp.zeros((windows * length, w.shape[2]), jnp.float32) for w in weights]
        return jax.lax.scan(layer, [*start, jnp.zeros(heads, jnp.float32)], weights)[0]

    return lambda: run(inputs, weights, keys)


def attention(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Attention's two products, [N, G, r, L, d] with keys [N, G, L, d] that also serve as values."""
    windows, groups, repeats, length, head_dim = queries.shape
    mixed = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        block = queries[..., start:stop, :].reshape(windows, groups, repeats * (stop - start), head_dim)
        seen = keys[:, :, :stop]
        scores = jnp.einsum("ngqd,ngkd->ngqk", block, seen, preferred_element_type=jnp.float32)
        found = jnp.einsum("ngqk,ngkd->ngqd", scores.astype(keys.dtype), seen, preferred_element_type=jnp.float32)
        mixed.append(found.reshape(windows, groups, repeats, stop - start, head_dim))
    return jnp.concatenate(mixed, axis=3)
