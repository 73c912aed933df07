"""The workers of a batch, by what was asked for."""

from __future__ import annotations

from pathlib import Path

from pipeline.batch.engine import ENGINES, Engine
from stages.errors import UserError


def make_engine(name: str, workers: int, threads: int, log: Path, address: str | None = None) -> Engine:
    """Return an engine.

    Args:
        name: "local", processes of this machine, or "ray", those of a Ray cluster.
        workers: processes at once; 0: one for each GPU, without GPUs one for each core, four at most.
        threads: of each worker; 0: $OMP_NUM_THREADS, without it the cores shared out evenly.
        log: folder where local workers write what libraries print; Ray keeps logs of its own.
        address: of a Ray cluster; None: $RAY_ADDRESS, and without it a cluster on this machine for this call.
    Raises: UserError for an unknown engine, Ray absent, or an address where no cluster answers.
    """
    if name not in ENGINES:
        raise UserError(f"no engine is called {name}", f"engines: {', '.join(ENGINES)}", "choose one of these")
    if name == "ray":
        from pipeline.batch.cluster import RayEngine

        return RayEngine(workers, threads, log, address)
    if address is not None:
        raise UserError(f"--address {address} has no use here", "only Ray has one", "add --engine ray")
    from pipeline.batch.local import LocalEngine

    return LocalEngine(workers, threads, log)
