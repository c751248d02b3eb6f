"""Whole chains on object stores: the same results as on a disk, to the byte."""

import json

import pytest
import tiny_run

from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_reader import RowReader
from saex_pipe.pipelines import chain
from saex_pipe.stages.harvest import work

CORPUS = {"window_length": 32, "max_tokens": 60 * 32}
HARVEST = {"taps": [tiny_run.TAP], "compute_dtype": "float32", "batch_windows": 8, "shard_windows": 8}
TRAIN = {"latents": 64, "k": 4, "batch_rows": 128, "rows": 1280, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    model, source = tiny_run.write_model(place / "model"), tiny_run.write_corpus(place / "text.jsonl.gz")
    settings = {
        "corpus": CORPUS | {"source": [str(source)]},
        "harvest": HARVEST | {"model": str(model)},
        "train": TRAIN,
    }
    return chain.Recipe("remote", "", ("corpus", "harvest", "train", "evaluate", "cache"), settings, "")


def run(recipe, out, **settings):
    return list(chain.run_chain(recipe, out, stages=recipe.stages, **settings))


@pytest.fixture(scope="module")
def local(recipe, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("local"))
    run(recipe, out)
    return Folder(out)


def results(folder):
    """Every object that says neither when nor where it was made."""
    volatile = ("manifest.json", "metrics.jsonl", "report.html")
    names = [name for name in folder.list() if not name.endswith(volatile) and "/state/" not in name]
    return {name: data for name, data in folder.read_many(names).items() if not name.endswith("saex.json")}


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_chain_on_an_object_store_gives_what_it_gives_on_a_disk(recipe, local, stores, kind):
    finished = run(recipe, stores[kind])
    assert [stage.ran for stage in finished] == [True] * 5
    folder = Folder(stores[kind])
    found, expected = results(folder), results(local)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    for stage in finished:
        name = stage.config.folder
        mine, theirs = (Manifest.read(root.child(name)) for root in (folder, local))
        assert (mine.digest, mine.contents) == (theirs.digest, theirs.contents)
    assert [stage.ran for stage in run(recipe, stores[kind])] == [False] * 5


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_results_are_replaced_and_shared_out_on_an_object_store(recipe, local, stores, kind, monkeypatch):
    monkeypatch.setattr(work, "_POLL_SECONDS", 0.1)
    run(recipe, stores[kind])
    other = chain.with_assignments(recipe, ["harvest.taps=blocks.1.mlp_out", "harvest.elastic=true", "train.k=3"])
    finished = run(other, stores[kind], force=True)
    assert [stage.ran for stage in finished] == [False, True, True, True, True]
    folder = Folder(stores[kind])
    assert not [name for name in folder.list() if "saex-new" in name]
    assert list(Manifest.read(folder.child("activations")).contents["taps"]) == ["blocks.1.mlp_out"]
    states = folder.child("activations").read_many(folder.child("activations").list("claims/"))
    assert all("finished" in json.loads(state) for state in states.values())
    run(recipe, stores[kind], force=True)
    assert results(folder).keys() >= results(local).keys()


class DiedError(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_training_goes_on_from_a_checkpoint_in_a_bucket(recipe, local, stores, kind, monkeypatch):
    changed = chain.with_assignments(recipe, ["train.checkpoint_every_steps=2"])
    config = chain.configure(
        changed, "train", f"{stores[kind]}-resumed", {"activations": local.child("activations").uri}
    )
    batch, seen = RowReader.batch, []

    def dying(self, step, *rest, **settings):
        seen.append(step)
        if step == 7 and len(seen) == 8:
            raise DiedError
        return batch(self, step, *rest, **settings)

    monkeypatch.setattr(RowReader, "batch", dying)
    with pytest.raises(DiedError):
        chain.finish_stage(config, force=False)
    chain.finish_stage(config, force=False)
    assert seen == [*range(8), *range(6, 10)]
    name = "sae_weights.safetensors"
    assert Folder(config.out).read(name) == local.child("sae").read(name)
    saved = Folder(config.out).list("state/")
    assert sorted({name.split("/")[1] for name in saved}) == ["000000000008", "000000000010"]
