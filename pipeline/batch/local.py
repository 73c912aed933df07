"""Worker processes of this machine, by concurrent.futures.

Each worker is a process pool of its own with one process: one that is killed breaks its own pool alone, and it is known
whose task it had. A thread for each waits for it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pipeline.batch.engine import PATIENCE_S, TRIES, Outcome, WorkerDied

POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
MOST_WORKERS = 4  # unless asked for more: each takes a gigabyte with the pocket prior
_STARTING = threading.Lock()  # a child takes over the environment as it stands


class LocalEngine:
    """See pipeline.batch.engine.Engine; each worker has a GPU to itself where there are any."""

    def __init__(self, workers: int, threads: int, log: Path) -> None:
        gpus = gpu_names()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or len(gpus) or min(cores, MOST_WORKERS)
        each = threads or threads_set() or max(1, cores // self.workers)
        self._slots = [
            _Slot(log / f"worker-{k}.log", each, gpus[k % len(gpus)] if gpus else None) for k in range(self.workers)
        ]

    def run(self, call: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Outcome]:
        idle: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            idle.put(slot)

        def work(task: Any) -> Any:
            slot = idle.get()
            try:
                return slot.work(call, task)
            except Exception as error:  # given to the caller with its task
                return error
            finally:
                idle.put(slot)

        with ThreadPoolExecutor(self.workers, "worker") as threads:
            waiting = {threads.submit(work, task): task for task in tasks}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            finally:
                for future in waiting:
                    future.cancel()
                for slot in self._slots:
                    slot.stop()
                end = time.monotonic() + PATIENCE_S
                for slot in self._slots:
                    slot.join(end)


def threads_set() -> int:
    """Return the number of threads that the caller's environment sets, 0 where it sets none."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() else 0


def gpu_names() -> list[str]:
    """Return the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    if not Path("/dev/nvidiactl").exists() and os.name == "posix":  # torch would take seconds to say so
        return []
    import torch

    return [str(k) for k in range(torch.cuda.device_count())]


class _Slot:
    """One worker process at a time, started when first needed and again when it has died."""

    def __init__(self, log: Path, threads: int, gpu: str | None) -> None:
        self._log, self._threads, self._gpu = log, threads, gpu
        self._pool: ProcessPoolExecutor | None = None
        self._pid = 0
        self._stopped = False

    def work(self, call: Callable[[Any], Any], task: Any) -> Any:
        """Return what the call returns. Raises: what it raises; WorkerDied after so many deaths."""
        for _ in range(TRIES):
            if self._stopped:
                raise CancelledError
            try:
                return self._started().submit(call, task).result()
            except BrokenProcessPool:
                self._pool = None
        raise WorkerDied(f"its worker process died {TRIES} times: killed, or out of memory; see {self._log}")

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            chosen = dict.fromkeys(POOLS, str(self._threads))
            chosen |= {} if self._gpu is None else {"CUDA_VISIBLE_DEVICES": self._gpu}
            begin = (self._log, os.getpid())
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=begin)
            with _STARTING, _environment(chosen):
                self._pid = pool.submit(os.getpid).result()
            self._pool = pool
        return self._pool

    def stop(self) -> None:
        """Ask the worker to end; a run in it, or one that it started as a process, saves itself first."""
        self._stopped = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            with contextlib.suppress(ProcessLookupError):
                _signal(self._pid, signal.SIGINT)

    def join(self, end: float) -> None:
        """Wait for the worker's end, until then on the monotonic clock; kill it after that."""
        if self._pool is None:
            return
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.kill(self._pid, 0)  # raises once the process is gone
                time.sleep(0.02)
            _signal(self._pid, getattr(signal, "SIGKILL", signal.SIGTERM))


@contextlib.contextmanager
def _environment(chosen: dict[str, str]) -> Iterator[None]:
    """Set variables for the children that are started inside."""
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _signal(pid: int, number: int) -> None:
    """Send a signal to a worker and to what it started."""
    if os.name == "posix":
        os.killpg(pid, number)
    else:
        os.kill(pid, number)


def _begin(log: Path, parent: int) -> None:
    """Set up a worker: a process group of its own, prints to a file, the end of its parent is its own."""
    if os.name == "posix":
        os.setsid()  # Ctrl-C of the terminal goes to the parent alone, which passes it on once
    signal.signal(signal.SIGINT, lambda *_: None)  # a run has its own handler; between two there is nothing to save
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        _signal(os.getpid(), signal.SIGTERM)  # a run saves itself
        time.sleep(PATIENCE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
