"""GGUF files: every type that the ``gguf`` package dequantises, slabs, and files split into parts."""

import shutil
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import slabs
from saex_pipe.common.llm.gguf import GgufFile
from saex_pipe.common.llm.load import load_model, read_architecture
from saex_pipe.common.llm.tokenizer import load_tokenizer

ROWS, BLOCKS = 7, 3


def packed(kind, rows=ROWS):
    """Random blocks: every pattern of bits is valid, though some scales are infinite or no number."""
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(kind.value).integers(0, 256, (rows, BLOCKS * block_bytes), dtype=np.uint8)


def dequantised(kind, raw):
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, kind)


def can_be_dequantised(kind):
    try:
        gguf.dequantize(packed(kind), kind)
    except NotImplementedError:
        return False
    return True


with np.errstate(all="ignore"):
    READABLE = [kind for kind in gguf.GGMLQuantizationType if can_be_dequantised(kind)]


def write(path, tensors, fields=()):
    """A GGUF file with the tensors ``{name: (kind, bytes)}`` and the fields ``(key, value, type)``."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value, kind in fields:
        writer.add_key_value(key, value, kind)
    for name, (kind, raw) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_parts(folder, tensors, count, fields=(("llama.block_count", 7, gguf.GGUFValueType.UINT32),)):
    """Parts as gguf-split of llama.cpp makes them, with the metadata in the first; tensors are dealt out in turn."""
    paths = [folder / f"model-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        about_parts = [
            ("split.no", number, gguf.GGUFValueType.UINT16),
            ("split.count", count, gguf.GGUFValueType.UINT16),
            ("split.tensors.count", len(tensors), gguf.GGUFValueType.INT32),
        ]
        mine = {name: tensors[name] for name in list(tensors)[number::count]}
        write(path, mine, [*(fields if number == 0 else ()), *about_parts])
    return paths


def test_there_are_as_many_types_as_there_were():
    """The list is made by asking the package; an empty one would test nothing."""
    some = {"F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K", "IQ2_XS", "TQ1_0", "MXFP4"}
    assert some <= {kind.name for kind in READABLE}
    assert len(READABLE) >= 26


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_is_read(kind, tmp_path, monkeypatch):
    raw = packed(kind)
    expected = dequantised(kind, raw)
    file = GgufFile(write(tmp_path / "one.gguf", {"first": (kind, packed(kind, 2)), "second": (kind, raw)}))
    assert file.tensors["second"].shape == expected.shape
    assert file.tensors["second"].type == kind
    with np.errstate(all="ignore"):
        whole = file.read("second")
        monkeypatch.setattr(slabs, "_SLAB_VALUES", 2 * expected.shape[1])  # two rows, and one left over
        np.testing.assert_array_equal(file.read("second"), whole)
        halves = file.read("second", ml_dtypes.bfloat16)
        assert halves.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(halves.astype(np.float32), expected.astype(halves.dtype).astype(np.float32))
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize("name", ["Q8_K", "F64", "I32"])
def test_a_type_that_cannot_be_dequantised_is_named(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    file = GgufFile(write(tmp_path / "one.gguf", {"x": (kind, packed(kind)), "y": (READABLE[0], packed(READABLE[0]))}))
    file.check(["y"])
    for refused in (lambda: file.read("x"), lambda: file.check(["y", "x"])):
        with pytest.raises(InputError, match=f"tensor x is of type {name}, which cannot be dequantised"):
            refused()


def test_a_type_that_is_not_known_is_refused(tiny_llama, tmp_path):
    path = tiny_llama().write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8  # past the number of axes and both
    path.write_bytes(content[:place] + (99).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(InputError, match=r"tensor blk\.0\.attn_q\.weight has the unknown type 99; update gguf"):
        load_model(path)


def test_reading_takes_the_result_and_a_slab(tmp_path):
    """A large tensor is dequantised a slab at a time; whole, it would take twice the result."""
    kind = gguf.GGMLQuantizationType.Q4_K
    raw = np.zeros((8192, 8 * 144), np.uint8)
    file = GgufFile(write(tmp_path / "one.gguf", {"x": (kind, raw)}))
    for dtype, size in ((np.float32, 8192 * 2048 * 4), (ml_dtypes.bfloat16, 8192 * 2048 * 2)):
        tracemalloc.start()
        file.read("x", dtype)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < size + (8 << 20)


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    kind = gguf.GGMLQuantizationType.F32
    path = write(tmp_path / "one.gguf", {"x": (kind, packed(kind))})
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"one\.gguf has become shorter while it was read"):
        file.read("x")
    path.unlink()
    with pytest.raises(InputError, match=r"one\.gguf cannot be read: No such file"):
        file.read("x")


class TestSplit:
    @pytest.fixture
    def tensors(self):
        kinds = [gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_K", "F16", "Q6_K")]
        return {f"t{i}": (kind, packed(kind)) for i, kind in enumerate(kinds)}

    @pytest.mark.parametrize("asked", [0, 1, 2])
    def test_any_part_opens_all(self, tensors, asked, tmp_path):
        file = GgufFile(write_parts(tmp_path, tensors, 3)[asked])
        assert file.metadata["llama.block_count"] == 7
        assert set(file.tensors) == set(tensors)
        with np.errstate(all="ignore"):
            for name, (kind, raw) in tensors.items():
                np.testing.assert_array_equal(file.read(name), dequantised(kind, raw))

    def test_a_missing_part_is_named(self, tensors, tmp_path):
        first, second, _ = write_parts(tmp_path, tensors, 3)
        second.unlink()
        with pytest.raises(InputError, match=r"model-00002-of-00003\.gguf, one of 3 parts, is missing; put all parts"):
            GgufFile(first)

    def test_parts_under_each_others_names(self, tensors, tmp_path):
        first, second, third = write_parts(tmp_path, tensors, 3)
        second.rename(tmp_path / "kept")
        third.rename(second)
        shutil.copyfile(tmp_path / "kept", third)
        with pytest.raises(InputError, match=r"00002-of-00003.gguf is part 2 of 3 by its metadata .*, 1 by its name"):
            GgufFile(first)

    def test_a_part_of_another_model(self, tensors, tmp_path):
        (tmp_path / "other").mkdir()
        first, second = write_parts(tmp_path, tensors, 2)
        fewer = dict(list(tensors.items())[:2])
        shutil.copyfile(write_parts(tmp_path / "other", fewer, 2)[1], second)
        with pytest.raises(InputError, match="hold 4 tensors, the first announces 5; fetch all parts again"):
            GgufFile(first)

    def test_a_part_that_was_renamed(self, tensors, tmp_path):
        path = write_parts(tmp_path, tensors, 2)[0].rename(tmp_path / "model.gguf")
        with pytest.raises(InputError, match="part of a file split into 2, and its name does not say so"):
            GgufFile(path)

    def test_a_whole_file_with_the_name_of_a_part(self, tensors, tmp_path):
        path = write(tmp_path / "model-00001-of-00002.gguf", tensors)
        assert set(GgufFile(path).tensors) == set(tensors)

    def test_a_model_in_parts_is_the_model(self, tiny_llama, tmp_path):
        whole = GgufFile(tiny_llama().write_gguf(tmp_path / "tiny.gguf"))
        tensors = {name: (info.type, whole.read(name).view(np.uint8)) for name, info in whole.tensors.items()}
        fields = [
            (key, value, gguf.GGUFValueType.get_type(value))
            for key, value in whole.metadata.items()
            if key != "general.architecture"
        ]
        _, part = write_parts(tmp_path, tensors, 2, fields)
        assert read_architecture(part) == read_architecture(tmp_path / "tiny.gguf")
        load_model(part)
        with pytest.raises(InputError, match="holds no tokenizer"):
            load_tokenizer(part)
