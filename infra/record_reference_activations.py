"""Record activations of the quickstart model as ``transformers`` computes them, for the tests to compare with.

Needs torch, and is not part of the test run:

    python infra/record_reference_activations.py MODEL.gguf tests/common/llm/data/smollm2_reference.npz

The model is ``LlamaForCausalLM`` in float32. Its weights come through ``gguf.GGUFReader`` and from llama.cpp's row
order to that of Hugging Face by way of an index, so that nothing is shared with ``common/llm``. Activations are taken
by forward hooks. The file holds, for two windows of 16 tokens, every tap of ``FULL_LAYERS`` whole, and of each tap of
every layer, and of the logits, a sample of ``SAMPLES`` coordinates.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FULL_LAYERS = (0, 15)
SAMPLES = 256
# "Fellow-Citizens of the Senate and House of Representatives: I embrace", and the start of a chat turn with figures,
# code and other scripts.
TOKENS = [
    [54, 3164, 29, 37266, 33034, 282, 260, 11151, 284, 4699, 282, 21912, 42, 339, 10286, 351],
    [1, 4093, 198, 788, 216, 33, 41, 40, 36, 42, 1792, 79, 33, 446, 7353, 3546],
]


def llama_from_gguf(path: Path) -> LlamaForCausalLM:
    """The reference in float32, from a GGUF file of the Llama architecture."""
    reader = gguf.GGUFReader(path)

    def field(name: str) -> int | float:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = int(field("attention.head_count")), int(field("attention.head_count_kv"))
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=int(field("embedding_length")),
        intermediate_size=int(field("feed_forward_length")),
        num_hidden_layers=int(field("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(field("rope.dimension_count")),
        max_position_embeddings=int(field("context_length")),
        rms_norm_eps=float(field("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base"))},
        tie_word_embeddings="output.weight" not in tensors,
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    state["lm_head.weight"] = tensors.get("output.weight", tensors["token_embd.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weights = tensors[f"blk.{layer}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weights = weights[hugging_face_rows(weights.shape[0], heads if theirs == "attn_q" else kv_heads)]
            state[f"model.layers.{layer}.{ours}.weight"] = weights
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return model


def hugging_face_rows(rows: int, heads: int) -> np.ndarray:
    """Where llama.cpp's converter put each row: element i of a head's first half to 2 i, of its second to 2 i + 1."""
    size = rows // heads
    within = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    return (np.arange(heads)[:, None] * size + within).ravel()


def record(model: LlamaForCausalLM, tokens_NL: np.ndarray) -> dict[str, np.ndarray]:
    """Every tap by its name in ``common/llm/taps.py``, and ``logits``, all float32 and [N, L, width]."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, output: str | None = None, input: str | None = None) -> None:
        def hook(_: torch.nn.Module, inputs: tuple, result: torch.Tensor | tuple) -> None:
            if input:
                found[input] = inputs[0]
            if output:
                found[output] = result[0] if isinstance(result, tuple) else result

        handles.append(module.register_forward_hook(hook))

    keep(model.model.embed_tokens, output="embed")
    keep(model.model.norm, output="final_norm")
    for number, layer in enumerate(model.model.layers):
        here = f"blocks.{number}."
        keep(layer.input_layernorm, input=here + "resid_pre", output=here + "attn_in")
        keep(layer.self_attn.o_proj, input=here + "attn_z", output=here + "attn_out")
        keep(layer.post_attention_layernorm, input=here + "resid_mid", output=here + "mlp_in")
        keep(layer.mlp, output=here + "mlp_out")
        keep(layer, output=here + "resid_post")
    with torch.no_grad():
        found["logits"] = model(torch.from_numpy(np.asarray(tokens_NL, np.int64))).logits
    for handle in handles:
        handle.remove()
    return {name: value.float().numpy().copy() for name, value in found.items()}


def sample_places(size: int) -> np.ndarray:
    """Which coordinates of a flattened tap are kept."""
    return np.sort(np.random.default_rng(size).choice(size, SAMPLES, replace=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file of the quickstart model")
    parser.add_argument("output", type=Path, help=".npz file to write")
    arguments = parser.parse_args()
    tokens_NL = np.asarray(TOKENS, np.int32)
    values = record(llama_from_gguf(arguments.model), tokens_NL)
    full = {
        f"full/{name}": value
        for name, value in values.items()
        if name.split(".")[1:2] in [[str(n)] for n in FULL_LAYERS]
    }
    places = {f"places/{value[0].size}": sample_places(value.size) for value in values.values()}
    sampled = {f"sample/{name}": value.ravel()[places[f"places/{value[0].size}"]] for name, value in values.items()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output, tokens_NL=tokens_NL, **full, **places, **sampled)


if __name__ == "__main__":
    main()
