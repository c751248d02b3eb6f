"""Milliseconds of one SAE training step and of its parts, beside bare matmuls in the same run.

    python infra/bench/sae_step.py [--quick] [--rows 2048] [--width 576] [--latents 4608] [--k 32]

Prints one JSON line per case. ``bound`` is the time that the case's FLOPs would take at the rate of one bare matmul of
the encoder's shape in the same compute dtype: B D F multiply-adds for the encoder, and for TopK B K D for each of
decoder, its gradient to the codes, and the two weight gradients; ReLU pays B D F for all five. A case without
matmuls (selection, update) has no bound. Rounds of all cases alternate, and values are medians, so that other load
on the machine hits all alike.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from saex_pipe.common.host_memory import keep_freed_memory
from saex_pipe.common.sae.contract import ComputeDtype, DataStats, Params, Variant
from saex_pipe.common.sae.matmul import matmul
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.select import top_k
from saex_pipe.common.sae.sparse import ActiveCodes, decode_active
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.train_step import init_state, make_step
from saex_pipe.common.sae.variants import build


class Case(NamedTuple):
    """Something to time, and the multiply-adds it cannot do without."""

    name: str
    call: Callable[[], Any]
    multiply_adds: int


def whole_step(variant: Variant, params: Params, x_BD: jax.Array, compute_dtype: ComputeDtype) -> Callable[[], Any]:
    """Calls that go on training one state, as the train stage does."""
    optimiser = adam(1e-4, 10_000)
    step = jax.jit(make_step(variant, optimiser, 2**30, compute_dtype), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.copy, params), optimiser)

    def call() -> Any:
        nonlocal state
        state, terms = step(state, x_BD, x_BD)
        return terms

    return call


def update_only(variant: Variant, params: Params) -> Callable[[], Any]:
    """Projection, clipping, Adam and the constraint."""
    optimiser = adam(1e-4, 10_000)

    def update(params: Params, opt_state: Any, gradients: Params) -> tuple[Params, Any]:
        updates, opt_state = optimiser.update(variant.project_gradients(params, gradients), opt_state)
        return variant.constrain(jax.tree.map(jnp.add, params, updates)), opt_state

    jitted = jax.jit(update, donate_argnums=(0, 1))
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), params)
    carried = (jax.tree.map(jnp.copy, params), optimiser.init(params))

    def call() -> Any:
        nonlocal carried
        carried = jitted(*carried, gradients)
        return carried

    return call


def cases(rows: int, width: int, latents: int, k: int, compute_dtype: ComputeDtype) -> Iterator[Case]:
    x_BD = jax.random.normal(jax.random.key(0), (rows, width))
    stats = DataStats(jnp.zeros(width), jnp.zeros(width))
    topk, relu = build("topk", latents, k=k), build("relu", latents, sparsity_coefficient=5.0)
    params = topk.init(jax.random.key(1), stats)
    dense, sparse = rows * width * latents, rows * width * k
    product = jax.jit(lambda a, b: matmul(a, b, compute_dtype))
    z_BF = product(x_BD, params["w_enc_DF"])
    active = ActiveCodes(*jax.jit(lambda z: top_k(z, k))(z_BF))
    select = jax.jit(lambda z: top_k(z, k))
    decode = jax.jit(decode_active)
    decode_gradient = jax.jit(lambda a, w, out: jax.vjp(decode_active, a, w)[1](out)[1])
    strided = TopK(latents=latents, k=k, auxiliary_stride=8)
    half_dead_F = jnp.arange(latents) % 2 == 0
    gradient = jax.jit(jax.grad(lambda p, dead_F: strided.loss(p, x_BD, x_BD, dead_F, compute_dtype)[0]))
    yield Case("topk step", whole_step(topk, params, x_BD, compute_dtype), dense + 4 * sparse)
    yield Case("relu step", whole_step(relu, relu.init(jax.random.key(1), stats), x_BD, compute_dtype), 5 * dense)
    yield Case("topk: encoder matmul", lambda: product(x_BD, params["w_enc_DF"]), dense)
    yield Case("topk: selection", lambda: select(z_BF), 0)
    yield Case("topk: decoder", lambda: decode(active, params["w_dec_FD"]), sparse)
    yield Case("topk: decoder weight gradient", lambda: decode_gradient(active, params["w_dec_FD"], x_BD), sparse)
    yield Case("topk: update", update_only(topk, params), 0)
    yield Case("topk: loss and gradients", lambda: gradient(params, jnp.zeros(latents, bool)), dense + 4 * sparse)
    yield Case("topk: loss and gradients, half of the latents dead, stride 8", lambda: gradient(params, half_dead_F), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one dtype and few rounds")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--latents", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    arguments = parser.parse_args()
    keep_freed_memory()
    shape = f"B={arguments.rows} D={arguments.width} F={arguments.latents} K={arguments.k}"
    compute_dtypes: list[ComputeDtype] = ["bfloat16"] if arguments.quick else ["bfloat16", "float32"]
    for compute_dtype in compute_dtypes:
        timed = list(cases(arguments.rows, arguments.width, arguments.latents, arguments.k, compute_dtype))
        milliseconds: dict[str, list[float]] = {case.name: [] for case in timed}
        for case in timed:
            jax.block_until_ready(case.call())
        for _ in range(7 if arguments.quick else 15):
            for case in timed:
                start = time.perf_counter()
                jax.block_until_ready(case.call())
                milliseconds[case.name].append(1e3 * (time.perf_counter() - start))
        medians = {name: statistics.median(values) for name, values in milliseconds.items()}
        bare = medians["topk: encoder matmul"] / (arguments.rows * arguments.width * arguments.latents)
        for case in timed:
            bound = round(bare * case.multiply_adds, 2) if case.multiply_adds else None
            line = {
                "bench": "sae_step",
                "case": f"{case.name}, {compute_dtype}, {shape}",
                "value": round(medians[case.name], 2),
                "unit": "ms",
                "bound": bound,
                "bound_fraction": round(bound / medians[case.name], 3) if bound else None,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
