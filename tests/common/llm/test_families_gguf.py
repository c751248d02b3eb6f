"""Every family through GGUF: what the file holds, dequantised, equals the same weights in the reference.

``tests/reference_models/gguf_files.py`` writes the files as llama.cpp's converter does.
"""

import gguf
import numpy as np
import pytest
from reference_models.folders import DATA, weights_of
from reference_models.gguf_files import CASES, as_stored, last_tap, write_gguf
from reference_models.k_quants import quantize
from reference_models.running import check_equal, compute, relative_error

KEYS = sorted({key for key, _ in CASES})


@pytest.fixture(scope="module")
def recorded():
    with np.load(DATA / "gguf_reference.npz") as file:
        return dict(file)


def last_token(values, key):
    """What is recorded of a case: the final residual stream and the logits of every window's last token."""
    return {name: values[name][:, -1] for name in (last_tap(key), "logits")}


@pytest.mark.parametrize(("key", "kind"), CASES, ids=[f"{key}-{kind}" for key, kind in CASES])
def test_file_equals_its_dequantised_weights_in_the_reference(key, kind, recorded, tmp_path):
    found = last_token(compute(write_gguf(tmp_path / "model.gguf", key, kind)), key)
    check_equal(found, {name: recorded[f"{key}/{kind}/{name}"] for name in found})


def test_types_are_told_apart(recorded):
    """Rounding to each type changes the values by far more than the comparison allows."""
    for key in KEYS:
        logits = [recorded[f"{key}/{kind}/logits"] for k, kind in CASES if k == key]
        assert min(relative_error(a, b) for i, a in enumerate(logits) for b in logits[:i]) > 1e-4, key


@pytest.mark.parametrize("key", ["gpt2/tied", "llama/llama3_biased", "gemma3_text/local_and_global"])
def test_split_file_gives_the_same(key, tmp_path):
    single = compute(write_gguf(tmp_path / "whole.gguf", key))
    write_gguf(tmp_path / "part.gguf", key, split_after=9)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    for name, value in compute(parts[0]).items():
        np.testing.assert_array_equal(value, single[name], err_msg=name)


# ---- the writer


@pytest.mark.parametrize("key", KEYS)
def test_written_tensors_are_those_of_the_folder(key, tmp_path):
    """By the package's own reader: names of llama.cpp, the type that was asked for, and the way back is exact."""
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model.gguf", key))
    config, tensors = as_stored(key, "F32")
    expected = {name: w for name, w in weights_of(key).items() if name in tensors}
    assert set(expected) == set(weights_of(key)) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    for name, weights in expected.items():
        # Taking off the 1 that was added to a norm loses its last bits.
        np.testing.assert_allclose(tensors[name], weights, rtol=0, atol=2e-7 if "norm" in name else 0)
    names = {tensor.name for tensor in reader.tensors if not tensor.name.startswith("rope_")}
    assert len(names) == len(expected)
    assert {"token_embd.weight", "blk.1.attn_output.weight", "output_norm.weight"} <= names
    known = gguf.MODEL_TENSORS[next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == field(reader))]
    roots = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in known}
    assert {name.replace("blk.1.", "blk.0.").rsplit(".", 1)[0] for name in names if "blk.0" in name} <= roots


def field(reader):
    return reader.fields["general.architecture"].contents()


@pytest.mark.parametrize(("kind", "limit"), [("Q4_K", 0.09), ("Q6_K", 0.025), ("Q8_0", 0.007)])
def test_quantisers_round_to_the_nearest_level(kind, limit):
    """Levels 1/15, 1/63 and 1/255 of a block's range apart, which is about 4 to 5 standard deviations."""
    weights = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    weights[0, :256] = 0
    exact = gguf.GGMLQuantizationType[kind]
    back = gguf.dequantize(quantize(weights, exact), exact)
    assert limit / 2 < relative_error(back, weights) < limit
    assert not back[0, :256].any()


# ---- live


@pytest.mark.parametrize("key", KEYS)
def test_live_reference(key, family_recorder, recorded, tmp_path):
    kind = "Q8_0" if (key, "Q8_0") in CASES else "Q4_K"
    live = family_recorder.reference_of_gguf(key, kind, tmp_path / "folder")
    check_equal(live, {name: recorded[f"{key}/{kind}/{name}"] for name in live})
    check_equal(last_token(compute(write_gguf(tmp_path / "model.gguf", key, kind)), key), live)
