"""The house rules, read from the source: floors, islands, doors, packaging, the map of files, sizes.

Each rule is a function from sources to a list of complaints, so that the rules themselves are tested on samples
that they must refuse.
"""

import ast
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ("common", "stages", "pipelines")
ISLANDS = ("formats", "llm", "sae")

Sources = Mapping[str, str]  # path from the root of the repository to content


class Door(NamedTuple):
    """Where a heavy dependency may be imported."""

    modules: tuple[str, ...]
    pattern: str  # of the paths that may
    place: str


PLOTTING = ("matplotlib", "plotly", "altair", "bokeh", "seaborn")
WEB = ("http.server", "flask", "fastapi", "starlette", "uvicorn", "aiohttp")
DOORS = (
    Door(("gguf",), r"common/llm/gguf\.py", "common/llm/gguf.py"),
    Door(("transformers",), r"common/llm/.*", "common/llm"),
    Door(("jinja2",), r"common/llm/chat_template\.py", "common/llm/chat_template.py"),
    Door(("tensorstore", "zarr"), r"common/formats/.*", "common/formats"),
    Door(("apache_beam",), r".*/beam\.py", "files named beam.py"),
    Door(("qwix",), r"common/sae/int8\.py", "common/sae/int8.py"),
    Door(("typer",), r"pipelines/.*", "pipelines"),
    Door(PLOTTING, r".*/report\.py", "files named report.py"),
    Door(("tensorboardX", "wandb"), r"common/metrics_sinks\.py", "common/metrics_sinks.py"),
    Door(WEB, r"stages/view/.*", "stages/view"),
    Door(("torch",), r"(?!)", "tests and infra"),
)

MOST_LINES = 350
LONG_FOR_A_REASON: dict[str, str] = {}  # path to why it is one file all the same


def python_sources(*folders: str) -> dict[str, str]:
    """Path and text of every Python file below ``folders``."""
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in files(*folders) if path.endswith(".py")}


def files(*folders: str) -> list[str]:
    """Every file below ``folders``, except what tools leave behind; links are not followed."""
    found = []
    for folder in folders:
        for place, inner, names in os.walk(ROOT / folder):
            inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
            found += [(Path(place) / name).relative_to(ROOT).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


class Import(NamedTuple):
    """One imported name: ``from a import b`` is a, a.b; which of them is a module is not known here."""

    line: int
    names: tuple[str, ...]
    level: int  # number of leading dots


def imports(source: str) -> Iterator[Import]:
    """Every import in ``source``, in functions and under TYPE_CHECKING too, and ``import_module("...")``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, (alias.name,), 0)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                base = node.module or ""
                yield Import(node.lineno, (base, f"{base}.{alias.name}"), node.level)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.lineno, (node.args[0].value,), 0)


def module_of(path: str) -> str:
    """``common/formats/tokens.py`` to ``saex_pipe.common.formats.tokens``."""
    return "saex_pipe." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def own_imports(sources: Sources) -> Iterator[tuple[str, int, str]]:
    """Path, line and imported module of every import of one of our modules."""
    modules = {module_of(path) for path in sources}
    for path, source in sources.items():
        for found in imports(source):
            known = [name for name in found.names if name in modules]
            if known:
                yield path, found.line, known[-1]
            elif found.names[0].startswith("saex_pipe."):
                yield path, found.line, found.names[0]


# ---- the rules


def room(module: str) -> tuple[int, str]:
    """Floor (0 is the ground) and, for islands, the island's name."""
    parts = [*module.split("."), "", ""][1:]
    if parts[0] == "common":
        return (1, parts[1]) if parts[1] in ISLANDS else (0, "")
    return (2, parts[1]) if parts[0] == "stages" else (3, "")


def check_floors(sources: Sources) -> list[str]:
    """An import may point down or stay in its room."""
    complaints = []
    for path, line, module in own_imports(sources):
        here, there = room(module_of(path)), room(module)
        if there[0] > here[0]:
            complaints.append(f"{path}:{line} imports {module} from a floor above")
        elif there[0] == here[0] and there[1] != here[1]:
            complaints.append(f"{path}:{line} imports {module} from another island")
    return complaints


def check_cycles(sources: Sources) -> list[str]:
    """No module imports itself through others."""
    graph: dict[str, set[str]] = {module_of(path): set() for path in sources}
    for path, _, module in own_imports(sources):
        if module in graph:
            graph[module_of(path)].add(module)
    done: set[str] = set()
    complaints = []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            complaints.append("cycle: " + " -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return complaints


def check_doors(sources: Sources) -> list[str]:
    """One door per heavy dependency."""
    complaints = []
    for path, source in sources.items():
        for found in imports(source):
            for door in DOORS:
                through = [m for m in door.modules for name in found.names if name == m or name.startswith(f"{m}.")]
                if through and not found.level and not re.fullmatch(door.pattern, path):
                    complaints.append(f"{path}:{found.line} imports {through[0]}, which is for {door.place} alone")
    return complaints


def check_absolute(sources: Sources) -> list[str]:
    """Our modules are imported as saex_pipe.x.y."""
    complaints = []
    for path, source in sources.items():
        for found in imports(source):
            if found.level or found.names[0].split(".")[0] in HOUSE:
                name = "." * found.level + found.names[0]
                complaints.append(f"{path}:{found.line} imports {name}: write saex_pipe. and the full name")
    return complaints


def check_packages(sources: Sources, pyproject: str) -> list[str]:
    """Every folder of ours with Python files is a package and is listed in pyproject.toml."""
    listed = tomllib.loads(pyproject)["tool"]["setuptools"]["packages"]
    present = {"saex_pipe." + os.path.dirname(path).replace("/", ".") for path in sources}
    return [
        *(f"{name} is missing from [tool.setuptools] packages" for name in sorted(present - set(listed))),
        *(f"[tool.setuptools] packages lists {name}, which has no Python files" for name in set(listed) - present),
        *(f"[tool.setuptools] packages lists {name} twice" for name in {n for n in listed if listed.count(n) > 1}),
        *(
            f"{folder} has no __init__.py"
            for folder in sorted({os.path.dirname(path) for path in sources})
            if f"{folder}/__init__.py" not in sources
        ),
    ]


def check_map(paths: list[str], readme: str) -> list[str]:
    """README.md has a table row ``| `path` | what it is |`` for every file, and for nothing else."""
    rows = re.findall(r"^\| *`((?:common|stages|pipelines)/[^`]*)` *\|(.*)$", readme, flags=re.MULTILINE)
    listed = [path for path, _ in rows]
    return [
        *(f"README.md does not list {path}" for path in paths if path not in listed),
        *(f"README.md lists {path}, which does not exist" for path in listed if path not in paths),
        *(f"README.md lists {path} twice" for path in sorted({p for p in listed if listed.count(p) > 1})),
        *(f"README.md does not say what {path} is" for path, meaning in rows if not meaning.strip("| ")),
    ]


def check_sizes(sources: Sources, reasons: Mapping[str, str]) -> list[str]:
    """A file is short enough to be read at a sitting, or says why it is not."""
    lines = {path: source.count("\n") for path, source in sources.items()}
    return [
        *(
            f"{path} has {count} lines, the limit is {MOST_LINES}: split it or give a reason in LONG_FOR_A_REASON"
            for path, count in lines.items()
            if count > MOST_LINES and not reasons.get(path)
        ),
        *(f"{path} needs no reason for its length any more" for path in reasons if lines.get(path, 0) <= MOST_LINES),
    ]


# ---- the house keeps them


def test_the_house_is_found():
    assert {"common/config.py", "common/formats/__init__.py", "pipelines/recipes/__init__.py"} <= set(
        python_sources(*HOUSE)
    )


@pytest.mark.parametrize("rule", [check_floors, check_cycles, check_doors], ids=lambda rule: rule.__name__)
def test_imports(rule):
    assert rule(python_sources(*HOUSE)) == []


def test_imports_are_absolute_everywhere():
    assert check_absolute(python_sources(*HOUSE, "infra", "tests")) == []


def test_the_package_list_is_complete():
    assert check_packages(python_sources(*HOUSE), (ROOT / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_the_readme_maps_every_file():
    mapped = [path for path in files(*HOUSE) if not path.endswith("/__init__.py") or (ROOT / path).stat().st_size]
    assert check_map(mapped, (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_files_are_short():
    assert check_sizes(python_sources(*HOUSE, "infra"), LONG_FOR_A_REASON) == []


# ---- the rules refuse what they are for

GOOD = {
    **{f"{folder}/__init__.py": "" for folder in ("common", "common/sae", "stages", "stages/view")},
    "common/config.py": "import json",
    "common/mesh.py": "from saex_pipe.common import config",
    "common/llm/gguf.py": "import gguf\nfrom saex_pipe.common.config import Config",
    "common/llm/load.py": "import transformers\nfrom saex_pipe.common.llm.gguf import read",
    "common/formats/tokens.py": "import tensorstore as ts\nimport zarr.codecs",
    "common/sae/topk.py": "import http\nfrom http import HTTPStatus\nimport torchvision_free",
    "stages/corpus/beam.py": "import apache_beam as beam\nfrom saex_pipe.common.formats import tokens",
    "stages/train/run.py": "from saex_pipe.stages.train.config import Config\nfrom saex_pipe.common.sae import topk",
    "stages/train/config.py": "from saex_pipe.common.config import StageConfig",
    "stages/train/report.py": "import matplotlib.pyplot as plt",
    "stages/view/run.py": "import http.server\nfrom http import server",
    "pipelines/cli.py": "import typer\nfrom saex_pipe.stages.train import run",
}


@pytest.mark.parametrize("rule", [check_floors, check_cycles, check_doors, check_absolute])
def test_a_good_house_is_accepted(rule):
    assert rule(GOOD) == []


@pytest.mark.parametrize(
    ("rule", "path", "source", "complaint"),
    [
        (
            check_floors,
            "common/config.py",
            "from saex_pipe.common.sae import topk",
            "saex_pipe.common.sae.topk from a fl",
        ),
        (check_floors, "common/config.py", "import saex_pipe.stages.train.run", "stages.train.run from a floor above"),
        (
            check_floors,
            "common/sae/topk.py",
            "def f():\n    from saex_pipe.pipelines import cli",
            ":2 imports saex_pipe.pi",
        ),
        (check_floors, "stages/train/run.py", "from saex_pipe.pipelines.cli import app", "from a floor above"),
        (check_floors, "common/sae/topk.py", "from saex_pipe.common.llm.load import x", "from another island"),
        (
            check_floors,
            "common/formats/tokens.py",
            "from saex_pipe.common import sae",
            "saex_pipe.common.sae from another",
        ),
        (check_floors, "stages/train/run.py", "from saex_pipe.stages.corpus.beam import x", "from another island"),
        (check_floors, "stages/train/run.py", "from saex_pipe.stages import view", "from another island"),
        (check_floors, "stages/train/run.py", "import_module('saex_pipe.stages.view.run')", "from another island"),
        (check_floors, "stages/train/run.py", "importlib.import_module('saex_pipe.pipelines.cli')", "floor above"),
        (
            check_floors,
            "common/mesh.py",
            "if TYPE_CHECKING:\n    import saex_pipe.common.llm.load",
            "from a floor above",
        ),
        (
            check_cycles,
            "common/config.py",
            "from saex_pipe.common.mesh import x",
            "config -> saex_pipe.common.mesh -> ",
        ),
        (
            check_cycles,
            "common/config.py",
            "def f():\n    import saex_pipe.common.config",
            "config -> saex_pipe.common.con",
        ),
        (check_doors, "common/llm/load.py", "import gguf", "imports gguf, which is for common/llm/gguf.py alone"),
        (check_doors, "stages/harvest/run.py", "from transformers import AutoModel", "for common/llm alone"),
        (check_doors, "stages/train/run.py", "import tensorstore as ts", "for common/formats alone"),
        (check_doors, "common/shuffle.py", "def f():\n    from zarr.codecs import x", ":2 imports zarr, which is for"),
        (check_doors, "stages/corpus/run.py", "import apache_beam.io", "for files named beam.py alone"),
        (check_doors, "stages/corpus/run.py", "import typer", "for pipelines alone"),
        (check_doors, "stages/train/run.py", "import matplotlib.pyplot as plt", "for files named report.py alone"),
        (check_doors, "pipelines/cli.py", "from http import server", "imports http.server, which is for stages/view"),
        (check_doors, "pipelines/cli.py", "from http.server import HTTPServer", "for stages/view alone"),
        (
            check_doors,
            "common/llm/load.py",
            "import torch.nn as nn",
            "imports torch, which is for tests and infra alone",
        ),
        (check_doors, "common/llm/load.py", "importlib.import_module('torch')", "imports torch"),
        (check_absolute, "stages/train/run.py", "from .config import Config", "imports .config: write saex_pipe."),
        (check_absolute, "stages/train/run.py", "from . import config", "imports .: write saex_pipe."),
        (check_absolute, "tests/test_x.py", "import common.config", "imports common.config: write saex_pipe."),
        (check_absolute, "infra/bench/x.py", "from stages.train import run", "imports stages.train: write saex_pipe."),
    ],
)
def test_bad_imports_are_refused(rule, path, source, complaint):
    complaints = rule(GOOD | {path: source})
    assert complaints
    assert all(path in said or "cycle" in said for said in complaints)
    assert complaint in complaints[0]


PYPROJECT = '[tool.setuptools]\npackages = ["saex_pipe.common", "saex_pipe.stages.x"]\n'
PACKAGED = {"common/__init__.py": "", "common/a.py": "", "stages/x/__init__.py": ""}


@pytest.mark.parametrize(
    ("sources", "pyproject", "complaint"),
    [
        (PACKAGED | {"common/new/__init__.py": ""}, PYPROJECT, "saex_pipe.common.new is missing from"),
        ({"common/__init__.py": ""}, PYPROJECT, "lists saex_pipe.stages.x, which has no Python files"),
        ({"common/a.py": "", "stages/x/__init__.py": ""}, PYPROJECT, "common has no __init__.py"),
        (PACKAGED, PYPROJECT.replace("common", "stages.x"), "saex_pipe.common is missing from"),
        (
            PACKAGED,
            PYPROJECT.replace("[", '["saex_pipe.common", ').replace('["saex_pipe.common", tool', "[tool"),
            "twice",
        ),
    ],
)
def test_a_wrong_package_list_is_refused(sources, pyproject, complaint):
    assert check_packages(PACKAGED, PYPROJECT) == []
    assert complaint in check_packages(sources, pyproject)[0]


MAP = "| file | |\n|---|---|\n| `common/a.py` | one thing |\n| `stages/x/page.css` | another |\n"


@pytest.mark.parametrize(
    ("paths", "readme", "complaint"),
    [
        (["common/a.py", "stages/x/page.css", "stages/x/b.py"], MAP, "README.md does not list stages/x/b.py"),
        (["common/a.py"], MAP, "README.md lists stages/x/page.css, which does not exist"),
        (
            ["common/a.py", "stages/x/page.css"],
            MAP + "| `common/a.py` | again |\n",
            "README.md lists common/a.py twice",
        ),
        (["common/a.py", "stages/x/page.css"], MAP.replace("one thing", " "), "does not say what common/a.py is"),
    ],
)
def test_a_wrong_map_is_refused(paths, readme, complaint):
    assert check_map(["common/a.py", "stages/x/page.css"], MAP) == []
    assert check_map(paths, readme) == [complaint] or complaint in check_map(paths, readme)[0]


def test_long_files_are_refused():
    longest = "\n" * MOST_LINES
    assert check_sizes({"a.py": longest}, {}) == []
    assert check_sizes({"a.py": longest + "\n"}, {"a.py": "one table"}) == []
    assert "a.py has 351 lines, the limit is 350" in check_sizes({"a.py": longest + "\n"}, {})[0]
    assert check_sizes({"a.py": longest}, {"a.py": "one table"}) == ["a.py needs no reason for its length any more"]
