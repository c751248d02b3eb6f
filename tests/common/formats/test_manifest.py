"""What a stage's folder keeps, gives up and leaves alone."""

import json
from typing import ClassVar

import numpy as np
import pytest

from saex_pipe.common.config import StageConfig, setting
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.activations import ActivationWriter, StoreInfo
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.stage_output import stage_output
from saex_pipe.common.formats.zarr_array import Tiling
from saex_pipe.common.metrics_log import MetricsLog


class Config(StageConfig):
    """A stage of one setting."""

    stage: ClassVar[str] = "bake"
    folder: ClassVar[str] = "bread"

    salt: int = setting(1, unit="grams", meaning="how much")


def bake(out, salt=1, force=False):
    with stage_output(Config(out=str(out), salt=salt), force=force) as output:
        if output.manifest is None:
            output.finish(contents={"salt": salt}, totals={})


def fail(out, name, error):
    with stage_output(Config(out=str(out))) as output:
        output.folder.write(name, b"{}")
        output.metrics.event(step=1)
        raise error


def test_folders_of_others_beside_the_output_are_left_alone(tmp_path):
    for name in ("bread.old", "bread.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("x")
    bake(tmp_path / "bread")
    bake(tmp_path / "bread")
    bake(tmp_path / "bread", salt=2, force=True)
    assert Manifest.require(str(tmp_path / "bread"), ("bake",)).contents == {"salt": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bread", "bread.new", "bread.old"]
    assert all((tmp_path / name / "thesis.tex").exists() for name in ("bread.old", "bread.new"))


def test_a_finished_replacement_is_settled_and_an_unfinished_one_undone(tmp_path):
    bread, grave, staging = (tmp_path / name for name in ("bread", ".bread.saex-old", ".bread.saex-new"))
    bake(bread)
    bread.rename(grave)
    bake(bread)
    assert (bread.exists(), grave.exists()) == (True, False), "the old result is back"
    bake(tmp_path / "other", salt=2)
    bread.rename(grave)
    (tmp_path / "other").rename(staging)
    bake(bread, salt=2)
    assert [path.name for path in tmp_path.iterdir()] == ["bread"]
    assert Manifest.require(str(bread), ("bake",)).contents == {"salt": 2}


def test_a_worker_that_starts_at_the_same_moment_is_no_stranger(tmp_path, monkeypatch):
    listed = Folder.list

    def list_after_another_has_started(folder, prefix=""):
        monkeypatch.setattr(Folder, "list", listed)
        with pytest.raises(KeyError):
            fail(tmp_path / "bread", "ledger/000000.json", KeyError("killed"))
        return folder.list(prefix)

    monkeypatch.setattr(Folder, "list", list_after_another_has_started)
    with stage_output(Config(out=str(tmp_path / "bread"))) as output:
        assert output.finished_shards() == {0}


@pytest.mark.parametrize("error", [InputError("bad", "mend it"), SaexError("bad"), KeyError("bad")])
@pytest.mark.parametrize("name", ["ledger/000000.json", "parts/codes.npz", "state/5/x"])
def test_work_that_the_next_run_goes_on_from_is_kept(error, name, tmp_path):
    with pytest.raises(type(error)):
        fail(tmp_path / "bread", name, error)
    assert Folder(str(tmp_path / "bread")).list() == sorted(["metrics.jsonl", name, "started.json"])


@pytest.mark.parametrize("error", [InputError("bad", "mend it"), SaexError("bad"), KeyError("bad")])
def test_a_run_that_wrote_nothing_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)):
        fail(tmp_path / "bread", "acts/a/zarr.json", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [InputError("bad", "mend it"), SaexError("bad"), KeyError("bad")])
def test_a_run_that_comes_to_a_prepared_folder_leaves_it(error, tmp_path):
    """The same command may be at work there, which has nothing to show for it yet."""
    with stage_output(Config(out=str(tmp_path / "out"))) as output:
        output.folder.write("calibration.json", b"{}")
        with pytest.raises(type(error)):
            fail(tmp_path / "out", "zarr.json", error)
        assert {"started.json", "calibration.json"} <= {*output.folder.list()}


def test_finished_shards_are_known_by_name(tmp_path):
    with stage_output(Config(out=str(tmp_path / "bread"))) as output:
        assert output.finished_shards() == set()
        output.commit_shard(3, {})
        output.folder.write("ledger/000012.json", b"damaged")
        assert output.finished_shards() == {3, 12}


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    bake(tmp_path / "bread")
    path = tmp_path / "bread" / "manifest.json"
    found = json.loads(path.read_text())
    assert "inputs" not in found
    path.write_text(json.dumps(found | {"inputs": {}}))
    bake(tmp_path / "bread")


def test_metrics_on_an_object_store_go_on_after_those_of_the_run_before():
    kept = {}
    for run in range(2):
        log = MetricsLog(None, lambda data: kept.update(log=data), lambda: kept.get("log"))
        log.event(run=run)
        log.close()
        log.event(run=run + 0.5)
        log.close()
        log.close()
    assert [json.loads(line)["run"] for line in kept["log"].splitlines()] == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize(
    ("dtype", "value", "line"),
    [
        ("float32", np.nan, r"activations at this tap are not finite; try compute_dtype=float32"),
        ("float16", np.nan, r"activations at this tap are not finite; try compute_dtype=float32"),
        ("float32", np.inf, r"activations at this tap are not finite; try compute_dtype=float32"),
        ("float16", np.inf, r"float16 cannot hold; set store_dtype to bfloat16 or float32"),
    ],
)
def test_what_is_not_finite_is_told_from_what_does_not_fit(dtype, value, line, tmp_path):
    info = StoreInfo(1, 1, 2, {"a": 1}, {"a": dtype}, Tiling(1, 1), RowPolicy(), {})
    writer = ActivationWriter(Folder(str(tmp_path)), info)
    acts = {"a": np.full((1, 2, 1), value, dtype)}
    with pytest.raises(SaexError, match=line):
        writer.write_shard(range(1), np.zeros((1, 2), np.int32), np.ones((1, 2), bool), acts)
