"""A chain on a random model of three small blocks and a few pages of invented text: every stage in seconds."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from saex_pipe.stages.corpus import run as corpus
from saex_pipe.stages.corpus.config import Config as CorpusConfig
from saex_pipe.stages.harvest import run as harvest
from saex_pipe.stages.harvest.config import Config as HarvestConfig

WIDTH, LAYERS, VOCABULARY = 32, 3, 400
TAP = "blocks.2.resid_pre"
WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "it",
    "for",
    "on",
    "with",
    "as",
    "at",
    "by",
    "from",
    "this",
    "that",
    "peace",
    "war",
    "law",
    "river",
    "people",
    "union",
    "state",
]


def texts(number=40, words=220, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, words)) + f". End of document {i}.\n" for i in range(number)]


def write_corpus(path: Path, documents=None) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents or texts()))
    return path


def write_model(path: Path, vocabulary=VOCABULARY) -> Path:
    """A Hugging Face folder: configuration, random weights, and a byte-level BPE trained on the text."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>", "<start>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "bos_token": "<start>", "add_bos_token": False})
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    save_file(_weights(vocabulary), path / "model.safetensors")
    return path


def write_store(place: Path, shards: int) -> Path:
    """A store of ``shards`` shards of two chunks each, with the corpus, model and text that it is made of beside it."""
    model, source = write_model(place / "model"), write_corpus(place / "text.jsonl.gz")
    sizes = {"window_length": 32, "max_tokens": shards * 8 * 32, "holdout_fraction": 0.0}
    own = {"source": [str(source)], "tokenizer": str(model), "out": str(place / "corpus")}
    corpus.run(CorpusConfig.create(own | sizes))
    settings = {"model": str(model), "tokens": str(place / "corpus"), "taps": [TAP], "compute_dtype": "float32"}
    cut = {"batch_windows": 8, "shard_windows": 8, "chunk_windows": 4, "out": str(place / "whole")}
    harvest.run(HarvestConfig.create(settings | cut))
    return place / "whole"


def _weights(vocabulary: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)

    def matrix(out: int, width: int) -> np.ndarray:
        return (random.normal(0, 1, (out, width)) / np.sqrt(width)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, WIDTH) * np.float32(4)}
    for layer in range(LAYERS):
        here = f"model.layers.{layer}."
        shapes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
        tensors |= {f"{here}self_attn.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        shapes = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
        tensors |= {f"{here}mlp.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{here}{norm}.weight"] = np.ones(WIDTH, np.float32)
    return tensors | {"model.norm.weight": np.ones(WIDTH, np.float32)}


def write_recipe(folder: Path) -> Path:
    """A recipe of the whole main chain, with its model and text beside it; several shards in every stage."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_corpus(folder / "text.jsonl.gz")
    recipe = folder / "tiny.toml"
    recipe.write_text(f"""
[corpus]
source = ["{folder}/text.jsonl.gz"]
window_length = 32
max_tokens = 6400
holdout_fraction = 0.2

[harvest]
model = "{folder}/model"
taps = ["{TAP}"]
batch_windows = 8
shard_windows = 24
chunk_windows = 4

[train]
latents = 64
k = 4
batch_rows = 256
rows = 30720
checkpoint_every_steps = 20
learning_rate = 1e-3

[evaluate]
batch_windows = 4

[cache]
examples_per_feature = 3
context = 4

[view]
features = 10
""")
    return recipe


TOY = (
    *("--set", "toy.latents=24", "--set", "toy.width=12", "--set", "toy.active=2", "--set", "toy.rows=8192"),
    *("--set", "train.latents=32", "--set", "train.k=2", "--set", "train.batch_rows=256", "--set", "train.rows=15360"),
)


def command(*arguments: str) -> list[str]:
    """The command line, run as a process of its own."""
    return [sys.executable, "-c", "from saex_pipe.pipelines.cli import main; main()", *map(str, arguments)]


def saex_pipe(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run the command line to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)
