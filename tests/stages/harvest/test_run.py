"""The harvest stage on a tiny model: meshes, taps by pattern, what is under way at once, and what it reports."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from saex_pipe.common.errors import InputError, PreemptedError
from saex_pipe.common.formats.activations import ActivationStore, ActivationWriter
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.formats.zarr_array import Tiling, open_array, read_windows
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.stages.corpus import run as corpus
from saex_pipe.stages.corpus.config import Config as CorpusConfig
from saex_pipe.stages.harvest import run as harvest
from saex_pipe.stages.harvest.config import Config
from saex_pipe.stages.harvest.shard import Batch, Shard

SETTINGS = {"taps": [tiny_run.TAP], "compute_dtype": "float32", "store_dtype": "float32", "batch_windows": 8}
SHARDS = {"shard_windows": 24, "chunk_windows": 4}  # of three batches each
WINDOWS = 80


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("harvest")
    model = tiny_run.write_model(place / "model")
    source = tiny_run.write_corpus(place / "text.jsonl.gz")
    out = str(place / "corpus")
    settings = {"window_length": 32, "max_tokens": WINDOWS * 32, "holdout_fraction": 0.0}
    corpus.run(CorpusConfig.create({"source": [str(source)], "tokenizer": str(model), "out": out} | settings))
    return {"model": str(model), "tokens": out}


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A store that one device and one writer made undisturbed, and its manifest."""
    out = tmp_path_factory.mktemp("whole") / "activations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        return out, run(inputs, out)


def run(inputs, out, **changes):
    return harvest.run(Config.create(inputs | SETTINGS | SHARDS | {"out": str(out)} | changes))


def acts_of(out, tap=tiny_run.TAP):
    return read_windows(open_array(Folder(str(out)), f"acts/{tap}"), range(WINDOWS))


def files_of(out):
    names = [
        path for path in Path(out).rglob("*") if path.is_file() and path.name not in ("manifest.json", "metrics.jsonl")
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def wanted(inputs):
    """Token ids and the activations that one device makes of them."""
    model = load_model(Path(inputs["model"]), last_layer=1, with_unembedding=False, dtype="float32")
    tokens_NL = TokenStore(inputs["tokens"]).tokens(range(WINDOWS))
    forward = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=[tiny_run.TAP], logits=False))
    return tokens_NL, np.asarray(forward(model, tokens_NL).taps[tiny_run.TAP])


@pytest.mark.parametrize("model_parallel", [1, 2, 4])
def test_a_store_is_the_same_on_every_mesh(inputs, tmp_path, wanted, model_parallel):
    tokens_NL, wanted_NLD = wanted
    assert len(jax.local_devices()) == 8
    manifest = run(inputs, tmp_path, model_parallel=model_parallel)
    np.testing.assert_allclose(acts_of(tmp_path), wanted_NLD, rtol=1e-5, atol=1e-5)
    counted_NL = ~np.isin(tokens_NL, [0, 1])  # ends and starts of documents
    counted_NL[64:], counted_NL[:, 0] = False, False
    median = np.median(np.linalg.norm(wanted_NLD, axis=-1)[counted_NL])
    assert manifest.contents["row_policy"]["norm_limits"][tiny_run.TAP] == pytest.approx(10 * median, rel=1e-5)


def test_how_it_is_run_does_not_change_what_it_is(inputs, whole):
    out, manifest = whole
    again = run(inputs, out, model_parallel=2, writers=3)
    assert (again.digest, again.finished_at) == (manifest.digest, manifest.finished_at)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_parallel": 3}, "model axis of 3 does not divide 8 devices; use one of 1, 2, 4, 8"),
        (
            {"batch_windows": 12},
            "harvest.batch_windows = 12 does not divide over 8 devices of the data axis; use a multiple of 8, "
            "such as 16",
        ),
        ({"model_parallel": 0}, "harvest.model_parallel = 0: Input should be greater than or equal to 1"),
    ],
)
def test_devices_that_do_not_divide_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        run(inputs, tmp_path / "out", **changes)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "out").exists(), "nothing is left behind"


@pytest.mark.parametrize("window_bytes", [128 * 576 * 2, 1024 * 768 * 2, 1024 * 2304 * 2, 256 * 3072 * 4])
@pytest.mark.parametrize("batch", [7, 8, 13, 24, 31, 32, 37, 512, 1009])
def test_shards_are_whole_batches_of_64_to_256_megabytes(window_bytes, batch):
    config = Config.create({"model": "m", "tokens": "t", "out": "o", "taps": ["embed"], "batch_windows": batch})
    tiling = harvest._tiling(config, window_bytes, 10**6)
    assert tiling.shard_windows % tiling.chunk_windows == 0
    short = -tiling.shard_windows % batch
    assert short < (tiling.chunk_windows if batch == 1009 else 1), "the room of the last pass of a shard that is empty"
    assert 64e6 <= tiling.shard_windows * window_bytes <= max(256 << 20, batch * window_bytes)
    assert 1.5e6 <= tiling.chunk_windows * window_bytes <= max(8 << 20, 2 * window_bytes)
    by_hand = config.model_copy(update={"shard_windows": 10, "chunk_windows": 5})
    assert harvest._tiling(by_hand, window_bytes, 10**6) == Tiling(10, 5)
    chunk_by_hand = config.model_copy(update={"chunk_windows": 5})
    assert harvest._tiling(chunk_by_hand, window_bytes, 10**6).chunk_windows == 5


@pytest.mark.usefixtures("one_device")
def test_patterns_of_taps_are_stored_under_the_names_that_they_stand_for(inputs, tmp_path, whole):
    manifest = run(inputs, tmp_path, taps=["blocks.*.resid_pre", "blocks.{0,2}.attn_z"])
    wanted = ["blocks.0.resid_pre", "blocks.1.resid_pre", "blocks.2.resid_pre", "blocks.0.attn_z", "blocks.2.attn_z"]
    assert sorted(manifest.contents["taps"]) == sorted(wanted)
    assert sorted(ActivationStore(str(tmp_path)).info.taps) == sorted(wanted)
    np.testing.assert_array_equal(acts_of(tmp_path), acts_of(whole[0]))


@pytest.mark.usefixtures("one_device")
def test_the_share_of_outlier_tokens_is_stated_for_each_tap_and_for_all(inputs, tmp_path):
    taps = ["blocks.0.resid_pre", "blocks.1.resid_pre"]
    run(inputs, tmp_path / "all", taps=taps)
    contents = run(inputs, tmp_path / "some", taps=taps, drop_norm_multiple=1.1).contents
    every, some = ActivationStore(str(tmp_path / "all")), ActivationStore(str(tmp_path / "some"))
    windows = range(every.info.windows)
    rows_NL, limits = every.keep(windows), contents["row_policy"]["norm_limits"]
    beyond = {
        tap: rows_NL & (np.linalg.norm(every.acts(tap, windows).astype(np.float32), axis=-1) > limits[tap])
        for tap in taps
    }
    shares = {tap: found_NL.sum() / rows_NL.sum() for tap, found_NL in beyond.items()}
    assert len({*shares.values()}) == len(taps)
    assert contents["tap_outlier_share"] == pytest.approx(shares, abs=2e-3)
    assert contents["outlier_share"] == 1 - some.rows / every.rows
    assert max(shares.values()) <= contents["outlier_share"] < sum(shares.values())


@pytest.mark.usefixtures("one_device")
def test_the_share_of_outlier_tokens_is_stated(inputs, tmp_path, wanted):
    contents = run(inputs, tmp_path, drop_norm_multiple=1.1).contents
    tokens_NL, wanted_NLD = wanted
    rows_NL = ~np.isin(tokens_NL, [0, 1])  # ends and starts of documents
    rows_NL[:, 0] = False
    beyond_NL = np.linalg.norm(wanted_NLD, axis=-1) > contents["row_policy"]["norm_limits"][tiny_run.TAP]
    assert 0.01 < contents["outlier_share"] < 0.99
    assert contents["outlier_share"] == pytest.approx((rows_NL & beyond_NL).sum() / rows_NL.sum(), abs=2e-3)
    assert contents["statistics"][tiny_run.TAP]["count"] == contents["rows"]


@pytest.mark.usefixtures("one_device")
def test_the_share_of_time_that_the_device_waits_is_reported(inputs, tmp_path, monkeypatch, whole):
    write_shard = ActivationWriter.write_shard

    def slow(*arguments, **settings):
        time.sleep(0.2)
        return write_shard(*arguments, **settings)

    timings = whole[1].timings
    assert 0 < timings["device_waiting_seconds"] < timings["loop_seconds"] < timings["seconds"]
    monkeypatch.setattr(ActivationWriter, "write_shard", slow)
    slowed = run(inputs, tmp_path).timings
    assert slowed["device_waiting_seconds"] > 0.3, "writing holds four shards up"
    share = slowed["device_waiting_seconds"] / slowed["loop_seconds"]
    assert slowed["device_waiting_share"] == pytest.approx(share, abs=0.01)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["tokens"] == WINDOWS * 32
    assert 0 < events[-1]["device_waiting_share"] < 1
    assert 0 < events[-1]["waiting_seconds"] <= slowed["device_waiting_seconds"]


@pytest.mark.usefixtures("one_device")
def test_two_passes_are_queued_beyond_the_one_that_is_fetched(inputs, tmp_path, monkeypatch):
    fill, submit = Batch.fill, harvest.Passes.submit
    queued = [threading.Event() for _ in range(WINDOWS // 8)]
    number = {"queued": 0, "filled": 0}

    def counted_submit(passes, batch):
        future = submit(passes, batch)
        queued[number["queued"]].set()
        number["queued"] += 1
        return future

    def waiting_fill(batch, harvested):
        last = min(number["filled"] + 2, len(queued) - 1)
        assert queued[last].wait(20), "the next passes wait for this one to be fetched"
        number["filled"] += 1
        fill(batch, harvested)

    monkeypatch.setattr(harvest.Passes, "submit", counted_submit)
    monkeypatch.setattr(Batch, "fill", waiting_fill)
    run(inputs, tmp_path)
    assert number == {"queued": 10, "filled": 10}, "across the ends of shards too"


@pytest.mark.usefixtures("one_device")
def test_shards_in_memory_are_bounded(inputs, tmp_path, monkeypatch):
    empty, write_shard = Shard.empty, ActivationWriter.write_shard
    held, most = set(), []

    def counted_empty(info, number, *rest):
        held.add(number)
        most.append(len(held))
        return empty(info, number, *rest)

    def slow_write(writer, windows, *rest, **settings):
        time.sleep(0.2)
        held.remove(windows.start // 16)
        return write_shard(writer, windows, *rest, **settings)

    monkeypatch.setattr(Shard, "empty", staticmethod(counted_empty))
    monkeypatch.setattr(ActivationWriter, "write_shard", slow_write)
    run(inputs, tmp_path, shard_windows=16)
    assert max(most) == 3, "one that is written, one that is full, one that is filled"


class Interrupted(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


@pytest.mark.usefixtures("one_device")
def test_an_interrupted_harvest_goes_on_to_the_same_bytes(inputs, tmp_path, monkeypatch, whole):
    write_shard, written = ActivationWriter.write_shard, []

    def failing(writer, windows, *rest, **settings):
        if len(written) == 2:
            raise Interrupted
        written.append(windows)
        return write_shard(writer, windows, *rest, **settings)

    def recorded(writer, windows, *rest, **settings):
        written.append(windows)
        return write_shard(writer, windows, *rest, **settings)

    monkeypatch.setattr(ActivationWriter, "write_shard", failing)
    with pytest.raises(Interrupted):
        run(inputs, tmp_path, writers=3)
    monkeypatch.setattr(ActivationWriter, "write_shard", recorded)
    run(inputs, tmp_path, writers=3)
    assert sorted(windows.start for windows in written) == [0, 24, 48, 72], "each shard is written once"
    assert files_of(tmp_path) == files_of(whole[0])


@pytest.mark.usefixtures("one_device")
def test_asked_to_stop_it_finishes_the_shard_in_hand_and_no_other(inputs, tmp_path, monkeypatch):
    fill = Batch.fill

    def signalling(batch, harvested):
        if batch.shard.number == 1 and batch.completes_shard:  # queued when the shard before was already handed on
            os.kill(os.getpid(), signal.SIGTERM)
        fill(batch, harvested)

    monkeypatch.setattr(Batch, "fill", signalling)
    with pytest.raises(PreemptedError):
        run(inputs, tmp_path)
    assert sorted(path.name for path in (tmp_path / "ledger").iterdir()) == ["000000.json", "000001.json"]
