from pathlib import Path

import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import taps
from saex_pipe.common.llm.configuration import from_hugging_face

SMALL = from_hugging_face(
    {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 96,
        "vocab_size": 101,
        "max_position_embeddings": 128,
    },
    Path("config.json"),
)


def test_names_come_in_the_order_of_computation():
    names = taps.all_names(SMALL)
    assert len(names) == 4 * 8 + 2
    assert list(taps.validate(reversed(names), SMALL)) == names


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.1.resid_pos", "blocks.1.resid_post"),
        ("blocks.4.mlp_in", "blocks.3.mlp_in"),
        ("block.1.mlp_out", "blocks.1.mlp_out"),
        ("blocks.01.mlp_out", "blocks.1.mlp_out"),
        ("blocks.x.attn_z", "blocks.0.attn_z"),
        ("embedding", "embed"),
        ("finalnorm", "final_norm"),
        ("", "embed"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(InputError, match=f"no tap '{name}'") as caught:
        taps.parse(name, SMALL)
    assert near in str(caught.value)


def test_a_name_given_twice_is_refused():
    with pytest.raises(InputError, match="named twice"):
        taps.validate(["embed", "embed"], SMALL)


def test_widths():
    assert taps.width("blocks.0.attn_z", SMALL) == 32
    assert {taps.width(name, SMALL) for name in taps.all_names(SMALL) if "attn_z" not in name} == {64}


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        ([], -1),
        (["embed"], -1),
        (["blocks.0.resid_pre"], -1),
        (["blocks.3.resid_pre"], 2),
        (["blocks.1.attn_in", "blocks.0.mlp_out"], 1),
        (["blocks.2.resid_post"], 2),
        (["final_norm"], 3),
    ],
)
def test_last_layer(names, layer):
    assert taps.last_layer(names, SMALL) == layer


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["blocks.*.resid_post"], [f"blocks.{layer}.resid_post" for layer in range(4)]),
        (["blocks.{1,3}.mlp_out"], ["blocks.1.mlp_out", "blocks.3.mlp_out"]),
        (["blocks.2.attn_{z,out}"], ["blocks.2.attn_z", "blocks.2.attn_out"]),
        (["final_norm", "blocks.0.resid_*", "embed"], None),
        (["blocks.1.mlp_out", "blocks.*.mlp_out"], [f"blocks.{layer}.mlp_out" for layer in range(4)]),
    ],
)
def test_globs_stand_for_taps_in_the_order_of_computation(patterns, names):
    expected = names or ["embed", *(f"blocks.0.resid_{place}" for place in ("pre", "mid", "post")), "final_norm"]
    assert list(taps.expand(patterns, SMALL)) == expected


@pytest.mark.parametrize("pattern", ["blocks.{7,9}.mlp_out", "blocks.*.resid", "*.resid_post", "blocks.*.mlp_out.*"])
def test_a_glob_that_fits_nothing_is_refused(pattern):
    with pytest.raises(InputError, match=r"its blocks are 0 to 3, with resid_pre, attn_in"):
        taps.expand([pattern], SMALL)


def test_a_plain_name_that_is_wrong_is_refused_beside_globs():
    with pytest.raises(InputError, match=r"near ones are blocks\.1\.mlp_out"):
        taps.expand(["blocks.*.mlp_in", "blocks.1.mlp_ot"], SMALL)
