"""The peers of the harvest benchmark, in a process and a Python of their own: transformers and SAELens on torch.

Reads one JSON request a line and answers each with one JSON line, so that they compute only when they are asked to:

    {"do": "open", "folder": ..., "layers": ..., "dtype": ...}      a model, and the depth that it is run to
    {"do": "choose", "peer": ..., "tokens": ..., "acts": ..., "compile": ...}   the best setting for these windows
    {"do": "time", "peer": ...}                                     one batch in that setting: seconds and tokens

``choose`` leaves the activations of the first two windows in ``acts``, for the benchmark to compare with its own.
"""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers

TRIALS = 2
LONGEST_CALL_SECONDS = 10
STORE_BATCH_TOKENS = (512, 2048, 8192)  # SAELens is tried with batches of about this size


class Setting(NamedTuple):
    """One way to run a peer."""

    name: str
    call: Callable[[], Any]
    tokens: int  # of one call
    threads: int


class Model:
    """One model, cut off at the depth that is measured."""

    def __init__(self, folder: str, layers: int, dtype: str) -> None:
        self.layers, self.dtype = layers, dtype
        self.whole = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        config = self.whole.config
        self.width: int = config.hidden_size
        self.base = self.whole.base_model
        self.blocks_name, self.norm_name = ("h", "ln_f") if config.model_type == "gpt2" else ("layers", "norm")
        del getattr(self.base, self.blocks_name)[layers:]
        config.num_hidden_layers = layers
        self.final_norm = getattr(self.base, self.norm_name)
        self.without_final_norm()

    def without_final_norm(self) -> None:
        """Let the base model return the residual stream."""
        setattr(self.base, self.norm_name, torch.nn.Identity())

    def with_final_norm(self) -> None:
        """Put back what TransformerLens looks for when it converts the weights."""
        setattr(self.base, self.norm_name, self.final_norm)

    def forward(self, tokens_NL: torch.Tensor) -> torch.Tensor:
        """The residual stream after the last block that is left."""
        acts_NLD: torch.Tensor = self.base(tokens_NL, use_cache=False).last_hidden_state
        return acts_NLD


def transformers_settings(model: Model, tokens_NL: torch.Tensor, compiling: bool) -> Iterator[Setting]:
    """Eager with half as many threads as there are cores and with as many, and compiled."""
    for mode in ("eager", "compiled") if compiling else ("eager",):
        forward = torch.compile(model.forward, dynamic=False) if mode == "compiled" else model.forward
        for threads in thread_counts() if mode == "eager" else (max(thread_counts()),):
            yield Setting(
                f"transformers {metadata.version('transformers')} torch {torch.__version__} {mode} sdpa",
                lambda forward=forward: forward(tokens_NL),
                tokens_NL.numel(),
                threads,
            )


def hooked_settings(model: Model, tokens_NL: torch.Tensor, compiling: bool) -> Iterator[Setting]:
    """SAELens' activation store on a HookedTransformer, which is its default."""
    hook_name = f"blocks.{model.layers - 1}.hook_resid_post"
    return store_settings("HookedTransformer eager", hooked_transformer(model), hook_name, model, tokens_NL)


def proxy_settings(model: Model, tokens_NL: torch.Tensor, compiling: bool) -> Iterator[Setting]:
    """SAELens' activation store on its wrapper around a model of transformers."""
    from sae_lens.load_model import HookedProxyLM

    hook_name = f"{model.whole.base_model_prefix}.{model.blocks_name}.{model.layers - 1}"
    wrapper = HookedProxyLM(model.whole, None, hook_names=[hook_name])  # type: ignore[arg-type]
    yield from store_settings("AutoModelForCausalLM eager", wrapper, hook_name, model, tokens_NL)
    if compiling:
        compiled = torch.compile(wrapper)
        yield from store_settings("AutoModelForCausalLM compiled", compiled, hook_name, model, tokens_NL)


def store_settings(
    label: str, wrapper: Any, hook_name: str, model: Model, tokens_NL: torch.Tensor
) -> Iterator[Setting]:
    """Batches of several sizes."""
    length = tokens_NL.shape[1]
    for batch in sorted({max(1, size // length) for size in STORE_BATCH_TOKENS}):
        store = activation_store(wrapper, tokens_NL, hook_name, model, batch)
        name = f"sae-lens {metadata.version('sae-lens')} {label} batch {batch}x{length}"
        yield Setting(name, store.get_filtered_llm_batch, batch * length, max(thread_counts()))


def activation_store(wrapper: Any, tokens_NL: torch.Tensor, hook_name: str, model: Model, batch: int) -> Any:
    """SAELens' own store of activations, over windows that are tokenised already."""
    from sae_lens.training.activations_store import ActivationsStore

    rows = tokens_NL.repeat(-(-2 * batch // len(tokens_NL)), 1)
    return ActivationsStore(
        model=wrapper,
        dataset=datasets.Dataset.from_dict({"tokens": rows.tolist()}),
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=tokens_NL.shape[1],
        d_in=model.width,
        n_batches_in_buffer=2 * batch,
        total_training_tokens=1,
        store_batch_size_prompts=batch,
        train_batch_size_tokens=batch * tokens_NL.shape[1],
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=model.dtype,
    )


def hooked_transformer(model: Model) -> Any:
    """The same weights in TransformerLens, without its processing of them."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    c = model.whole.config
    shared = {
        "d_model": c.hidden_size,
        "d_head": c.hidden_size // c.num_attention_heads,
        "n_heads": c.num_attention_heads,
        "n_layers": model.layers,
        "n_ctx": c.max_position_embeddings,
        "d_vocab": c.vocab_size,
        "dtype": getattr(torch, model.dtype),
        "device": "cpu",
    }
    if c.model_type == "gpt2":
        family = {"d_mlp": 4 * c.n_embd, "eps": c.layer_norm_epsilon, "act_fn": "gelu_new", "normalization_type": "LN"}
        convert = convert_gpt2_weights
    else:
        family = {
            "d_mlp": c.intermediate_size,
            "eps": c.rms_norm_eps,
            "act_fn": "silu",
            "n_key_value_heads": c.num_key_value_heads,
            "normalization_type": "RMS",
            "positional_embedding_type": "rotary",
            "rotary_adjacent_pairs": False,
            "rotary_dim": c.hidden_size // c.num_attention_heads,
            "rotary_base": int(c.rope_parameters["rope_theta"]),
            "final_rms": True,
            "gated_mlp": True,
        }
        convert = convert_llama_weights
    config = HookedTransformerConfig(**shared, **family)
    hooked = HookedTransformer(config)
    model.with_final_norm()
    hooked.load_state_dict(convert(model.whole, config), strict=False)
    model.without_final_norm()
    return hooked.eval()


def thread_counts() -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return sorted({max(1, cores // 2), cores})


def seconds(setting: Setting) -> float:
    torch.set_num_threads(setting.threads)
    start = time.perf_counter()
    with torch.inference_mode():
        setting.call()
    return time.perf_counter() - start


def fastest(settings: Iterator[Setting]) -> Setting:
    """The setting that takes the least time for a token; the first call of each is not counted.

    A setting is left out where one call would take long at the best rate so far, or comes out at half of that rate.
    """
    best, least = None, float("inf")
    for setting in settings:
        if best is not None and setting.tokens * least > LONGEST_CALL_SECONDS:
            continue
        seconds(setting)
        found = seconds(setting)
        if found / setting.tokens < 2 * least:
            found = min(found, *(seconds(setting) for _ in range(TRIALS)))
        rate = setting.tokens / found
        print(f"{setting.name}, {setting.threads} threads: {rate:.0f} tokens/s", file=sys.stderr, flush=True)
        if 1 / rate < least:
            best, least = setting, 1 / rate
    assert best is not None
    return best


PEERS = {"transformers": transformers_settings, "saelens": hooked_settings, "saelens-proxy": proxy_settings}


class Server:
    """Answers requests."""

    def __init__(self) -> None:
        self.model: Model | None = None
        self.chosen: dict[str, Setting] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what one request asks."""
        if request["do"] == "open":
            self.chosen.clear()
            self.model = None  # before the next one takes memory
            self.model = Model(request["folder"], request["layers"], request["dtype"])
            return {}
        if request["do"] == "choose":
            return self._choose(**{name: value for name, value in request.items() if name != "do"})
        setting = self.chosen[request["peer"]]
        return {"seconds": seconds(setting), "tokens": setting.tokens}

    def _choose(self, peer: str, tokens: str, acts: str, compile: bool) -> dict[str, Any]:
        assert self.model is not None, "open a model first"
        tokens_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
        torch.compiler.reset()  # or the shapes before count towards the most that are compiled
        best = fastest(PEERS[peer](self.model, tokens_NL, compile))
        self.chosen[peer] = best
        with torch.inference_mode():
            found = best.call() if peer == "transformers" else best.call.__self__.get_activations(tokens_NL[:2])  # type: ignore[attr-defined]
        np.save(acts, found[:2].float().numpy())
        return {"name": f"{best.name} {best.threads} threads", "tokens": best.tokens}


def main() -> None:
    """Serve until the requests end. Whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    server = Server()
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
