"""Record what ``transformers`` computes for the tiny models of ``tests/reference_models``, for the tests to replay.

Needs torch, and is not part of the test run:

    python infra/record_family_references.py

The models are those of ``transformers`` in float32 with its plain attention. They load the folders that the tests
load too. Taps are taken by forward hooks and checked, layer by layer, against what they are said to be.
Written to ``tests/common/llm/data``: ``families.json`` (configurations and tensor shapes, as ``transformers`` saves
them), ``family_defaults.json`` (what it takes for fields that are left out), ``<family>_reference.npz`` (every tap and
the logits, of the second window) and ``gguf_reference.npz`` (the last token's final residual stream and logits, of the
weights as each GGUF type rounds them).
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration, PreTrainedModel
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reference_models import folders, gguf_files  # noqa: E402
from reference_models.configurations import ALL, FAMILIES, NARROW  # noqa: E402
from reference_models.hub_configs import HUB  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()


class Places(NamedTuple):
    """Where in a model of ``transformers`` the taps are; the last six are inside a block."""

    blocks: str
    embed: str
    final_norm: str
    attn_norm: str = "input_layernorm"
    attn_projection: str = "self_attn.o_proj"  # its input is attn_z
    attn_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp_out: str = "mlp"


LLAMA = Places("model.layers", "model.embed_tokens", "model.norm")
SANDWICH = LLAMA._replace(
    attn_out="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
)
PLACES = {
    "gpt2": Places(
        "transformer.h", "transformer.wte", "transformer.ln_f", "ln_1", "attn.c_proj", "attn.c_proj", "ln_2", "mlp"
    ),
    "gpt_neox": Places(
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        attn_projection="attention.dense",
        attn_out="attention.dense",
    ),
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "gemma3": SANDWICH._replace(
        blocks="model.language_model.layers",
        embed="model.language_model.embed_tokens",
        final_norm="model.language_model.norm",
    ),
}


def build(key: str, fields: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model with weights of its own from a configuration."""
    family = key.split("/")[0]
    config = AutoConfig.for_model(family, **(fields or ALL[key].fields))
    kind = Gemma3ForConditionalGeneration if family == "gemma3" else AutoModelForCausalLM
    make = kind if family == "gemma3" else kind.from_config
    return make(config).eval()


def describe(key: str) -> dict[str, Any]:
    """``config.json`` as ``transformers`` saves it, and the names and shapes of the tensors that it saves."""
    with tempfile.TemporaryDirectory() as folder:
        build(key).save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        shapes = folders.shapes_in(Path(folder) / "model.safetensors")
    return {"config": config, "tensors": shapes}


def defaults(family: str) -> dict[str, Any]:
    """What the configuration class takes for each field that a file leaves out."""
    kind = type(AutoConfig.for_model(family))
    fields = {field.name: field.default for field in dataclasses.fields(kind) if field.name in kind.__annotations__}
    return {name: value for name, value in fields.items() if value is not dataclasses.MISSING}


def load(folder: Path) -> PreTrainedModel:
    """The reference, in float32, of the folder that the tests load."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    kind = Gemma3ForConditionalGeneration if family == "gemma3" else AutoModelForCausalLM
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{folder}: {info}")
    return model.eval()


def record(model: PreTrainedModel, tokens_NL: np.ndarray) -> dict[str, np.ndarray]:
    """Every tap by its name in ``common/llm/taps.py``, and ``logits``, all float32 and [N, L, width]."""
    family = model.config.model_type
    places = PLACES.get(family, LLAMA)
    found: dict[str, torch.Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, *, input: str | None = None, output: str | None = None) -> None:
        def hook(_: torch.nn.Module, arguments: tuple, named: dict, result: torch.Tensor | tuple) -> None:
            if input:
                found[input] = arguments[0] if arguments else named["hidden_states"]
            if output:
                found[output] = result[0] if isinstance(result, tuple) else result

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    keep(model.get_submodule(places.embed), output="embed")
    keep(model.get_submodule(places.final_norm), output="final_norm")
    for number, block in enumerate(model.get_submodule(places.blocks)):
        here = f"blocks.{number}."
        keep(block, input=here + "resid_pre", output=here + "resid_post")
        keep(block.get_submodule(places.attn_norm), output=here + "attn_in")
        keep(block.get_submodule(places.attn_projection), input=here + "attn_z")
        keep(block.get_submodule(places.attn_out), output=here + "attn_out")
        keep(block.get_submodule(places.mlp_norm), output=here + "mlp_in")
        keep(block.get_submodule(places.mlp_out), output=here + "mlp_out")
    with torch.no_grad():
        found["logits"] = model(torch.from_numpy(np.asarray(tokens_NL, np.int64)), use_cache=False).logits
        for handle in handles:
            handle.remove()
        for number in range(len(model.get_submodule(places.blocks))):
            here = f"blocks.{number}."
            found[here + "resid_mid"] = found[here + "resid_pre"] + found[here + "attn_out"]
        check_taps(model, places, found)
    return {name: value.float().numpy().copy() for name, value in found.items()}


def check_taps(model: PreTrainedModel, places: Places, found: dict[str, torch.Tensor]) -> None:
    """The taps are what they are called: each follows from the ones before it by the part of the model between."""
    blocks = model.get_submodule(places.blocks)
    parallel = getattr(model.config, "use_parallel_residual", False)
    stream = found["embed"]
    if model.config.model_type == "gpt2":
        stream = stream + model.transformer.wpe.weight[: stream.shape[1]]
    for number, block in enumerate(blocks):
        tap = {name.split(".")[2]: value for name, value in found.items() if name.startswith(f"blocks.{number}.")}
        torch.testing.assert_close(tap["resid_pre"], stream)
        torch.testing.assert_close(tap["attn_in"], block.get_submodule(places.attn_norm)(stream))
        attn_out = block.get_submodule(places.attn_projection)(tap["attn_z"])
        if places.attn_out != places.attn_projection:
            attn_out = block.get_submodule(places.attn_out)(attn_out)
        torch.testing.assert_close(tap["attn_out"], attn_out)
        torch.testing.assert_close(tap["resid_mid"], stream + attn_out)
        mlp_in = block.get_submodule(places.mlp_norm)(stream if parallel else tap["resid_mid"])
        torch.testing.assert_close(tap["mlp_in"], mlp_in)
        mlp_out = block.mlp(mlp_in)
        if places.mlp_out != "mlp":
            mlp_out = block.get_submodule(places.mlp_out)(mlp_out)
        torch.testing.assert_close(tap["mlp_out"], mlp_out)
        stream = tap["resid_post"]
        torch.testing.assert_close(stream, tap["resid_mid"] + mlp_out)
    torch.testing.assert_close(found["final_norm"], model.get_submodule(places.final_norm)(stream))
    logits = model.get_output_embeddings()(found["final_norm"])
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    torch.testing.assert_close(found["logits"], cap * torch.tanh(logits / cap) if cap else logits)


def record_folders(scratch: Path) -> None:
    """Every narrow configuration; the older files about the same model must mean the same to ``transformers``."""
    for family in FAMILIES:
        values = {}
        for key in (key for key in NARROW if key.startswith(f"{family}/")):
            model = load(folders.write_model(scratch / key, key))
            found = record(model, folders.tokens_NL())
            values |= {f"{key.split('/')[1]}/{name}": value[folders.KEPT] for name, value in found.items()}
            if key in HUB:
                older = record(load(HUB[key].write(scratch / key / "hub")), folders.tokens_NL())
                for name, value in found.items():
                    np.testing.assert_allclose(older[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{key} {name}")
            print(key, "attention:", attention_entropies(model))
        np.savez_compressed(folders.DATA / f"{family}_reference.npz", **values)


def attention_entropies(model: PreTrainedModel) -> str:
    """The mean entropy of attention at the last token, as a share of that of even attention: for a look at the data."""
    with torch.no_grad():
        layers = model(torch.from_numpy(folders.tokens_NL().astype(np.int64)), output_attentions=True).attentions
    shares = [float(torch.special.entr(p[:, :, -1]).sum(-1).mean() / np.log(p.shape[-1])) for p in layers]
    return ", ".join(f"{share:.2f}" for share in shares)


def record_gguf(scratch: Path) -> None:
    """Every configuration that GGUF can hold, in every type, by way of the dequantised weights."""
    values = {}
    for key, kind in gguf_files.CASES:
        found = reference_of_gguf(key, kind, scratch / key / kind)
        values |= {f"{key}/{kind}/{name}": value for name, value in found.items()}
    np.savez_compressed(folders.DATA / "gguf_reference.npz", **values)


def reference_of_gguf(key: str, kind: str, scratch: Path) -> dict[str, np.ndarray]:
    """Final residual stream and logits of the last token, of the weights that the GGUF file holds."""
    config, tensors = gguf_files.as_stored(key, kind)
    found = record(load(folders.write_folder(scratch, config, tensors)), folders.tokens_NL())
    last = gguf_files.last_tap(key)
    return {name: found[name][:, -1] for name in (last, "logits")}


def main() -> None:
    torch.set_num_threads(2)
    folders.DATA.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(describe(key))}" for key in ALL]
    (folders.DATA / "families.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    lines = [f"{json.dumps(family)}: {json.dumps(defaults(family))}" for family in FAMILIES if family != "gemma3"]
    (folders.DATA / "family_defaults.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    with tempfile.TemporaryDirectory() as scratch:
        record_folders(Path(scratch))
        record_gguf(Path(scratch))


if __name__ == "__main__":
    main()
