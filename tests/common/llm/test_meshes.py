"""Models on meshes of eight devices, in one process and in two, against the same models on one device."""

import re

import jax
import jax.numpy as jnp
import mesh_models
import numpy as np
import pytest
from mesh_models import CONFIGS, LENGTH, MODEL_AXES, WINDOWS, largest_error, on_a_mesh, single_device, write_tiny
from processes import run_processes

from saex_pipe.common.aot import count_collectives
from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import params
from saex_pipe.common.llm.configuration import from_hugging_face
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.mesh import batch_sharding, make_mesh

LIMIT = 1e-5
# Both axes cut for every model, and the extremes where they matter; the slow tests run the rest.
OFTEN = [(name, 4) for name in CONFIGS] + [("repeated_keys", 8), ("grouped", 1)]
SELDOM = [(name, axis) for name in CONFIGS for axis in MODEL_AXES if (name, axis) not in OFTEN]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """By name of a configuration its folder and what one device computes."""
    folder, known = tmp_path_factory.mktemp("models"), {}

    def get(name):
        if name not in known:
            path = write_tiny(folder, name)
            with jax.default_matmul_precision("highest"):
                known[name] = path, single_device(path)
        return known[name]

    return get


@pytest.mark.parametrize(
    ("name", "model_axis"), OFTEN + [pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM]
)
def test_every_tap_equals_that_of_one_device(name, model_axis, tiny):
    path, expected = tiny(name)
    assert largest_error(on_a_mesh(path, model_axis), expected) <= LIMIT


def test_the_comparison_fails_for_heads_on_the_wrong_device(tiny):
    path, expected = tiny("grouped")
    model = load_model(path, dtype="float32", mesh=make_mesh(4))
    rows = model.blocks.w_attn_out
    rows[...] = jnp.roll(rows[...], model.architecture.head_dim, axis=1)
    assert largest_error(mesh_models.every_tap(model, mesh_models.placed_tokens(model.mesh)), expected) > 1e-2


@pytest.mark.parametrize("names", [("repeated_keys",), pytest.param(tuple(CONFIGS), marks=pytest.mark.slow)])
def test_two_processes_equal_one_device(names, tiny, tmp_path):
    """And notice a wrong value in the last window, where only the second process holds it."""
    for name in names:
        path, expected = tiny(name)
        (tmp_path / name).symlink_to(path)
        np.savez(path / "expected.npz", **expected)
    (tmp_path / "wrong").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "wrong" / file).symlink_to(tiny(names[0])[0] / file)
    wrong = {**tiny(names[0])[1]}
    wrong["logits"] = wrong["logits"] * (1 + 1e-3 * (np.arange(WINDOWS) == WINDOWS - 1))[:, None, None]
    np.savez(tmp_path / "wrong" / "expected.npz", **wrong)
    reports = run_processes(mesh_models.__file__, 2, tmp_path)
    cases = {f"{name} {axis}" for name in names for axis in MODEL_AXES}
    for report in reports:
        assert report["devices"] == [4, 8]
        assert report["errors"].keys() - cases == {f"wrong {axis}" for axis in MODEL_AXES}
        assert max(report["errors"][case] for case in cases) <= LIMIT
    first, second = (report["errors"] for report in reports)
    assert first["wrong 4"] <= LIMIT < second["wrong 4"]
    assert min(first["wrong 8"], second["wrong 8"]) > LIMIT  # without a data axis both hold parts of every window


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_sharded_from_the_file_on(name, tiny):
    path, _ = tiny(name)
    model = load_model(path, dtype="float32", mesh=make_mesh(8))
    total = whole = 0
    held = dict.fromkeys(jax.devices(), 0)
    for weight in jax.tree.leaves(model):
        total += weight.nbytes
        is_matrix = weight.ndim >= 3 or (weight.ndim == 2 and weight.shape[0] >= model.architecture.vocabulary)
        whole += 0 if is_matrix else weight.nbytes
        for shard in weight.addressable_shards:
            held[shard.device] += shard.data.nbytes
            assert shard.data.size == weight.size // 8 or not is_matrix, weight.shape
    for size in held.values():
        assert (total - whole) // 8 <= size <= (total - whole) // 8 + whole
    assert whole < total / 20  # norms, biases and learned positions


def compiled_text(name: str, model_axis: int, *, logits: bool) -> str:
    architecture = from_hugging_face(CONFIGS[name], "a test")
    mesh = make_mesh(model_axis)
    model = params.abstract_model(architecture, layers=3, with_unembedding=logits, dtype="float32", mesh=mesh)
    tokens = jax.ShapeDtypeStruct((WINDOWS, LENGTH), jnp.int32, sharding=batch_sharding(mesh))
    taps = () if logits else ("blocks.2.resid_post",)
    forward = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=taps, logits=logits))
    return forward.lower(model, tokens).compile(mesh_models.FAST_TO_COMPILE).as_text()


@pytest.mark.parametrize(("name", "model_axis"), [("repeated_keys", 4)] + [(name, 8) for name in CONFIGS])
def test_a_forward_pass_adds_up_twice_a_block_and_gathers_nothing(name, model_axis):
    """Once for the embedding; after attention and MLP in the body of the loop, which all blocks go through."""
    per_block = 1 if name == "parallel" else 2  # where both read the block's input, their sums are added up as one
    text = compiled_text(name, model_axis, logits=False)
    assert count_collectives(text) == {"all-reduce": 1 + per_block}


@pytest.mark.parametrize("name", ["grouped", "learned_positions"])
def test_logits_gather_no_weights(name):
    text = compiled_text(name, 8, logits=True)
    padded = -(-CONFIGS[name]["vocab_size"] // 8) * 8
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    # A vocabulary that does not divide leaves padding, which is cut off logits that lie on every device.
    assert gathered == ([] if padded == CONFIGS[name]["vocab_size"] else [f"{WINDOWS},{LENGTH},{padded}"])
    assert count_collectives(text)["all-reduce"] == 3


def test_windows_alone_need_no_collectives():
    assert count_collectives(compiled_text("grouped", 1, logits=True)) == {}


@pytest.mark.parametrize(
    ("change", "devices", "sizes"),
    [
        ({"num_attention_heads": 25, "num_key_value_heads": 25}, 2, "1"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "1, 3, 6"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 8, "1, 2, 4, 12"),
        ({"intermediate_size": 44}, 8, "1, 2, 4"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(change, devices, sizes):
    architecture = from_hugging_face({**CONFIGS["grouped"], **change}, "a test")
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    with pytest.raises(InputError, match=f"over {devices} devices of the model axis; sizes that do are {sizes}$"):
        params.abstract_model(architecture, layers=3, with_unembedding=False, dtype="float32", mesh=mesh)
    with pytest.raises(InputError, match=str(architecture.query_heads)):
        params.check_divides(architecture, devices)
