"""Models by their id on the hub: what loads, and the one line that ends a command where something is wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from loopback_hub import serving
from safetensors.numpy import save

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_config(files, **fields):
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | fields).encode()}


@pytest.fixture(scope="module")
def repositories(tiny_llama, tmp_path_factory):
    """A model that loads, in one file and in shards, and others that are spoiled in one way each."""
    model, place = tiny_llama(tied=False), tmp_path_factory.mktemp("models")
    whole = contents(model.write_folder(place / "whole"))
    sharded = contents(model.write_folder(place / "sharded", shards=2))
    gguf = model.write_gguf(place / "tiny.gguf").read_bytes()
    norm = {"model.norm.weight": np.ones(64, np.int32)}
    without = {name: content for name, content in whole.items() if name != "model.safetensors"}
    return {
        "whole": whole,
        "sharded": sharded,
        "gguf": {"tiny.gguf": gguf},
        "lacking": {name: content for name, content in sharded.items() if name != SHARDS[1]},
        "truncated": sharded | {SHARDS[1]: sharded[SHARDS[1]][:-100]},
        "integers": whole | {"model.safetensors": save({**model.tensors, **norm})},
        "quantised": with_config(whole, quantization_config={"quant_method": "gptq", "bits": 4}),
        "contrary": with_config(whole, intermediate_size=95),
        "pickled": without | {"pytorch_model.bin": b"x"},
        "truncated-gguf": {"tiny.gguf": gguf[:-100]},
    }


SAID = {
    "whole": "llama 3",
    "sharded": "llama 3",
    "gguf/tiny.gguf": "llama 3",
    "lacking": f"InputError shard */{SHARDS[1]} is missing; download the model again",
    "truncated": f"InputError */{SHARDS[1]} is truncated or not a safetensors file: *; download it again",
    "integers": "InputError *: tensor model.norm.weight is stored as I32, which this version does not read; use *",
    "quantised": "InputError */config.json: *quantization_config*",
    "contrary": "InputError *: tensor * has shape *96*, its configuration says *95*; get a model whose *",
    "pickled": "InputError * holds neither model.safetensors nor *; use a model, *(pytorch_model.bin is not read)",
    "gguf": "InputError hf://org/gguf holds GGUF files, of which one has to be named; add /tiny.gguf",
    "truncated-gguf/tiny.gguf": "InputError */tiny.gguf is truncated: * bytes of the * that its header announces; *",
    "gated": "InputError hf://org/gated: access to org/gated has to be granted; ask for it on its page, then set *",
    "private": "InputError hf://org/private: the hub shows no model org/private; check the name, or set HF_TOKEN *",
    "none": "InputError hf://org/none: the hub shows no model org/none; check the name, or set HF_TOKEN *",
}
SCRIPT = """
import sys
from saex_pipe.common.errors import SaexError
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.resources import fetch
for name in sys.argv[1:]:
    try:
        architecture = load_model(fetch("hf://org/" + name, progress=False), dtype="float32").architecture
        print(architecture.family, architecture.layers)
    except SaexError as error:
        print(type(error).__name__, str(error).replace("\\n", "\\\\n"))
"""


def test_what_loads_and_what_does_not(repositories, tmp_path):
    from fnmatch import fnmatchcase

    with serving({f"org/{name}": files for name, files in repositories.items()}) as hub:
        hub.files |= {f"org/{name}": repositories["whole"] for name in ("gated", "private")}
        hub.gated.add("org/gated")
        hub.private.add("org/private")
        environment = hub.environment | {"SAEX_CACHE": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *SAID], env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    for (name, expected), line in zip(SAID.items(), done.stdout.splitlines(), strict=True):
        assert fnmatchcase(line, expected.replace("[", "[[]")), (name, line)


COMMANDS = """
import contextlib, io, json, sys
from saex_pipe.pipelines.cli import main
for arguments in json.load(sys.stdin):
    status, errors = 0, io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main(arguments)
    except SystemExit as error:
        status = error.code
    print(json.dumps([status, errors.getvalue()]))
"""


def test_the_command_line(repositories, tmp_path):
    """One line on stderr, the right exit status, and a folder that holds no finished output."""
    model = tiny_run.write_model(tmp_path / "model")
    text = tiny_run.write_corpus(tmp_path / "text.jsonl.gz")
    lacking = contents(model) | {"model.safetensors.index.json": json.dumps({"weight_map": {"x": SHARDS[1]}}).encode()}
    del lacking["model.safetensors"]

    def corpus(out, tokenizer):
        settings = [f"tokenizer={tokenizer}", f"source={text}", "window_length=32", "max_tokens=640"]
        return ["corpus", "--out", str(tmp_path / out), *(word for setting in settings for word in ("--set", setting))]

    def harvest(uri):
        settings = [f"model={uri}", "taps=blocks.1.resid_pre", f"tokens={tmp_path}/runs/corpus"]
        words = [word for setting in settings for word in ("--set", setting)]
        return ["harvest", "--out", str(tmp_path / "spoiled"), *words]

    def run(commands, **changed):
        environment = hub.environment | {"SAEX_CACHE": str(tmp_path / "cache")} | changed
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS],
            input=json.dumps(commands),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    files = {"org/gated": repositories["whole"], "org/whole": repositories["whole"], "org/lacking": lacking}
    with serving(files) as hub:
        hub.gated.add("org/gated")
        found = run(
            [
                corpus("runs", model),
                corpus("spoiled", "hf://org/none"),
                harvest("hf://org/gated"),
                harvest("hf://org/lacking"),
                harvest("hf://org/whole"),
            ]
        )
        found += run([corpus("spoiled", "hf://org/gated")], HF_HUB_OFFLINE="1")
    expected = [
        (0, ""),
        (2, "hf://org/none: the hub shows no model org/none; check the name"),
        (2, "hf://org/gated: access to org/gated has to be granted; ask for it"),
        (2, f"{SHARDS[1]} is missing; download the model again"),
        (2, "the tokenizer's largest id 382 does not fit the model's 101 embeddings; use the model's own tokenizer"),
        (1, "hf://org/gated is not in the cache and the hub cannot be reached; go online"),
    ]
    for (status, errors), (expected_status, line) in zip(found, expected, strict=True):
        assert status == expected_status, errors
        assert line in (errors.splitlines() or [""])[-1]
    assert [path.parent.name for path in tmp_path.rglob("manifest.json")] == ["corpus"]
