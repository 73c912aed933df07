"""The processes of one run: `torchrun --nproc-per-node N -m pipeline run ...` splits a step's views over them.

Rank 0 makes the folder, holds its lock, writes and prints; the others compute along (stages/parallel.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import EXIT_USER_ERROR, Interrupted, explain, show
from stages.errors import UserError
from stages.parallel import FirstFailed, RankLost, rank, size, splits

if TYPE_CHECKING:
    import torch

    from pipeline.runs.progress import Progress

PATIENCE = timedelta(hours=2)  # for rank 0 to download a prior; a process that ends is noticed at once


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Work together with the other processes that torchrun started, if it did.

    What they fail of is told once: by the first process, or by the one that failed before it. Raises: SystemExit in
    processes that the first one speaks for.
    """
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    store = dist.distributed_c10d._get_default_store()
    try:
        yield
    except Interrupted as stop:
        if rank() == 0:
            raise
        raise SystemExit(stop.exit_code) from stop
    except FirstFailed as error:
        raise SystemExit(EXIT_USER_ERROR) from error
    except Exception as error:
        user_error = lost("RUN", "its last checkpoint is safe") if isinstance(error, RankLost) else explain(error)
        if user_error is None:
            raise
        if rank() > 0:
            time.sleep(1)  # for the first process to tell it, where it failed of the same
        if _count(store) == 1 and rank() > 0:
            show(user_error)
        if rank() > 0:
            raise SystemExit(EXIT_USER_ERROR) from error
        raise user_error from error
    else:
        dist.destroy_process_group()


def _count(store) -> int:
    """How many processes have failed so far, this one included; 1 where nobody can say."""
    try:
        return store.add("failed", 1)
    except (RuntimeError, ValueError):  # the process that kept the store is gone
        return 1


def lost(folder: Path | str, where: str) -> UserError:
    """Return what is told where another process of the run ended.

    Args:
        folder: of the run.
        where: what is saved.
    """
    return UserError(
        "another process of this run ended",
        f"it was killed, or failed with a message of its own; {where}",
        f"go on with: torchrun --nproc-per-node {size()} -m pipeline resume {folder}",
    )


def quiet_but_first(progress: Progress) -> Progress:
    """Return the progress in the first process, and one that says nothing in the others."""
    if rank() == 0:
        return progress
    from rich.console import Console

    from pipeline.runs.progress import Progress

    return Progress(Console(quiet=True, force_terminal=False))


def note_split(progress: Progress, stage: str, settings: object) -> None:
    """Say of a stage whose views cannot be split that every process takes all of them."""
    views, accumulate = getattr(settings, "views_per_step", 1), getattr(settings, "accumulate", 0)
    if size() > 1 and not (accumulate and splits(views, accumulate)):
        progress.note(f"{stage}: its {views} views a step are not split over {size()} processes; each takes them all")
