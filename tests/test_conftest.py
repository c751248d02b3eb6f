"""The strict settings are in force, here and in processes that tests start."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest


def test_nothing_promotes_silently():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.int32)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_there_are_eight_devices_of_which_one_is_used_by_default():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8
    assert jax.jit(jnp.sum)(jnp.ones(3)).devices() == {jax.devices()[0]}


def test_processes_that_tests_start_are_strict_too():
    script = (
        "import jax; print(jax.config.jax_numpy_dtype_promotion, jax.config.jax_numpy_rank_promotion, jax.devices())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "strict raise [CpuDevice(id=0)]\n"
