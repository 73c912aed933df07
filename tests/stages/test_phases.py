"""Phases: nothing without a recorder, paths and sums with one, the backward pass, gradients that stay as they are."""

import sys
import threading
import time

import pytest
import torch

from stages.phases import Recorder, backward_phase, phase, recorder, recording


class Clock:
    """A clock that goes on when it is told to, and counts who looks at it."""

    def __init__(self) -> None:
        self.now, self.looks = 100.0, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def visit(*names: str) -> None:
    if names:
        with phase(names[0]):
            visit(*names[1:])


def test_a_phase_adds_its_seconds_to_the_dict_with_or_without_a_recorder(clock):
    times = {"render": 1.0}
    with phase("render", times):
        clock.now += 0.25
    with recording(Recorder()), phase("optimiser", times):
        clock.now += 0.5
    assert times == {"render": 1.25, "optimiser": 0.5}


def test_a_phase_without_a_recorder_looks_at_no_clock_and_calls_nothing(clock):
    calls = []
    march = phase("march")
    sys.setprofile(lambda frame, event, arg: calls.append((frame.f_code.co_name, event)))
    with march:
        pass
    sys.setprofile(None)
    assert [name for name, event in calls if event == "call"] == ["__enter__", "__exit__"]
    assert [name for name, event in calls if event == "c_call"] in ([], [calls[-1][0]])  # setprofile itself
    assert clock.looks == 0


def test_paths_nest_and_calls_add_up():
    with recording(Recorder()) as listener:
        for _ in range(3):
            visit("step", "guidance", "networks")
        visit("networks")
    calls = {path: span.calls for path, span in listener.spans.items()}
    assert calls == {("step",): 3, ("step", "guidance"): 3, ("step", "guidance", "networks"): 3, ("networks",): 1}
    assert listener.spans["step",].seconds >= listener.spans["step", "guidance"].seconds > 0
    assert recorder() is None


def test_an_exception_leaves_no_phase_open():
    with recording(Recorder()) as listener:
        with pytest.raises(ValueError), phase("step"):
            listener.enter("left open")
            raise ValueError
        assert listener.path == ()
        visit("step")
    assert listener.spans["step",].calls == 2


def test_what_other_threads_do_is_not_counted():
    with recording(Recorder()) as listener, phase("step"):
        other = threading.Thread(target=visit, args=("writing",))
        other.start()
        other.join()
    assert list(listener.spans) == [("step",)]


def test_the_device_is_waited_for_at_both_ends_and_the_watcher_sees_every_phase():
    waits, names = [], []
    with recording(Recorder(lambda: waits.append(0), lambda path, began, seconds: names.append((path, seconds)))):
        visit("step", "render")
    assert len(waits) == 4
    assert [path for path, _ in names] == [("step", "render"), ("step",)]


class Slow(torch.autograd.Function):
    """The identity, whose backward pass takes a second of a test's clock."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.perf_counter.now += 1
        return grad.clone()


def test_the_backward_pass_through_a_network_is_a_phase_of_its_own(clock):
    leaf = torch.ones(3, requires_grad=True)
    with recording(Recorder()) as listener, phase("step"):
        entrance = Slow.apply(2 * leaf)  # not counted
        exit = Slow.apply(entrance * 3)
        backward_phase("networks", entrance, exit)
        with phase("backward"):
            Slow.apply(exit).sum().backward()  # its own backward is not counted either
    inside = listener.spans["step", "backward", "networks"]
    assert inside.calls == 1
    assert inside.seconds == 1 and listener.spans["step", "backward"].seconds == 3
    assert torch.equal(leaf.grad, torch.full((3,), 6.0))


def test_backward_phases_leave_the_tensors_alone_where_nothing_is_recorded():
    leaf = torch.ones(3, requires_grad=True)
    exit = leaf * 2
    backward_phase("networks", leaf, exit)
    assert not leaf._backward_hooks and not exit._backward_hooks
    with recording(Recorder()):
        backward_phase("networks", leaf.detach(), exit)
    assert not exit._backward_hooks


def test_a_backward_pass_that_never_reaches_the_entrance_does_not_hold_its_phase_open():
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with recording(Recorder()) as listener:
        exit = first * second
        backward_phase("networks", first, exit)
        with phase("backward"):
            torch.autograd.grad(exit.sum(), second)  # hooks of `first` do not run
        assert listener.path == ()
