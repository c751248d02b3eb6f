"""How many floating-point operations a device can do in a second, to say which share of them a program uses."""

import time
from functools import cache

import jax
import jax.numpy as jnp

from saex_pipe.common.aot import CHIPS

# By ``jax.Device.device_kind``.
_TPUS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
_MEASURED_SIZE = {"cpu": 1024}  # rows and columns; some 10 ms on two cores
_MEASURED_SIZE_ELSEWHERE = 8192  # or an accelerator would not be busy
_TRIES = 3


def tpu_kind(device: jax.Device) -> str | None:
    """The key of ``device`` in ``CHIPS``; None where it is no TPU, or one of an unknown kind."""
    return _TPUS.get(device.device_kind)


@cache
def peak_flops(dtype: str) -> float:
    """Operations a second of one device of this process: of a TPU by its data sheet, of others as measured once.

    The data sheet's rate is that of bfloat16, in which TPUs multiply float32 as well by default. The measurement is
    one square matrix product with inputs of ``dtype`` ("float32", "bfloat16" or "int8"), the best of three.
    """
    device = jax.local_devices()[0]
    kind = tpu_kind(device)
    if kind is not None:
        return CHIPS[kind].peak_bf16_flops
    size = _MEASURED_SIZE.get(device.platform, _MEASURED_SIZE_ELSEWHERE)
    sums = jnp.int32 if dtype == "int8" else jnp.float32
    a_NN = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a_NN: jnp.matmul(a_NN, a_NN, preferred_element_type=sums))
    jax.block_until_ready(product(a_NN))
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        jax.block_until_ready(product(a_NN))
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
