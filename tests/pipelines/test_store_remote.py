"""``saex-pipe store`` on S3 and GCS: each command does what it does on a disk."""

import pytest
import tiny_run
from object_stores import fresh

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.claims import Claims
from saex_pipe.common.formats.folder import Folder
from saex_pipe.pipelines import cli

TAP = tiny_run.TAP
SHARD_1, SHARD_2 = (f"acts/{TAP}/c/{shard}/0/0" for shard in (1, 2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of three shards on a disk; its model and tokens lie there, too."""
    return Folder(str(tiny_run.write_store(tmp_path_factory.mktemp("store"), shards=3)))


@pytest.fixture(params=["s3", "gs"])
def store(request, stores, whole):
    """A copy of the store, to be spoilt."""
    folder = Folder(f"{fresh(stores[request.param])}/activations")
    for name, data in everything(whole).items():
        folder.write(name, data)
    return folder


def everything(folder):
    return folder.read_many(folder.list())


def lasting(folder):
    """Without those that say when and how long."""
    return {name: data for name, data in everything(folder).items() if name not in ("manifest.json", "metrics.jsonl")}


def run(command, store, *arguments):
    cli.app(["store", command, store.uri, *arguments], standalone_mode=False)


def test_verify_finds_what_is_wrong(store, whole, capsys):
    run("verify", store)
    assert "all 3 shards are as they were written" in capsys.readouterr().out
    store.write(SHARD_1, whole.read(SHARD_2))
    store.delete("tokens/c/2/0")
    with pytest.raises(SaexError, match="3 findings; 'saex-pipe store repair"):
        run("verify", store)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"acts/{TAP} shard 1"] * 2 + ["tokens shard 2"]


def test_repair_mends_it(store, whole, capsys):
    store.write(SHARD_1, whole.read(SHARD_2))
    store.delete("tokens/c/2/0")
    run("repair", store)
    assert f"{store.uri}: made 2 shards again" in capsys.readouterr().out
    assert lasting(store) == lasting(whole)
    run("verify", store)


def test_a_copy_is_the_same_to_the_byte(store, tmp_path):
    for out in (Folder(f"{store.uri}-copy"), Folder(str(tmp_path / "copy"))):
        run("copy", store, out.uri)
        shards = {name: data for name, data in everything(store).items() if "/c/" in name}
        assert len(shards) == 9
        assert {name: data for name, data in everything(out).items() if "/c/" in name} == shards


def test_prune_of_an_unfinished_store_spares_what_is_held(store, capsys):
    for name in ("manifest.json", "ledger/000001.json", "ledger/000002.json", "claims/"):
        store.delete(name)
    assert Claims(store, "dead", 1.0).claim(1)
    before = everything(store)
    with Claims(store, "alive", 1.0) as alive:
        assert alive.claim(2)
        run("prune", store, "--yes")
        reclaimed = {name for name in before if "/c/1" in name} | {"claims/000001.json"}
        assert len(reclaimed) == 4
        assert everything(store).keys() == before.keys() - reclaimed | {"claims/000002.json"}
    said = capsys.readouterr().out
    assert f"4 objects of {sum(len(before[name]) for name in reclaimed):,} bytes\n" in said
    assert f"deleted {store.uri}/{SHARD_1}\n" in said
    assert "kept 3 objects of" in said


def test_prune_of_a_finished_store_leaves_what_it_is_made_of(store, whole):
    store.write(f"acts/{TAP}/c/9/0/0", b"123")
    beside = Folder(f"{store.uri.removesuffix('activations')}.activations.saex-new")
    beside.write("x", b"1")
    run("prune", store, "--yes", "--stopped")
    assert everything(store) == {name: data for name, data in everything(whole).items() if "claims/" not in name}
    assert beside.list() == []


def test_sample_shows_the_rows_that_it_shows_on_a_disk(store, whole, capsys):
    run("sample", whole, "--rows", "3")
    expected = capsys.readouterr().out
    assert expected.count("norm") == 3
    run("sample", store, "--rows", "3")
    assert capsys.readouterr().out == expected
