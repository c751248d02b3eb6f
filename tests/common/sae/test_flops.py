"""The count of a step's operations, against the products that the gradient of a loss is traced to."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from saex_pipe.common.sae.contract import Moment
from saex_pipe.common.sae.flops import step_flops
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.variants import build

B, D_IN, D_OUT, F = 96, 16, 10, 48


def products(jaxpr):
    """Operations of every matrix product of at least B x D x D in a traced function."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), shape = equation.params["dimension_numbers"], equation.invars[0].aval.shape
            flops = 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
            if flops >= 2 * B * D_OUT * D_OUT:
                yield flops
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip"])
def test_a_dense_variant_does_what_is_counted(kind):
    width_out = D_IN if kind == "autoencoder" else D_OUT
    variant = build("relu", F, sparsity_coefficient=1.0, transcoder=kind != "autoencoder", skip=kind == "skip")
    params = variant.init(jax.random.key(0), DataStats(jnp.ones(D_IN), jnp.ones(width_out)))
    x_BD, target_BD = jnp.ones((B, D_IN)), jnp.ones((B, width_out))
    traced = jax.make_jaxpr(jax.grad(lambda p: variant.loss(p, x_BD, target_BD, Moment.plain(F))[0]))(params)
    # Less what nobody asks for, as the compiler does it: the gradient to the rows.
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    assert sum(products(needed)) == step_flops(variant, params, B)


def test_a_sparse_variant_is_charged_for_its_active_latents():
    variant = build("topk", F, k=4, transcoder=True)
    params = variant.init(jax.random.key(0), DataStats(jnp.ones(D_IN), jnp.ones(D_OUT)))
    encoder, decoder, three_gradients = B * D_IN * F, B * 4 * D_OUT, B * 4 * (D_OUT + D_OUT + D_IN)
    assert step_flops(variant, params, B) == 2 * (encoder + decoder + three_gradients)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    assert step_flops(variant, stacked, B) == step_flops(variant, params, B), "of one SAE"
