"""Training on meshes of eight devices, in one process and in two, against the same training on one device."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sae_on_meshes
from jax.sharding import PartitionSpec as P
from processes import run_processes
from sae_on_meshes import LATENTS, MODEL_AXES, RATE, WIDTH, batch_BD, largest_error, place, start, trained, variant_of

from saex_pipe.common.errors import InputError
from saex_pipe.common.mesh import make_mesh
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.optimiser import Optimiser
from saex_pipe.common.sae.sharded import topk_codes
from saex_pipe.common.sae.sharding import born_sharded, check_latents, partition, shardings
from saex_pipe.common.sae.sparse import ActiveCodes
from saex_pipe.common.sae.variants import VARIANTS

LIMIT = 1e-5
DEAD = 30  # of 48: more than fit into the smallest size that is compiled for
# Both axes cut for every variant, and the extremes where latents are chosen; the slow tests run the rest.
OFTEN = [(name, 4) for name in sorted(VARIANTS)] + [("topk", 8)]
SELDOM = [(name, axis) for name in sorted(VARIANTS) for axis in MODEL_AXES if (name, axis) not in OFTEN]
# A weight as it is where it is whole; parts of it have fewer than all latents.
WHOLE = re.compile(rf"\w\[(?:\d+,)*(?:{LATENTS},{WIDTH}|{WIDTH},{LATENTS})\]")


@pytest.fixture(scope="module")
def on_one_device() -> Callable[..., dict[str, np.ndarray]]:
    """By variant and number of dead latents what one device makes of them."""
    known: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def get(name: str, dead: int = DEAD) -> dict[str, np.ndarray]:
        if (name, dead) not in known:
            known[name, dead] = jax.device_get(trained(name, None, dead))
        return known[name, dead]

    return get


@pytest.mark.parametrize(
    ("name", "model_axis"), OFTEN + [pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM]
)
def test_training_equals_that_of_one_device(name: str, model_axis: int, on_one_device: Callable) -> None:
    assert largest_error(trained(name, make_mesh(model_axis), DEAD), on_one_device(name)) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 2, LATENTS])
def test_dead_latents_on_few_or_all_shards(dead: int, on_one_device: Callable) -> None:
    assert largest_error(trained("topk", make_mesh(8), dead), on_one_device("topk", dead)) <= LIMIT


@pytest.mark.parametrize("optimiser", ["adam_8bit", "adafactor", "muon", "signum"])
def test_every_optimiser_works_on_parts(optimiser: str) -> None:
    chosen = Optimiser(name=optimiser)
    expected = jax.device_get(trained("relu", None, 0, chosen))
    found = trained("relu", make_mesh(4), 0, chosen)
    if optimiser == "adam_8bit":  # a level of rounding more or less
        for place_, leaf in found.items():
            if leaf.dtype in (jnp.int8, jnp.uint8):
                difference = np.abs(np.asarray(leaf, np.int32) - np.asarray(expected[place_], np.int32))
                assert difference.max() <= 1
                expected[place_] = np.asarray(leaf)
    assert largest_error(found, expected) <= (1e-3 if optimiser == "adam_8bit" else LIMIT)
    wide = [leaf for leaf in found.values() if leaf.size >= LATENTS * WIDTH]
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in wide)


@pytest.mark.slow
def test_training_in_two_processes_equals_that_in_one(tmp_path: Path, on_one_device: Callable) -> None:
    cases = [(name, 4) for name in sorted(VARIANTS)] + [("topk", 8), ("relu", 1)]
    for name, axis in cases:
        np.savez(tmp_path / f"{name}-{DEAD}-{axis}.npz", **on_one_device(name))
    changed = {key: leaf * 1.001 if leaf.dtype == np.float32 else leaf for key, leaf in on_one_device("relu").items()}
    np.savez(tmp_path / "relu-0-1.npz", **changed)
    for report in run_processes(sae_on_meshes.__file__, 2, tmp_path):
        assert report["devices"] == [4, 8]
        assert report["errors"].pop("relu-0-1") > LIMIT
        assert report["errors"].keys() == {f"{name}-{DEAD}-{axis}" for name, axis in cases}
        assert max(report["errors"].values()) <= LIMIT


@pytest.mark.parametrize("optimiser", ["adam", "adam_8bit"])
def test_everything_is_born_in_parts(optimiser: str) -> None:
    """No device's program knows an array of the size of a weight, and what it holds is its part."""
    mesh = make_mesh(8)
    make = partial(sae_on_meshes.make_state, variant_of("topk"), 0, Optimiser(name=optimiser))
    placed = shardings(jax.eval_shape(make), LATENTS, mesh)
    program = jax.jit(make, out_shardings=placed).lower().compile(sae_on_meshes.FAST_TO_COMPILE)
    text, memory = program.as_text(), program.memory_analysis()
    assert re.search(rf"\[{LATENTS // 8},{WIDTH}\]", text)
    assert not WHOLE.search(text)
    state = born_sharded(make, LATENTS, mesh)
    parts = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert memory.argument_size_in_bytes == 0
    assert memory.output_size_in_bytes < parts + 2048  # the table of the outputs
    for name, leaf in sae_on_meshes.by_place(state).items():
        assert leaf.size < LATENTS or leaf.addressable_shards[0].data.size == leaf.size // 8, name
    expected = jax.device_get(jax.jit(make)())
    assert largest_error(sae_on_meshes.by_place(state), sae_on_meshes.by_place(expected)) <= LIMIT


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_step_compiles_once_in_place_and_gathers_no_weight(name: str) -> None:
    mesh = make_mesh(4)
    step, variant = sae_on_meshes.compiled(sae_on_meshes.make_train_step(mesh)), variant_of(name)
    state = first = start(name, mesh, DEAD)
    for number in range(2):
        rows_BD = place(batch_BD(number), mesh)
        state, _ = step(variant, RATE, state, rows_BD, rows_BD)
    assert step._cache_size() == 1
    assert first.params["w_enc_FD"].is_deleted()
    assert {leaf.sharding for leaf in jax.tree.leaves(first)} == {leaf.sharding for leaf in jax.tree.leaves(state)}
    program = step.lower(variant, RATE, state, rows_BD, rows_BD).compile()
    parts = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= parts
    assert not WHOLE.search(program.as_text())


@pytest.mark.parametrize("selection", ["exact", "approximate"])
def test_the_chosen_latents_are_those_of_one_device(selection: str) -> None:
    """Also where one shard has all of them, and where fewer than k are above 0."""
    random = np.random.default_rng(0)
    x_BD, w_enc_FD = (random.standard_normal(shape).astype(np.float32) for shape in ((64, WIDTH), (LATENTS, WIDTH)))
    b_enc_F = np.where(np.arange(LATENTS) // 12 == 1, 20.0, -4.0).astype(np.float32)
    x_BD[:32] = 0  # there the biases decide, and of equal ones any may be taken
    k, b_pre_D = 14, np.zeros(WIDTH, np.float32)
    for bias_F in (b_enc_F, 0.1 * random.standard_normal(LATENTS).astype(np.float32)):
        codes = jax.jit(partial(topk_codes, k=k, compute=Compute(mesh=make_mesh(4), selection=selection)))
        values_BK, latents_BK = (np.asarray(leaf) for leaf in codes(x_BD, b_pre_D, w_enc_FD, bias_F)[0])
        z_BF = np.maximum(x_BD.astype(np.float64) @ w_enc_FD.T + bias_F, 0)
        found_BF = np.zeros_like(z_BF)
        np.put_along_axis(found_BF, latents_BK, values_BK, axis=1)
        assert ((found_BF > 0).sum(axis=1) == np.minimum((z_BF > 0).sum(axis=1), k)).all()
        np.testing.assert_allclose(-np.sort(-found_BF)[:, :k], -np.sort(-z_BF)[:, :k], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found_BF[found_BF > 0], z_BF[found_BF > 0], rtol=1e-5, atol=1e-5)


def test_each_device_holds_and_chooses_among_its_own() -> None:
    mesh = make_mesh(4)
    arguments = jnp.ones((64, WIDTH)), jnp.zeros(WIDTH), jnp.ones((LATENTS, WIDTH)), jnp.arange(float(LATENTS))
    active: ActiveCodes = jax.jit(partial(topk_codes, k=3, compute=Compute(mesh=mesh)))(*arguments)[0]
    assert active.values_BK.shape == (64, 4 * 3)
    assert active.values_BK.sharding.spec == P("data", "model")
    np.testing.assert_array_equal(np.asarray(active.latents_BK[0]) // 12, np.repeat(np.arange(4), 3))
    assert (np.asarray(active.values_BK) > 0).sum(axis=1).tolist() == [3] * 64


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("w_enc_FD", (48, 16), P("model")),
        ("w_dec_FD", (48, 16), P("model")),
        ("w_dec_FD", (2, 48, 16), P(None, "model")),
        ("b_enc_F", (48,), P("model")),
        ("b_dec_D", (16,), P()),
        ("b_dec_D", (3, 16), P()),
        ("w_skip_DD", (16, 16), P()),
        ("w_enc_FD", (48, 1), P("model")),  # a scale of each latent
        ("w_enc_FD", (48,), P("model")),  # a factored moment
        ("w_enc_FD", (16,), P()),
        ("w_dec_FD", (1,), P()),
        ("step", (), P()),
        ("rows_since_fired_F", (48,), P("model")),
    ],
)
def test_latents_lie_over_model(name: str, shape: tuple[int, ...], expected: P) -> None:
    assert partition(name, shape, 48) == expected


def test_latents_that_do_not_divide_are_refused_with_what_does() -> None:
    with pytest.raises(InputError, match=r"model_parallel = 8 does not divide 20 latents; use 1 or 2 or 4, or 24 la"):
        check_latents(20, make_mesh(8))
