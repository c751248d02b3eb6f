import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import taps
from saex_pipe.common.llm.architecture import Architecture

SMALL = Architecture("llama", 4, 64, 4, 2, 8, 96, 101, 128, 1e-5, 1e4, True)


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
