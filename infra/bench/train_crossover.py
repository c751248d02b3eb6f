"""Where products with k of F codes active are faster by the active latents than densely, as whole training steps.

    python infra/bench/train_crossover.py [--variant topk,batchtopk] [--shape 2048x576x9216,...] [--share 64,32,16]
                                          [--dtype bfloat16,float32] [--rounds 7]

One JSON object a line: ms of a step by active latents, the dense step as its ``bound``, and in ``ratio`` how many times
as long as the dense one it takes; below 1 the active latents pay. ``--share`` lists latents per active one. Both sides
take turns, step by step. ``common/sae/crossover.py`` holds what was found.
"""

import argparse
import json
import statistics
import time
from itertools import product

import jax
from train_parts import Shape, variant_of, whole_step

from saex_pipe.common.host_memory import keep_freed_memory

WARM_ROUNDS = 3


def compare(name: str, shape: Shape, dtype: str, rounds: int) -> dict[str, object]:
    """Medians of both ways, and of their ratio round by round."""
    variant = variant_of(name, shape)
    calls = {codes: whole_step(variant, shape, dtype, few=True, codes=codes) for codes in ("sparse", "dense")}
    times: dict[str, list[float]] = {codes: [] for codes in calls}
    for _ in range(WARM_ROUNDS + rounds):
        for codes, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[codes].append(1e3 * (time.perf_counter() - start))
    sparse, dense = (times[codes][WARM_ROUNDS:] for codes in ("sparse", "dense"))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(sparse, dense, strict=True))
    found = {"value": round(statistics.median(sparse), 1), "unit": "ms", "bound": round(statistics.median(dense), 1)}
    case = f"{name} {dtype} {shape}, a {shape.latents // shape.k}th active"
    return {"bench": "train_crossover", "case": case, **found, "ratio": round(ratio, 2)}


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="topk,batchtopk")
    parser.add_argument("--shape", default="2048x576x9216,2048x768x6144,4096x256x2048")
    parser.add_argument("--share", default="64,32,16")
    parser.add_argument("--dtype", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shape.split(",")]
    shares = [int(share) for share in given.share.split(",")]
    for name, dtype, (rows, width, latents), share in product(
        given.variant.split(","), given.dtype.split(","), shapes, shares
    ):
        shape = Shape(rows, width, latents, latents // share)
        print(json.dumps(compare(name, shape, dtype, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
