"""The workers of a batch, by what was asked for."""

from __future__ import annotations

from pathlib import Path

from pipeline.batch.engine import Engine
from pipeline.batch.local import LocalEngine


def make_engine(workers: int, threads: int, log: Path) -> Engine:
    """Return an engine of processes of this machine.

    Args:
        workers: processes at once; 0: one for each GPU, without GPUs one for each core, four at most.
        threads: of each worker; 0: $OMP_NUM_THREADS, without it the cores shared out evenly.
        log: folder where workers write what libraries print.
    """
    return LocalEngine(workers, threads, log)
