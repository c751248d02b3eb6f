"""Every variant trained for a few steps on a mesh, for comparison with one device.

Run as a program it is one of several processes that share a mesh: it trains the variants that a folder names on
meshes and compares what its own devices hold with recorded values.
"""

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saex_pipe.common.mesh import batch_sharding, make_mesh
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.initial import DataStats
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import Optimiser
from saex_pipe.common.sae.sharding import born_sharded
from saex_pipe.common.sae.train_step import Step, StepSettings, TrainState, init_state, make_step
from saex_pipe.common.sae.variants import build

MODEL_AXES = (8, 4, 1)
WIDTH, LATENTS, ROWS, STEPS = 16, 48, 64, 4
# How fast a program runs does not matter here; this halves the time that it takes to compile.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
ADAM = Optimiser()
RATE = np.float32(1e-2)


def variant_of(name: str, **changes: Any) -> Variant:
    """The variant with the settings of its reference."""
    settings = importlib.import_module(f"sae_references.{name}").SETTINGS
    return build(name, LATENTS, **{**settings, **changes})


def batch_BD(step: int) -> np.ndarray:
    """Sums of a few of fixed random features, about a mean."""
    features_FD = np.random.default_rng(99).standard_normal((24, WIDTH)) / 4
    random = np.random.default_rng(step)
    codes_BF = random.uniform(0.5, 1.5, (ROWS, 24)) * (random.uniform(size=(ROWS, 24)) < 0.15)
    return (codes_BF @ features_FD + 0.3).astype(np.float32)


def make_state(variant: Variant, dead: int, optimiser: Optimiser = ADAM, seed: int = 0) -> TrainState:
    """A state with moving averages, in which every third latent, ``dead`` of them, has not fired for long."""
    x_BD = jnp.asarray(batch_BD(0))
    mean_D = x_BD.mean(axis=0)
    params = variant.init(jax.random.key(seed), DataStats(mean_D, mean_D, x_BD, x_BD))
    normalisers = Normalisers(*(Normaliser(jnp.full(WIDTH, 1.25)) for _ in range(2)))
    state = init_state(params, optimiser.build(STEPS), normalisers, averaged=True)
    since_F = 10_000 * ((jnp.arange(LATENTS) * 3) % (LATENTS + 1) < dead).astype(jnp.int32)
    return state._replace(rows_since_fired_F=since_F)


def make_train_step(mesh: Mesh | None, optimiser: Optimiser = ADAM, **compute: Any) -> Step:
    """The step, not yet compiled."""
    settings = StepSettings(
        total_steps=STEPS, dead_after_rows=5000, average_decay=0.5, compute=Compute(mesh=mesh, **compute)
    )
    return make_step(optimiser.build(STEPS), settings)


def place(rows_BD: np.ndarray, mesh: Mesh | None) -> Any:
    """A batch on the devices of its rows."""
    if mesh is None:
        return rows_BD
    return jax.make_array_from_callback(rows_BD.shape, batch_sharding(mesh), lambda part: rows_BD[part])


def compiled(step: Step, **options: Any) -> Callable[..., Any]:
    """The step as training compiles it, but faster."""
    return jax.jit(step, donate_argnums=2, compiler_options=FAST_TO_COMPILE, **options)


def start(name: str, mesh: Mesh | None, dead: int, optimiser: Optimiser = ADAM) -> TrainState:
    """The state before the first step."""
    make = partial(make_state, variant_of(name), dead, optimiser)
    return jax.jit(make)() if mesh is None else born_sharded(make, LATENTS, mesh)


def trained(name: str, mesh: Mesh | None, dead: int, optimiser: Optimiser = ADAM) -> dict[str, jax.Array]:
    """State and terms after a few steps, by their places in the trees."""
    state, variant = start(name, mesh, dead, optimiser), variant_of(name)
    step = compiled(make_train_step(mesh, optimiser))
    for number in range(STEPS):
        rows_BD = place(batch_BD(number), mesh)
        state, terms = step(variant, RATE, state, rows_BD, rows_BD)
    return by_place((state, terms))


def by_place(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their places in it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def largest_error(found: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> float:
    """The largest relative error of an array, over the shards that this process holds; counts must be equal."""
    assert found.keys() == expected.keys()
    errors = [0.0]
    for name, array in found.items():
        assert array.shape == expected[name].shape, name
        for shard in array.addressable_shards:
            part, whole = np.asarray(shard.data), expected[name][shard.index]
            if np.issubdtype(whole.dtype, np.integer):
                np.testing.assert_array_equal(part, whole, err_msg=name)
            else:
                size = np.linalg.norm(expected[name].astype(np.float64)) + 1e-30
                errors.append(float(np.linalg.norm(part.astype(np.float64) - whole) / size))
    return max(errors)


def main(port: str, processes: str, folder: str, process: str) -> None:
    """Print the largest error of each case, which is the name of a file, VARIANT-DEAD-MODEL_AXIS, as JSON."""
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=int(processes), process_id=int(process))
    errors = {}
    for path in sorted(Path(folder).glob("*.npz")):
        name, dead, axis = path.stem.rsplit("-", 2)
        with np.load(path) as file:
            expected = dict(file)
        errors[path.stem] = largest_error(trained(name, make_mesh(int(axis)), int(dead)), expected)
    print(json.dumps({"devices": [jax.local_device_count(), jax.device_count()], "errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
