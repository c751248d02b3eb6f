"""Strict settings for the whole suite, in force before anything computes, and folders on each kind of store.

Dtypes and ranks never promote silently, and the CPU counts as eight devices, so that code for one device and code
for many are both at hand. The first two reach the processes that tests start; the eight devices stay in this one,
since a command that finds eight would spread its work over them. Programs that one process has compiled the others
find in a folder that lasts as long as the suite, which halves its time: commands are killed and started again often.
"""

import os
import tempfile

COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
SETTINGS: dict[str, str | float] = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": 0,
}
os.environ.update({name: str(value) for name, value in SETTINGS.items()})

import jax  # noqa: E402 - after the environment that it reads
import pytest  # noqa: E402
from object_stores import ENVIRONMENT, fresh, serve_gcs, serve_proxy, serve_s3  # noqa: E402

from saex_pipe.common.formats.folder import Folder  # noqa: E402

for name, value in SETTINGS.items():
    jax.config.update(name.lower(), value)  # again, in case a plugin of pytest imported jax first
jax.config.update("jax_num_cpu_devices", 8)


def pytest_make_parametrize_id(val):
    """Bytes name a case by their length: what is in them, such as the time in a gzip file, may differ in each process.

    The processes that share the suite must find the same names.
    """
    return f"{len(val)}bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="session")
def train_on_one_device():
    """The train stage takes all devices there are; here only one, except where a test is about several.

    In force before fixtures of modules, which train, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saex_pipe.stages.train.devices.available", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def stores():
    """URIs of the roots, by kind, and the servers: of S3 a proxy, since moto makes no faults."""
    with pytest.MonkeyPatch.context() as patch, serve_s3() as moto, serve_proxy(moto) as s3, serve_gcs() as gcs:
        for name, value in {**ENVIRONMENT, "SAEX_S3_ENDPOINT": s3.url, "TENSORSTORE_GCS_HTTP_URL": gcs.url}.items():
            patch.setenv(name, value)
        yield {"s3": "s3://bucket/runs", "gs": "gs://bucket/runs", "servers": {"s3": s3, "gs": gcs}}


@pytest.fixture(params=["file", "s3", "gs"])
def folder(request, stores, tmp_path):
    """An empty folder on each kind of store."""
    return Folder(str(tmp_path) if request.param == "file" else fresh(stores[request.param]))
