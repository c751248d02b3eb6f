"""Strict settings for the whole suite, in force before anything computes.

Dtypes and ranks never promote silently, and the CPU counts as eight devices, so that code for one device and code
for many are both at hand. The first two reach the processes that tests start; the eight devices stay in this one,
since a command that finds eight would spread its work over them.
"""

import os

SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
os.environ.update(SETTINGS)

import jax  # noqa: E402 - after the environment that it reads
import pytest  # noqa: E402

for name, value in SETTINGS.items():
    jax.config.update(name.lower(), value)  # again, in case a plugin of pytest imported jax first
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="session")
def train_on_one_device():
    """The train stage takes all devices there are; here only one, except where a test is about several.

    In force before fixtures of modules, which train, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saex_pipe.stages.train.devices.available", lambda: jax.devices()[:1])
        yield
