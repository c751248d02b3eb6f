"""``saex-pipe store``: what it says of a store, finds wrong with it, copies, and mends."""

import contextlib
import json
import re
import shutil
import threading

import jax
import numpy as np
import pytest
import tiny_run
from old_store import make_old

from saex_pipe.common.errors import InputError, SaexError, ShareDone
from saex_pipe.common.formats import int8
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.followed_store import Room
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.llm.tokenizer import load_tokenizer
from saex_pipe.common.metrics_log import progress
from saex_pipe.pipelines import cli
from saex_pipe.pipelines import store as store_module
from saex_pipe.stages.harvest import run as harvest
from saex_pipe.stages.harvest.config import Config

TAP = tiny_run.TAP


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus and a store of five shards of two chunks each."""
    place = tmp_path_factory.mktemp("store")
    tiny_run.write_store(place, shards=5)
    return place


@pytest.fixture
def store(place, tmp_path):
    """A copy of the folder, to be spoilt."""
    shutil.copytree(place / "whole", tmp_path / "store")
    return tmp_path / "store"


def run(*arguments):
    cli.app(["store", *map(str, arguments)], standalone_mode=False)


def shard(store, number, array=f"acts/{TAP}"):
    return store / array / "c" / str(number) / "/".join("0" * (2 if array.startswith("acts") else 1))


def files_of(store):
    skipped = ("manifest.json", "metrics.jsonl")
    return {name: (store / name).read_bytes() for name in Folder(str(store)).list() if name not in skipped}


def flip(store):
    data = bytearray(shard(store, 1).read_bytes())
    data[3000] ^= 4
    shard(store, 1).write_bytes(data)


def truncate(store):
    shard(store, 2).write_bytes(shard(store, 2).read_bytes()[:-200])


def remove(store):
    shard(store, 3, "tokens").unlink()


def swap(store):
    one, other = shard(store, 0).read_bytes(), shard(store, 4).read_bytes()
    shard(store, 0).write_bytes(other)
    shard(store, 4).write_bytes(one)


def swap_chunks(store):
    data = bytearray(shard(store, 1).read_bytes())
    size = 4 * 32 * tiny_run.WIDTH * 2 + 4
    data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]
    shard(store, 1).write_bytes(data)


def spoil_index(store):
    data = bytearray(shard(store, 1, "keep").read_bytes())
    data[-6] ^= 1
    shard(store, 1, "keep").write_bytes(data)


def lose_entry(store):
    (store / "ledger" / "000002.json").unlink()


def cut_entry(store):
    path = store / "ledger" / "000002.json"
    path.write_bytes(path.read_bytes()[:50])


def swap_entries(store):
    one, other = (store / "ledger" / f"{number:06d}.json" for number in (0, 3))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def spoil_metadata(store):
    path = store / "keep" / "zarr.json"
    path.write_text(path.read_text().replace('"shape":[40,32]', '"shape":[41,32]'))


def lose_index(store):
    (store / "index" / "rows.npy").unlink()


FAULTS = {
    lose_index: ["index/rows.npy: missing"],
    flip: [f"acts/{TAP} shard 1: windows 8 to 11: damaged: its checksum does not fit"],
    truncate: [f"acts/{TAP} shard 2: windows 20 to 23: cut off before the end of its 8,196 bytes"],
    remove: ["tokens shard 3: missing"],
    swap: [
        f"acts/{TAP} shard {n}: windows {8 * n + 4 * c} to {8 * n + 4 * c + 3}: not what was written there"
        for n in (0, 4)
        for c in (0, 1)
    ],
    swap_chunks: [f"acts/{TAP} shard 1: windows {a} to {a + 3}: not what was written there" for a in (8, 12)],
    spoil_index: ["keep shard 1: its index is not that of its chunks"],
    lose_entry: ["ledger shard 2: has no entry"],
    cut_entry: ["ledger shard 2: its entry does not fit the index"],
    swap_entries: [f"ledger shard {number}: its entry does not fit the index" for number in (0, 3)],
    spoil_metadata: ["keep: its zarr.json does not describe the array in the manifest"],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_verify_names_exactly_what_is_wrong_and_repair_mends_it(place, store, fault, capsys):
    fault(store)
    assert files_of(store) != files_of(place / "whole")
    with pytest.raises(SaexError, match="findings; 'saex-pipe store repair"):
        run("verify", store)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FAULTS[fault])
    for line, expected in zip(sorted(lines), sorted(FAULTS[fault]), strict=True):
        assert line.startswith(expected)
    run("repair", store)
    assert files_of(store) == files_of(place / "whole")
    capsys.readouterr()
    run("verify", store)
    assert "all 5 shards are as they were written" in capsys.readouterr().out


MAKERS = {
    "fixed shares": [{"worker": "1/2"}, {"worker": "0/2"}],
    "elastic": [{"elastic": True}],
    "room for two shards": [{"max_store_bytes": 2 * 8 * 32 * tiny_run.WIDTH * 2}],
    "jax": [{"worker": "jax"}],
}


@pytest.mark.parametrize("makers", MAKERS.values(), ids=MAKERS)
def test_repair_mends_every_share_of_a_store_that_several_made(place, tmp_path, monkeypatch, makers, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(Room, "has", lambda room, shard: True)  # as where readers keep up
    plain = Manifest.read(Folder(str(place / "whole")))
    store = tmp_path / "store"
    for maker in makers:
        with contextlib.suppress(ShareDone):
            harvest.run(Config.create(plain.config | maker | {"out": str(store)}))
    monkeypatch.undo()
    before = {name: data for name, data in files_of(store).items() if not name.startswith("claims/")}
    for fault in (flip, truncate, remove, lambda store: (store / "ledger" / "000000.json").unlink()):
        fault(store)
    run("repair", store)
    assert "made 4 shards again" in capsys.readouterr().out
    assert {name: data for name, data in files_of(store).items() if not name.startswith("claims/")} == before
    repaired = Manifest.read(Folder(str(store)))
    assert repaired.config == plain.config | {"out": str(store)}
    assert (repaired.contents, repaired.digest) == (plain.contents, plain.digest)
    run("verify", store)


def test_verify_reads_as_many_objects_at_once_as_there_are_jobs_and_its_bar_counts_all(store, monkeypatch):
    together, read, bars = threading.Barrier(3, timeout=30), Folder.read, []
    threads = set()

    def read_beside_others(folder, name):
        if "/c/" in name:
            together.wait()  # breaks where fewer than three reads are under way
            threads.add(threading.get_ident())
        return read(folder, name)

    @contextlib.contextmanager
    def recorded(*settings):
        with progress(*settings) as bar:
            bars.append(bar)
            yield bar

    monkeypatch.setattr(Folder, "read", read_beside_others)
    monkeypatch.setattr(store_module, "progress", recorded)
    run("verify", store, "--jobs", "3")
    assert len(threads) == 3
    assert [(bar.done, bar.total, bar.unit) for bar in bars] == [(15, 15, "objects")]


def test_totals_that_are_not_those_of_the_index_are_found_and_mended(place, store, capsys):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["contents"]["rows"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(SaexError, match="1 findings"):
        run("verify", store)
    assert capsys.readouterr().out == "manifest.json: its rows are not as many as those in the index\n"
    run("repair", store)
    original = json.loads((place / "whole" / "manifest.json").read_text())
    repaired = json.loads(path.read_text())
    assert (repaired["contents"], repaired["digest"]) == (original["contents"], original["digest"])


def test_repair_makes_only_the_bad_shards(store, monkeypatch):
    from saex_pipe.common.formats.activations import ActivationWriter

    made, write = [], ActivationWriter.write_shard

    def counted(writer, windows, *rest, **settings):
        made.append(windows.start // 8)
        return write(writer, windows, *rest, **settings)

    monkeypatch.setattr(ActivationWriter, "write_shard", counted)
    swap(store)
    run("repair", store)
    assert sorted(made) == [0, 4]


class DiedError(BaseException):
    """Stands in for the end of the process."""


def test_a_repair_that_is_interrupted_anywhere_can_be_finished(place, store, tmp_path, monkeypatch, capsys):
    delete = Folder.delete
    for survives in range(6):
        spoilt = tmp_path / f"spoilt-{survives}"
        shutil.copytree(store, spoilt)
        swap(spoilt)
        left = [survives]

        def dying(folder, name="", left=left):
            if left[0] == 0:
                raise DiedError
            left[0] -= 1
            delete(folder, name)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "delete", dying)
            try:
                run("repair", spoilt)
            except DiedError:
                pass
            else:
                assert survives == 5
        if (spoilt / "manifest.json").exists():
            run("repair", spoilt)
        else:
            config = json.loads((place / "whole" / "manifest.json").read_text())["config"]
            harvest.run(Config.create(config | {"out": str(spoilt)}))
        assert files_of(spoilt) == files_of(place / "whole")


def test_a_store_whose_inputs_have_changed_is_not_repaired(store):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"digest": "another"}))
    flip(store)
    before = files_of(store)
    with pytest.raises(InputError, match="was made of other inputs than there are now"):
        run("repair", store)
    assert files_of(store) == before


def test_info_says_what_is_in_a_store(store, capsys):
    run("info", store, "--json", "--price-per-gb-month", "1000000")
    facts = json.loads(capsys.readouterr().out)
    size = 40 * 32 * tiny_run.WIDTH * 2
    assert (facts["bytes"], facts["shards"], facts["tokens"]) == (size, 5, 1280)
    assert facts["cost_per_month"] == pytest.approx(size * 1e-3, abs=0.01)
    assert facts["taps"] == {TAP: f"{tiny_run.WIDTH} x bfloat16"}
    assert facts["rows"] == ActivationStore(str(store)).rows
    run("info", store)
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "warned"), [(1e-4, False), (2.34e-4, True), (float("nan"), True)])
def test_info_warns_where_one_byte_adds_too_much_error(store, capsys, error, warned):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["contents"]["added_error"] = {TAP: error}
    path.write_text(json.dumps(manifest))
    run("info", store, "--json")
    said = capsys.readouterr()
    line = f"warning: {store}: int8 adds {error:.2g} of the variance to {TAP}, more than 0.0001; "
    remedy = f"store it as bfloat16 (--set harvest.tap_dtypes={TAP}=bfloat16)\n"
    assert said.err == (line + remedy if warned else "")
    assert str(json.loads(said.out)[f"added_error {TAP}"]) == str(error)


def test_harvest_and_copy_warn_where_one_byte_adds_too_much_error(place, tmp_path, monkeypatch, capsys):
    config = Manifest.read(Folder(str(place / "whole"))).config
    taps = {"taps": [TAP, "embed"], "tap_dtypes": [f"{TAP}=int8"], "out": str(tmp_path / "store")}
    harvest.run(Config.create(config | taps))
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(int8, "MOST_ADDED_ERROR", 1e-7)  # in place of a model with heavier tails
    manifest = harvest.run(Config.create(config | taps | {"out": str(tmp_path / "other")}))
    error = manifest.contents["added_error"][TAP]
    line = f"int8 adds {error:.2g} of the variance to {TAP}, more than 1e-07; store it as bfloat16 (--set"
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'other'}: {line}")
    run("copy", tmp_path / "other", tmp_path / "copy")
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'copy'}: {line}")


def test_info_of_an_unfinished_store_says_who_is_at_work(store, capsys):
    (store / "manifest.json").unlink()
    (store / "ledger" / "000004.json").unlink()
    Folder(str(store)).write("claims/000004.json", json.dumps({"worker": "w", "beat": 3}).encode())
    run("info", store, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["claims"]) == ("4 of 5 shards", {"000004": "w"})


def test_stats_are_those_of_the_rows(store, capsys):
    run("stats", store, "--json")
    facts = json.loads(capsys.readouterr().out)
    opened = ActivationStore(str(store))
    rows_BD = opened.acts(TAP, range(40))[opened.keep(range(40))].astype(np.float64)
    norms = np.linalg.norm(rows_BD, axis=1)
    assert facts["rows"] == len(rows_BD)
    assert facts["root_mean_square_norm"] == pytest.approx(np.sqrt(np.square(norms).mean()), rel=1e-3)
    assert facts["norm_50_percent"] == pytest.approx(np.median(norms), rel=0.05)
    run("stats", store)
    assert "mean to spread" in capsys.readouterr().out


def test_stats_are_plotted_on_a_page_of_its_own(store, tmp_path):
    run("stats", store, "--plot", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    found = ActivationStore(str(store)).statistics(TAP)
    assert page.count("<rect") == len(found.norms()[0]) + tiny_run.WIDTH
    assert f"<h2>{TAP}</h2>" in page
    assert f"{found.count:,} rows of {tiny_run.WIDTH} in bfloat16" in page
    assert "http" not in page


def test_sample_shows_rows_with_their_text(place, store, capsys):
    run("sample", store, "--rows", "3", "--seed", "1")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    opened, tokenizer = ActivationStore(str(store)), load_tokenizer(place / "model")
    for line in lines:
        window, at, text, norm = re.fullmatch(r"window (\d+) position (\d+): (.*)  norm (\S+)  .*", line).groups()
        one, at = range(int(window), int(window) + 1), int(at)
        tokens_L = opened.tokens(one)[0]
        before, here = (tokenizer.decode(part) for part in np.split(tokens_L[max(0, at - 8) : at + 1], [-1]))
        assert text == f"{before}[{here}]".replace("\n", " ")
        assert {*tiny_run.WORDS} & {*re.split(r"[\[\] ]+", text)}
        row_D = opened.acts(TAP, one)[0, at].astype(np.float32)
        assert float(norm) == pytest.approx(np.linalg.norm(row_D), rel=1e-3)


def test_a_copy_of_the_same_shape_is_the_same_to_the_byte(store, tmp_path):
    run("copy", store, tmp_path / "copy")
    names = [name for name in files_of(store) if "/c/" in name]
    assert len(names) == 15
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (store / name).read_bytes(), name
    found, original = ActivationStore(str(tmp_path / "copy")), ActivationStore(str(store))
    assert found.manifest.contents["statistics"] == original.manifest.contents["statistics"]


def test_a_copy_may_have_another_type_and_another_cut(store, tmp_path):
    cut = ["--set", "dtype=int8", "--set", "windows=30", "--set", "shard_windows=12", "--set", "chunk_windows=3"]
    run("copy", store, tmp_path / "copy", *cut)
    found, original = ActivationStore(str(tmp_path / "copy")), ActivationStore(str(store))
    assert found.info.tiling.shards(30) == [range(0, 12), range(12, 24), range(24, 30)]
    exact, stored = (opened.acts(TAP, range(30)).astype(np.float64) for opened in (original, found))
    keep_NL = original.keep(range(30))
    rows_BD = exact[keep_NL]
    error = np.square(stored[keep_NL] - rows_BD).sum() / np.square(rows_BD - rows_BD.mean(axis=0)).sum()
    assert 0 < error < 1e-4
    assert found.manifest.contents["added_error"][TAP] == pytest.approx(error, rel=1e-3)
    np.testing.assert_array_equal(found.tokens(range(30)), original.tokens(range(30)))


def test_a_store_of_version_1_is_migrated_and_then_can_be_repaired(place, store, capsys):
    make_old(store)
    refusal = "has schema version 1, this version of saex-pipe reads 2; 'saex-pipe store migrate"
    with pytest.raises(InputError, match=refusal):
        run("verify", store)
    run("migrate", store, "--jobs", "2")
    digest = json.loads((place / "whole" / "manifest.json").read_text())["digest"]
    assert f"all 5 shards are as they were written; its digest is now {digest}" in capsys.readouterr().out
    activations = {name: data for name, data in files_of(place / "whole").items() if "/c/" in name}
    flip(store)
    run("repair", store)
    assert {name: data for name, data in files_of(store).items() if "/c/" in name} == activations
    run("verify", store)


def test_a_folder_that_is_no_store_is_refused(place, tmp_path):
    for command in (["info"], ["verify"], ["stats"], ["sample"], ["repair"], ["prune"], ["copy"]):
        for uri in (tmp_path / "nothing", place / "corpus"):
            with pytest.raises(InputError, match=r"holds no|was written by corpus"):
                run(*command, uri, *([tmp_path / "out"] if command == ["copy"] else []))
