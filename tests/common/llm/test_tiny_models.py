"""Tiny random models through both file formats against NumPy in float64, and against torch where installed."""

import gguf
import jax
import numpy as np
import pytest

from saex_pipe.common.llm import checkpoint
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model, load_unembedding, read_architecture
from saex_pipe.common.llm.taps import all_names, width

LIMIT = 1e-5
SHAPES = {
    "grouped": {"heads": 4, "kv_heads": 2},
    "multi_query_untied": {"heads": 4, "kv_heads": 1, "tied": False},
    "full_heads": {"heads": 4, "kv_heads": 4},
    "head_dim_apart_from_width": {"heads": 3, "kv_heads": 3, "head_dim": 8, "tied": False},
}


# One function for all tests, so that models of one shape share a compilation.
forward = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=all_names(model.architecture)))


def run(path, tokens_NL):
    output = forward(load_model(path, dtype="float32"), tokens_NL)
    return {**output.taps, "logits": output.logits_NLV}


@pytest.fixture(params=SHAPES)
def tiny(request, tiny_llama):
    return tiny_llama(**SHAPES[request.param])


def test_every_tap_equals_numpy(tiny, tmp_path, relative_error):
    path = tiny.write_folder(tmp_path)
    found, expected = run(path, tiny.tokens_NL()), tiny.reference(tiny.tokens_NL())
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert relative_error(found[name], value) <= LIMIT, name
        if name != "logits":
            assert found[name].shape[-1] == width(name, read_architecture(path))


def test_gguf_gives_the_same_numbers(tiny, tmp_path):
    tokens_NL = tiny.tokens_NL()
    folder, file = run(tiny.write_folder(tmp_path), tokens_NL), run(tiny.write_gguf(tmp_path / "tiny.gguf"), tokens_NL)
    assert set(folder) == set(file)
    for name, value in folder.items():
        np.testing.assert_array_equal(file[name], value, err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_gguf_equals_its_dequantised_weights(kind, tiny_llama, tmp_path, relative_error):
    tiny, kind = tiny_llama(heads=4, kv_heads=2), gguf.GGMLQuantizationType[kind]
    rounded = {
        name: gguf.dequantize(gguf.quantize(w, kind), kind) if w.ndim == 2 else w for name, w in tiny.tensors.items()
    }
    found = run(tiny.write_gguf(tmp_path / "tiny.gguf", kind=kind), tiny.tokens_NL())
    expected = type(tiny)(tiny.config, rounded).reference(tiny.tokens_NL())
    assert max(relative_error(found[name], value) for name, value in expected.items()) <= LIMIT
    assert relative_error(found["logits"], tiny.reference(tiny.tokens_NL())["logits"]) > 1e-4


def test_shards_give_the_same_numbers(tiny_llama, tmp_path):
    tiny = tiny_llama(tied=False)
    single = run(tiny.write_folder(tmp_path / "one"), tiny.tokens_NL())
    sharded = run(tiny.write_folder(tmp_path / "three", shards=3), tiny.tokens_NL())
    for name, value in single.items():
        np.testing.assert_array_equal(sharded[name], value)


def test_the_comparison_fails_for_rows_in_the_wrong_order(tiny, tmp_path, relative_error, monkeypatch):
    expected = tiny.reference(tiny.tokens_NL())
    as_is = run(tiny.write_gguf(tmp_path / "unpermuted.gguf", permute=False), tiny.tokens_NL())
    assert relative_error(as_is["blocks.0.attn_z"], expected["blocks.0.attn_z"]) > 1e-2
    assert relative_error(as_is["logits"], expected["logits"]) > 1e-2
    monkeypatch.setattr(checkpoint, "unpermute_rows", lambda weights, heads: weights)
    not_undone = run(tiny.write_gguf(tmp_path / "permuted.gguf"), tiny.tokens_NL())
    assert relative_error(not_undone["logits"], expected["logits"]) > 1e-2


def test_live_reference(tiny, tmp_path, recorder, relative_error):
    """The folder that transformers itself writes, fields and all, and the values that it computes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": tiny.config["rope_theta"]}
    fields = {
        k: v for k, v in tiny.config.items() if k not in ("rope_theta", "torch_dtype", "model_type", "architectures")
    }
    if tiny.config["hidden_size"] % tiny.config["num_attention_heads"]:
        pytest.skip("LlamaConfig refuses a width that is no multiple of the heads")
    model = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope)).eval()
    state = {name: torch.from_numpy(value) for name, value in tiny.tensors.items()}
    model.load_state_dict({"lm_head.weight": state["model.embed_tokens.weight"], **state})
    model.save_pretrained(tmp_path)
    live = recorder.record(model, tiny.tokens_NL())
    found = run(tmp_path, tiny.tokens_NL())
    assert set(found) == set(live)
    assert max(relative_error(found[name], value) for name, value in live.items()) <= LIMIT


def test_unembedding_reads_final_residuals_as_logits(tiny, tmp_path, relative_error):
    expected = tiny.reference(tiny.tokens_NL())
    unembedding = load_unembedding(tiny.write_gguf(tmp_path / "tiny.gguf"))
    x = expected["blocks.2.resid_post"]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + unembedding.norm_epsilon) * unembedding.final_norm_D
    assert relative_error(normed @ unembedding.w_unembed_DV, expected["logits"]) <= LIMIT


def test_rounding_to_bfloat16_is_all_that_the_compute_dtype_changes(tiny, tmp_path, relative_error):
    path = tiny.write_folder(tmp_path)
    output = forward(load_model(path, dtype="bfloat16"), tiny.tokens_NL())
    assert output.logits_NLV.dtype == np.float32
    error = relative_error(output.logits_NLV, tiny.reference(tiny.tokens_NL())["logits"])
    assert 1e-4 < error < 0.05
