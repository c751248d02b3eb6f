"""What the training benchmark times: whole steps, the parts of one, and bare matrix products of the same shapes."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from saex_pipe.common.sae.compute import Compute, ComputeDtype
from saex_pipe.common.sae.contract import DataStats, Moment, Params, Variant
from saex_pipe.common.sae.flops import step_flops
from saex_pipe.common.sae.matmul import by_transposed, over_rows
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import Optimiser, OptimiserName, adam
from saex_pipe.common.sae.select import top_k
from saex_pipe.common.sae.sparse import ActiveCodes, decode_active
from saex_pipe.common.sae.train_step import StepSettings, init_state, make_step
from saex_pipe.common.sae.variants import VARIANTS, build

TOTAL_STEPS = 100_000  # of the training that a step is taken from
# What a setting that has no default is set to; the speed of a step does not depend on it.
REQUIRED = {"sparsity_coefficient": 1.0, "target_l0": 32.0}
FORM = {"jumprelu_form": "l0"}  # SAELens' default
# Products that ``step_flops`` does not count: Gated's second reconstruction and its gradient.
MORE_PRODUCTS = {"gated": 2}

Call = Callable[[], Any]
Codes = Literal["auto", "sparse", "dense"]


class Shape(NamedTuple):
    """Of one training step."""

    rows: int
    width: int
    latents: int
    k: int

    def __str__(self) -> str:
        return f"B={self.rows} D={self.width} F={self.latents} K={self.k}"


class Part(NamedTuple):
    """A part of a step, and the floating-point operations of products that it cannot do without; 0: none."""

    name: str
    call: Call
    flops: float


def variant_of(name: str, shape: Shape) -> Variant:
    """The variant with its defaults, k and what else it has to be told."""
    known = {field.name: field for field in fields(VARIANTS[name])}
    settings = {key: REQUIRED.get(key) for key, field in known.items() if field.default is MISSING}
    settings |= {"k": shape.k} if "k" in known else {}
    settings |= {key: value for key, value in FORM.items() if key in known}
    return build(name, shape.latents, **{key: value for key, value in settings.items() if key != "latents"})


def rows_of(shape: Shape) -> jax.Array:
    """Gaussian rows."""
    return jax.random.normal(jax.random.key(0), (shape.rows, shape.width))


def initial(variant: Variant, shape: Shape) -> Params:
    """Parameters at step 0, for rows of mean 0."""
    zeros, rows = jnp.zeros(shape.width), rows_of(shape)
    return jax.jit(lambda key: variant.init(key, DataStats(zeros, zeros, rows, rows)))(jax.random.key(1))


def with_active(variant: Variant, params: Params, shape: Shape) -> Params:
    """Parameters of which k latents a row are active on average, as after training, in place of half of all."""
    z_BF = variant.pre_activations(params, rows_of(shape)[:256], Compute())
    level = jnp.quantile(z_BF, 1 - shape.k / shape.latents)
    if "threshold_F" in params:
        return {**params, "threshold_F": jnp.full(shape.latents, level)}
    return variant.shift_pre_activations(params, jnp.full(shape.latents, -level))


def whole_step(
    variant: Variant,
    shape: Shape,
    dtype: ComputeDtype,
    *,
    few: bool,
    codes: Codes = "auto",
    optimiser: OptimiserName = "adam",
) -> Call:
    """Calls that go on training one state, as the train stage does.

    Args:
        variant: what is trained.
        shape: of a step.
        dtype: of the inputs of its products.
        few: whether k latents stay active on average.
        codes: how products with codes are computed, as ``Compute.codes``.
        optimiser: its name.
    """
    built = Optimiser(name=optimiser).build(TOTAL_STEPS)
    settings = StepSettings(total_steps=TOTAL_STEPS, compute=Compute(dtype=dtype, codes=codes))
    step = jax.jit(make_step(built, settings), donate_argnums=2)
    scale = Normaliser(jnp.ones(shape.width))
    normalisers = jax.tree.map(jnp.copy, Normalisers(scale, scale))
    params = initial(variant, shape)
    params = with_active(variant, params, shape) if few else params
    state = init_state(params, built, normalisers)
    x_BD, rate = rows_of(shape), jnp.float32(0 if few else variant.published_learning_rate())

    def call() -> Any:
        nonlocal state
        state, terms = step(variant, rate, state, x_BD, x_BD)
        return terms

    return call


def needed_flops(name: str, shape: Shape, *, few: bool) -> float:
    """Of the products of one step, see ``common.sae.flops``; ``few``: with k of F codes active."""
    variant = variant_of("topk" if few else name, shape)
    shapes = jax.eval_shape(lambda: initial(variant, shape))
    more = 0 if few else MORE_PRODUCTS.get(name, 0) * shape.rows * shape.width * shape.latents
    return step_flops(variant, shapes, shape.rows) + 2.0 * more


def dense_products(shape: Shape, dtype: ComputeDtype) -> Part:
    """The five products of a dense step: encoder, decoder, gradient to the codes, gradients of both weights."""
    keys = jax.random.split(jax.random.key(2), 3)
    x_BD, codes_BF = rows_of(shape), jax.random.normal(keys[0], (shape.rows, shape.latents)).astype(dtype)
    w_DF, w_FD = (jax.random.normal(key, (shape.width, shape.latents)).astype(dtype) for key in keys[1:])
    w_FD, x_BD = w_FD.T.copy(), x_BD.astype(dtype)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    @jax.jit
    def all_five(x_BD: jax.Array, codes_BF: jax.Array, w_DF: jax.Array, w_FD: jax.Array) -> list[jax.Array]:
        encoder, to_codes = product(x_BD, w_DF), product(x_BD, w_FD.T)
        gradients = [over_rows(codes_BF, x_BD, dtype), over_rows(x_BD, codes_BF, dtype)]
        return [encoder, product(codes_BF, w_FD), to_codes, *gradients]

    flops = 10.0 * shape.rows * shape.width * shape.latents
    return Part("five bare products", lambda: all_five(x_BD, codes_BF, w_DF, w_FD), flops)


def encoder_product(shape: Shape, dtype: ComputeDtype) -> Part:
    """The one dense product that every variant has."""
    x_BD = rows_of(shape)
    w_FD = jax.random.normal(jax.random.key(3), (shape.latents, shape.width))
    product = jax.jit(lambda a, b: by_transposed(a, b, dtype))
    return Part("encoder product", lambda: product(x_BD, w_FD), 2.0 * shape.rows * shape.width * shape.latents)


def update_only(variant: Variant, params: Params) -> Call:
    """Projection, clipping, Adam and the constraint."""
    optimiser = adam(TOTAL_STEPS)

    def update(params: Params, opt_state: Any, gradients: Params) -> tuple[Params, Any]:
        updates, opt_state = optimiser.update(variant.project_gradients(params, gradients), opt_state)
        return variant.constrain(jax.tree.map(lambda p, u: p + 1e-4 * u, params, updates)), opt_state

    jitted = jax.jit(update, donate_argnums=(0, 1))
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), params)
    carried = (jax.tree.map(jnp.copy, params), optimiser.init(params))

    def call() -> Any:
        nonlocal carried
        carried = jitted(*carried, gradients)
        return carried

    return call


def topk_parts(shape: Shape, dtype: ComputeDtype) -> list[Part]:
    """A TopK step taken apart; selection and update have no products."""
    variant, x_BD = variant_of("topk", shape), rows_of(shape)
    params = initial(variant, shape)
    encoder = encoder_product(shape, dtype)
    z_BF = jax.block_until_ready(encoder.call())
    select = jax.jit(lambda z: top_k(z, shape.k))
    active = ActiveCodes(*select(z_BF))
    decode = jax.jit(decode_active)
    decoder_gradient = jax.jit(lambda a, w, out: jax.vjp(lambda a, w: decode_active(a, w)[0], a, w)[1](out))
    compute, plain = Compute(dtype=dtype), Moment.plain(shape.latents)
    half_dead = plain._replace(dead_F=jnp.arange(shape.latents) % 2 == 0)
    gradient = jax.jit(jax.grad(lambda p, moment: variant.loss(p, x_BD, x_BD, moment, compute)[0]))
    sparse = 2.0 * shape.rows * shape.width * shape.k
    return [
        encoder,
        Part("selection", lambda: select(z_BF), 0),
        Part("decoder", lambda: decode(active, params["w_dec_FD"]), sparse),
        Part("gradients of the decoder", lambda: decoder_gradient(active, params["w_dec_FD"], x_BD), 2 * sparse),
        Part("loss and gradients", lambda: gradient(params, plain), encoder.flops + 4 * sparse),
        Part("loss and gradients, half of the latents dead", lambda: gradient(params, half_dead), 0),
        Part("update", update_only(variant, params), 0),
    ]
