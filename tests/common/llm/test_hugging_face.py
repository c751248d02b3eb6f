"""Safetensors: every dtype, how much memory a tensor takes, and files that are not whole."""

import contextlib
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import slabs
from saex_pipe.common.llm.hugging_face import SafetensorsFolder

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def folder_of(path, tensors):
    save_file(tensors, path / "model.safetensors")
    return SafetensorsFolder(path)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (3,), (2, 3, 4), (), (0, 4)])
def test_every_dtype_is_read(name, shape, tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=shape).astype(DTYPES[name])
    folder = folder_of(tmp_path, {"before": np.ones(3, np.float32), "x": values})
    assert folder.shapes["x"] == shape
    monkeypatch.setattr(slabs, "_SLAB_VALUES", 10)
    found = folder.read("x")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(np.float32))
    halves = folder.read("x", ml_dtypes.bfloat16)
    assert halves.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(halves, values.astype(ml_dtypes.bfloat16))


def test_reading_takes_the_result_and_a_slab(tmp_path):
    """Neither a map of the file, nor the tensor as stored, nor float32 on the way to bfloat16."""
    folder = folder_of(tmp_path, {"x": np.zeros((4096, 4096), ml_dtypes.bfloat16)})
    for dtype, size in ((np.float32, 4096 * 4096 * 4), (ml_dtypes.bfloat16, 4096 * 4096 * 2)):
        tracemalloc.start()
        folder.read("x", dtype)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < size + (4 << 20)


def test_a_dtype_that_is_not_read_is_named_when_the_tensor_is_wanted(tmp_path):
    folder = folder_of(tmp_path, {"x": np.ones(3, np.float32), "mask": np.ones(3, np.uint8)})
    folder.check(["x"])
    for refused in (lambda: folder.read("mask"), lambda: folder.check(["x", "mask"])):
        with pytest.raises(
            InputError, match=r"tensor mask is stored as U8, .*; use weights stored as F64, F32, F16, BF16"
        ):
            refused()


def header(entry):
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        (1 << 62).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{}}",
        header({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(4),
        header({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}),
        header({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}) + bytes(4),
        header({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(3),
        header({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(5),
        header({"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}) + bytes(4),
        header({"dtype": "F32", "shape": [1]}) + bytes(4),
        header(3),
    ],
)
def test_a_file_that_is_not_whole_is_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        InputError, match=r"model\.safetensors is truncated or not a safetensors file.*download it again"
    ):
        SafetensorsFolder(tmp_path)


def test_damaged_bytes_never_crash(tmp_path):
    folder = folder_of(tmp_path, {"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.float16)})
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    content = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(InputError):
            folder = SafetensorsFolder(tmp_path)
            for name in folder.shapes:
                folder.read(name)


class TestShards:
    @pytest.fixture
    def place(self, tmp_path):
        for number in (1, 2):
            save_file(
                {f"x{number}": np.full(4, number, np.float32)}, tmp_path / f"model-0000{number}-of-00002.safetensors"
            )
        self.index(tmp_path, {f"x{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)})
        return tmp_path

    def index(self, place, weight_map):
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def test_they_are_read_together(self, place):
        folder = SafetensorsFolder(place)
        assert [folder.read(f"x{number}")[0] for number in (1, 2)] == [1, 2]

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda place, shard: shard.unlink(), r"shard .*00002\.safetensors is missing; download the model again"),
            (lambda place, shard: shard.write_bytes(shard.read_bytes()[:-1]), r"00002\.safetensors is truncated"),
            (lambda place, shard: save_file({"other": np.zeros(1)}, shard), "lacks tensor x2, which .* places there"),
            (
                lambda place, shard: (place / "model.safetensors.index.json").write_text('{"weight_map": ["x"]}'),
                "has no weight_map from tensors to files",
            ),
            (lambda place, shard: (place / "model.safetensors.index.json").write_text("{"), "index.json is not JSON"),
            (lambda place, shard: (place / "model.safetensors.index.json").unlink(), r"pytorch_model\.bin is not read"),
        ],
    )
    def test_what_is_wrong_with_them_is_named(self, place, spoil, message):
        spoil(place, place / "model-00002-of-00002.safetensors")
        with pytest.raises(InputError, match=message):
            SafetensorsFolder(place)
