"""Tasks of compiled kernels over threads: each done once, failures raised, nothing left behind."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from stages.kernels.cpu import threads
from stages.kernels.cpu.threads import each


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("tasks", [0, 1, 7, 300])
def test_every_task_is_done_once(count, tasks):
    torch.set_num_threads(count)
    done = np.zeros(tasks, np.int64)

    def kernel(task, array):
        array[task] += 1

    each(tasks, kernel, done)
    assert (done == 1).all()


def test_as_many_threads_as_torch_uses_work_at_once():
    torch.set_num_threads(2)
    meeting = threading.Barrier(2)  # broken, and raised, where one thread takes both tasks

    def kernel(task):
        meeting.wait(timeout=20)

    each(2, kernel)
    result = set()
    torch.set_num_threads(1)
    each(50, lambda task: result.add(threading.get_ident()))
    assert result == {threading.get_ident()}


@pytest.mark.parametrize("bad", [0, 1, 9])
def test_a_failing_task_is_raised_to_the_caller_and_the_next_call_works(bad):
    torch.set_num_threads(2)

    def kernel(task):
        if task == bad:
            raise ArithmeticError(f"task {task}")

    with pytest.raises(ArithmeticError, match=f"task {bad}"):
        each(10, kernel)
    test_every_task_is_done_once(2, 7)


def test_calls_from_several_threads_at_once_do_not_wait_for_each_other_for_ever():
    torch.set_num_threads(2)
    totals = np.zeros(8, np.int64)

    def kernel(task, array, k):
        array[k] += task

    callers = [threading.Thread(target=each, args=(100, kernel, totals, k)) for k in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own():
    torch.set_num_threads(2)
    each(4, lambda task: None)
    assert threads._pool is not None
    child = os.fork()
    if child == 0:  # no assertion here: pytest must not run twice
        os._exit(0 if threads._pool is None else 1)
    assert os.waitpid(child, 0)[1] == 0
