"""Threads for the CPU kernels: compiled functions that let go of Python's lock, called task by task.

numba's own parallel loops took half of all compilation (each loop's body is compiled twice more) and start a second
pool of threads beside torch's. There are as many threads here as torch uses (OMP_NUM_THREADS, torch.set_num_threads).
Work is split by shape alone and tasks write apart, so the bytes do not depend on how many threads there are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None


def each(tasks: int, kernel: Callable[..., object], *arguments: object) -> None:
    """Run kernel(task, *arguments) for every task in range(tasks), handed out one by one.

    Args:
        kernel: compiled with nogil; its tasks do not depend on each other.
    """
    helpers = min(torch.get_num_threads(), tasks) - 1
    numbers = itertools.count()  # next() is one step under Python's lock

    def work() -> None:
        for task in numbers:
            if task >= tasks:
                return
            kernel(task, *arguments)

    futures = [_threads().submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():  # not begun: nothing is left for it
                future.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, os.cpu_count() or 1), thread_name_prefix="kernels")
    return _pool


def _forget() -> None:
    global _pool
    _pool = None  # a forked child has none of its parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
