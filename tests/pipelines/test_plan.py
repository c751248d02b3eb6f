"""Plans for TPUs that are not here, from ``config.json`` alone. What needs libtpu is skipped where it is missing."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from mesh_models import CONFIGS

from saex_pipe.common.aot import Topology, topology
from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.configuration import from_hugging_face
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.params import abstract_model
from saex_pipe.pipelines.cli import main
from saex_pipe.pipelines.plan import flops_per_token, plan_harvest
from saex_pipe.stages.harvest.config import Config

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

# What their config.json says of shape, and the tap in the middle.
GEMMA_2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
PHI_3_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GPT_2_XL = {
    "model_type": "gpt2",
    "n_embd": 1600,
    "n_head": 25,
    "n_layer": 48,
    "n_positions": 1024,
    "vocab_size": 50257,
}
GATED, PLAIN = 3, 2  # matrices of an MLP
# Name, tap, and the size of the weights up to it in bfloat16, less norms and biases.
LARGE = {
    "gemma-2-2b": (
        GEMMA_2_2B,
        "blocks.13.resid_post",
        2 * 2304 * (256000 + 14 * (256 * (8 + 2 * 4 + 8) + GATED * 9216)),
    ),
    "phi-3-mini": (PHI_3_MINI, "blocks.16.resid_post", 2 * 3072 * (32064 + 17 * (4 * 3072 + GATED * 8192))),
    "gpt-2-xl": (GPT_2_XL, "blocks.24.resid_post", 2 * 1600 * (50257 + 25 * (4 * 1600 + PLAIN * 6400))),
}


def write_config(folder, config):
    """Of a model only its ``config.json``: no weights, no tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def settings(folder, config, tap, **others):
    values = {"out": "runs/x", "tokens": "runs/y", "model": write_config(folder, config), "taps": (tap,), **others}
    return Config.create(values)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("slice_name", ["v5e:2x4", "v5p:2x2x1"])
@pytest.mark.parametrize("name", LARGE)
def test_large_models_fit(name, slice_name, tmp_path):
    config, tap, weights = LARGE[name]
    on = topology(slice_name)
    plan = plan_harvest(settings(tmp_path, config, tap, batch_windows=64), 1024, on)
    memory = plan.memory
    assert plan.data_parallel == len(on.devices)
    # Norms, biases, positions, and in GPT-2 XL the rest of tiles of 128 that a width of 1,600 leaves.
    assert weights < memory.argument_bytes < weights * (1.01 if name != "gpt-2-xl" else 1.02)
    assert memory.output_bytes == pytest.approx(
        64 // len(on.devices) * 1024 * (plan.store_bytes_per_token + 4), rel=0.01
    )
    assert memory.argument_bytes < memory.peak_bytes < plan.memory_limit_bytes
    assert memory.collectives == {}
    assert 0 < plan.tokens_per_second < 5e6


@needs_libtpu
@pytest.mark.slow
def test_a_model_axis_shares_out_the_weights(tmp_path):
    config, tap, weights = LARGE["gemma-2-2b"]
    on = topology("v5e:2x4")
    plan = plan_harvest(settings(tmp_path, config, tap, batch_windows=64, model_parallel=4), 1024, on)
    assert (plan.data_parallel, plan.model_parallel) == (2, 4)
    assert plan.memory.argument_bytes == pytest.approx(weights / 4, rel=0.01)
    assert plan.memory.collectives == {"all-reduce": 3}  # the embedding's, and two in the loop's body
    assert plan.roofline.interconnect_seconds > 0


def test_twenty_five_heads_are_for_windows_alone(tmp_path):
    eight = Topology("v5e:2x4", "v5e", 8, jax.devices())
    with pytest.raises(InputError, match=r"25 query heads, .* over 2 devices of the model axis; .* are 1, 5, 25$"):
        plan_harvest(settings(tmp_path, GPT_2_XL, "embed", model_parallel=2), 1024, eight)


@needs_libtpu
def test_a_plan_as_a_table_and_as_json(tmp_path, capsys):
    model = write_config(tmp_path / "model", CONFIGS["grouped"])
    recipe = tmp_path / "small.toml"
    recipe.write_text(f"[corpus]\nwindow_length = 16\n[harvest]\nmodel = {model!r}\ntaps = ['blocks.1.resid_post']\n")
    arguments = ["plan", "harvest", str(recipe), "--topology", "v5e:2x4", "--model-parallel", "2"]
    main([*arguments, "--set", "batch_windows=8", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert (plan["data_parallel"], plan["model_parallel"], plan["window_length"]) == (4, 2, 16)
    assert plan["taps"] == ["blocks.1.resid_post"]
    assert plan["memory"]["collectives"] == {"all-reduce": 3}  # the embedding's, and two in the loop's body
    assert plan["memory"]["peak_bytes"] < plan["memory_limit_bytes"]
    assert plan["store_bytes_per_token"] == 40 * 2
    assert plan["step_seconds"] == max(plan["roofline"].values())
    assert plan["tokens_per_second"] == pytest.approx(8 * 16 / plan["step_seconds"])
    assert plan["store_bytes_per_hour_at_half"] == pytest.approx(plan["tokens_per_second"] / 2 * 80 * 3600)
    main(["plan", "harvest", "--model", model, "--set", "taps=blocks.*.resid_pre", "--set", "corpus.window_length=16"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 taps, the last blocks.2.resid_pre" in shown
    assert "v5e:2x4, 8 chips: data 8 x model 1" in shown


@needs_libtpu
def test_a_step_that_does_not_fit_says_what_to_change(tmp_path):
    config = {**CONFIGS["grouped"], "vocab_size": 2**28}
    with pytest.raises(
        InputError, match=r"needs .* GiB .* has 15.75 GiB; use fewer harvest.batch_windows than 8, more"
    ):
        plan_harvest(
            settings(tmp_path, config, "embed", batch_windows=8, compute_dtype="float32"), 16, topology("v5e:2x4")
        )


def test_what_cannot_be_planned_is_refused(tmp_path, capsys):
    model = write_config(tmp_path, CONFIGS["grouped"])
    cases = {
        ("corpus",): "there is no plan for 'corpus'; the stages that are planned are harvest and train",
        ("harvest", "--model", model): "harvest.taps is missing; set it to",
        ("harvest", "--model", model, "--set", "taps=embed", "--topology", "v5e-8"): "no TPU topology 'v5e-8'",
    }
    for arguments, complaint in cases.items():
        with pytest.raises(SystemExit) as exit_:
            main(["plan", *arguments])
        assert exit_.value.code == 2
        assert complaint in capsys.readouterr().err


def test_without_libtpu_one_line_says_what_to_install(tmp_path):
    model = write_config(tmp_path, CONFIGS["grouped"])
    script = (
        "import sys; sys.modules['libtpu'] = None\n"
        "from saex_pipe.pipelines.cli import main\n"
        f"main(['plan', 'harvest', '--model', {model!r}, '--set', 'taps=embed'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "install saex-pipe[tpu]" in done.stderr


def dot_flops(jaxpr, times=1):
    """FLOPs of every matrix product of a program, loops of known length unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            depth = 1
            for axis in contracted:
                depth *= left[axis]
            size = 1
            for length in out:
                size *= length
            total += 2 * depth * size * times
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                total += dot_flops(inner.jaxpr, times * equation.params.get("length", 1))
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_program(name):
    """On windows of one token, where no mask leaves anything out."""
    a = from_hugging_face(CONFIGS[name], "a test")
    model = abstract_model(a, layers=a.layers, with_unembedding=False, dtype="float32")
    tap = f"blocks.{a.layers - 1}.resid_post"
    program = jax.make_jaxpr(lambda model, tokens_NL: apply(model, tokens_NL, taps=[tap], logits=False).taps)(
        model, jax.ShapeDtypeStruct((1, 1), jnp.int32)
    )
    assert flops_per_token(a, [tap], 1) == dot_flops(program.jaxpr)


def test_flops_follow_the_tap_and_the_mask():
    a = from_hugging_face(CONFIGS["capped_windows"], "a test")  # windows of 5 in layers 0 and 2
    length, heads = 12, a.query_heads * a.head_dim
    at = {site: flops_per_token(a, [f"blocks.2.{site}"], length) for site in ("resid_pre", "attn_z", "attn_out")}
    assert flops_per_token(a, ["embed"], length) == 0
    seen = sum(min(query + 1, 5) for query in range(length)) / length
    assert at["attn_z"] - at["resid_pre"] == pytest.approx(2 * 40 * (heads + 2 * 4 * 6) + 4 * heads * seen)
    assert at["attn_out"] - at["attn_z"] == 2 * heads * 40
    assert flops_per_token(a, ["blocks.2.mlp_in"], length) == at["attn_out"]
    assert flops_per_token(a, ["blocks.2.mlp_out"], length) - at["attn_out"] == 2 * 40 * 48 * GATED
    full = flops_per_token(a, ["blocks.1.attn_z"], length) - flops_per_token(a, ["blocks.1.resid_pre"], length)
    assert full - (at["attn_z"] - at["resid_pre"]) == pytest.approx(4 * heads * ((length + 1) / 2 - seen))
