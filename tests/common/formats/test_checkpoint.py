"""Checkpoints of a training that this version cannot go on with."""

from pathlib import Path
from typing import Any

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
