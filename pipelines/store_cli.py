"""The commands ``saex-pipe store ...``. Imports that take time happen inside them."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at, check, copy and mend activation stores.")
_StoreUri = Annotated[str, typer.Argument(metavar="URI", help="Folder of an activation store.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Jobs = Annotated[int, typer.Option(metavar="N", min=1, help="Objects read at once.")]


@app.command()
def info(
    uri: _StoreUri,
    price: Annotated[float, typer.Option("--price-per-gb-month", metavar="PRICE", min=0)] = 0.02,
    as_json: _Json = False,
) -> None:
    """Geometry, bytes, and cost per month; also of a store that is still being written."""
    from saex_pipe.pipelines import store

    store.print_info(uri, price, as_json)


@app.command()
def verify(uri: _StoreUri, jobs: _Jobs = 8, as_json: _Json = False) -> None:
    """Read everything and name each shard that is not as it was written."""
    from saex_pipe.pipelines import store

    store.verify(uri, jobs, as_json)


@app.command()
def stats(
    uri: _StoreUri,
    as_json: _Json = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE.html", help="Also write a page with plots.")] = None,
) -> None:
    """Norms, outliers, and how far off zero the rows of every tap lie."""
    from saex_pipe.pipelines import store

    store.print_stats(uri, as_json, plot)


@app.command()
def sample(
    uri: _StoreUri,
    rows: Annotated[int, typer.Option(metavar="N", min=1)] = 8,
    seed: Annotated[int, typer.Option(metavar="N", min=0)] = 0,
    tap: Annotated[str | None, typer.Option(metavar="NAME")] = None,
) -> None:
    """Some random rows with their text."""
    from saex_pipe.pipelines import store

    store.print_sample(uri, rows, seed, tap)


@app.command("copy")
def copy_store(
    uri: _StoreUri,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder that receives the copy.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a copy of other settings.")] = False,
) -> None:
    """Copy with another type, fewer taps or windows, or other shards; 'config copy' lists the settings."""
    from saex_pipe.pipelines import store

    store.copy(uri, out, set_ or [], force)


@app.command()
def repair(uri: _StoreUri, jobs: _Jobs = 8) -> None:
    """Make exactly those shards again that are missing or damaged."""
    from saex_pipe.pipelines import store

    store.repair(uri, jobs)


@app.command()
def migrate(uri: _StoreUri, jobs: _Jobs = 8) -> None:
    """Bring a store of an earlier version of saex-pipe to the present format, where it stands."""
    from saex_pipe.pipelines import store

    store.migrate(uri, jobs)


@app.command()
def prune(
    uri: _StoreUri,
    yes: Annotated[bool, typer.Option("--yes", help="Do it.")] = False,
    stopped: Annotated[
        bool, typer.Option("--stopped", help="No worker runs any more: delete what any of them began, too.")
    ] = False,
) -> None:
    """Delete what nothing needs any more, also of a store that is still being written."""
    from saex_pipe.pipelines import store

    store.prune(uri, yes, stopped)
