"""The chain: which stages a run has, their configurations, and the URIs that join them.

A stage that stands alone is a chain of one: the same recipe, the same wiring, the same ``run``.
"""

import difflib
import importlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from saex_pipe.common.config import (
    Resource,
    StageConfig,
    Upstream,
    canonical_digest,
    comma_list,
    parse_assignment,
    parse_value,
    takes_list,
)
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import Manifest, fingerprint
from saex_pipe.common.formats.stage_output import finished_output

# In the order in which they can run. The configuration is light to import; what runs it is not.
STAGES = ("corpus", "toy", "harvest", "train", "tune", "evaluate", "cache", "view")
SWEPT_STAGE = "train"  # whose settings may be lists, see ``sweep``
SWEEP = "sweep"  # folder of a run that holds one run an SAE
_ALONE = ("copy",)  # has settings, but no place in a chain
_RECIPES = files("saex_pipe.pipelines.recipes")


@dataclass(frozen=True)
class Recipe:
    """What a TOML file says: the stages of a chain and the settings of each."""

    name: str
    title: str
    stages: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    text: str


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _RECIPES.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one in the file ``name`` where it ends in .toml."""
    if name.endswith(".toml"):
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{name} cannot be read ({error.strerror})", "give a TOML file or the name of a recipe"
            ) from None
        except UnicodeDecodeError:
            raise InputError(f"{name} is not a text file", "give a TOML file or the name of a recipe") from None
        stem = path.stem
    else:
        if name not in recipe_names():
            near = difflib.get_close_matches(name, recipe_names(), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"there is no recipe {name!r}",
                f"{hint}recipes are {', '.join(recipe_names())}; a file must end in .toml",
            )
        text, stem = _RECIPES.joinpath(f"{name}.toml").read_text(encoding="utf-8"), name
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is not TOML ({error})", "mend that line") from None
    return _recipe(stem, table, text)


def _recipe(name: str, table: dict[str, Any], text: str) -> Recipe:
    settings = {key: value for key, value in table.items() if isinstance(value, dict)}
    for key in table:
        if key not in (*STAGES, "title", "stages"):
            raise InputError(
                f"recipe {name} has a key {key!r}", f"its keys are title, stages, and tables {', '.join(STAGES)}"
            )
        if key in STAGES and key not in settings:
            raise InputError(
                f"recipe {name}: {key} = {table[key]!r} is no table", f"write [{key}] and its settings below"
            )
    stages = table.get("stages", [stage for stage in STAGES if stage in settings])
    if not isinstance(stages, list) or not stages:
        raise InputError(f"recipe {name}: stages = {stages!r} are none", f"list some of {', '.join(STAGES)}")
    for stage in stages:
        require_stage(stage)
    return Recipe(name, str(table.get("title", "")), tuple(sorted(stages, key=STAGES.index)), settings, text)


def require_stage(stage: Any) -> str:
    """``stage`` itself; an InputError names the stages there are."""
    if stage not in STAGES:
        near = difflib.get_close_matches(str(stage), STAGES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"there is no stage {stage!r}", f"{hint}stages are {', '.join(STAGES)}")
    return stage


def _known(stage: str) -> str:
    return stage if stage in _ALONE else require_stage(stage)


def config_class(stage: str) -> type[StageConfig]:
    """The configuration class of a stage."""
    config: type[StageConfig] = importlib.import_module(f"saex_pipe.stages.{_known(stage)}.config").Config
    return config


def with_assignments(recipe: Recipe, assignments: Sequence[str], stage: str | None = None) -> Recipe:
    """``recipe`` with ``--set`` assignments applied: ``stage.key=value``, or ``key=value`` where ``stage`` is given."""
    settings = {name: dict(values) for name, values in recipe.settings.items()}
    for text in assignments:
        key, value = parse_assignment(text)
        head, dot, rest = key.partition(".")
        if dot:
            owner, key = require_stage(head), rest
        elif stage is not None:
            owner = stage
        else:
            raise InputError(f"--set {text!r} names no stage", "write stage.key=value, for instance train.k=64")
        cls = config_class(owner)
        settings.setdefault(owner, {})[key] = split_values(cls, key, comma_list(cls, key, value))
    return Recipe(recipe.name, recipe.title, recipe.stages, settings, recipe.text)


def split_values(cls: type[StageConfig], key: str, value: Any) -> Any:
    """``"16,32,64"`` of a setting of the train stage that takes one value, as a list of three: a sweep."""
    if cls.stage != SWEPT_STAGE or not isinstance(value, str) or takes_list(cls, key):
        return value
    parts = re.split(r",(?![^{]*})", value)  # not within braces, as in a glob of taps
    if key not in cls.model_fields or key in {"out", *cls.marked(Upstream), *cls.marked(Resource)} or len(parts) == 1:
        return value
    return [parse_value(part.strip()) for part in parts]


def configure(
    recipe: Recipe, stage: str, out: str, places: Mapping[str, str] | None = None, member: str = ""
) -> StageConfig:
    """The configuration of one stage of a run at ``out``.

    What the recipe leaves open is joined up: an input comes from the folder of the stage that writes it, under
    ``out`` unless ``places`` says otherwise; the tokenizer and the model to evaluate are those of the harvest.
    ``member`` is the name of one SAE of a sweep, whose results have folders of their own.
    """
    cls = config_class(stage)
    values = {"out": join(out, member_folder(stage, member)), **recipe.settings.get(stage, {})}
    for name in cls.marked(Upstream):
        field = cls.model_fields[name]
        mark = next(m for m in field.metadata if isinstance(m, Upstream))
        if field.is_required() or {*mark.only_with} & {*recipe.stages}:
            folder = _source(recipe, stage, mark.folder)
            here = f"{SWEEP}/{member}/{folder}" if member and _is_of_member(folder) else folder
            values.setdefault(name, (places or {}).get(folder, join(out, here)))
    model = recipe.settings.get("harvest", {}).get("model")
    if model is not None and stage == "corpus":
        values.setdefault("tokenizer", model)
    if model is not None and stage in ("tune", "evaluate"):
        values.setdefault("model", model)
    return cls.create(values)


def join(root: str, folder: str) -> str:
    """The URI of ``folder`` under ``root``."""
    return f"{root.rstrip('/')}/{folder}"


@dataclass(frozen=True)
class Finished:
    """One stage of a run after it is done."""

    config: StageConfig
    manifest: Manifest
    ran: bool  # False: it was up to date


def run_chain(
    recipe: Recipe, out: str, *, stages: Sequence[str], upstream: str | None = None, force: bool = False
) -> Iterator[Finished]:
    """Run ``stages`` of a recipe in order, each where its result is not there yet.

    A stage whose result stands under ``upstream`` is taken from there. Stages of the recipe that are not in
    ``stages`` are taken as they are.
    """
    places: dict[str, str] = {}
    for stage in recipe.stages:
        config = placed(recipe, stage, out, places, stages=stages, upstream=upstream)
        places[config.folder] = config.out
        if stage in stages:
            yield finish_stage(config, force=force)


def placed(
    recipe: Recipe,
    stage: str,
    out: str,
    places: Mapping[str, str],
    *,
    stages: Sequence[str],
    upstream: str | None = None,
    member: str = "",
) -> StageConfig:
    """The configuration of a stage where its result is or will be: at ``out``, or under ``upstream`` if it is there."""
    config = configure(recipe, stage, out, places, member)
    if upstream is not None and not is_up_to_date(config):
        elsewhere = config.model_copy(update={"out": join(upstream, member_folder(stage, member))})
        if is_up_to_date(elsewhere) or (stage not in stages and Manifest.read(Folder(config.out)) is None):
            config = elsewhere
    return config


def _source(recipe: Recipe, stage: str, folder: str) -> str:
    """The folder that ``stage`` reads where it asks for ``folder``: that of an earlier stage which stands for it."""
    earlier = [other for other in recipe.stages if STAGES.index(other) < STAGES.index(stage)]
    return next((config_class(other).folder for other in earlier if config_class(other).stands_for == folder), folder)


def _is_of_member(folder: str) -> bool:
    """Whether each SAE of a sweep has a ``folder`` of its own."""
    return any(config_class(stage).folder == folder for stage in STAGES[STAGES.index(SWEPT_STAGE) :])


def member_folder(stage: str, member: str) -> str:
    """The folder of a stage's result under the root of a run."""
    folder = config_class(stage).folder
    return f"{SWEEP}/{member}/{folder}" if member else folder


def finish_stage(config: StageConfig, *, force: bool) -> Finished:
    """Run the stage that ``config`` belongs to. What runs it is imported only where there is something to run."""
    found = finished_output(config)
    if found is not None and not config.runs_when_finished:
        return Finished(config, found, ran=False)
    run = importlib.import_module(f"saex_pipe.stages.{config.stage}.run").run
    return Finished(config, run(config, force=force), ran=found is None)


def finish_together(configs: Sequence[StageConfig], *, force: bool) -> Iterator[Finished]:
    """Train the SAEs of a sweep, those that are not there yet, together."""
    found = [finished_output(config) for config in configs]
    missing = [config for config, manifest in zip(configs, found, strict=True) if manifest is None]
    made: Iterator[Manifest] = iter(())
    if missing:
        made = iter(importlib.import_module("saex_pipe.stages.train.run").run_sweep(missing, force=force))
    for config, manifest in zip(configs, found, strict=True):
        yield Finished(config, manifest or next(made), ran=manifest is None)


def is_up_to_date(config: StageConfig) -> bool:
    """Whether ``config.out`` already holds the result of this very configuration."""
    manifest = Manifest.read(Folder(config.out))
    return manifest is not None and manifest.digest == canonical_digest(fingerprint(config))
