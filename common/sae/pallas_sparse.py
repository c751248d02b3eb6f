"""Products with codes of which only K of F per row are active, as kernels for TPUs.

The arrays of ``sparse.py``'s ``gather_sum`` and ``gather_dot`` go through the memory of the chip once: a kernel copies
the K rows that a batch row names from HBM into VMEM, row by row, and adds them up or multiplies them there, while XLA
writes gathered rows back to HBM and reads them again. What is read is B K rows, what is written the result.

Eight batch rows at a time, one per sublane, take their k-th row each: a wave. Copies of the waves to come are under
way while one is worked on, as many as hide the latency of HBM. Latent ids reach the scalar memory a block of rows at a
time, since those of a whole batch need not fit in it. All sums are float32.

A row of bfloat16 shares its 32-bit words with the row beside it (tiles are (8, 128)(2, 1)), and no copy can part them:
both are read, as many bytes as a row of float32, and the half that was meant is taken in VMEM.

Under ``jax.vmap`` the members are computed one after another.

Pallas on TPU: https://docs.jax.dev/en/latest/pallas/tpu/index.html (The JAX Authors, 2024).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

SUBLANES, LANES = 8, 128
MOST_ACTIVE = 4096  # K whose ids for eight rows, twice, take a quarter of a scalar memory of 1 MiB
MOST_WIDTH = 2**16  # D at which eight rows take 2 MiB of the 16 that a kernel may use
BLOCK_BYTES = 2**21  # of a block of batch rows
WAVES_AHEAD_BYTES = 2**21  # a microsecond's worth of v5p's HBM, and below a sixth of what a kernel may use
MOST_WAVES_AHEAD = 16

# What is done with a wave: the first of its eight batch rows in the block, the rank k, and the rows as float32 [8, D].
Visit = Callable[[Array, Array, Array], None]


def can_run(values_or_latents_BK: Array, rows_FD: Array) -> bool:
    """Whether the kernels take arrays of these shapes and dtypes."""
    latents, width = rows_FD.shape
    whole_words = rows_FD.dtype == jnp.float32 or (rows_FD.dtype == jnp.bfloat16 and latents % 2 == 0)
    return (
        whole_words
        and width % LANES == 0
        and 0 < width <= MOST_WIDTH
        and 0 < values_or_latents_BK.shape[1] <= MOST_ACTIVE
    )


@sequential_vmap
def gather_sum(
    values_BK: Float[Array, "B K"], latents_BK: Int[Array, "B K"], rows_FD: Float[Array, "F D"]
) -> Float[Array, "B D"]:
    """``sum_k values_BK[:, k] rows_FD[latents_BK[:, k]]``, float32.

    Args:
        values_BK: float32.
        latents_BK: int32, all in [0, F).
        rows_FD: float32 or bfloat16, as ``can_run`` allows.
    """
    batch, width = values_BK.shape[0], rows_FD.shape[1]
    return _over_blocks(_sum_kernel, latents_BK, values_BK, rows_FD, width)[:batch]


@sequential_vmap
def gather_dot(
    rows_BD: Float[Array, "B D"], rows_FD: Float[Array, "F D"], latents_BK: Int[Array, "B K"]
) -> Float[Array, "B K"]:
    """``rows_BD . rows_FD[latents_BK]``, float32; ``rows_BD`` float32, the others as in ``gather_sum``."""
    batch, k = latents_BK.shape
    return _over_blocks(_dot_kernel, latents_BK, rows_BD, rows_FD, k)[:batch]


def _over_blocks(
    kernel: Callable[..., None], latents_BK: Array, own_BX: Array, rows_FD: Array, out_width: int
) -> Float[Array, "B Y"]:
    """``kernel`` on every block of batch rows; the result has rows up to the end of the last block."""
    batch, k = latents_BK.shape
    width = rows_FD.shape[1]
    block = _block_rows(batch, k, width)
    padding = ((0, -batch % block), (0, 0))
    latents_BK, own_BX = jnp.pad(latents_BK, padding), jnp.pad(own_BX, padding)
    waves_ahead = max(2, min(MOST_WAVES_AHEAD, WAVES_AHEAD_BYTES // (SUBLANES * width * 4)))
    words = jnp.float32 if rows_FD.dtype == jnp.float32 else jnp.int32

    def blocked(columns: int, memory: pltpu.MemorySpace = pltpu.VMEM) -> pl.BlockSpec:
        return pl.BlockSpec((block, columns), lambda i: (i, 0), memory_space=memory)

    return pl.pallas_call(
        kernel,
        grid=(latents_BK.shape[0] // block,),
        in_specs=[
            blocked(k, pltpu.SMEM),
            blocked(k),
            blocked(own_BX.shape[1]),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=blocked(out_width),
        out_shape=jax.ShapeDtypeStruct((latents_BK.shape[0], out_width), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((waves_ahead, SUBLANES, width), words),
            pltpu.SemaphoreType.DMA((waves_ahead,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * latents_BK.size * width,
            bytes_accessed=4 * (latents_BK.size * (width + 2) + own_BX.size + latents_BK.shape[0] * out_width),
            transcendentals=0,
        ),
    )(latents_BK, latents_BK, own_BX, rows_FD)


def _block_rows(batch: int, k: int, width: int) -> int:
    """Batch rows a block: a power of two times 8, since waves are counted by shifts."""
    rows = 64
    while rows > SUBLANES and (rows * max(width, k) * 4 > BLOCK_BYTES or rows // 2 >= batch or rows * k > 2**15):
        rows //= 2
    return rows


def _sum_kernel(
    latents_RK: Array,
    latent_lanes_RK: Array,
    values_RK: Array,
    rows_FD: Array,
    sum_RD: Array,
    ring: Array,
    arrived: Array,
) -> None:
    sum_RD[...] = jnp.zeros_like(sum_RD)

    def add(first: Array, rank: Array, wave_8D: Array) -> None:
        eight = pl.ds(first, SUBLANES)
        sum_RD[eight, :] += _column(values_RK[eight, :], rank) * wave_8D

    _each_wave(latents_RK, latent_lanes_RK, rows_FD, ring, arrived, add)


def _dot_kernel(
    latents_RK: Array, latent_lanes_RK: Array, own_RD: Array, rows_FD: Array, dot_RK: Array, ring: Array, arrived: Array
) -> None:
    def multiply(first: Array, rank: Array, wave_8D: Array) -> None:
        eight = pl.ds(first, SUBLANES)
        dot_81 = jnp.sum(own_RD[eight, :] * wave_8D, axis=1, keepdims=True)
        before_8K = dot_RK[eight, :]
        dot_RK[eight, :] = jnp.where(_lanes(before_8K) == rank, dot_81, before_8K)

    _each_wave(latents_RK, latent_lanes_RK, rows_FD, ring, arrived, multiply)


def _each_wave(
    latents_RK: Array, latent_lanes_RK: Array, rows_FD: Array, ring: Array, arrived: Array, visit: Visit
) -> None:
    """Bring in the rows of every wave, k by k and within it eight batch rows by eight, and ``visit`` it."""
    block, k = latents_RK.shape
    eights, slots = block // SUBLANES, ring.shape[0]
    paired = ring.dtype == jnp.int32
    table = rows_FD.bitcast(jnp.int32) if paired else rows_FD  # type: ignore[attr-defined]

    def place(wave: Array) -> tuple[Array, Array, Array]:
        first = pl.multiple_of(jax.lax.rem(wave, eights) * SUBLANES, SUBLANES)
        return first, jax.lax.div(wave, eights), jax.lax.rem(wave, slots)

    def start(wave: Array) -> None:
        first, rank, slot = place(wave)
        for sublane in range(SUBLANES):
            latent = latents_RK[first + sublane, rank]
            row = jax.lax.div(latent, 2) if paired else latent
            target = ring.at[slot, pl.ds(sublane, 1), :]
            pltpu.make_async_copy(table.at[pl.ds(row, 1), :], target, arrived.at[slot]).start()

    def work(wave: Array, _: None) -> None:
        first, rank, slot = place(wave)
        # A semaphore counts bytes: this waits for all eight rows.
        pltpu.make_async_copy(ring.at[slot], ring.at[slot], arrived.at[slot]).wait()
        words_8D = ring[slot]
        if paired:
            words_8D = _half(words_8D, _column(latent_lanes_RK[pl.ds(first, SUBLANES), :], rank))
        visit(first, rank, words_8D)
        pl.when(wave + slots < eights * k)(partial(start, wave + slots))

    jax.lax.fori_loop(0, min(slots, eights * k), lambda wave, _: start(wave), None)
    jax.lax.fori_loop(0, eights * k, work, None)


def _half(words_8D: Int[Array, "8 D"], latent_81: Int[Array, "8 1"]) -> Float[Array, "8 D"]:
    """The bfloat16 of an odd row is the upper half of its word, which is where float32 has its leading bits."""
    upper_8D = words_8D & jnp.int32(-(2**16))
    lower_8D = words_8D << jnp.int32(16)
    return jax.lax.bitcast_convert_type(jnp.where((latent_81 & 1) == 1, upper_8D, lower_8D), jnp.float32)


def _column(block_8K: Array, rank: Array) -> Array:
    """One column of ``block_8K``; a slice cannot start at a lane that is known only at run time."""
    return jnp.sum(jnp.where(_lanes(block_8K) == rank, block_8K, jnp.zeros_like(block_8K)), axis=1, keepdims=True)


def _lanes(block_8K: Array) -> Int[Array, "8 K"]:
    return jax.lax.broadcasted_iota(jnp.int32, block_8K.shape, 1)
