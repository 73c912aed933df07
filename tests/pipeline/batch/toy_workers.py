"""Batch runs of toy stages in worker processes: as pipeline.batch.worker makes them, with prompts that go wrong.

Beside each run's folder NAME.pids holds a line with the worker's pid for every time that the run was begun.
"""

import os
import signal

from pipeline.batch import worker
from pipeline.batch.worker import Task
from tests import toy_pipeline


def make_toy_run(task: Task) -> str:
    """Make a toy run; a prompt with "empty" makes no object, one with "bug" breaks, one with "die" kills its worker."""
    with open(task.out / f"{task.run.name}.pids", "a") as file:
        file.write(f"{os.getpid()}\n")
    words = task.run.prompt.split()
    os.environ["TOY_EMPTY"] = "coarse" if "empty" in words else ""
    toy_pipeline.install()
    if "die" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "bug" in words:
        raise ValueError("a bug")
    return worker.make_run(task)
