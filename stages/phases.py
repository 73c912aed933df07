"""Named, nested phases that time the work; they cost next to nothing until they are recorded.

    with phase("render", self.times):    # seconds are added to the dict, recorded or not
        with phase("march"):             # seen by a recorder alone; half a microsecond without one
            ...

The seconds in a dict are the host's. On CUDA, where calls return before the device is done, they are those of the
launches, and the phase that next waits for the device holds the rest; a Recorder can wait at both ends of each phase.

Names that readers of a profile rely on: "step" (one optimisation step of a stage), "networks" (inside a prior's neural
networks, forward or backward), "compilation", "kernel cache" and "imports" (see pipeline/profile/record.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Path = tuple[str, ...]  # a phase and those around it, outermost first


@dataclass
class Span:
    """The visits to one phase: their number, and their seconds with everything inside."""

    calls: int = 0
    seconds: float = 0.0


class Recorder:
    """Sums the phases of one thread, by path.

    Args:
        synchronise: called at both ends of every phase, to wait for a device that works on its own (CUDA): without it
            a phase would hold the launches only.
        watch: called with path, beginning and seconds of every phase that ends, for a trace.
    """

    def __init__(
        self,
        synchronise: Callable[[], None] | None = None,
        watch: Callable[[Path, float, float], None] | None = None,
    ) -> None:
        self.spans: dict[Path, Span] = {}
        self.thread = threading.get_ident()
        self.synchronise, self.watch = synchronise, watch
        self._open: list[tuple[Path, float]] = []

    def enter(self, name: str) -> int:
        """Open a phase inside the one that is open; returns what leave() wants."""
        if self.synchronise is not None:
            self.synchronise()
        path = (*self.path, name)
        self.spans.setdefault(path, Span())  # here, so that phases stand in the order in which they were first opened
        self._open.append((path, time.perf_counter()))
        return len(self._open)

    def leave(self, depth: int) -> None:
        """Close the phase that enter() opened, and any inside it that an exception left open."""
        if self.synchronise is not None:
            self.synchronise()
        now = time.perf_counter()
        while len(self._open) >= depth:
            path, began = self._open.pop()
            span = self.spans[path]
            span.calls += 1
            span.seconds += now - began
            if self.watch is not None:
                self.watch(path, began, now - began)

    @property
    def path(self) -> Path:
        """The phase that is open now; empty outside all."""
        return self._open[-1][0] if self._open else ()


_recorder: Recorder | None = None


def recorder() -> Recorder | None:
    """Return the recorder that listens to this thread's phases now, or None."""
    listener = _recorder
    return listener if listener is not None and listener.thread == threading.get_ident() else None


@contextlib.contextmanager
def recording(listener: Recorder) -> Iterator[Recorder]:
    """Let a recorder listen, in place of one that did."""
    global _recorder
    before, _recorder = _recorder, listener
    try:
        yield listener
    finally:
        _recorder = before


class phase:
    """`with phase(name, times):` adds the seconds inside to times[name], where given, and tells the recorder if any."""

    __slots__ = ("_began", "_depth", "_listener", "_name", "_times")

    def __init__(self, name: str, times: dict[str, float] | None = None) -> None:
        self._name, self._times = name, times

    def __enter__(self) -> None:
        self._listener = None if _recorder is None else recorder()
        if self._listener is not None:
            self._depth = self._listener.enter(self._name)
        if self._times is not None:
            self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._times is not None:
            self._times[self._name] = self._times.get(self._name, 0.0) + time.perf_counter() - self._began
        if self._listener is not None:
            self._listener.leave(self._depth)


def backward_phase(name: str, entrance: Tensor, exit: Tensor) -> None:
    """Count the backward pass from the gradient of `exit` to that of `entrance` as a phase, if there is a recorder.

    For a function whose forward went from entrance to exit, both on the way of one gradient; the tensors' hooks look
    at the clock and leave the gradients as they are. Where autograd works in a thread of its own (CUDA), the thread
    that called backward() waits, so the phase lies inside the one that is open there.
    """
    listener = recorder()
    if listener is None or not (entrance.requires_grad and exit.requires_grad):
        return
    depth: list[int] = []
    exit.register_hook(lambda _: depth.append(listener.enter(name)))
    entrance.register_hook(lambda _: listener.leave(depth.pop()) if depth else None)
