"""Sweeps: a setting of the train stage may be a list, and several lists are a grid. One SAE for each combination.

The SAEs of a sweep lie in folders of their own, ``sweep/k=16/sae``, ``sweep/k=16/scores``: each is what a run of its
settings alone would leave. They are trained together (``stages.train.run.run_sweep``).
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from saex_pipe.common.config import StageConfig, takes_list
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.pipelines import chain
from saex_pipe.pipelines.chain import SWEPT_STAGE as STAGE
from saex_pipe.pipelines.sweep_report import sweep_report

_MOST = 256  # SAEs; more are a slip of the comma
TABLE, PAGE = f"{chain.SWEEP}/sweep.json", f"{chain.SWEEP}/index.html"


class Member(NamedTuple):
    """One SAE of a sweep."""

    name: str  # "" where the recipe is no sweep
    settings: Mapping[str, Any]  # those that are swept
    recipe: chain.Recipe


def members(recipe: chain.Recipe) -> list[Member]:
    """The SAEs that a recipe asks for: one, unless settings of its train stage are lists.

    Raises:
        InputError: a list is empty or repeats a value, or the grid has too many points.
    """
    cls = chain.config_class(STAGE)
    settings = recipe.settings.get(STAGE, {})
    swept = {key: value for key, value in settings.items() if _is_list_of_values(cls, key, value)}
    for key, values in swept.items():
        if len({json.dumps(value) for value in values}) < max(len(values), 1):
            raise InputError(f"train.{key} = {values} is no list of different values", "give each value once")
    points = [dict(zip(swept, point, strict=True)) for point in itertools.product(*swept.values())]
    if len(points) > _MOST:
        raise InputError(f"the sweep has {len(points):,} SAEs, more than {_MOST}", "sweep fewer settings at a time")
    if not swept:
        return [Member("", {}, recipe)]
    return [
        Member(_name(point), point, replace(recipe, settings={**recipe.settings, STAGE: {**settings, **point}}))
        for point in points
    ]


def _is_list_of_values(cls: type[StageConfig], key: str, value: Any) -> bool:
    if not isinstance(value, list) or key not in cls.model_fields:
        return False
    return not takes_list(cls, key) or any(isinstance(element, list) for element in value)


def _name(point: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return re.sub(r"[^\w.+-]+", "_", "+".join(map(str, value)) if isinstance(value, list) else str(value))

    return ",".join(f"{key}={text(value)}" for key, value in point.items())


def default_stages(recipe: chain.Recipe) -> tuple[str, ...]:
    """Those that a sweep runs unless it is told which: what a choice among its SAEs needs, not pages about each."""
    return tuple(stage for stage in recipe.stages if stage not in ("cache", "view"))


def run_sweep(
    found: Sequence[Member], out: str, *, stages: Sequence[str], upstream: str | None = None, force: bool = False
) -> Iterator[chain.Finished]:
    """Run the stages of a sweep: those up to training once, the training of all SAEs together, the rest for each."""
    shared = found[0].recipe
    places: dict[str, str] = {}
    for stage in shared.stages:
        if chain.STAGES.index(stage) < chain.STAGES.index(STAGE):
            config = chain.placed(shared, stage, out, places, stages=stages, upstream=upstream)
            places[config.folder] = config.out
            if stage in stages:
                yield chain.finish_stage(config, force=force)
    places_of = [dict(places) for _ in found]
    for stage in shared.stages[shared.stages.index(STAGE) :]:
        configs = []
        for member, member_places in zip(found, places_of, strict=True):
            config = chain.placed(
                member.recipe, stage, out, member_places, stages=stages, upstream=upstream, member=member.name
            )
            member_places[config.folder] = config.out
            configs.append(config)
        if stage == STAGE and stage in stages:
            yield from chain.finish_together(configs, force=force)
        elif stage in stages:
            yield from (chain.finish_stage(config, force=force) for config in configs)


def table(found: Sequence[Member], finished: Sequence[chain.Finished]) -> list[dict[str, Any]]:
    """One row an SAE: its swept settings, and its scores, or what training said of its last batch."""
    rows = []
    for member in found:
        of_member = [stage for stage in finished if f"/{chain.SWEEP}/{member.name}/" in stage.config.out]
        row: dict[str, Any] = {"name": member.name, "settings": dict(member.settings)}
        for stage in of_member:
            if stage.config.stage == STAGE:
                row |= {"sae": stage.config.out, "seconds": stage.manifest.timings["seconds"]}
                last = stage.manifest.contents["last_step"]
                row |= {"l0": last["l0"], "fvu": last["fvu"], "dead_fraction": stage.manifest.contents["dead_fraction"]}
                row["scored_on"] = "the last batch of training"
        for stage in of_member:
            if stage.config.stage == "evaluate":
                scores = ("l0", "fvu", "dead_fraction", "ce_recovered", "kl", "recovered_fraction")
                row |= {name: stage.manifest.contents.get(name) for name in scores}
                row["scored_on"] = "held-out rows"
        rows.append(row)
    return rows


def write_table(out: str, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Keep the table, and a page of it with plots, beside the folders of the sweep; ``rows``, and the page's URI."""
    Folder(out).write(TABLE, (json.dumps(rows, indent=1, sort_keys=True) + "\n").encode())
    Folder(out).write(PAGE, sweep_report(rows).encode())
    return rows, chain.join(out, PAGE)
