"""Which way to compute a product with codes of which K of F per row are active: by the active latents or densely.

Three products, for codes [B, F] and rows [F, D] or [B, D]: "sum" codes @ rows (decoder, gradient to the input), "dot"
the active entries of rows_BD @ rows_FD.T (gradient to the codes), "scatter" codes.T @ rows_BD (weight gradients). And
three ways: "gather", XLA's gathers and scatters of ``sparse.py``; "pallas", the kernels of ``pallas_sparse.py``; and
"dense", codes as a matrix and ``matmul``.

For TPUs the choice is a roofline ahead of time, without a measurement: bytes through HBM over its rate, or operations
over the peak of the matrix unit, whichever takes longer, by ``aot.CHIPS``. All arrays are float32, 4 bytes, and are
multiplied in one pass of bfloat16, which is what TPUs do by default.

    pallas   B K D + B D + 3 B K            sum and dot: every active row once, the rows of the batch, ids and codes
    gather   3 B K D + 2 B D K / 8          sum: gathered rows are written and read again, sums once per 8
             3 B K D + B D                  dot: likewise, but B K D where the gathered rows of a step stay in VMEM
             3 V (8 D + D) + F D            scatter: V = min(F, B K) + B K / 8 runs of 8, their sums, the result
    dense    B F + (B D + F D + B F)        the codes once by themselves, then the matmul of 2 B F D operations

in floats. The compiled programs' memory bears this out (B=4096, D=2304, K=64, F=65536, libtpu 0.0.42): temporaries of
8 B D for gather's sum, 12 B D for its scatter, at least the B F of the codes for dense, none for pallas. Gather's dot
has none on v5e for any K up to 128, and on v5p 32 K D from K=32. What copies of single rows and XLA's scatters take
beyond their bytes is not in it: no TPU was at hand.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from saex_pipe.common.aot import CHIPS
from saex_pipe.common.sae.compute import Compute

Product = Literal["sum", "dot", "scatter"]
Way = Literal["gather", "dense", "pallas"]

# On CPUs, and wherever else there are no kernels: sparse from this many latents per active one. Steps of TopK and
# BatchTopK by active latents take 0.5 to 0.8 times as long as dense ones at 32, and 0.8 to 1.4 times at 16
# (infra/bench/train_crossover.py, two cores, bfloat16; in float32 much the same).
CPU_LATENTS_PER_ACTIVE = 24
FLOAT_BYTES = 4
RUN = 8  # as sparse.py sums them
GATHERED_STAYS_IN_VMEM = ("v5e",)  # of the dot; seen in programs compiled for v5e and v5p


class Sizes(NamedTuple):
    """Of one product, on one device."""

    rows: int  # B
    width: int  # D
    latents: int  # F
    active: int  # K


def way(product: Product, sizes: Sizes, compute: Compute, *, kernel: bool) -> Way:
    """How to compute ``product``: as ``compute.codes`` says, or the fastest where that is "auto".

    Args:
        product: which of the three.
        sizes: of what one device computes.
        compute: whose mesh, or else JAX's first device, says where it runs.
        kernel: whether there is a kernel that takes these arrays.
    """
    if compute.codes == "dense":
        return "dense"
    kind = compute.tpu
    if kind is None:
        return "gather" if _few_on_a_cpu(sizes) or compute.codes == "sparse" else "dense"
    seconds = expected_seconds(product, sizes, kind)
    if not kernel:
        seconds.pop("pallas", None)
    if compute.codes == "sparse":
        del seconds["dense"]
    return min(seconds, key=lambda candidate: seconds[candidate])


def gathers_pay(products: Sequence[Product], sizes: Sizes, compute: Compute) -> bool:
    """Whether these products, which go the same way, are computed by the active latents: without kernels, and where
    they take less time together than dense ones, or as ``compute.codes`` says."""
    if compute.codes != "auto":
        return compute.codes == "sparse"
    kind = compute.tpu
    if kind is None:
        return _few_on_a_cpu(sizes)
    seconds = [expected_seconds(product, sizes, kind) for product in products]
    return sum(each["gather"] for each in seconds) < sum(each["dense"] for each in seconds)


def _few_on_a_cpu(sizes: Sizes) -> bool:
    return sizes.active * CPU_LATENTS_PER_ACTIVE <= sizes.latents


def expected_seconds(product: Product, sizes: Sizes, kind: str) -> dict[Way, float]:
    """Seconds of ``product`` on a TPU of ``kind`` (a key of ``CHIPS``) for every way that there is; a bound from below.

    Of ways that take as long the first is the plainest. Dense is infinite where its matrices do not fit in the memory.
    """
    chip = CHIPS[kind]
    rows, width, latents, active = sizes
    picked, batch, table, codes = rows * active * width, rows * width, latents * width, rows * latents
    gathered: dict[Product, float] = {
        "sum": 3 * picked + 2 * batch * active / RUN,
        "dot": (1 if kind in GATHERED_STAYS_IN_VMEM else 3) * picked + batch + 3 * rows * active,
        "scatter": 3 * (min(latents, rows * active) + rows * active // RUN) * (RUN + 1) * width + table,
    }
    seconds: dict[Way, float] = {"gather": gathered[product] * FLOAT_BYTES / chip.hbm_bytes_per_second}
    matmul_bytes = (batch + table + codes) * FLOAT_BYTES
    if matmul_bytes > chip.hbm_bytes:
        seconds["dense"] = float("inf")
    else:
        multiplied = max(matmul_bytes / chip.hbm_bytes_per_second, 2 * rows * table / chip.peak_bf16_flops)
        seconds["dense"] = codes * FLOAT_BYTES / chip.hbm_bytes_per_second + multiplied
    if product != "scatter":
        read_once = picked + batch + 3 * rows * active
        seconds["pallas"] = read_once * FLOAT_BYTES / chip.hbm_bytes_per_second
    return seconds
