"""The comparisons of the families can fail: a model wrong on disk in one small way is far outside their limit.

Each fault is written to the file, so that what reads and runs it is the code under test as it is.
"""

from typing import NamedTuple

import numpy as np
import pytest
from reference_models.folders import DATA, Tensors, config_of, reference_of, weights_of, write_folder
from reference_models.gguf_files import last_tap, write_gguf
from reference_models.running import LIMIT, check_equal, compute, errors, kept

from saex_pipe.common.llm.taps import SITES

FAR = 1e-3  # a hundred times what the comparisons allow


class Change(NamedTuple):
    """Another value of a field of ``config.json``, and the first tap that it moves."""

    key: str
    field: str  # dots lead into inner objects
    value: object
    tap: str


FIRST, SECOND = "blocks.0.attn_z", "blocks.1.attn_z"
CONFIG_FAULTS = {
    "window of mistral one too long": Change("mistral/window", "sliding_window", 5, FIRST),
    "window of qwen2 one too long": Change("qwen2/windows_above_yarn", "sliding_window", 5, SECOND),
    "window of gemma2 one too long": Change("gemma2/capped", "sliding_window", 5, FIRST),
    "window of gemma3 one too long": Change("gemma3_text/local_and_global", "sliding_window", 5, FIRST),
    "attention cap of gemma2": Change("gemma2/capped", "attn_logit_softcapping", 5.0, FIRST),
    "local rope of gemma3 turns like the global one": Change(
        "gemma3_text/untied_multi_query", "rope_parameters.sliding_attention.rope_theta", 3000.0, SECOND
    ),
    "long side of longrope taken for short": Change(
        "phi3/longrope_short", "rope_parameters.short_factor", [1.5, 2.5, 4.0, 8.0], FIRST
    ),
    "short side of longrope taken for long": Change(
        "phi3/longrope_long", "rope_parameters.long_factor", [1.0, 1.125, 1.25, 1.625], FIRST
    ),
    "yarn's ramp": Change("qwen3/biased_windows_yarn", "rope_parameters.beta_slow", 1.0, FIRST),
    "parallel blocks run one after the other": Change(
        "gpt_neox/parallel", "use_parallel_residual", False, "blocks.0.mlp_in"
    ),
}
# Each compiles a model of its own, so that most of them are for a slower round.
MORE_CONFIG_FAULTS = {
    "window of qwen3 one too long": Change("qwen3/biased_windows_yarn", "sliding_window", 5, SECOND),
    "window of phi3 one too long": Change("phi3/window", "sliding_window", 5, FIRST),
    "logit cap of gemma2": Change("gemma2/capped", "final_logit_softcapping", 3.5, "logits"),
    "query scalar of gemma2 taken from head_dim": Change("gemma2/capped", "query_pre_attn_scalar", 16, FIRST),
    "part that turns in gpt_neox": Change("gpt_neox/parallel", "rope_parameters.partial_rotary_factor", 0.5, FIRST),
    "window of mistral one too short": Change("mistral/window", "sliding_window", 3, FIRST),
    "windows of gemma2 on the other layers": Change(
        "gemma2/uncapped_untied", "layer_types", ["sliding_attention", "full_attention"], FIRST
    ),
    "no attention cap in gemma2": Change("gemma2/capped", "attn_logit_softcapping", None, FIRST),
    "logit cap of gemma3": Change("gemma3_text/untied_multi_query", "final_logit_softcapping", None, "logits"),
    "query scalar of gemma3 taken from head_dim": Change(
        "gemma3_text/local_and_global", "query_pre_attn_scalar", 16, FIRST
    ),
    "global rope of gemma3 not scaled": Change(
        "gemma3_text/local_and_global", "rope_parameters.full_attention.factor", 1.0, SECOND
    ),
    "magnitude of longrope": Change("phi3/longrope_short", "rope_parameters.attention_factor", 1.0, FIRST),
    "part that turns in phi3": Change("phi3/window", "rope_parameters.partial_rotary_factor", 0.5, FIRST),
    "linear scaling": Change("llama/linear_full_heads", "rope_parameters.factor", 2.0, FIRST),
    "llama3 scaling": Change("llama/llama3_biased", "rope_parameters.low_freq_factor", 2.0, FIRST),
    "yarn's magnitude": Change("qwen3/biased_windows_yarn", "rope_parameters.attention_factor", 1.0, FIRST),
    "yarn's derived magnitude": Change("llama/yarn", "rope_parameters.attention_factor", 1.0, FIRST),
    "epsilon": Change("llama/smollm2", "rms_norm_eps", 2.0**-7, "blocks.0.attn_in"),
    "epsilon of layer norms": Change("gpt2/tied", "layer_norm_epsilon", 2.0**-7, "blocks.0.attn_in"),
}


def compute_changed(change: Change, folder):
    config = config_of(change.key)
    *path, field = change.field.split(".")
    inner = config
    for name in path:
        inner = inner[name]
    inner[field] = change.value
    return kept(compute(write_folder(folder, config, weights_of(change.key))))


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_wrong_field_is_noticed(fault, tmp_path):
    change = CONFIG_FAULTS[fault]
    check_noticed(compute_changed(change, tmp_path), reference_of(change.key), change.tap)


@pytest.mark.slow
@pytest.mark.parametrize("fault", MORE_CONFIG_FAULTS)
def test_other_wrong_field_is_noticed(fault, tmp_path):
    change = MORE_CONFIG_FAULTS[fault]
    check_noticed(compute_changed(change, tmp_path), reference_of(change.key), change.tap)


@pytest.mark.slow
def test_approximation_of_gelu_is_noticed(tmp_path):
    """The two differ by less than 0.0005 at most: the smallest of all these faults, and still ten times the limit."""
    change = Change("gpt2/untied_inner", "activation_function", "gelu_new", "blocks.0.mlp_out")
    found, expected = compute_changed(change, tmp_path), reference_of(change.key)
    assert errors(found, expected)[change.tap] > 10 * LIMIT
    with pytest.raises(AssertionError):
        check_equal(found, expected)


def check_noticed(found, expected, first):
    """From the tap ``first`` on everything differs; before it nothing does."""
    error = errors(found, expected)
    assert error[first] > FAR > LIMIT
    assert error["logits"] > FAR
    before = {name for name in error if order(name) < order(first)}
    assert {name for name in error if error[name] <= LIMIT} >= before
    with pytest.raises(AssertionError):
        check_equal(found, expected)


def order(name):
    """Taps sort as they are computed."""
    if name.startswith("blocks."):
        _, layer, site = name.split(".")
        return int(layer), SITES.index(site)
    return {"embed": (-1, 0), "final_norm": (99, 0), "logits": (99, 1)}[name]


def swapped(tensors: Tensors, a: str, b: str) -> Tensors:
    other = {name: name.replace(a, b) if a in name else name.replace(b, a) for name in tensors}
    return {name: tensors[other[name]] for name in tensors}


def changed(tensors: Tensors, ending: str, change) -> Tensors:
    return {name: change(w) if name.endswith(ending) else w for name, w in tensors.items()}


def interleaved(weights):
    """Rows of four heads as llama.cpp orders them."""
    return weights.reshape(4, 2, -1, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def all_queries_first(weights):
    """Rows of two heads as all queries, all keys, all values."""
    return weights.reshape(2, 3, -1, *weights.shape[1:]).swapaxes(0, 1).reshape(weights.shape)


TENSOR_FAULTS = {
    "query and key norms of qwen3 swapped": ("qwen3/tied", lambda t: swapped(t, ".q_norm.", ".k_norm."), FIRST),
    "query and key norms of gemma3 swapped": (
        "gemma3_text/local_and_global",
        lambda t: swapped(t, ".q_norm.", ".k_norm."),
        FIRST,
    ),
    "gate and up swapped": ("llama/smollm2", lambda t: swapped(t, ".gate_proj.", ".up_proj."), "blocks.0.mlp_out"),
    "query rows in llama.cpp's order": (
        "llama/llama3_biased",
        lambda t: changed(t, "q_proj.weight", interleaved),
        FIRST,
    ),
    "query bias in llama.cpp's order": ("llama/llama3_biased", lambda t: changed(t, "q_proj.bias", interleaved), FIRST),
    "heads of gpt_neox not taken apart": (
        "gpt_neox/parallel",
        lambda t: changed(changed(t, "query_key_value.weight", all_queries_first), "key_value.bias", all_queries_first),
        FIRST,
    ),
    "square matrix of gpt2 transposed": (
        "gpt2/tied",
        lambda t: changed(t, "attn.c_proj.weight", lambda w: w.T),
        "blocks.0.attn_out",
    ),
    "positions of gpt2 one off": (
        "gpt2/tied",
        lambda t: changed(t, "wpe.weight", lambda w: np.roll(w, 1, axis=0)),
        "blocks.0.resid_pre",
    ),
    "one added twice to norms of gemma": (
        "gemma/multi_query",
        lambda t: changed(t, "norm.weight", lambda w: w + 1),
        "blocks.0.attn_in",
    ),
    "norm after attention taken for the one before the MLP": (
        "gemma2/capped",
        lambda t: swapped(t, "post_attention_layernorm", "pre_feedforward_layernorm"),
        "blocks.0.attn_out",
    ),
    "key bias of qwen2 dropped": ("qwen2/tied", lambda t: changed(t, "k_proj.bias", np.zeros_like), FIRST),
    "query and key of phi3 swapped": (
        "phi3/window",
        lambda t: changed(t, "qkv_proj.weight", lambda w: np.concatenate([w[32:64], w[:32], w[64:]])),
        FIRST,
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensor_is_noticed(fault, tmp_path):
    key, change, tap = TENSOR_FAULTS[fault]
    found = kept(compute(write_folder(tmp_path, config_of(key), change(weights_of(key)))))
    check_noticed(found, reference_of(key), tap)


@pytest.mark.parametrize(
    ("key", "step"),
    [
        ("llama/smollm2", "permutation"),
        ("llama/llama3_biased", "permutation"),
        ("mistral/window", "permutation"),
        ("gpt_neox/parallel", "split of heads"),
        ("gemma/multi_query", "added one"),
        ("gemma2/capped", "added one"),
        ("gemma3_text/local_and_global", "added one"),
    ],
)
def test_forgetful_converter_is_noticed(key, step, tmp_path):
    found = compute(write_gguf(tmp_path / "model.gguf", key, left_out=[step]))
    with np.load(DATA / "gguf_reference.npz") as file:
        expected = {name: file[f"{key}/F32/{name}"] for name in (last_tap(key), "logits")}
    found = {name: found[name][:, -1] for name in expected}
    assert min(errors(found, expected).values()) > FAR
