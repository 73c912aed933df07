"""`pipeline run --profile`: how the time splits up over a run, as a table, and a few steps as a trace to look into.

    RUN/profile/profile.txt           the table           RUN/profile/profile.json    the same for programs
    RUN/profile/<stage>.trace.json    a few steps, operator by operator, under the phases they belong to
    RUN/profile/run.trace.json        the whole run, by phases alone

The stages name their phases (stages/phases.py); this listens to them, and to imports and the kernels' compiler, which
happen inside whatever phase needs them first. Listening changes nothing that is computed. Traced steps are slower, so
they are counted apart from the other steps. On CUDA every phase waits for the device at both ends.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.output.files import write_whole
from pipeline.profile.summary import TRACED, split_of, table_of
from stages.phases import Recorder, phase, recording

if TYPE_CHECKING:
    import torch

    from pipeline.config.model import Config

TRACED_STEPS = 3  # of a stage
TRACED_AT = 0.8  # share of the stage at which they lie: by then every kind of step has begun
EVENTS_MAX = 100_000  # phases in the whole run's trace; what comes later is left out of it
FOLDER = "profile"
CLOCK = "pipeline clock"
Event = tuple[tuple[str, ...], float, float]  # path, beginning and length in seconds


class Profile:
    """Listens while it is entered; what it heard is written at the end of `of_run`."""

    def __init__(self) -> None:
        self.recorder = _Recorder(self)
        self.began = time.perf_counter()
        self.traces: list[Path] = []
        self._stack = contextlib.ExitStack()
        self._folder: Path | None = None
        self._windows: dict[str, range] = {}  # stage: the steps to trace
        self._steps: dict[str, int] = {}  # stage: steps begun
        self._profiler: Any = None
        self._clock_s = 0.0
        self._run: list[Event] = []
        self._window: list[Event] = []

    def __enter__(self) -> Profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # torch's tracer tells of its starts and stops otherwise
        self._stack.enter_context(recording(self.recorder))
        self._stack.enter_context(_imports_as_phases(self.recorder))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def of_run(self, folder: Path, config: Config, device: torch.device, note: Callable[[str], None]) -> Iterator[None]:
        """Trace steps of this run's stages, and write table and traces into its folder, however it ends."""
        self._folder = folder / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._windows = {stage: traced_steps(getattr(config, stage).steps) for stage in config.stages}
        if device.type == "cuda":
            import torch

            self.recorder.synchronise = torch.cuda.synchronize
        try:
            with _compilation_as_phases(self.recorder):
                yield
        finally:
            self._write(note)

    def opened(self, path: tuple[str, ...], name: str) -> str:
        """Start a trace where one is due, as a phase opens inside `path`; returns the name to count it by."""
        stage = path[-1] if path else ""
        if name != "step" or stage not in self._windows:
            return name
        step = self._steps.get(stage, 0)
        self._steps[stage] = step + 1
        if step not in self._windows[stage]:
            return name
        if step == self._windows[stage].start:
            self._start_trace()
        return TRACED

    def closed(self, path: tuple[str, ...], began: float, seconds: float) -> None:
        """End a phase's trace, where there is one."""
        event = (path, began, seconds)
        if "step" not in path[:-1] and TRACED not in path[:-1] and len(self._run) < EVENTS_MAX:
            self._run.append(event)
        if self._profiler is not None:
            self._window.append(event)
            if path[-1] == TRACED and self._steps[path[-2]] == self._windows[path[-2]].stop:
                self._stop_trace(path[-2])

    def _start_trace(self) -> None:
        from torch import profiler

        with phase("profiling"):
            activities = [profiler.ProfilerActivity.CPU]
            if self.recorder.synchronise is not None:
                activities.append(profiler.ProfilerActivity.CUDA)
            self._profiler, self._window = profiler.profile(activities=activities), []
            self._profiler.start()
            with profiler.record_function(CLOCK):
                self._clock_s = time.perf_counter()

    def _stop_trace(self, stage: str) -> None:
        trace, self._profiler = self._profiler, None
        with phase("profiling"):
            trace.stop()
            path = self._folder / f"{stage}.trace.json"
            trace.export_chrome_trace(str(path))
            content = json.loads(path.read_text(encoding="utf-8"))
            mark = next(event for event in content["traceEvents"] if event.get("name") == CLOCK and "ts" in event)
            zero_us = float(mark["ts"]) - 1e6 * self._clock_s
            content["traceEvents"] = phase_events(self._window, zero_us) + content["traceEvents"]
            write_whole(path, json.dumps(content).encode())
        self.traces.append(path)

    def _write(self, note: Callable[[str], None]) -> None:
        if self._profiler is not None:  # the run ended inside the traced steps
            self._profiler.stop()
            self._profiler = None
        facts = split_of(self.recorder.spans, time.perf_counter() - self.began)
        text = table_of(facts)
        write_whole(self._folder / "profile.json", (json.dumps(facts, indent=1) + "\n").encode())
        write_whole(self._folder / "profile.txt", (text + "\n").encode())
        whole = self._folder / "run.trace.json"
        write_whole(whole, json.dumps({"traceEvents": phase_events(self._run, -1e6 * self.began)}).encode())
        note(text)
        note(f"profile: {self._folder / 'profile.txt'} and .json; traces to open at https://ui.perfetto.dev or")
        note(f"https://www.speedscope.app (they stay on this machine): {', '.join(map(str, [*self.traces, whole]))}")


class _Recorder(Recorder):
    """A recorder that tells the profile as phases open and end."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(watch=profile.closed)
        self._profile = profile

    def enter(self, name: str) -> int:
        return super().enter(self._profile.opened(self.path, name))


def traced_steps(steps: int) -> range:
    """Return the steps of a stage that are traced, from 0; at most half of them."""
    count = min(TRACED_STEPS, max(1, steps // 2))
    first = round(TRACED_AT * (steps - count))
    return range(first, first + count)


def phase_events(events: list[Event], zero_us: float) -> list[dict[str, Any]]:
    """Return the phases as a process of their own in Chrome's trace format, above the operators of torch.profiler.

    Args:
        zero_us: what the trace's clock shows, in microseconds, where that of the events shows 0.
    """
    names = ({"name": "process_name", "args": {"name": "phases"}}, {"name": "thread_name", "args": {"name": "phases"}})
    first = [{"ph": "M", "pid": 0, "tid": 0} | name for name in names]
    first.append({"ph": "M", "pid": 0, "tid": 0, "name": "process_sort_index", "args": {"sort_index": -1}})
    ordered = sorted(events, key=lambda event: (event[1], len(event[0])))
    return first + [
        {
            "ph": "X",
            "pid": 0,
            "tid": 0,
            "cat": "phase",
            "name": path[-1],
            "ts": zero_us + 1e6 * began,
            "dur": 1e6 * seconds,
            "args": {"path": " / ".join(path)},
        }
        for path, began, seconds in ordered
    ]


@contextlib.contextmanager
def _imports_as_phases(recorder: Recorder) -> Iterator[None]:
    """Count the outermost import statement of a module that is not loaded yet as a phase "imports"."""
    plain, importing = builtins.__import__, False

    def timed(name: str, globals=None, locals=None, fromlist=(), level=0) -> Any:
        nonlocal importing
        if importing or level or recorder.thread != threading.get_ident() or _loaded(name, fromlist):
            return plain(name, globals, locals, fromlist, level)
        importing, depth = True, recorder.enter("imports")
        try:
            return plain(name, globals, locals, fromlist, level)
        finally:
            importing = False
            recorder.leave(depth)

    builtins.__import__ = timed
    try:
        yield
    finally:
        builtins.__import__ = plain


def _loaded(name: str, fromlist: Iterable[str] | None) -> bool:
    """Whether an import statement has nothing to load; asks no lazy module for what it would only then load."""
    module = sys.modules.get(name)
    return module is not None and all(item in vars(module) for item in fromlist or ())


@contextlib.contextmanager
def _compilation_as_phases(recorder: Recorder) -> Iterator[None]:
    """Count numba's work as phases: "kernel cache" for finding and loading kernels, "compilation" within it."""
    try:
        from numba.core import event
    except ImportError:
        yield
        return

    class _Listener(event.Listener):
        """Nested events of one kind are one phase."""

        def __init__(self, name: str) -> None:
            self.name, self.depths = name, []

        def on_start(self, _: object) -> None:
            if recorder.thread == threading.get_ident():
                self.depths.append(0 if self.depths else recorder.enter(self.name))

        def on_end(self, _: object) -> None:
            if recorder.thread == threading.get_ident() and self.depths:
                depth = self.depths.pop()
                if depth:
                    recorder.leave(depth)

    lock, compile_ = _Listener("kernel cache"), _Listener("compilation")
    with event.install_listener("numba:compiler_lock", lock), event.install_listener("numba:compile", compile_):
        yield
