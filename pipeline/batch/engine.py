"""Workers that do tasks at the same time.

An engine calls a function of a module with each task, in a worker process that lives from task to task, and gives the
outcomes as they come. A worker that dies is started again and its task is called again, so that a task must be one that
goes on from where it was. This module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

ENGINES = ("local", "ray")
TRIES = 3  # of a task whose worker dies under it
PATIENCE_S = 120.0  # for a run to end its step and save itself


class WorkerDied(Exception):
    """The task's worker died each time: killed, or out of memory."""


Outcome = tuple[Any, Any]  # the task, and what the call returned or raised


class Engine(Protocol):
    """The workers of one call; `run` may be asked once."""

    def run(self, call: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Outcome]:
        """Yield each task with its result, or with the exception that ended it, as they come.

        Where the iteration is left early, by Ctrl-C as well, every worker gets SIGINT once, which a run takes as the
        wish to save itself and stop; what has not stopped after some time is killed.

        Args:
            call: a function of a module, which workers import by its name.
            tasks: each picklable.
        """
