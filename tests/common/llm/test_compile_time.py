"""Blocks are scanned: the program for 48 layers is about that for 2, and so is the time that it takes to compile."""

import re
import statistics
import time

import jax
import jax.numpy as jnp
import pytest
from mesh_models import CONFIGS

from saex_pipe.common.llm.configuration import from_hugging_face
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.params import abstract_model
from saex_pipe.common.llm.taps import expand

FEW, MANY = 2, 48
WITHIN = 1.2


def lowered(name: str, layers: int, case: str) -> jax.stages.Lowered:
    """The forward pass to a tap in the middle, to the logits, or with a tap in every block."""
    count = "n_layer" if "n_layer" in CONFIGS[name] else "num_hidden_layers"
    architecture = from_hugging_face({**CONFIGS[name], count: layers}, "a test")
    taps = {"mid": [f"blocks.{layers // 2}.resid_post"], "logits": [], "glob": ["blocks.*.resid_post"]}[case]
    names, logits = expand(taps, architecture), case == "logits"
    model = abstract_model(architecture, layers=layers, with_unembedding=logits, dtype="float32")
    forward = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=names, logits=logits))
    return forward.lower(model, jax.ShapeDtypeStruct((2, 12), jnp.int32))


def operations(program: jax.stages.Lowered, kind: str = r"\w+") -> int:
    """How many operations of a kind the program has before it is compiled."""
    return len(re.findall(rf"= \"?stablehlo\.{kind}\b", program.as_text()))


@pytest.mark.parametrize("case", ["mid", "logits"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_program_does_not_grow_with_depth(name, case):
    few, many = (operations(lowered(name, layers, case)) for layers in (FEW, MANY))
    assert few > 100
    assert many <= few * WITHIN
    assert many == operations(lowered(name, MANY // 2, case))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tap_in_every_block_adds_its_own_output_and_no_block(name):
    few, many = (lowered(name, layers, "glob") for layers in (FEW, MANY))
    assert operations(many, "dot_general") == operations(few, "dot_general") > 0
    assert operations(many) - operations(few) <= 2 * (MANY - FEW)  # a slice of the stacked values, and its shape


def test_the_count_notices_blocks_one_by_one(monkeypatch):
    few = operations(lowered("grouped", FEW, "logits"))
    monkeypatch.setattr("saex_pipe.common.llm.decoder._next_run", lambda *_: (None, 1))
    assert operations(lowered("grouped", 6, "logits")) > few * 2 * WITHIN


def compile_seconds(name: str, layers: int, case: str) -> float:
    """Processor time, which other work on the machine disturbs less than the clock."""
    started = time.process_time()
    lowered(name, layers, case).compile()
    return time.process_time() - started


@pytest.fixture
def uncached():
    """Without the suite's folder of compiled programs."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mid", "logits"])
def test_compile_time_does_not_grow_with_depth(case, uncached):
    compile_seconds("grouped", FEW, case)
    pairs = [(compile_seconds("grouped", FEW, case), compile_seconds("grouped", MANY, case)) for _ in range(9)]
    few, many = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    print(f"{case}: {few:.2f} s for {FEW} layers, {many:.2f} s for {MANY}")
    assert many <= few * WITHIN
