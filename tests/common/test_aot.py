"""Compiling for TPUs that are not here. What needs libtpu is skipped where it is not installed."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from saex_pipe.common.aot import CHIPS, GIB, compile_ahead, count_collectives, topology
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.mesh import make_mesh

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def two_matmuls(x_BD, w_DF, w_FD):
    return jnp.tanh(x_BD @ w_DF) @ w_FD


def cut_over_model(mesh, rows):
    def array(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    return array((rows, 1024), "data"), array((1024, 4096), None, "model"), array((4096, 1024), "model")


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v5e:1x1", 1, 1),
        ("v5e:2x4", 8, 8),
        ("v5p:2x2x1", 4, 4),
        ("v4:2x2x1", 4, 4),
        ("v6e:4x4", 16, 16),
        ("tpu7x:2x2x1", 4, 8),
    ],
)
def test_topologies_have_names(name, chips, devices):
    found = topology(name)
    assert (found.chips, len(found.devices)) == (chips, devices)
    assert found.chip == CHIPS[name.split(":")[0]]


@needs_libtpu
def test_every_mesh_of_a_large_slice_can_be_made():
    devices = topology("v5p:4x4x4").devices
    assert [make_mesh(model, devices=devices).shape["data"] for model in (1, 2, 4, 8, 64)] == [64, 32, 16, 8, 1]


@needs_libtpu
def test_a_program_that_the_folder_of_compiled_ones_holds_is_compiled_anew():
    mesh = make_mesh(4, devices=topology("v5e:2x4").devices)
    found = []
    for _ in range(2):
        jax.clear_caches()  # of this process, not the suite's folder
        found.append(compile_ahead(jax.jit(two_matmuls).lower(*cut_over_model(mesh, 256)), remedy=""))
    assert found[0].peak_bytes == found[1].peak_bytes > 0


@needs_libtpu
def test_the_report_is_of_one_chip():
    mesh = make_mesh(4, devices=topology("v5e:2x4").devices)
    compiled = compile_ahead(jax.jit(two_matmuls).lower(*cut_over_model(mesh, 512)), remedy="")
    assert compiled.argument_bytes == 2 * (256 * 1024 + 2 * 1024 * 1024)  # half the rows, a quarter of the weights
    assert compiled.output_bytes == 2 * 256 * 1024
    assert compiled.argument_bytes + compiled.output_bytes <= compiled.peak_bytes < CHIPS["v5e"].hbm_bytes
    assert compiled.collectives == {"all-reduce": 1}
    assert compiled.seconds > 0


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x1"])
def test_a_program_that_does_not_fit_is_refused_with_what_it_needs(name):
    devices = topology(name).devices
    needed = CHIPS[name.split(":")[0]].hbm_bytes * 2
    x = jax.ShapeDtypeStruct(
        (needed // 2**20, 2**19), jnp.bfloat16, sharding=NamedSharding(make_mesh(devices=devices), PartitionSpec())
    )
    # Versions of libtpu keep a little more or less of it for themselves.
    limit = f"{CHIPS[name.split(':')[0]].hbm_bytes / GIB:.2f}"[:4]
    with pytest.raises(InputError, match=rf"needs {needed / GIB:.2f} GiB of memory .* has {limit}\d GiB; use fewer r"):
        compile_ahead(jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)).lower(x), remedy="use fewer rows")


@pytest.mark.parametrize("name", ["v5e", "v5e-8", "v9:2x2", "v5e:2", "v5p:2x2x2x2", "V5E:2x4"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(InputError, match=f"no TPU topology '{name}'; give one of v4, v5e, v5p, v6e, tpu7x and the g"):
        topology(name)


@needs_libtpu
def test_a_grid_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"v5e:3x3 is no TPU topology \(.*not divisible"):
        topology("v5e:3x3")


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.\nmore")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(SaexError, match=r"^libtpu cannot be used \(JAX TPU [^\n]*install saex-pipe\[tpu\][^\n]*$"):
        topology("v5e:2x4")


def test_collectives_are_counted_once_each():
    mesh = make_mesh(4)
    text = jax.jit(two_matmuls).lower(*cut_over_model(mesh, 512)).compile().as_text()
    assert count_collectives(text) == {"all-reduce": 1}
    pair = (
        "  %s.1 = (bf16[8]{0}, bf16[64]{0}) all-gather-start(%p), replica_groups={}\n"
        "  %d.1 = bf16[64]{0} all-gather-done(%s.1)\n  %all-reduce.3 = f32[] all-reduce(%all-reduce.2), to_apply=%add\n"
    )
    assert count_collectives(pair) == {"all-gather": 1, "all-reduce": 1}
