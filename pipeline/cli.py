"""The `pipeline` command: run, resume, export, view, batch, runs, recipes, settings, models, doctor.

Only the standard library and typer are imported here; each command imports what it needs, so `--help` stays fast
(0.15 s with typer, of which argparse would save 0.12; torch alone takes ten times that).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__
from pipeline.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, UserError, explain, show
from pipeline.priors.memory import keep_freed_memory
from pipeline.streams import open_missing, print_error, silence, silent_rank

app = typer.Typer(
    help="A sentence becomes a textured mesh.",
    epilog="Start with: pipeline run --stages coarse,fine",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but mistakes.")]
LogOption = Annotated[str, typer.Option("--log", help="Also write the metrics for: tensorboard.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/a-red-mug-0.")]


def _print_version(enabled: bool) -> None:
    if enabled:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings, as in coarse.steps=300.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to make, in words.")] = None,
    stages: Annotated[str | None, typer.Option(help="Stages in order, separated by commas: coarse,fine.")] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A recipe from configs/, or a YAML file; several by commas."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; must be new. Default: runs/<prompt>-<seed>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same device: same bytes.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    from_run: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Refine, or with a new prompt edit, another run's coarse stage."),
    ] = None,
    init_mesh: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Refine or paint this GLB, OBJ, PLY or STL: --stages fine.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make the object of this picture; its view: image.azimuth_deg.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run a prompt whose words the prior does not know.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also write RUN/profile: where the time went.")] = False,
    log: LogOption = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say memory and time, and start nothing.")
    ] = False,
    view: Annotated[
        bool, typer.Option("--view", help="Show the run on a page of this machine (extra: viewer).")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of that page; 0: a free one. Default: 8080.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Make a mesh: the whole way, or the stages you name."""
    with _profiled(profile) as listener, _viewed(view, port, quiet) as viewer:
        from pipeline.api import generate, load_config
        from pipeline.config.recipes import split_names
        from pipeline.runs.caption import picture_options

        flags = {"prompt": prompt, "stages": stages, "seed": seed, "device": device}
        flags |= {"from_run": None if from_run is None else str(from_run), "force": True if force else None}
        flags |= {"init_mesh": None if init_mesh is None else str(init_mesh)}
        of_picture, line = picture_options(image, prompt)
        flags |= of_picture
        if line and not quiet:
            print(line)
        options = {key: value for key, value in flags.items() if value is not None}
        whole = load_config(split_names(config), overrides or [], options)
        if dry_run:
            from pipeline.runs.plan import plan_run

            plan_run(whole, out, log=tuple(filter(None, log.split(","))))
            return
        show = None if viewer is None else viewer.open
        generate(config=whole, out=out, profile=listener, on_begin=show, quiet=quiet, log=log)


def _viewed(enabled: bool, port: int | None, quiet: bool) -> contextlib.AbstractContextManager:
    """Return what opens the page of a run's folder, or nothing; of several processes the first one has the page."""
    if enabled and not silent_rank():
        from pipeline.view.view import PORT, Viewer

        return Viewer(PORT if port is None else port, quiet)
    if port is not None and not enabled:
        raise UserError(f"--port {port} has no use here", "only a page has one", "add --view")
    return contextlib.nullcontext()


def _profiled(enabled: bool) -> contextlib.AbstractContextManager:
    """Return the profile that records a run from here on, imports included, or nothing."""
    if not enabled:
        return contextlib.nullcontext()
    from pipeline.profile.record import Profile

    return Profile()


@app.command()
def resume(folder: RunArgument, log: LogOption = "", quiet: QuietOption = False) -> None:
    """Continue an interrupted run from its last checkpoint; ends with the bytes of an uninterrupted one."""
    from pipeline import api

    api.resume(folder, quiet=quiet, log=log)


@app.command()
def export(
    folder: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the export, as in faces=5000 normal_map=true."),
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="Any of glb,obj,ply,stl,3mf,usdz, by commas.")] = "glb,obj",
    lods: Annotated[int, typer.Option(help="Levels of detail, each with half the faces of the one before.")] = 1,
    size_mm: Annotated[float | None, typer.Option(help="Longest side in STL and 3MF files, millimetres.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to. Default: the run folder.")] = None,
    quiet: QuietOption = False,
) -> None:
    """Write a run's result again: other formats, faces, maps; without optimising."""
    from pipeline import api

    words = [*(overrides or []), *([] if size_mm is None else [f"size_mm={size_mm}"])]
    api.export(folder, formats, out, settings=words, lods=lods, quiet=quiet)


@app.command()
def view(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run, also one that runs; or a folder of runs.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: a free one.")] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Any but this machine's own opens the page to others, by a token.")
    ] = "127.0.0.1",
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser, too.")] = False,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Show a run, or a folder of runs, on a page in the browser (extra: viewer)."""
    from pipeline.view import view as page
    from stages.paths import from_home

    page.view(from_home(folder), port, host, open_it=open_it, parent=parent)


@app.command()
def batch(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="A text file with a prompt a line.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings of every run.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the batch; the same again goes on with it.")] = Path(
        "runs/batch"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each prompt, with seeds from 0.")] = 1,
    config: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A recipe from configs/, or a YAML file; several by commas."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local: processes here; ray: a Ray cluster (extra: cluster).")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster. Default: $RAY_ADDRESS, else one on this machine.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Runs at once. Default: one a GPU; without, one a core, four at most.")
    ] = 0,
) -> None:
    """Make a mesh of every prompt in a file, several at once; typed again, go on with what is not done."""
    from pipeline.batch.batch import run_batch
    from stages.paths import from_home

    rows = run_batch(
        from_home(prompts),
        from_home(out),
        seeds=seeds,
        config=config,
        overrides=overrides or [],
        engine=engine,
        address=address,
        workers=workers,
    )
    if any(row.state != "done" for row in rows):
        raise SystemExit(1)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder that holds runs.")] = Path("runs"),
) -> None:
    """List the runs of a folder: state, time, seed, prompt."""
    from pipeline.batch.listing import print_runs
    from stages.paths import from_home

    print_runs(from_home(folder))


@app.command()
def recipes() -> None:
    """List the recipes for --config: what each is, and which it is laid over."""
    from pipeline.config.recipes import print_recipes

    print_recipes()


@app.command()
def settings(
    prefix: Annotated[str, typer.Argument(metavar="[KEY]", help="A key or a group, as fine.cameras.")] = "",
    config: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Show the values of a recipe or a run's folder.")
    ] = None,
) -> None:
    """List what key.sub=value can set: value, type and bounds, meaning with unit."""
    from pipeline.config.listing import print_settings

    print_settings(prefix.removesuffix("."), config)


models = typer.Typer(help="Priors: which there are, and whether a folder is a whole one.", no_args_is_help=True)
app.add_typer(models, name="models")
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@models.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the built-in priors and known models: id, stage, memory, licence, and which are gated or withdrawn."""
    from pipeline.priors.listing import print_presets

    print_presets(as_json)


@models.command("check")
def models_check(
    source: Annotated[str, typer.Argument(metavar="PATH", help="A diffusers folder, or a hub id in this cache.")],
    variant: Annotated[str | None, typer.Option(help="Weight files' variant, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side in pixels to work at. Default: as trained.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Name what is missing or wrong in a model's folder, part by part, without loading it."""
    from pipeline.priors.listing import check_model

    check_model(source, variant, resolution, as_json, revision)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what is installed, what is missing, why, and what that costs."""
    from pipeline.doctor import print_report

    print_report(as_json)


def _usage_error(error: Exception) -> UserError:
    """A mistyped command line in our three lines; typer's own exceptions moved between modules across versions."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "pipeline"
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    return UserError("cannot read the command line", message, f"see `{path} --help`")


def _set_up_process() -> None:
    """Set allocator and thread variables, which must come before the libraries load."""
    # Spinning OpenMP workers cost more than they gain on few cores, and large tensors are faster on large pages, where
    # the system has them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()
    open_missing()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):  # a letter that the terminal lacks, or a name that is no text, is no reason
            stream.reconfigure(errors="backslashreplace")
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        if os.environ.get(name, "").startswith("~"):  # both are taken as they stand, for a folder named `~`
            os.environ[name] = str(Path(os.environ[name]).expanduser())
    # Imports and cached kernels allocate a million objects that all stay: looking for garbage among them every 700 is
    # a fifth of the imports' time (4.4 s to 3.5 s).
    gc.set_threshold(100_000, 20, 100)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run the command line and exit with its code."""
    code = _run_command(arguments)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        code = code or 1
    except OSError as error:  # what was printed is lost: a full disk
        silence(sys.stdout)
        show(explain(error) or UserError("cannot print", str(error), "send the output elsewhere"))
        code = code or EXIT_USER_ERROR
    sys.exit(code)


def _run_command(arguments: list[str] | None) -> int:
    """Run the command line. Returns: its exit code; bugs raise."""
    try:
        _set_up_process()
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="pipeline", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer turns KeyboardInterrupt into this code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except SystemExit as stop:  # of a command that has said all
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Interrupted as stop:
        if not silent_rank():
            print_error(f"\n{stop}")
        return stop.exit_code
    except KeyboardInterrupt:
        print_error("\nstopped; no file is half written")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        silence(sys.stdout)
        return 1
    except Exception as error:
        if type(error).__name__ == "Abort":  # older typer's KeyboardInterrupt
            print_error("\nstopped; no file is half written")
            return EXIT_INTERRUPTED
        if type(error).__name__ == "NoArgsIsHelpError":  # `pipeline` alone; some versions have printed the help already
            print(error.format_message(), end="")  # type: ignore[attr-defined]
            return 0
        user_error = _usage_error(error) if hasattr(error, "format_message") else explain(error)
        if user_error is None or os.environ.get("PIPELINE_TRACEBACK"):
            raise
        if not silent_rank():
            show(user_error)
        return EXIT_USER_ERROR
