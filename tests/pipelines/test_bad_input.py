"""Bad input ends with one line that names value, limit and remedy, and leaves everything finished as it was."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import zstandard

from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.pipelines.cli import main


class Place:
    """A finished run that a case may damage, and a folder for whatever else it needs."""

    def __init__(self, root):
        self.tmp, self.out, self.new = root, root / "out", root / "new"
        self.recipe, self.model = root / "recipe" / "tiny.toml", root / "recipe" / "model"
        self.text = root / "recipe" / "text.jsonl.gz"

    def write(self, name, data):
        path = self.tmp / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def edit_json(self, name, **changes):
        path = self.out / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    tiny_run.write_recipe(root / "recipe")
    main(["run", str(root / "recipe" / "tiny.toml"), "--out", str(root / "out")])
    return root


@pytest.fixture
def place(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "place")
    made = Place(tmp_path / "place")
    made.recipe.write_text(made.recipe.read_text().replace(str(finished_run), str(made.tmp)))
    return made


def files(root):
    return {str(path): path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}


def failing(arguments, capsys):
    """The exit status, and the only line on stderr beside those of the progress, which come where that takes long."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    lines = [line for line in captured.err.splitlines() if " s left" not in line]
    assert [line.startswith("saex-pipe: ") for line in lines] == [True], captured.err
    return exit_.value.code, lines[0].removeprefix("saex-pipe: ")


def apart(script, *arguments):
    """``script`` in a process of its own, once it has ended."""
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


RUN = "run {recipe} --out {out}"
# id: (command line, what is wrong, the line). {new} is a fresh folder, so that what is finished does not count there.
COMMANDS = {
    "unknown command": ("hravest {recipe}", r"No such command 'hravest'. Did you mean 'harvest'\?; .*--help"),
    "unknown option": ("run {recipe} --fource", r"No such option: --fource .*--force.*'saex-pipe run --help'"),
    "no recipe": ("run", r"Missing argument 'RECIPE\|FILE.toml'; 'saex-pipe run --help'"),
    "unknown recipe": (
        "run quikstart",
        r"no recipe 'quikstart'; did you mean quickstart\? recipes are quickstart, toy",
    ),
    "missing recipe file": (
        "run nowhere.toml",
        r"nowhere.toml cannot be read \(No such file or directory\); give a TOML",
    ),
    "unknown stage to set": (RUN + " --set trian.k=4", r"there is no stage 'trian'; did you mean train\?"),
    "unknown stage of run": (
        RUN + " --only trian",
        r"recipe tiny has no stage 'trian'; its stages are corpus, harvest,",
    ),
    "stage not of this recipe": (RUN + " --from toy", r"recipe tiny has no stage 'toy'; its stages are"),
    "unknown stage to show": ("config trian", r"there is no stage 'trian'; did you mean train\? stages are"),
    "nothing there": ("status {new}", r"{new} .*; "),
    "unknown key": (
        RUN + " --set train.latens=4",
        r"train has no key 'latens'; did you mean latents.*'saex-pipe config",
    ),
    "set without =": (RUN + " --set train.k", r"--set 'train.k' is not of the form key=value; write"),
    "set without stage": (RUN + " --set k=4", r"--set 'k=4' names no stage; write stage.key=value"),
    "not a number": (RUN + " --set train.k=many", r"train.k = 'many': .*integer.*; 'saex-pipe config train'"),
    "unknown variant": (
        "train {recipe} --out {out} --set variant=tpok --force",
        r"variant 'tpok' .*did you mean topk\?",
    ),
    "k above latents": (RUN + " --set train.k=65 --force", r"k = 65 is outside 1 to 64 \(latents\); lower k or raise"),
    "latents and expansion": (
        RUN + " --set train.expansion=2 --force",
        r"train.latents = 64 and train.expansion = 2.*one",
    ),
    "k for relu": (
        "train {recipe} --out {out} --set variant=relu --force",
        r"relu takes no k \(got 4\); set it to none; the settings of relu",
    ),
    "unknown tap to train on": (
        RUN + " --set train.tap=blocks.1.resid_pre --force",
        r"no tap 'blocks.1.resid_pre'; it",
    ),
    "unknown target tap": (
        RUN + " --set train.target_tap=blocks.9.x --force",
        r"has no tap 'blocks.9.x'; it holds blo",
    ),
    "no rows": (RUN + " --set train.rows=0", r"train.rows = 0: .*greater than or equal to 1; 'saex-pipe config train'"),
    "batch of none": (RUN + " --set train.batch_rows=0", r"train.batch_rows = 0: .*greater than or equal to 1"),
    "batch above the store": (
        RUN + " --set train.batch_rows=100000 --force",
        r"has \d,\d{{3}} training rows, fewer than one batch of 100,000; harvest more tokens or set train.batch_rows",
    ),
    "pool too small": (
        RUN + " --set train.pool_bytes=64 --force",
        r"train.pool_bytes = 64 does not hold 10 rows of 64",
    ),
    "negative rate": (RUN + " --set train.learning_rate=-1", r"train.learning_rate = -1: .*greater than 0"),
    "everything held out": (
        RUN + " --set corpus.holdout_fraction=1.0",
        r"corpus.holdout_fraction = 1.0: .*less than 1",
    ),
    "window of one": (RUN + " --set corpus.window_length=1", r"corpus.window_length = 1: .*greater than or equal to 2"),
    "fewer tokens than a window": (
        "corpus {recipe} --out {new} --set max_tokens=31",
        r"fill no window of 32; .*corpus.max_tokens",
    ),
    "no source": (RUN + " --set corpus.source=[]", r"corpus.source = \[\]: .*at least 1 item"),
    "missing text": ("corpus {recipe} --out {new} --set source=none.txt", r"none.txt.* (no|not) .*; "),
    "scheme unknown": ("corpus {recipe} --out {new} --set source=ftp://a/b.txt", r"unknown scheme ftp://; use a local"),
    "checksum that does not fit": (
        "corpus {recipe} --out {new} --set source={text}#sha256=" + "0" * 64,
        r"text.jsonl.gz.*0{{12}}.*; ",
    ),
    "not a checksum": (
        "corpus {recipe} --out {new} --set source={text}#sha256=12",
        r"'12' is not a sha256; give its 64",
    ),
    "BOS without BOS": (
        "corpus {recipe} --out {new} --set prepend_bos=sometimes",
        r"prepend_bos = 'sometimes': .*'auto'",
    ),
    "missing model": ("harvest {recipe} --out {out} --set model={tmp}/none --force", r"{tmp}/none.*(no|not).*; "),
    "unknown tap": (
        "harvest {recipe} --out {out} --set taps=blocks.2.resid_per --force",
        r"no tap 'blocks.2.resid_per'; near ones are blocks.2.resid_pre",
    ),
    "tap above the last block": (
        "harvest {recipe} --out {out} --set taps=blocks.3.resid_pre --force",
        r"no tap 'blocks.3.resid_pre': its blocks are 0 to 2; near ones are blocks.2.resid_pre",
    ),
    "position outside the window": (
        RUN + " --set harvest.drop_positions=0,32 --force",
        r"harvest.drop_positions = \[0, 32\]: 32 is outside the window; use positions from 0 to 31",
    ),
    "every position dropped": (
        RUN + " --set harvest.drop_positions=[" + ",".join(map(str, range(32))) + "] --force",
        r"the first 64 windows have no row that the drop_\* settings keep; drop fewer positions",
    ),
    "no windows a batch": (
        RUN + " --set harvest.batch_windows=0",
        r"harvest.batch_windows = 0: .*greater than or equal to 1",
    ),
    "another dtype": (RUN + " --set harvest.store_dtype=int4", r"harvest.store_dtype = 'int4': .*'float32'"),
    "upstream not finished": (
        "harvest {recipe} --out {new}",
        r"harvest.tokens = '{new}/corpus' holds no finished output; run the stage that writes it first",
    ),
    "upstream of another stage": (
        "harvest {recipe} --out {new} --set tokens={out}/sae",
        r"{out}/sae was written by train; give the output of corpus",
    ),
    "settings differ": (
        RUN + " --set harvest.store_dtype=float32",
        r"{out}/activations holds the output of another configuration of harvest: store_dtype \(\"bfloat16\" there, "
        r"\"float32\" now\); --force replaces it, another --out keeps both",
    ),
    "too few held-out tokens": (
        RUN + " --set evaluate.max_tokens=31 --force",
        r"40 held-out windows, and evaluate.max_tokens = 31 admits none of 32 tokens; raise",
    ),
    "nothing to evaluate on": (
        "evaluate --out {out} --set sae={out}/sae",
        r"evaluate needs either evaluate.model and evaluate.tokens, or the evaluate.store of a toy; set one of the two",
    ),
    "tap of another width": (
        "evaluate {recipe} --out {out} --set tap=blocks.2.attn_z3 --force",
        r"no tap 'blocks.2.attn_z3'; near ones are blocks.2.attn_z",
    ),
    "no examples": (RUN + " --set cache.examples_per_feature=0", r"cache.examples_per_feature = 0: .*or equal to 1"),
    "unknown runner": (
        RUN + " --set cache.runner=Beamer --set cache.nearest=2 --force",
        r"runner = 'Beamer' .* is not one of Apache Beam's .*; see 'Runners'",
    ),
    "too many features": (RUN + " --set view.features=5000", r"view.features = 5000: .*less than or equal to 2000"),
    "port out of range": (RUN + " --set view.port=99999", r"view.port = 99999: .*less than or equal to 65535"),
    "toy fires too much": (
        "toy --out {new} --set active=300",
        r"active = 300 is above \d+.*128 latents.*; 'saex-pipe con",
    ),
    "toy rows": ("toy --out {new} --set rows=100", r"rows = 100 is not a multiple of window_length = 128; "),
    "folder at a strange place": (
        "toy --out ftp://x",
        r"'ftp://x.*a folder cannot be at ftp://; use a local path, gs://",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_arguments(case, place, capsys):
    command, line = COMMANDS[case]
    names = {name: str(value) for name, value in vars(place).items()}
    before = files(place.tmp)
    status, found = failing([part.format(**names) for part in command.split(" ")], capsys)
    assert re.search(line.format(**{name: re.escape(value) for name, value in names.items()}), found), found
    assert status == 2
    assert files(place.tmp) == before


GOOD = "".join(json.dumps({"text": text}) + "\n" for text in tiny_run.texts(4)).encode()


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


TEXTS = {  # name of the file: (its bytes, the line)
    "notes.doc": (
        b"a",
        r"corpus.source '.*notes.doc' has no known ending; use .txt, .jsonl, .parquet, each alone or with",
    ),
    "cut.jsonl.gz": (
        gzip.compress(GOOD)[:-20],
        r"cut.jsonl.gz cannot be read \(Truncated compressed stream\); check that the file is whole",
    ),
    "cut.jsonl.zst": (
        zstandard.compress(GOOD)[:-20],
        r"cut.jsonl.zst cannot be read \(.*\); check that the file is whole",
    ),
    "plain.jsonl.gz": (GOOD, r"plain.jsonl.gz cannot be read \(.*incorrect header.*\); check that"),
    "plain.jsonl.zst": (GOOD, r"plain.jsonl.zst cannot be read \(.*\); check that"),
    "cut.parquet": (parquet(text=["a", "b"])[:-9], r"cut.parquet cannot be read \(.*\); check that"),
    "text.parquet": (b"just text", r"text.parquet cannot be read \(.*\); check that"),
    "other.parquet": (
        parquet(body=["a"]),
        r"other.parquet has no column 'text'; set corpus.text_field; its columns are body",
    ),
    "numbers.parquet": (parquet(text=[1, 2]), r"numbers.parquet: row 1: 'text' gives no text: it holds int, "),
    "line3.jsonl": (
        b'{"text": "a"}\n{"text": "b"}\n{"text": c}\n',
        r"line3.jsonl: line 3 is not JSON; give one JSON object",
    ),
    "field.jsonl": (
        b'{"text": "a"}\n{"body": "b"}\n',
        r"field.jsonl: line 2 has no text in field 'text'; set corpus.text",
    ),
    "list.jsonl": (b'["a"]\n', r"list.jsonl: line 1 has no text in field 'text'; set"),
    "latin.txt": ("caf\xe9".encode("latin-1"), r"latin.txt cannot be read \('utf-8' codec.*\); check that"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', r"latin.jsonl.* (cannot be read|is not JSON).*; "),
    "empty.jsonl": (
        b"",
        r"corpus.source = \['.*empty.jsonl'\] holds no text; give at least one document that is not empty",
    ),
    "blank.txt": (b"", r"blank.txt'\] holds no text; give"),
    "blanks.jsonl": (b'{"text": ""}\n' * 3, r"blanks.jsonl'\] holds no text; give"),
    "none.parquet": (parquet(text=pa.array([], pa.string())), r"none.parquet'\] holds no text; give"),
    "short.txt": (b"of the people", r"the text has \d+ tokens, which fill no window of 32; give more text"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name, place, capsys):
    data, line = TEXTS[name]
    source = place.write(name, data)
    before = files(place.tmp)
    status, found = failing(["corpus", place.recipe, "--out", place.new, "--set", f"source={source}"], capsys)
    assert re.search(line, found), found
    assert status == 2
    assert files(place.tmp) == before
    # Nothing of it is in the way of the run with the right text.
    main(["corpus", str(place.recipe), "--out", str(place.new)])


def test_every_kind_of_text_gives_the_same_store(place):
    text = tiny_run.texts(1, words=900)[0]
    kinds = {".txt": text.encode(), ".jsonl": json.dumps({"text": text}).encode(), ".parquet": parquet(text=[text])}
    packings = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    found = {}
    for kind, data in kinds.items():
        for ending, pack in packings.items():
            source, out = place.write(f"text{kind}{ending}", pack(data)), place.tmp / f"out{kind}{ending}"
            settings = ["--set", f"source={source}", "--set", "holdout_fraction=0"]
            main(["corpus", str(place.recipe), "--out", str(out), *settings])
            store = TokenStore(f"{out}/corpus")
            windows = range(store.info.windows)
            found[kind + ending] = (store.tokens(windows).tobytes(), store.documents(windows).tobytes())
    assert len(found) == 9
    assert len({*found.values()}) == 1
    assert len(found[".txt"][0]) > 32 * 4 * 20


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def in_the_way(path):
    path.write_text("a file")


HARVEST = "harvest {recipe} --out {new} --set tokens={out}/corpus"
TRAIN = "train {recipe} --out {new} --set store={out}/activations"
DAMAGE = {  # id: (what is done, the command line, exit status, the line)
    "recipe with broken TOML": (
        lambda p: p.recipe.write_text("[train]\nk = = 4\n"),
        RUN,
        2,
        r"{recipe} is not TOML \(.*line 2.*\); mend that line",
    ),
    "recipe with an unknown table": (
        lambda p: p.recipe.write_text("[train]\nk = 4\n[trane]\n"),
        RUN,
        2,
        r"recipe tiny has a key 'trane'; .*title, stages, and tables corpus",
    ),
    "recipe with a value for a table": (
        lambda p: p.recipe.write_text("train = 4\n"),
        RUN,
        2,
        r"recipe tiny: train = 4 is no table; write \[train\] and its settings below",
    ),
    "recipe with stages that are no list": (
        lambda p: p.recipe.write_text("stages = 4\n"),
        RUN,
        2,
        r"recipe tiny: stages = 4 are none; list some of corpus, toy",
    ),
    "recipe without stages": (
        lambda p: p.recipe.write_text("title = 'x'\n"),
        RUN,
        2,
        r"recipe tiny: stages = \[\] are none; list some of corpus, toy",
    ),
    "recipe that is not text": (lambda p: p.recipe.write_bytes(b"\xff\xfe\x00"), RUN, 2, r"is not a text file; give"),
    "recipe that is a folder": (
        lambda p: (p.recipe.unlink(), p.recipe.mkdir()),
        RUN,
        2,
        r"tiny.toml cannot be read \(Is a directory\); give a TOML file",
    ),
    "truncated safetensors": (
        lambda p: cut(p.model / "model.safetensors", 5000),
        HARVEST,
        2,
        r"model.safetensors.*; ",
    ),
    "empty safetensors": (lambda p: cut(p.model / "model.safetensors", 0), HARVEST, 2, r"model.safetensors.*; "),
    "safetensors that is none": (
        lambda p: (p.model / "model.safetensors").write_bytes(b"x" * 100),
        HARVEST,
        2,
        r"model.safetensors.*; ",
    ),
    "model without weights": (
        lambda p: (p.model / "model.safetensors").unlink(),
        HARVEST,
        2,
        r"model holds neither .*; ",
    ),
    "model configuration not JSON": (
        lambda p: (p.model / "config.json").write_text("{{"),
        HARVEST,
        2,
        r"config.json.*; ",
    ),
    "truncated GGUF": (
        lambda p: p.write("m.gguf", b"GGUF\x03\0\0\0" + b"\x09" * 20),
        HARVEST + " --set model={tmp}/m.gguf",
        2,
        r"m.gguf is truncated or damaged.*; ",
    ),
    "empty GGUF": (lambda p: p.write("m.gguf", b""), HARVEST + " --set model={tmp}/m.gguf", 2, r"m.gguf .*; "),
    "GGUF that is none": (
        lambda p: p.write("m.gguf", b"PK\x03\x04" * 9),
        HARVEST + " --set model={tmp}/m.gguf",
        2,
        r"m.gguf is not a GGUF file: .*; ",
    ),
    "model with a smaller vocabulary": (
        lambda p: tiny_run.write_model(p.tmp / "small", vocabulary=300),
        HARVEST + " --set model={tmp}/small",
        2,
        r"the tokenizer's largest id \d+ does not fit the model's 300 embeddings; use the model's own tokenizer",
    ),
    "window above the model's context": (
        lambda p: main(["corpus", str(p.recipe), "--out", str(p.new), "--set", "window_length=129"]),
        "harvest {recipe} --out {new}",
        2,
        r"window length 129 is above the 128 positions of the model; use windows of at most 128 tokens",
    ),
    "tokenizer that is none": (
        lambda p: (p.model / "tokenizer.json").write_text("{{}}"),
        "corpus {recipe} --out {new}",
        2,
        r"tokenizer.json.*; ",
    ),
    "manifest not JSON": (
        lambda p: (p.out / "corpus/manifest.json").write_text("{{"),
        RUN,
        2,
        r"{out}/corpus/manifest.json is not a manifest of this version of saex-pipe; delete the folder",
    ),
    "store of another schema version": (
        lambda p: p.edit_json("activations/manifest.json", schema_version=7),
        TRAIN,
        2,
        r"{out}/activations has schema version 7, this version of saex-pipe reads 2; run 'saex-pipe harvest' again",
    ),
    "store that lacks a shard": (
        lambda p: (p.out / f"activations/acts/{tiny_run.TAP}/c/3/0/0").unlink(),
        TRAIN,
        1,
        r"lacks the shard with windows \d+ to \d+; 'saex-pipe store repair {out}/activations' makes it again",
    ),
    "store with a flipped bit": (
        lambda p: flip(p.out / f"activations/acts/{tiny_run.TAP}/c/3/0/0"),
        TRAIN,
        1,
        r"activations/acts/{tap}, windows \d+ to \d+: damaged: its checksum does not fit; 'saex-pipe store repair",
    ),
    "store without its index": (
        lambda p: (p.out / "activations/index/rows.npy").unlink(),
        TRAIN,
        1,
        r"activations/index/rows.npy is missing; 'saex-pipe store repair' makes it again",
    ),
    "damaged ledger entry": (
        lambda p: ((p.out / "activations/manifest.json").unlink(), cut(p.out / "activations/ledger/000002.json", 20)),
        "harvest {recipe} --out {out}",
        1,
        r"activations/ledger/000002.json is damaged; delete this one file and run the same command again",
    ),
    "damaged started.json": (
        lambda p: ((p.out / "activations/manifest.json").unlink(), cut(p.out / "activations/started.json", 20)),
        "harvest {recipe} --out {out}",
        2,
        r"activations/started.json is not of this version of saex-pipe; delete the folder and run its stage again",
    ),
    "SAE with damaged weights": (
        lambda p: cut(p.out / "sae/sae_weights.safetensors", 900),
        "evaluate {recipe} --out {out} --force --set batch_windows=2",
        2,
        r"{out}/sae holds a damaged SAE \(.*\); write or fetch it again",
    ),
    "SAE without weights": (
        lambda p: (p.out / "sae/sae_weights.safetensors").unlink(),
        "evaluate {recipe} --out {out} --force --set batch_windows=2",
        2,
        r"{out}/sae has no sae_weights.safetensors; ",
    ),
    "scores that are not JSON": (
        lambda p: (p.out / "scores/scores.json").write_text("?"),
        "view {recipe} --out {out} --force --set features=3",
        2,
        r"{out}/scores/scores.json does not hold scores; ",
    ),
    "cache that is not Parquet": (
        lambda p: cut(p.out / "cache/features.parquet", 100),
        "view {recipe} --out {out} --force --set features=3",
        2,
        r"features.parquet.*; ",
    ),
    "foreign folder": (
        lambda p: (p.new.mkdir(), (p.new / "corpus").mkdir(), (p.new / "corpus/thesis.tex").write_text("x")),
        "corpus {recipe} --out {new}",
        2,
        r"{new}/corpus holds files that are not a stage's output; choose another --out or empty it",
    ),
    "file in the way": (
        lambda p: in_the_way(p.new),
        "corpus {recipe} --out {new}",
        2,
        r"{new}.* a file is in (the|its) way; ",
    ),
    "file in the way of a stage": (
        lambda p: (p.new.mkdir(), in_the_way(p.new / "corpus")),
        "corpus {recipe} --out {new}",
        2,
        r"{new}/corpus.* a file is in (the|its) way; ",
    ),
    "nothing held out": (
        lambda p: main(
            ["run", str(p.recipe), "--out", str(p.new), "--only", "corpus", "--set", "corpus.holdout_fraction=0"]
        ),
        "evaluate {recipe} --out {new} --set sae={out}/sae",
        2,
        r"{new}/corpus has 0 held-out windows.*; raise corpus.holdout_fraction",
    ),
    "tap that the model has not": (
        lambda p: None,
        "evaluate {recipe} --out {out} --force --set tap=blocks.7.resid_pre",
        2,
        r"no tap 'blocks.7.resid_pre': its blocks are 0 to 2; ",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case, place, capsys):
    damage, command, expected, line = DAMAGE[case]
    damage(place)
    names = {name: str(value) for name, value in vars(place).items()} | {"tap": tiny_run.TAP}
    before = files(place.tmp)
    status, found = failing([part.format(**names) for part in command.split(" ")], capsys)
    assert re.search(line.format(**{name: re.escape(value) for name, value in names.items()}), found), found
    assert status == expected
    assert untouched(files(place.tmp)) == untouched(before)


def untouched(stamps):
    """Without the files that a stage writes again, the same, when it goes on."""
    return {path: when for path, when in stamps.items() if not path.endswith(("started.json", "zarr.json"))}


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of its own, and a way to give it another size or to make it read-only."""
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield where, lambda option: subprocess.run(["mount", "-o", f"remount,{option}", where], check=True)
    subprocess.run(["umount", "--lazy", where], check=True)


@pytest.mark.parametrize(
    ("stage", "kilobytes"), [("corpus", 24), ("harvest", 100), ("train", 80), ("train", 200), ("cache", 12)]
)
def test_a_full_disk(stage, kilobytes, place, tiny_disk):
    out, remount = tiny_disk
    folder = {"corpus": "corpus", "harvest": "activations", "train": "sae", "cache": "cache"}[stage]
    for done in ("corpus", "activations", "sae", "scores"):
        if done == folder:
            break
        (out / done).symlink_to(place.out / done)
    remount(f"size={kilobytes}k")
    command = [stage, place.recipe, "--out", out, "--set", "checkpoint_every_steps=5"][: 6 if stage == "train" else 4]
    before = files(place.tmp)
    # In a process of its own, with which all that Orbax leaves behind of a failed save ends, too.
    # On as many devices as here: what goes on with another number of them is the same to float error only.
    devices = (
        f"import jax; jax.config.update('jax_num_cpu_devices', {jax.device_count()}); "
        "from saex_pipe.stages.train import devices; devices.available = lambda: jax.devices()[:1]; "
    )
    done = apart(devices + "from saex_pipe.pipelines.cli import main; main()", *command)
    if kilobytes == 200:  # it had come so far that the next one goes on with it
        assert [path.name for path in (out / folder / "state").iterdir() if path.name.isdigit()]
    assert re.fullmatch(
        rf"saex-pipe: {out}/{folder}.*: the disk is full; free some space and run the same command again\n", done.stderr
    ), done.stderr
    assert done.returncode == 2
    finished = {path: when for path, when in files(out).items() if "/ledger/" in path}
    remount("size=4m")
    main([str(argument) for argument in command])
    assert files(place.tmp) == before
    assert {path: files(out)[path] for path in finished} == finished
    for name in {
        "corpus": ["tokens/c/0/0"],
        "harvest": ["keep/c/6/0"],
        "train": ["sae_weights.safetensors"],
        "cache": [],
    }[stage]:
        assert (out / folder / name).read_bytes() == (place.out / folder / name).read_bytes()


@pytest.mark.parametrize("command", ["toy --out {disk}", "corpus {recipe} --out {disk}/a/b"])
def test_no_permission_to_write(command, place, tiny_disk, capsys):
    disk, remount = tiny_disk
    remount("ro")
    status, line = failing(command.format(disk=disk, recipe=place.recipe).split(), capsys)
    assert re.search(
        rf"^{disk}.* could not be (written|created).*: no permission; change its rights or choose another", line
    ), line
    assert status == 2


def test_a_file_that_may_not_grow(place):
    """The limit on file sizes stands in for a full disk where nothing can be mounted."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    script = limit + "from saex_pipe.pipelines.cli import main; main()"
    # Without the suite's folder of compiled programs, to which the limit applies, too.
    without = "import os; os.environ.pop('JAX_COMPILATION_CACHE_DIR', None); "
    done = apart(without + script, "harvest", place.recipe, "--out", place.out, "--force", "--set", "drop_positions=1")
    assert done.returncode == 2
    assert re.fullmatch(
        r"saex-pipe: .*\.activations\.saex-new/.*files may not grow that large here; raise the limit.*\n", done.stderr
    ), done
