"""Every family on tiny random models: each tap and the logits against what ``transformers`` computes.

Recorded values everywhere (see ``infra/record_family_references.py``), live ones where torch is installed.
"""

import json
import math

import numpy as np
import pytest
from reference_models.configurations import NARROW
from reference_models.folders import DATA, config_of, reference_of, tokens_NL, weights_of, write_folder, write_model
from reference_models.hub_configs import HUB
from reference_models.running import check_equal, compile_forward, compute, errors, kept, relative_error

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import attention
from saex_pipe.common.llm.load import read_architecture
from saex_pipe.common.llm.taps import SITES

# One model of each family: first those whose blocks differ in kind, then those that differ from them in numbers.
KINDS = ("gpt2/tied", "gpt_neox/parallel", "llama/llama3_biased", "qwen3/tied", "gemma2/capped")
OTHERS = ("mistral/window", "qwen2/tied", "phi3/window", "gemma/multi_query", "gemma3_text/local_and_global")


@pytest.mark.parametrize("key", NARROW)
def test_every_tap_equals_the_reference(key, tmp_path):
    check_equal(kept(compute(write_model(tmp_path, key))), reference_of(key))


@pytest.mark.parametrize("key", HUB)
def test_older_folder_of_the_same_model_gives_the_same(key, tmp_path):
    check_equal(kept(compute(HUB[key].write(tmp_path))), reference_of(key))


@pytest.mark.parametrize("key", ["gemma2/capped", "llama/llama3_biased"])
def test_attention_in_several_blocks_gives_the_same(key, tmp_path, monkeypatch):
    """Windows of tokens so long that attention cuts them: here into blocks of 4, 4 and 2 tokens."""
    monkeypatch.setattr(attention, "_BLOCK", 4)
    check_equal(kept(compute(write_model(tmp_path, key), forward=compile_forward())), reference_of(key))


@pytest.mark.parametrize("key", ["gpt2/untied_inner", "qwen3/tied", "gemma3/with_vision"])
def test_shards_give_the_same(key, tmp_path):
    single, sharded = (compute(write_model(tmp_path / str(n), key, shards=n)) for n in (1, 3))
    for name, value in single.items():
        np.testing.assert_array_equal(sharded[name], value, err_msg=name)


def test_text_part_alone_is_the_text_part_of_a_model_that_sees(tmp_path):
    """The same weights as a ``gemma3_text`` folder, without the tensors for images."""
    start = "language_model."
    tensors = {name.removeprefix(start): w for name, w in weights_of("gemma3/with_vision").items() if start in name}
    config = config_of("gemma3/with_vision")["text_config"]
    check_equal(kept(compute(write_folder(tmp_path, config, tensors))), reference_of("gemma3/with_vision"))


# How many inputs of matmuls were rounded on the way from a block's input to each site: what attention reads, queries,
# keys, values and probabilities; the heads' outputs; what the MLP reads, and its hidden activations.
ROUNDINGS = dict(zip(SITES, (0, 0, 5, 6, 6, 6, 8, 8), strict=True))


def roundings(name: str, layers: int) -> int:
    """How many roundings to bfloat16 a tap's value has behind it, along the longest path."""
    if not name.startswith("blocks."):
        return {"embed": 0, "final_norm": 8 * layers, "logits": 8 * layers + 1}[name]
    _, layer, site = name.split(".")
    return 8 * int(layer) + ROUNDINGS[site]


@pytest.mark.parametrize("key", [*KINDS, *(pytest.param(key, marks=pytest.mark.slow) for key in OTHERS)])
def test_bfloat16_differs_by_the_rounding_of_matmul_inputs(key, tmp_path):
    """Against the same weights, rounded alike, in float32.

    bfloat16 has 8 significant bits: a rounding moves a number x of [2^e, 2^(e+1)) by at most u 2^e, u = 2^-8. Errors
    uniform in that range and magnitudes uniform in their logarithm move a vector by u / sqrt(3 * 3 / (2 ln 2)) = 0.39 u
    of its norm. K independent roundings add in quadrature, to 0.39 u sqrt(K) where what lies between passes relative
    errors on unchanged. Taking u for each leaves a gain of 2.5, which softmax (scores of about 3) and gates (products
    of two rounded numbers) come close to.
    Where nothing was rounded nothing may differ, and the residual stream is summed in float32.
    """
    path = write_model(tmp_path, key, in_bfloat16=True)
    unit = 2.0**-8
    values = compute(path, "bfloat16")
    found = errors(values, compute(path))
    layers = read_architecture(path).layers
    for layer in range(layers):
        tap = {site: values[f"blocks.{layer}.{site}"] for site in SITES}
        assert relative_error(tap["resid_mid"], tap["resid_pre"] + tap["attn_out"]) <= 1e-6
        assert relative_error(tap["resid_post"], tap["resid_mid"] + tap["mlp_out"]) <= 1e-6
    for name, error in found.items():
        assert error <= unit * math.sqrt(roundings(name, layers)), f"{name}: {error / unit:.2f} u"
    assert found["logits"] > 0.5 * unit


# Sizes without which a file is damaged rather than brief, with the exception of those that one published model omits.
GEMMA3_LEAVES_OUT = {"num_attention_heads", "vocab_size", "max_position_embeddings"}
NEVER_GUESSED = {"hidden_size", "num_hidden_layers", "intermediate_size", *GEMMA3_LEAVES_OUT}
NEVER_GUESSED |= {"n_embd", "n_layer", "n_head", "n_positions"}


def without(config, field):
    return {name: value for name, value in config.items() if name != field}


def architecture_of(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


@pytest.mark.parametrize("key", [*KINDS, *OTHERS])
def test_silence_means_what_transformers_takes_it_for(key, tmp_path):
    """A field that is left out is refused by name, or read as its default in the configuration class."""
    defaults = json.loads((DATA / "family_defaults.json").read_text())[key.split("/")[0]]
    config = config_of(key)
    if "num_attention_heads" in config:
        config |= {"num_attention_heads": 32, "hidden_size": 1024}  # which every default of the others fits
    read = 0
    for field in sorted(config.keys() & defaults.keys()):
        silent = without(config, field)
        if field in NEVER_GUESSED and not (field in GEMMA3_LEAVES_OUT and key.startswith("gemma3")):
            with pytest.raises(InputError, match=f"'{field}' is missing"):
                architecture_of(tmp_path, silent)
        else:
            assert architecture_of(tmp_path, silent) == architecture_of(tmp_path, {**config, field: defaults[field]})
            read += 1
    assert read > 5


def test_fields_that_gemma_3_leaves_out(tmp_path):
    """The text part of google/gemma-3-4b-it names six numbers; the others are those of the configuration class."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    found = architecture_of(tmp_path, {"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert (found.query_heads, found.kv_heads, found.head_dim, found.vocabulary) == (8, 4, 256, 262208)
    assert (found.max_positions, found.query_scalar, found.norm_epsilon) == (131072, 256, 1e-6)
    assert (found.rope.theta, found.local_rope.theta, found.sliding_window) == (1e6, 1e4, 1024)
    assert [layer for layer, slides in enumerate(found.sliding) if not slides] == [5, 11, 17, 23, 29]


@pytest.mark.parametrize("key", NARROW)
def test_live_reference(key, family_recorder, tmp_path):
    """The folder that the installed ``transformers`` writes, fields and all, and the values that it computes."""
    model = family_recorder.load(write_model(tmp_path / "ours", key))
    model.save_pretrained(tmp_path / "theirs")
    live = family_recorder.record(model, tokens_NL())
    check_equal(kept(live), reference_of(key))
    check_equal(compute(tmp_path / "theirs"), live)
