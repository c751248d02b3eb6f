"""Peak rates: a TPU's by name, others' as measured."""

import types

import jax
import pytest

from saex_pipe.common.peak import peak_flops


@pytest.fixture(autouse=True)
def _unmeasured():
    peak_flops.cache_clear()
    yield
    peak_flops.cache_clear()


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12)])
def test_a_tpu_has_the_rate_of_its_data_sheet(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(device_kind=kind, platform="tpu")])
    assert peak_flops("float32") == peak


def test_a_cpu_is_measured_once():
    first = peak_flops("float32")
    assert 1e8 < first < 1e14
    assert peak_flops("float32") == first
