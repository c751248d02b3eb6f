"""The quickstart model against ``transformers``: recorded values everywhere, live where torch is installed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from saex_pipe.common.llm import checkpoint
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.llm.taps import SITES, all_names

LIMIT = 1e-4
RECORDED = Path(__file__).parent / "data" / "smollm2_reference.npz"


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


def run(path, tokens_NL, dtype="float32", names=None):
    """The named taps, or all taps and logits; not jitted, as compiling 30 unrolled blocks takes longest."""
    last_layer = None if names is None else 15
    model = load_model(path, dtype=dtype, last_layer=last_layer, with_unembedding=names is None)
    output = apply(model, tokens_NL, taps=names or all_names(model.architecture), logits=names is None)
    values = {name: np.asarray(value) for name, value in output.taps.items()}
    return values if names else {**values, "logits": np.asarray(output.logits_NLV)}


@pytest.fixture(scope="module")
def computed(quickstart_path, recorded):
    with jax.default_matmul_precision("highest"):
        return run(quickstart_path, recorded["tokens_NL"])


def test_jitted_forward_to_the_quickstart_tap(quickstart_path, recorded, relative_error):
    """As the harvest runs it: 15 scanned blocks, nothing above loaded."""
    model = load_model(quickstart_path, dtype="float32", last_layer=14, with_unembedding=False)
    tap = "blocks.15.resid_pre"
    forward = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=[tap], logits=False).taps[tap])
    assert relative_error(forward(model, recorded["tokens_NL"]), recorded[f"full/{tap}"]) <= LIMIT


def errors(values, recorded, relative_error):
    """Relative error of every value, whole or sampled as it was recorded."""
    found = {}
    for key, expected in recorded.items():
        kind, _, name = key.partition("/")
        if name in values and kind == "full":
            found[key] = relative_error(values[name], expected)
        elif name in values and kind == "sample":
            places = recorded[f"places/{values[name][0].size}"]
            found[key] = relative_error(values[name].ravel()[places], expected)
    return found


def test_every_tap_of_every_layer_equals_the_recorded_reference(computed, recorded, relative_error):
    found = errors(computed, recorded, relative_error)
    assert len(found) == 30 * len(SITES) + 3 + 2 * len(SITES)
    assert max(found.values()) <= LIMIT, max(found, key=found.get)


def test_bfloat16_differs_by_rounding_only(quickstart_path, recorded, relative_error):
    names = ["blocks.0.attn_z", "blocks.15.resid_pre", "blocks.15.mlp_out"]
    found = errors(run(quickstart_path, recorded["tokens_NL"], "bfloat16", names), recorded, relative_error)
    assert 1e-4 < max(found.values()) <= 0.04, max(found, key=found.get)
    assert found["full/blocks.15.resid_pre"] <= 0.01


def test_rows_left_in_the_order_of_the_file_are_noticed(quickstart_path, recorded, relative_error, monkeypatch):
    monkeypatch.setattr(checkpoint, "unpermute_rows", lambda weights, heads: weights)
    names = ["blocks.0.attn_in", "blocks.0.attn_z", "blocks.15.attn_out"]
    found = errors(run(quickstart_path, recorded["tokens_NL"], names=names), recorded, relative_error)
    assert found["full/blocks.0.attn_in"] <= LIMIT
    assert min(found["full/blocks.0.attn_z"], found["full/blocks.15.attn_out"]) > 1e-2


def test_live_reference(recorder, quickstart_path, recorded, computed, relative_error):
    live = recorder.record(recorder.llama_from_gguf(quickstart_path), recorded["tokens_NL"])
    assert max(errors(live, recorded, relative_error).values()) <= 1e-5
    assert max(relative_error(computed[name], live[name]) for name in live) <= LIMIT
