"""Checkpoints of a training that this version cannot go on with."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import SingleDeviceSharding
from object_stores import fresh

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.checkpoint import TrainingState
from saex_pipe.common.formats.folder import Folder


def test_parameters_of_other_names_are_refused_by_those_names(tmp_path: Path) -> None:
    device = SingleDeviceSharding(jax.devices()[0])

    def array(*shape: int) -> ShapeDtypeStruct:
        return ShapeDtypeStruct(shape, jnp.float32, sharding=device)

    def like(params: dict[str, ShapeDtypeStruct]) -> tuple[Any, ...]:  # in training, too, a tuple of named parts
        return {"params": params}, array()

    with TrainingState(Folder(str(tmp_path))) as saves:
        saves.save(3, ({"params": {"w_enc_DF": jnp.ones((3, 4)), "b_enc_F": jnp.ones(4)}}, jnp.ones(())))
        saves.wait()
        with pytest.raises(
            InputError, match=r"3 holds a training of another version .* in w_enc_DF, w_enc_FD; .* or delete .*state"
        ):
            saves.restore(3, like({"w_enc_FD": array(4, 3), "b_enc_F": array(4)}))
        found, _ = saves.restore(3, like({"w_enc_DF": array(3, 4), "b_enc_F": array(4)}))
        assert (found["params"]["w_enc_DF"] == 1).all()


def test_training_goes_on_from_a_step_before_the_last(folder: Folder) -> None:
    """What is later is gone, on the disk and in a bucket: those steps are saved anew, whatever is saved first."""
    like = ShapeDtypeStruct((3,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    folder.write("state/notes", b"of somebody else")
    with TrainingState(folder) as saves:
        saves.save(3, jnp.full(3, 3.0))
        saves.save(6, jnp.full(3, 6.0))
    with TrainingState(folder) as saves:
        assert saves.steps() == [0, 3, 6]
        assert saves.restore(3, like)[0] == 3
        saves.forget_after(3)
        assert saves.steps() == [0, 3]
        saves.save(5, jnp.full(3, 5.0))
    with TrainingState(folder) as saves:
        assert saves.steps() == [0, 3, 5]
        assert saves.restore(5, like)[0] == 5
        saves.forget_after(0)
        saves.save(1, jnp.full(3, 1.0))
    with TrainingState(folder) as saves:
        assert saves.steps() == [0, 1]


def test_a_checkpoint_that_a_bucket_has_lost_a_part_of_is_refused(stores: dict[str, Any]) -> None:
    folder = Folder(fresh(stores["gs"]))
    with TrainingState(folder) as saves:
        saves.save(3, jnp.ones(3))
    folder.delete("state/000000000003/default/manifest")
    with (
        TrainingState(folder) as saves,
        pytest.raises(SaexError, match=r"default/manifest.ocdbt is gone; delete .*state/000000000003/ to go on"),
    ):
        saves.restore(3, ShapeDtypeStruct((3,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0])))
