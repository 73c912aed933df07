"""A worker's side of a batch: one run from where it is to its end."""

from __future__ import annotations

import gc
import os
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.batch.engine import PATIENCE_S
from pipeline.batch.plan import BatchRun
from pipeline.errors import Interrupted, explain
from pipeline.priors.memory import keep_freed_memory
from pipeline.priors.source import Kept
from pipeline.runs.folder import in_use

if TYPE_CHECKING:
    from pipeline.config.model import Config


@dataclass(frozen=True)
class Task:
    """A run that a worker is asked to make.

    Args:
        run: which.
        out: folder of the batch.
        config: of the run, as `config.model_dump(mode="json")`; a Config itself is made anew in each process.
    """

    run: BatchRun
    out: Path
    config: dict


@cache
def kept() -> Kept:
    """Return the priors that this process keeps from run to run, one a stage; the process is set up for many runs."""
    from stages.kinds import STAGES

    keep_freed_memory()
    gc.set_threshold(100_000, 20, 100)  # see pipeline.cli
    return Kept(len(STAGES))


def make_run(task: Task) -> str:
    """Make a run, or go on with it; returns what it failed of, empty for one that is done or was asked to stop.

    Nothing that is wrong with a run is raised, so that it ends no other. A bug's traceback goes to RUN.error.txt beside
    the run's folder.
    """
    folder = task.out / task.run.name
    report = task.out / f"{task.run.name}.error.txt"
    try:
        report.unlink(missing_ok=True)
        _go(folder, task)
    except Interrupted:
        return ""
    except KeyboardInterrupt:
        return ""
    except Exception as error:
        kept().drop()  # whatever a broken run left of them reaches no other
        known = explain(error)
        if known is not None:
            return f"{known.what}\n{known.why}\n{known.fix}"
        report.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
        return f"{type(error).__name__}: {error}\nthis is a bug of ours\nits traceback is in {report}"
    return ""


def _go(folder: Path, task: Task) -> None:
    import torch
    from rich.console import Console

    from pipeline.config.model import config_model
    from pipeline.runs import run
    from pipeline.runs.caller import Caller
    from pipeline.runs.progress import Progress

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    progress, caller = Progress(Console(quiet=True, force_terminal=False)), Caller(kept=kept())
    end = time.monotonic() + PATIENCE_S
    while in_use(folder) and time.monotonic() < end:  # the worker of a batch that was killed saves its run and ends
        time.sleep(0.2)
    if (folder / "config.yaml").is_file():
        run.resume_run(folder, progress, caller)
        return
    config: Config = config_model().model_validate(task.config)
    run.start_run(config, folder, progress, None, caller)
