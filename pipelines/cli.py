"""The command line. It parses, calls ``chain``, and prints; imports that take time happen inside the commands."""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saex_pipe.common.errors import SaexError
from saex_pipe.common.host_memory import keep_freed_memory
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.pipelines.store_cli import app as store_app

if TYPE_CHECKING:
    from saex_pipe.pipelines.chain import Recipe

_INTERRUPTED = 130  # the exit status after SIGINT, which Typer turns into a return value

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse autoencoders on language-model activations, as stages that can be killed and run again.",
)

_RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE|FILE.toml", help="Name of a recipe, or a TOML file.")]
_OptionalRecipe = Annotated[
    str | None, typer.Argument(metavar="[RECIPE|FILE.toml]", help="Name of a recipe, or a TOML file.")
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]
_Out = Annotated[str | None, typer.Option(metavar="URI", help="Folder of the run  [default: runs/RECIPE]")]
_Force = Annotated[bool, typer.Option("--force", help="Replace results of other settings.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Before the command: show the traceback of an error.")] = False,
) -> None:
    """Sparse autoencoders on language-model activations, as stages that can be killed and run again."""


@app.command()
def run(
    recipe: _RecipeArgument,
    from_: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage to run.")] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="The one stage to run.")] = None,
    set_: _Set = None,
    out: _Out = None,
    upstream: Annotated[
        str | None, typer.Option(metavar="URI", help="Folder of another run, whose results are used where they fit.")
    ] = None,
    force: _Force = False,
) -> None:
    """Run the stages of a recipe, each where its result is not there yet."""
    from saex_pipe.pipelines import chain, console, sweep

    loaded = chain.with_assignments(chain.load_recipe(recipe), set_ or [])
    stages, place = _chosen(loaded, from_, only), out or _default_out(loaded.name)
    members = sweep.members(loaded)
    if members[0].name:
        stages = stages if from_ or only else sweep.default_stages(loaded)
        running = sweep.run_sweep(members, place, stages=stages, upstream=upstream, force=force)
    else:
        running = chain.run_chain(loaded, place, stages=stages, upstream=upstream, force=force)
    finished = []
    for stage in running:
        console.print_stage(stage)
        finished.append(stage)
    if members[0].name:
        console.print_sweep(*sweep.write_table(place, sweep.table(members, finished)))
    else:
        console.print_table(finished)


def _chosen(recipe: "Recipe", first: str | None, only: str | None) -> Sequence[str]:
    from saex_pipe.common.errors import InputError

    if first is not None and only is not None:
        raise InputError(f"--from {first} and --only {only} contradict each other", "give one of the two")
    for stage in (first, only):
        if stage is not None and stage not in recipe.stages:
            raise InputError(
                f"recipe {recipe.name} has no stage {stage!r}", f"its stages are {', '.join(recipe.stages)}"
            )
    if only is not None:
        return [only]
    return recipe.stages[recipe.stages.index(first) :] if first is not None else recipe.stages


def _default_out(name: str) -> str:
    return f"runs/{name}"


def _stage_command(stage: str, summary: str) -> Callable[..., None]:
    def command(recipe: _OptionalRecipe = None, set_: _Set = None, out: _Out = None, force: _Force = False) -> None:
        from saex_pipe.pipelines import chain, console, sweep

        loaded = chain.load_recipe(recipe) if recipe is not None else chain.Recipe("custom", "", (), {}, "")
        loaded, place = chain.with_assignments(loaded, set_ or [], stage), out or _default_out(loaded.name)
        members = sweep.members(loaded) if stage == chain.SWEPT_STAGE else []
        if members and members[0].name:
            configs = [chain.configure(member.recipe, stage, place, member=member.name) for member in members]
            finished = []
            for done in chain.finish_together(configs, force=force):
                console.print_stage(done)
                finished.append(done)
            console.print_sweep(*sweep.write_table(place, sweep.table(members, finished)))
        else:
            console.print_stage(chain.finish_stage(chain.configure(loaded, stage, place), force=force))

    command.__doc__ = summary
    return command


for _stage, _summary in {
    "corpus": "Text to windows of token ids.",
    "toy": "Synthetic activations with a known dictionary.",
    "tune": "A sparse autoencoder to one tuned end to end, through its model.",
    "evaluate": "Scores of a sparse autoencoder.",
    "cache": "Activation store and autoencoder to what is known about each feature.",
    "view": "Feature cache to a page, or a local server (--set serve=true).",
}.items():
    app.command(_stage)(_stage_command(_stage, _summary))


@app.command()
def harvest(
    recipe: _OptionalRecipe = None,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="i/n|auto|jax", help="Make every n-th shard, beside n - 1 others; auto: Kubernetes, SLURM."
        ),
    ] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Claim shards one by one, beside any number of others.")
    ] = False,
    set_: _Set = None,
    out: _Out = None,
    force: _Force = False,
) -> None:
    """Token windows through a language model to an activation store."""
    shared = [f'worker="{worker}"'] if worker is not None else []
    _stage_command("harvest", "")(recipe, [*(set_ or []), *shared, *["elastic=true"] * elastic], out, force)


@app.command()
def train(
    recipe: _OptionalRecipe = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Start while the store is still being written, from its finished shards.")
    ] = False,
    set_: _Set = None,
    out: _Out = None,
    force: _Force = False,
) -> None:
    """Activation store to a sparse autoencoder."""
    _stage_command("train", "")(recipe, [*(set_ or []), *["follow=true"] * follow], out, force)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Recipe to print.")] = None) -> None:
    """List the recipes, or print one."""
    from saex_pipe.pipelines import chain

    if name is not None:
        typer.echo(chain.load_recipe(name).text, nl=False)
        return
    for recipe in map(chain.load_recipe, chain.recipe_names()):
        typer.echo(f"{recipe.name:<12}{recipe.title}")


@app.command()
def status(uri: Annotated[str, typer.Argument(metavar="URI", help="Folder of a run, or of one stage.")]) -> None:
    """Show what is finished."""
    from saex_pipe.pipelines import console

    console.print_status(uri)


@app.command("config")
def show_config(stage: Annotated[str, typer.Argument(metavar="STAGE", help="Stage whose settings to show.")]) -> None:
    """Print every setting of a stage with its default, unit and meaning."""
    from saex_pipe.pipelines import chain, console

    console.print_settings(chain.config_class(stage))


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Stage to plan: harvest or train.")],
    recipe: _OptionalRecipe = None,
    topology: Annotated[str, typer.Option(metavar="NAME", help="TPU slice, kind and grid of chips.")] = "v5e:2x4",
    model: Annotated[str | None, typer.Option(metavar="URI", help="Model; its config.json is enough.")] = None,
    model_parallel: Annotated[
        int | None, typer.Option(metavar="N", help="Devices that share one copy of the weights.")
    ] = None,
    set_: _Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compile a stage's step for TPUs that need not be here: memory per chip, tokens/s or rows/s, bytes of the store.

    To plan a training without its store, give the width of its rows: --set width=2304.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU that is here stays free for others
    if stage == "train":
        from saex_pipe.pipelines.plan_train import run_train_plan

        run_train_plan(recipe, topology, set_ or [], as_json, model_parallel)
    elif stage == "harvest":
        from saex_pipe.pipelines.plan import run_harvest_plan

        run_harvest_plan(recipe, topology, set_ or [], as_json, model=model, model_parallel=model_parallel)
    else:
        from saex_pipe.common.errors import InputError

        raise InputError(f"there is no plan for {stage!r}", "the stages that are planned are harvest and train")


app.add_typer(store_app, name="store")


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Turn what went wrong into one line and an exit status; with ``debug`` the traceback comes first."""
    hooks = sys.unraisablehook, threading.excepthook
    if not debug:
        # What threads and finalisers of libraries raise beside the error that ends the command, or after it.
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
    try:
        yield
    except Exception as error:
        if debug:
            traceback.print_exc()
        # Typer's own errors, whichever copy of click it carries.
        if (usage := getattr(error, "format_message", None)) is not None:
            path = getattr(getattr(error, "ctx", None), "command_path", "saex-pipe")
            _fail(f"{usage().rstrip('.')}; '{path} --help' shows what there is", 2)
        known = _known_error(error)
        if known is not None:
            _fail(str(known), known.exit_status)
        _fail(
            f"unexpected {type(error).__name__}: {_first_line(error)}; 'saex-pipe --debug COMMAND ...' shows where", 1
        )
    finally:
        sys.unraisablehook, threading.excepthook = hooks


def _known_error(error: BaseException) -> SaexError | None:
    """The SaexError in a chain of causes: a pipeline runner wraps what its workers raise."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, SaexError):
            return seen
        if isinstance(seen, OSError) and seen.errno is not None:
            return _disk_error(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def _disk_error(error: OSError) -> SaexError:
    import errno

    from saex_pipe.common.errors import InputError

    place = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{place}: the disk is full", "free some space and run the same command again")
    if error.errno == errno.EFBIG:
        return InputError(f"{place}: files may not grow that large here", "raise the limit (ulimit -f)")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"{place}: no permission", "change its rights or choose another place")
    return SaexError(f"{place}: {error.strerror}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _fail(message: str, status: int) -> None:
    print(f"saex-pipe: {' '.join(message.split())}", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(status)


def main(arguments: Sequence[str] | None = None) -> Any:
    """Entry point of ``saex-pipe``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Beam, JAX and TensorStore write informational lines to stderr that would break up the progress bar.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    keep_freed_memory()
    with _one_line_errors("--debug" in arguments), graceful_stop(at_once=True, interrupts="leave"):
        if app(arguments or ["--help"], prog_name="saex-pipe", standalone_mode=False) == _INTERRUPTED:
            _fail("interrupted; what was finished is kept, run the same command again to go on", _INTERRUPTED)
