import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from saex_pipe.common.errors import InputError
from saex_pipe.common.mesh import check_batch, make_mesh, place_batch


@pytest.mark.parametrize(("model", "shape"), [(1, (8, 1)), (4, (2, 4)), (8, (1, 8))])
def test_a_mesh_takes_every_device_once(model, shape):
    mesh = make_mesh(model)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_devices_may_be_chosen():
    chosen = jax.devices()[5:7]
    mesh = make_mesh(2, devices=chosen)
    assert mesh.devices.tolist() == [chosen]
    assert make_mesh(2, data=4).devices.shape == (4, 2)


def test_a_model_axis_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="model axis of 3 does not divide 8 devices; use one of 1, 2, 4, 8"):
        make_mesh(3)
    with pytest.raises(InputError, match="model axis of 0 does not divide"):
        make_mesh(0)


def test_a_mesh_that_leaves_devices_over_is_refused():
    with pytest.raises(InputError, match="data 2 x model 2 does not use 8 devices exactly; use data 4 with model 2"):
        make_mesh(2, data=2)


def test_a_batch_lies_on_the_devices_of_its_rows():
    batch = np.arange(24, dtype=np.int32).reshape(4, 6)
    mesh = make_mesh(4)
    placed = place_batch(batch, mesh)
    np.testing.assert_array_equal(placed, batch)
    for share, devices in enumerate(mesh.devices):
        for device in devices:
            [shard] = [shard for shard in placed.addressable_shards if shard.device == device]
            np.testing.assert_array_equal(shard.data, batch[2 * share : 2 * share + 2])


def test_a_batch_that_does_not_divide_is_refused():
    check_batch(16, make_mesh(1), "harvest.batch_windows")
    with pytest.raises(InputError, match=r"harvest.batch_windows = 12 does not divide over 8 .*; use .* such as 16"):
        check_batch(12, make_mesh(1), "harvest.batch_windows")
