"""Worker processes of a Ray cluster: an actor each, which keeps its priors from run to run.

Ray places the actors, gives each a GPU where the cluster has any, starts one that died again and calls its task again.
Run folders must lie where every machine of the cluster sees them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.batch.engine import TRIES, Outcome, WorkerDied
from pipeline.batch.local import PATIENCE_S, POOLS, threads_set
from stages.errors import UserError

CONNECT_S = 5.0


class RayEngine:
    """See pipeline.batch.engine.Engine.

    Args:
        workers: at once; 0: one for each GPU, without GPUs one for each of the cluster's CPUs, by `threads`.
        threads: of each worker, which takes as many CPUs; 0: $OMP_NUM_THREADS, without it one.
        log: folder that all machines of the cluster see.
        address: of a cluster; None: $RAY_ADDRESS, without it one on this machine for this call.
    Raises: UserError where Ray is absent or no cluster answers at the address.
    """

    def __init__(self, workers: int, threads: int, log: Path, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            fix = "pip install 'text3d-pipeline[cluster]', or take --engine local"
            raise UserError("the engine ray needs Ray", f"it is not installed ({error})", fix) from None
        self._ray = ray
        self._threads = threads or threads_set() or 1
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        _check_address(address)
        own = {"num_cpus": workers * self._threads} if address == "local" and workers else {}
        variables = dict.fromkeys(POOLS, str(self._threads)) | {"RAY_USAGE_STATS_ENABLED": "0"}
        # what a T5 makes of a prompt is made once for all machines
        variables["PIPELINE_CACHE"] = os.environ.get("PIPELINE_CACHE", str(log / "cache"))
        try:
            ray.init(
                address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": variables},
                ignore_reinit_error=True,
                **own,
            )
        except Exception as error:  # Ray raises bare Exceptions, too
            raise _dead(address, (str(error).strip() or type(error).__name__).splitlines()[0]) from None
        there = ray.cluster_resources()
        self._gpus = int(there.get("GPU", 0))
        room = self._gpus or max(1, int(there.get("CPU", 1)) // self._threads)
        self.workers = min(workers or room, room)  # one that finds no room would wait for the others' end

    def run(self, call: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Outcome]:
        ray = self._ray
        options = {"num_cpus": self._threads, "num_gpus": 1 if self._gpus else 0}
        options |= {"max_restarts": -1, "max_task_retries": TRIES - 1}
        actor = ray.remote(_Worker).options(**options)
        board = ray.remote(_Board).options(num_cpus=0).remote()
        waiting = list(reversed(tasks))
        workers = [actor.remote(board, k) for k in range(min(self.workers, len(waiting)))]
        running: dict[Any, tuple[Any, Any]] = {}
        try:
            for worker in workers:
                task = waiting.pop()
                running[worker.work.remote(call, task)] = (worker, task)
            while running:
                done, _ = ray.wait(list(running), num_returns=1)
                worker, task = running.pop(done[0])
                outcome = self._outcome(done[0])
                if waiting:
                    following = waiting.pop()
                    running[worker.work.remote(call, following)] = (worker, following)
                yield task, outcome
        finally:
            if running:
                self._interrupt(board, list(running))
            for worker in workers:
                ray.kill(worker)
            ray.shutdown()

    def _outcome(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except errors.RayError as error:
            return WorkerDied(f"its worker died {TRIES} times: {str(error).strip().splitlines()[0]}")

    def _interrupt(self, board: Any, running: list[Any]) -> None:
        """Send every worker SIGINT, from the machine that it is on, and wait for the runs to save themselves."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        ray = self._ray
        send = ray.remote(os.kill).options(num_cpus=0, max_retries=0)
        with contextlib.suppress(ray.exceptions.RayError):
            for node, pid in ray.get(board.places.remote()):
                send.options(scheduling_strategy=On(node, soft=False)).remote(pid, int(signal.SIGINT))
            ray.wait(running, num_returns=len(running), timeout=PATIENCE_S)


class _Board:
    """The actor that knows where the workers are, while they are busy."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[str, int]] = {}

    def note(self, worker: int, node: str, pid: int) -> None:
        """Note the machine and the process of a worker."""
        self._places[worker] = (node, pid)

    def places(self) -> list[tuple[str, int]]:
        """Return machine and process of each worker."""
        return list(self._places.values())


class _Worker:
    """The actor of a worker: calls functions one after the other in one process, where they keep what they load."""

    def __init__(self, board: Any, number: int) -> None:
        import ray

        node = ray.get_runtime_context().get_node_id()
        ray.get(board.note.remote(number, node, os.getpid()))  # again in each process that takes a dead one's place

    def work(self, call: Callable[[Any], Any], task: Any) -> Any:
        """Return what the call returns."""
        return call(task)


def _check_address(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # "local" or "auto"
        return
    try:
        with socket.create_connection((host, int(port)), CONNECT_S):
            pass
    except (OSError, ValueError) as error:
        raise _dead(address, str(error)) from None


def _dead(address: str, why: str) -> UserError:
    if address == "local":
        return UserError("Ray cannot start on this machine", why, "its logs are in /tmp/ray; or take --engine local")
    start = "ray start --head prints the address; without --address a cluster is started on this machine"
    return UserError(f"no Ray cluster answers at {address}", why, start)
