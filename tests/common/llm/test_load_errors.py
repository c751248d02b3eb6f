"""Every bad model ends in one line that names the value and the remedy."""

import contextlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.load import load_model, read_architecture


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return tiny_llama(tied=False)


def refused(path, message, **arguments):
    with pytest.raises(InputError, match=message) as caught:
        load_model(path, **arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize("keep", [0, 3, 20, 60, 700, 5000, -1])
def test_truncated_gguf(keep, tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    refused(path, "tiny.gguf is (truncated|not a GGUF file)")


def test_gguf_with_damaged_bytes_never_crashes(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content[:3000])
        damaged[rng.integers(4, 2500)] = rng.integers(256)
        path.write_bytes(bytes(damaged) + content[3000:])
        with contextlib.suppress(InputError):
            read_architecture(path)


def test_not_a_model(tmp_path):
    refused(tmp_path / "missing.gguf", "missing.gguf cannot be read: No such file")
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", "is not a GGUF file: it starts with b'hell'")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config\.json cannot be read")


def test_gguf_of_another_kind(tiny, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    other = content.replace(b"llama", b"mamba")
    path.write_bytes(other)
    refused(path, "architecture 'mamba' is not one this version runs; known ones are gemma, .*, llama, ")
    path.write_bytes(content.replace(b"attn_q.weight", b"attn_x.weight"))
    refused(path, r"lacks tensor blk\.0\.attn_q\.weight")
    path.write_bytes(content.replace(b"llama.rope.freq_base", b"llama.rope.freq_bose"))
    refused(path, "field 'rope.freq_bose' = 500.0 is neither handled nor known to be harmless")
    path.write_bytes(content.replace(b"llama.block_count", b"llama.block_caunt"))
    refused(path, "field 'block_caunt'")


def test_truncated_safetensors(tiny, tmp_path):
    folder = tiny.write_folder(tmp_path)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for keep in (0, 5, 100, len(content) - 1):
        weights.write_bytes(content[:keep])
        refused(folder, r"model\.safetensors is truncated or not a safetensors file")
    weights.unlink()
    refused(folder, r"holds neither model\.safetensors nor model\.safetensors\.index\.json")


def test_shards_and_index_that_do_not_fit(tiny, tmp_path):
    folder = tiny.write_folder(tmp_path, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    refused(folder, "shard .*model-00002-of-00002.safetensors is missing")
    save_file({"other": np.zeros(1, np.float32)}, shard)
    refused(folder, "lacks tensor .*, which model.safetensors.index.json places there")
    shard.write_bytes(content)
    load_model(folder, last_layer=0)
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "is not a JSON object")


def test_tensors_that_do_not_fit_the_configuration(tiny, tmp_path):
    folder = tiny.write_folder(tmp_path)
    refused(change(folder, num_hidden_layers=4), r"lacks tensor model\.layers\.3\.")
    refused(change(folder, num_hidden_layers=2), r"tensor .model\.layers\.2\..* is not part of the llama family")
    refused(change(folder, num_hidden_layers=3, intermediate_size=95), r"has shape \(.*96.*\), .* says \(.*95")
    refused(change(folder, intermediate_size=96, vocab_size=100), r"embed_tokens.weight has shape \(101, 64\)")
    change(folder, vocab_size=101)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    save_file({**tiny.tensors, **bias}, folder / "model.safetensors")
    refused(folder, r"tensor .model\.layers\.0\.self_attn\.q_proj\.bias. is not part of the llama family")
    save_file({**tiny.tensors, "model.norm.weight": np.ones(64, np.int32)}, folder / "model.safetensors")
    refused(folder, "model.norm.weight is stored as I32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "t5"},
            "model_type 't5' is not one this version runs; known ones are gemma, .*, llama, mistral",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' lacks 'low_freq_factor'"),
        ({"attention_bias": True}, r"lacks tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"mlp_bias": True}, r"lacks tensor model\.layers\.0\.mlp\.down_proj\.bias"),
        ({"hidden_act": "swosh"}, "swosh"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bais": False}, r"field 'attention_bais' = False is neither handled .*near 'attention_bias'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"num_key_value_heads": 3}, "4 query heads do not divide over 3 key/value heads"),
        ({"head_dim": 15}, "15 of head_dim 15 dimensions; they take an even number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny'"),
    ],
)
def test_configurations_that_would_change_the_numbers(fields, message, tiny, tmp_path):
    refused(change(tiny.write_folder(tmp_path), **fields), message)


def test_bad_arguments(tiny, tmp_path):
    folder = tiny.write_folder(tmp_path)
    refused(folder, "compute dtype 'int8'; it must be one of float32, bfloat16", dtype="int8")
    for layer in (3, -2):
        refused(folder, f"last layer {layer}; the model's layers are 0 to 2", last_layer=layer)
