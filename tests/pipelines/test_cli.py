"""The command line: help, recipes, settings, status, choosing stages, exit statuses, and how little it imports."""

import errno
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny_run

from saex_pipe.common.config import Upstream, field_extra
from saex_pipe.pipelines import chain
from saex_pipe.pipelines.cli import main

COMMANDS = ("run", "recipes", "status", "config", *chain.STAGES)
HEAVY = ("jax", "apache_beam", "transformers", "orbax")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_run.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def out(recipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "out"
    main(["run", str(recipe), "--out", str(place)])
    return place


def fails(*arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


def fresh(*arguments, modules):
    """Run in a process of its own; which of ``modules`` it imported, and what it printed."""
    script = (
        "import json, sys\n"
        "from saex_pipe.pipelines.cli import main\n"
        f"main({[str(argument) for argument in arguments]})\n"
        f"print(json.dumps([name for name in {modules} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    return json.loads(last), printed


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
def test_help(command, capsys):
    main([*command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Usage: {' '.join(('saex-pipe', *command))} " in shown
    if not command:
        assert all(f" {name} " in shown for name in COMMANDS)
    if command and command[0] in chain.STAGES:
        assert all(option in shown for option in ("--set", "--out", "--force"))


def test_recipes_are_listed_and_printed(capsys):
    main(["recipes"])
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == chain.recipe_names()
    main(["recipes", "quickstart"])
    table = tomllib.loads(capsys.readouterr().out)
    assert table["title"] in listed
    assert table["stages"] == ["corpus", "harvest", "train", "evaluate", "cache", "view"]


@pytest.mark.parametrize("stage", chain.STAGES)
def test_every_setting_is_explained(stage, capsys):
    main(["config", stage])
    lines = capsys.readouterr().out.splitlines()
    config = chain.config_class(stage)
    for name, field in config.model_fields.items():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        filled = name == "out" or name in config.marked(Upstream)
        default = "from the chain" if filled else "required"
        default = default if field.is_required() else "none" if field.default is None else json.dumps(field.default)
        assert lines[at].startswith(f"{name} = {default}  ("), lines[at]
        assert field_extra(config, name)["unit"] in lines[at]
        assert len(lines[at + 1].strip()) > 10, f"{stage}.{name} is not explained"
    assert len(lines) == 2 + 2 * len(config.model_fields)
    assert not any(word in line for line in lines for word in ("``", "Literal", "ge=", "NoneType"))


def test_limits_and_choices_are_in_words(capsys):
    main(["config", "train"])
    shown = capsys.readouterr().out
    assert "rows = required  (int, rows, at least 1)" in shown
    assert 'weight_dtype = "float32"  (float32 or bfloat16)' in shown
    assert "k = none  (int or none, active latents per row, at least 1)" in shown
    main(["config", "corpus"])
    assert "at least 0, below 1)" in capsys.readouterr().out


def test_status(recipe, out, tmp_path, capsys):
    main(["status", str(out)])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()[1:]]
    stages = [stage for stage in chain.STAGES if stage not in ("toy", "tune")]
    assert [row[1:3] for row in rows] == [[stage, "finished"] for stage in stages]
    digest = json.loads((out / "sae" / "manifest.json").read_bytes())["digest"]
    assert digest[:8] in shown
    assert "…" not in shown
    main(["status", str(out / "sae")])
    shown = capsys.readouterr().out
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [["sae", "train", "finished"]]
    begun = tmp_path / "activations"
    (begun / "ledger").mkdir(parents=True)
    (begun / "started.json").write_text('{"stage": "harvest"}')
    (begun / "ledger" / "000000.json").write_text("{}")
    main(["status", str(tmp_path)])
    assert "activations harvest unfinished 1 shards done" in " ".join(capsys.readouterr().out.split())
    assert fails("status", tmp_path / "nothing") == 2


def test_from_and_only_run_what_they_name(recipe, out, capsys):
    capsys.readouterr()
    for option, stages in ((("--only", "train"), ["train"]), (("--from", "evaluate"), ["evaluate", "cache", "view"])):
        main(["run", str(recipe), "--out", str(out), *option])
        done = [line for line in capsys.readouterr().out.splitlines() if ": up to date (" in line]
        assert [line.partition(":")[0] for line in done] == stages


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("corpus", "max_tokens", 3200),
        ("harvest", "store_dtype", "float32"),
        ("train", "rows", 512),
        ("evaluate", "max_tokens", 64),
        ("cache", "examples_per_feature", 1),
        ("view", "features", 3),
        ("toy", "rows", 256),
    ],
)
def test_a_stage_alone_with_a_setting(stage, key, value, recipe, out, tmp_path):
    config = chain.config_class(stage)
    (tmp_path / "out").mkdir()
    for folder in ("corpus", "activations", "sae", "scores", "cache"):
        if folder != config.folder:
            (tmp_path / "out" / folder).symlink_to(out / folder)
    main([stage, str(recipe), "--set", f"{key}={value}", "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out" / config.folder / "manifest.json").read_bytes())
    assert manifest["stage"] == stage
    assert manifest["config"][key] == value


def test_debug_shows_the_traceback_before_the_line(capsys):
    assert fails("--debug", "config", "trian") == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert before[0] == "Traceback (most recent call last):"
    assert line.startswith("saex-pipe: there is no stage 'trian'")


def test_an_unexpected_error_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(chain, "recipe_names", lambda: 1 // 0)
    assert fails("recipes") == 1
    line = "saex-pipe: unexpected ZeroDivisionError: integer division or modulo by zero; "
    line += "'saex-pipe --debug COMMAND ...' shows where\n"
    assert capsys.readouterr().err == line


def test_from_and_only_together_are_refused(recipe, out, capsys):
    assert fails("run", recipe, "--out", out, "--from", "train", "--only", "view") == 2
    assert "--from train and --only view contradict each other; give one" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_bad_input(code, monkeypatch, capsys):
    def full():
        raise OSError(code, os.strerror(code), "x")

    monkeypatch.setattr(chain, "recipe_names", full)
    assert fails("recipes") == 2
    assert capsys.readouterr().err.startswith("saex-pipe: x: ")


def test_help_imports_nothing_heavy():
    found, printed = fresh("--help", modules=[*HEAVY, "tensorstore", "pyarrow", "numpy"])
    assert found == []
    assert any("Usage: saex-pipe" in line for line in printed)


def test_a_run_that_is_up_to_date_imports_nothing_heavy(recipe, out):
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    found, printed = fresh("run", recipe, "--out", out, modules=[*HEAVY, "tensorstore"])
    assert found == ["tensorstore"]
    assert sum(": up to date (" in line for line in printed) == 6
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == before


def test_a_served_page_is_served_although_it_is_up_to_date(recipe, out, monkeypatch):
    from saex_pipe.stages.view import run

    served = []
    monkeypatch.setattr(run, "serve", lambda cache, index, port: served.append(port))
    main(["view", str(recipe), "--out", str(out), "--set", "serve=true", "--set", "port=0"])
    assert served == [0]
