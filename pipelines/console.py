"""What the command line prints about stages: one line each, the table at the end, status, settings."""

import json
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from rich.console import Console
from rich.table import Table

from saex_pipe.common.config import StageConfig, Upstream, field_extra
from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.manifest import STARTED, Manifest
from saex_pipe.pipelines.chain import STAGES, SWEEP, Finished, config_class, join

_SCORES = {
    "l0": "L0, active latents per row",
    "fvu": "FVU, fraction of variance unexplained",
    "ce_recovered": "cross-entropy recovered, fraction",
    "kl": "KL from the model with the SAE spliced in, nats per token",
    "dead_fraction": "dead latents, fraction (never fired on the rows scored)",
    "mean_max_cosine_true": "mean max cosine, true to learned features",
    "mean_max_cosine_learned": "mean max cosine, learned to true features",
    "recovered_fraction": "true features recovered at cosine 0.9, fraction",
}


def print_stage(stage: Finished) -> None:
    """One line: what the stage did and where its output is."""
    seconds = stage.manifest.timings["seconds"]
    state = f"done in {seconds:.1f} s" if stage.ran else "up to date"
    print(f"{stage.config.stage}: {state} ({stage.config.out})", flush=True)


def print_table(finished: Sequence[Finished]) -> None:
    """Seconds, rate and size of every stage; the scores; the page."""
    table = Table("stage", *("seconds", "amount", "rate", "output"), title="Run", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    scores: dict[str, Any] = {}
    page = None
    for stage in finished:
        table.add_row(stage.config.stage, *_figures(stage.manifest))
        scores |= stage.manifest.contents if stage.config.stage == "evaluate" else {}
        page = join(stage.config.out, "index.html") if stage.config.stage == "view" else page
    console = Console(soft_wrap=False)
    console.print(table)
    shown = {name: scores[name] for name in _SCORES if scores.get(name) is not None}
    if shown:
        lines = Table("score", "value", show_header=False)
        for name, value in shown.items():
            lines.add_row(_SCORES[name], f"{value:.4f}")
        console.print(lines)
    if page is not None:
        print(f"page of the best features: {page}")


_SWEEP_COLUMNS = {
    "l0": "L0",
    "fvu": "FVU",
    "ce_recovered": "CE recovered",
    "recovered_fraction": "recovered",
    "dead_fraction": "dead",
}


def print_sweep(rows: Sequence[Mapping[str, Any]], page: str) -> None:
    """One line an SAE: what was swept, and how it came out."""
    shown = [name for name in _SWEEP_COLUMNS if any(row.get(name) is not None for row in rows)]
    table = Table("SAE", *(_SWEEP_COLUMNS[name] for name in shown), title="Sweep", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        values = (row.get(name) for name in shown)
        table.add_row(row["name"], *("" if value is None else f"{value:.4g}" for value in values))
    Console(soft_wrap=False).print(table)
    scored = {row["scored_on"] for row in rows if "scored_on" in row}
    print(f"scores of {' and '.join(sorted(scored))}; table and plots: {page}")


def _figures(manifest: Manifest) -> tuple[str, str, str, str]:
    totals, seconds = manifest.totals, manifest.timings["seconds"]
    unit = next((name for name in ("tokens", "rows") if name in totals), None)
    # A resumed stage knows the seconds of its last process only, which say nothing about its rate.
    rate = "" if unit is None or manifest.timings["resumed"] else f"{totals[unit] / max(seconds, 1e-9):,.0f} {unit}/s"
    amount = "" if unit is None else f"{totals[unit]:,} {unit}"
    return f"{seconds:.1f} s", amount, rate, _bytes(totals["bytes"]) if "bytes" in totals else ""


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def print_status(uri: str) -> None:
    """The state of every stage of the run at ``uri``, or of the one stage whose folder it is."""
    folders = dict.fromkeys(config_class(stage).folder for stage in STAGES)
    members = sorted({"/".join(name.split("/")[:2]) for name in Folder(uri).list(f"{SWEEP}/") if name.count("/") > 2})
    names = [*folders, *(f"{member}/{folder}" for member in members for folder in folders)]
    rows = [row for name in names if (row := _state(join(uri, name), name)) is not None]
    rows = rows or [row for row in [_state(uri, uri.rstrip("/").rpartition("/")[2])] if row is not None]
    if not rows:
        raise InputError(f"{uri} holds no output of saex-pipe", "give the folder of a run, such as runs/quickstart")
    columns = ("folder", "stage", "state", "amount", "output", "finished (UTC)", "digest")
    table = Table(*columns, box=None, padding=(0, 1, 0, 0))  # narrow enough for 80 columns, so that nothing is cut off
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _state(uri: str, name: str) -> tuple[str, ...] | None:
    folder = Folder(uri)
    manifest = Manifest.read(folder)
    if manifest is not None:
        _, amount, _, size = _figures(manifest)
        return (
            name,
            manifest.stage,
            "finished",
            amount,
            size,
            manifest.finished_at[:16],
            manifest.digest[:8],
        )
    started = folder.read(STARTED)
    if started is None:
        return None
    shards = len(folder.list("ledger/"))
    return name, json.loads(started)["stage"], "unfinished", f"{shards} shards done", "", "", ""


# Words for the limits of a setting, by their name in annotated_types.
_LIMITS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "min_length": "at least {} of them",
    "max_length": "at most {} of them",
}


def print_settings(config: type[StageConfig]) -> None:
    """Every setting with its default, unit and meaning."""
    print(f"{config.stage}: {(config.__doc__ or '').splitlines()[0].replace('``', '')}\n")
    from_chain = {"out", *config.marked(Upstream)}
    for name, field in config.model_fields.items():
        default = "none" if field.default is None else json.dumps(field.default) if not field.is_required() else ""
        default = default or ("from the chain" if name in from_chain else "required")
        unit = field_extra(config, name)["unit"]
        limits = [
            words.format(getattr(m, limit))
            for m in field.metadata
            for limit, words in _LIMITS.items()
            if hasattr(m, limit)
        ]
        facts = ", ".join(part for part in (_type(field.annotation), unit, *limits) if part)
        print(f"{name} = {default}  ({facts})\n    {field.description}")


def _type(annotation: Any) -> str:
    """A type in words: choices one by one, None as it is written after ``--set``."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_type, get_args(annotation)))
    if annotation is type(None):
        return "none"
    if get_origin(annotation) is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    return text.replace("typing.", "").replace("Annotated", "")
