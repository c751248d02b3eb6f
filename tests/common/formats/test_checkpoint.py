"""Checkpoints of a training that this version cannot go on with."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import SingleDeviceSharding

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.checkpoint import TrainingState
from saex_pipe.common.formats.folder import Folder


def test_parameters_of_other_names_are_refused_by_those_names(tmp_path: Path) -> None:
    device = SingleDeviceSharding(jax.devices()[0])
    b_enc_F = ShapeDtypeStruct((4,), jnp.float32, sharding=device)
    with TrainingState(Folder(str(tmp_path))) as saves:
        saves.save(3, {"w_enc_DF": jnp.ones((3, 4)), "b_enc_F": jnp.ones(4)})
        saves.wait()
        with pytest.raises(
            InputError, match=r"3 holds a training of another version .* in w_enc_DF, w_enc_FD; .*--force"
        ):
            saves.restore(3, {"w_enc_FD": ShapeDtypeStruct((4, 3), jnp.float32, sharding=device), "b_enc_F": b_enc_F})
        like = {"w_enc_DF": ShapeDtypeStruct((3, 4), jnp.float32, sharding=device), "b_enc_F": b_enc_F}
        assert (saves.restore(3, like)["w_enc_DF"] == 1).all()
