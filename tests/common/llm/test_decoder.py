"""Taps, edits, resuming and early exit of the forward pass, on tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.decoder import apply, unembed
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.llm.taps import all_names, expand, width


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return tiny_llama(layers=4)


@pytest.fixture(scope="module")
def path(tiny, tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(path):
    return load_model(path, dtype="float32")


@pytest.fixture(scope="module")
def expected(tiny):
    return tiny.reference(tiny.tokens_NL())


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_scanned_and_unrolled_blocks_agree(model, tiny, expected):
    scanned = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL))(model, tiny.tokens_NL())
    mixed = apply(model, tiny.tokens_NL(), taps=["blocks.2.mlp_in"])
    assert scanned.taps == {}
    close(scanned.logits_NLV, expected["logits"])
    close(mixed.logits_NLV, expected["logits"])


def test_blocks_are_scanned_so_the_program_does_not_grow_with_depth(tiny_llama, tmp_path):
    def operations(layers):
        deep = tiny_llama(layers=layers)
        model = load_model(deep.write_folder(tmp_path / str(layers)), dtype="float32")
        return len(jax.jit(lambda m, t: apply(m, t)).lower(model, deep.tokens_NL()).as_text().splitlines())

    assert operations(8) == operations(2)


@pytest.mark.parametrize("name", ["embed", "blocks.0.resid_pre", "blocks.1.attn_z", "blocks.2.resid_post"])
def test_computation_ends_at_the_last_tap(name, path, tiny, expected):
    layer = int(name.split(".")[1]) if name.startswith("blocks") else -1
    last = layer - 1 if name.endswith("resid_pre") else layer
    short = load_model(path, last_layer=last, with_unembedding=False, dtype="float32")
    assert short.blocks.layers == last + 1
    output = apply(short, tiny.tokens_NL(), taps=[name], logits=False)
    assert output.logits_NLV is None
    assert list(output.taps) == [name]
    close(output.taps[name], expected[name])


@pytest.mark.parametrize(
    ("names", "edited"),
    [
        (["blocks.*.resid_post"], []),
        (["blocks.*.resid_pre", "blocks.*.attn_z"], []),
        (["blocks.{1,2}.mlp_out", "blocks.3.resid_post"], []),
        (["blocks.1.resid_post", "blocks.2.resid_pre", "blocks.3.resid_post"], []),
        (["blocks.{0,2}.resid_pre", "blocks.0.resid_post"], []),
        (["blocks.{0,1,2}.mlp_in"], ["blocks.1.attn_out"]),
        (["blocks.3.resid_mid"], ["blocks.1.resid_post", "blocks.2.resid_pre"]),
        (["blocks.{2,3}.resid_post"], ["blocks.2.resid_post"]),
    ],
)
def test_taps_are_the_same_however_blocks_are_run(names, edited, model, tiny):
    """Scans of many blocks, with and without taps inside, blocks by themselves, and all of these in turn."""
    names = expand(names, model.architecture)
    edits = {name: lambda value, _: 0.1 - value for name in edited}
    expected = tiny.reference(tiny.tokens_NL(), edits={name: lambda value: 0.1 - value for name in edited})
    found = jax.jit(lambda model, t: apply(model, t, taps=names, edits=edits))(model, tiny.tokens_NL())
    assert sorted(found.taps) == sorted(names)
    for name in names:
        close(found.taps[name], expected[name])
    close(found.logits_NLV, expected["logits"])


def test_weights_above_the_last_layer_are_never_read(tiny, tmp_path, monkeypatch):
    from saex_pipe.common.llm.gguf import GgufFile

    names, read = [], GgufFile.read
    monkeypatch.setattr(GgufFile, "read", lambda self, name, *dtype: (names.append(name), read(self, name, *dtype))[1])
    load_model(tiny.write_gguf(tmp_path / "tiny.gguf"), last_layer=1, with_unembedding=False)
    assert {name.split(".")[1] for name in names if name.startswith("blk")} == {"0", "1"}


def test_every_tap_can_be_edited(tiny_llama, tmp_path):
    """Each tap in turn turned round and shifted, all in one program; logits and the tap itself as NumPy has them."""
    tiny = tiny_llama(layers=2)
    model = load_model(tiny.write_folder(tmp_path), dtype="float32")
    names, tokens_NL = all_names(model.architecture), tiny.tokens_NL()

    @jax.jit
    def run(model, tokens_NL):
        return {name: apply(model, tokens_NL, taps=[name], edits={name: lambda v, _: 0.1 - v}) for name in names}

    plain = tiny.reference(tokens_NL)["logits"]
    for name, output in run(model, tokens_NL).items():
        expected = tiny.reference(tokens_NL, edits={name: lambda v: 0.1 - v})
        close(output.taps[name], expected[name])
        close(output.logits_NLV, expected["logits"])
        assert output.taps[name].shape[-1] == width(name, model.architecture)
        assert np.abs(expected["logits"] - plain).max() > 0.1, name


def test_zeroing_both_branches_of_all_blocks_leaves_the_embedding(model, tiny, expected):
    edits = {
        f"blocks.{n}.{site}": lambda value, _: jnp.zeros_like(value)
        for n in range(4)
        for site in ("attn_out", "mlp_out")
    }
    output = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=["blocks.3.resid_post"], edits=edits))(
        model, tiny.tokens_NL()
    )
    np.testing.assert_array_equal(output.taps["blocks.3.resid_post"], expected["embed"].astype(np.float32))


def test_an_edit_sees_the_taps_before_it(model, tiny, expected):
    """As a transcoder does: mlp_out from mlp_in, here by the block's own MLP, which must change nothing."""
    weights = tiny.tensors
    gate, up, down = (weights[f"model.layers.2.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))

    def transcode(value_NLD, captured):
        assert list(captured) == ["blocks.1.attn_z", "blocks.2.mlp_in"]
        x_NLD = captured["blocks.2.mlp_in"]
        return (jax.nn.silu(x_NLD @ gate) * (x_NLD @ up)) @ down

    taps = ["blocks.2.mlp_in", "blocks.1.attn_z", "blocks.3.resid_pre"]
    run = jax.jit(lambda model, t: apply(model, t, taps=taps, edits={"blocks.2.mlp_out": transcode}))
    output = run(model, tiny.tokens_NL())
    close(output.logits_NLV, expected["logits"])
    assert set(output.taps) == set(taps)


@pytest.mark.parametrize(
    "name", ["blocks.0.resid_pre", "blocks.2.resid_pre", "blocks.1.resid_post", "blocks.3.resid_post"]
)
def test_resuming_from_a_residual_stream(name, model, tiny, expected):
    def crop(value, captured):
        return value.clip(-0.2, 0.2)

    @jax.jit
    def run(model, tokens_NL, value):
        there = apply(model, tokens_NL, resume_from=(name, value), taps=[name, "final_norm"])
        return there, apply(model, tokens_NL, resume_from=(name, value), edits={name: crop})

    plain, cropped = run(model, tiny.tokens_NL(), jnp.asarray(expected[name], jnp.float32))
    close(plain.taps[name], expected[name])
    close(plain.taps["final_norm"], expected["final_norm"])
    close(plain.logits_NLV, expected["logits"])
    close(cropped.logits_NLV, tiny.reference(tiny.tokens_NL(), edits={name: lambda v: v.clip(-0.2, 0.2)})["logits"])
    assert np.abs(cropped.logits_NLV - plain.logits_NLV).max() > 0.1


def test_logits_of_the_final_tap(model, tiny, expected):
    close(unembed(model, jnp.asarray(expected["final_norm"], jnp.float32)), expected["logits"])


def test_a_window_does_not_see_another_window_nor_later_tokens(model, tiny):
    tokens_NL = tiny.tokens_NL()
    changed_NL = tokens_NL.copy()
    changed_NL[1, 5:] = (changed_NL[1, 5:] + 1) % 101
    run = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL).logits_NLV)
    before, after = (run(model, t) for t in (tokens_NL, changed_NL))
    np.testing.assert_allclose(before[0], after[0], atol=1e-5)
    np.testing.assert_allclose(before[1, :5], after[1, :5], atol=1e-5)
    assert np.abs(before[1, 5] - after[1, 5]).max() > 1e-2


def test_one_compilation_serves_all_batches(model, tiny):
    run = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL).logits_NLV)
    for _ in range(3):
        run(model, tiny.tokens_NL())
    assert run._cache_size() == 1


def test_refusals(path, model, tiny):
    tokens_NL, value = tiny.tokens_NL(), jnp.zeros((2, 11, 64))
    short = load_model(path, last_layer=1, with_unembedding=False)
    cases = [
        (lambda: apply(model, tokens_NL, taps=["blocks.4.mlp_in"]), "no tap 'blocks.4.mlp_in'"),
        (lambda: apply(model, tokens_NL, edits={"blocks.0.mlp": lambda v, _: v}), "no tap 'blocks.0.mlp'"),
        (lambda: apply(short, tokens_NL, taps=["blocks.2.attn_in"], logits=False), "blocks 0 to 2, 2 were loaded"),
        (lambda: apply(short, tokens_NL), "blocks 0 to 3, 2 were loaded"),
        (lambda: apply(load_model(path, with_unembedding=False), tokens_NL), "loaded without its unembedding"),
        (lambda: apply(model, tokens_NL, resume_from=("blocks.1.mlp_out", value)), "cannot resume from"),
        (
            lambda: apply(model, tokens_NL, resume_from=("blocks.1.resid_pre", value), taps=["blocks.0.resid_post"]),
            "lies before the place the run resumes from",
        ),
        (
            lambda: apply(model, tokens_NL, taps=["embed"], edits={"final_norm": lambda v, _: v}, logits=False),
            "lies after the last tap",
        ),
        (lambda: apply(model, np.zeros((1, 65), np.int32)), "window length 65 is above the 64 positions"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
