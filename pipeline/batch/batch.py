"""A batch from a file of prompts to a gallery page: `pipeline batch`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch.gallery import write_gallery
from pipeline.batch.listing import Row, print_rows, rows_of
from pipeline.batch.plan import BatchRun, plan_runs, read_prompts, save_plan
from pipeline.batch.worker import Task, make_run
from pipeline.batch.workers import make_engine
from pipeline.config.layers import from_overrides
from pipeline.config.model import Config, load_config
from pipeline.config.recipes import split_names
from pipeline.errors import Interrupted
from pipeline.output.files import write_whole
from pipeline.runs.folder import Lock, check_disk
from pipeline.runs.progress import Progress, duration
from stages.errors import UserError

if TYPE_CHECKING:
    from pipeline.batch.engine import Engine


def run_batch(
    prompts: Path,
    out: Path,
    *,
    seeds: int = 1,
    config: str | None = None,
    overrides: Sequence[str] = (),
    engine: str = "local",
    address: str | None = None,
    workers: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Make a run for each prompt and seed, or go on with those that are not done; then write the gallery.

    A run that fails ends no other; asked for again, it is tried again.

    Args:
        prompts: file with a prompt a line.
        out: folder of the batch: a folder for each run, batch.json and index.html.
        seeds: of each prompt, from 0.
        config: recipes' names or YAML files, by commas, as for a run.
        overrides: `key.sub=value` words of every run.
        engine, address, workers, threads: see pipeline.batch.workers.make_engine.
        progress: where lines are printed; None: standard output.
    Returns: a row for each run asked for.
    Raises: UserError for a mistake in what all runs share; Interrupted on Ctrl-C, with every run saved.

    Example:
        >>> rows = run_batch(Path("prompts.txt"), Path("runs/mugs"), seeds=2, overrides=["coarse.steps=100"])
        >>> [row.folder for row in rows if row.state == "failed"]
    """
    progress = progress or Progress()
    texts = read_prompts(prompts)
    if seeds < 1 or workers < 0:
        raise UserError("cannot plan the batch", f"seeds={seeds}, workers={workers}", "give at least one seed")
    taken = set(from_overrides(overrides).values) & {"prompt", "seed"}
    if taken:
        raise UserError(f"{min(taken)}= has no use here", "the file and --seeds give each run its own", "leave it out")
    shared = load_config(split_names(config), list(overrides), {})
    runs = plan_runs(texts, seeds)
    out = out.absolute()
    check_disk(out)
    asked = {"config": config, "settings": sorted(overrides)}
    save_plan(out, asked, runs, {})
    (out / "logs").mkdir(exist_ok=True)
    with Lock(out / "logs"):  # not that of the whole: a run in it may be gone on with by itself
        waiting = [row.run for row in rows_of(out, runs) if row.state != "done"]
        progress.note(f"{out}: {len(runs)} runs, {len(runs) - len(waiting)} done before")
        try:
            if waiting:
                _make(
                    make_engine(engine, min(workers, len(waiting)), threads, out / "logs", address),
                    out,
                    shared,
                    asked,
                    runs,
                    waiting,
                    progress,
                )
        except KeyboardInterrupt:
            print_rows(rows_of(out, runs), progress)
            raise Interrupted("stopped, every run is saved\ngo on by typing the same again") from None
        finally:
            write_whole(out / "index.html", write_gallery(out).encode("utf-8", "backslashreplace"))
    rows = rows_of(out, runs)
    print_rows(rows, progress)
    progress.note(f"gallery: {out / 'index.html'}")
    return rows


def _make(
    engine: Engine,
    out: Path,
    shared: Config,
    asked: dict[str, Any],
    runs: list[BatchRun],
    waiting: list[BatchRun],
    progress: Progress,
) -> None:
    tasks = [Task(run, out, _of_run(shared, run)) for run in waiting]
    errors: dict[str, str] = {}
    began = time.monotonic()
    with contextlib.closing(engine.run(make_run, tasks)) as outcomes:
        for done, (task, outcome) in enumerate(outcomes, 1):
            run = task.run
            if isinstance(outcome, BaseException):  # the worker's own end, not the run's
                outcome = f"{type(outcome).__name__}: {outcome}"
            if outcome:
                errors[run.name] = outcome
                save_plan(out, asked, runs, errors)
            left = (len(waiting) - done) * (time.monotonic() - began) / done
            ends = f"failed: {outcome.splitlines()[0]}" if outcome else "done"
            progress.note(f"{done}/{len(waiting)}  {run.prompt} (seed {run.seed}): {ends}; about {duration(left)} left")


def _of_run(shared: Config, run: BatchRun) -> dict[str, Any]:
    own = {"prompt": run.prompt, "seed": run.seed}
    return shared.model_dump(mode="json") | own
