"""The display of a run's progress: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.runs.process import memory_mb, peak_gpu_memory_mb
from pipeline.streams import Output

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_EVERY_S = 10.0  # seconds between plain lines
COMPILE_S = 28  # measured: the 32 kernels that a run of both stages compiles, two cores


class Progress:
    """Notes and one bar per stage. Speed and time left come from the last steps, so a slow first one is forgotten."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(file=Output(), highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print one line that stays."""
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def stage(self, name: str, steps: int, done: int) -> Iterator[StageProgress]:
        """Show a stage that has taken `done` of `steps` steps."""
        display = (_Live if self.console.is_terminal else _Plain)(self.console, name, steps, done)
        with display:
            yield display

    @contextlib.contextmanager
    def announce_compilation(self) -> Iterator[None]:
        """Say so when numba or Warp compiles a kernel: the cache of an earlier run is silent, a new machine is not."""
        from stages.kernels.cuda.launch import builds_watched

        watch = _CompileWatch(self, _cache_trouble)
        with contextlib.ExitStack() as stack:
            stack.callback(watch.report)
            stack.enter_context(builds_watched(watch.start, watch.end))
            with contextlib.suppress(ImportError):  # `pipeline doctor` says what the lack of numba costs
                from numba.core import event

                class _Listener(event.Listener):
                    def on_start(self, _: object) -> None:
                        watch.start(f", about {COMPILE_S} s")

                    def on_end(self, _: object) -> None:
                        watch.end()

                stack.enter_context(event.install_listener("numba:compile", _Listener()))
            yield


class _CompileWatch:
    """Sums nested and repeated compilations into two lines."""

    def __init__(self, progress: Progress, trouble: Callable[[], str]) -> None:
        self._progress, self._depth, self._count, self._seconds, self._since = progress, 0, 0, 0.0, 0.0
        self._trouble = trouble  # why the kernels are not kept
        self._announced = False

    def start(self, estimate: str = "") -> None:
        if not self._announced:
            self._announced = True
            extent = "run" if self._trouble() else "machine, once"
            self._progress.note(f"compiling kernels for this {extent}{estimate}")
        if self._depth == 0:
            self._since = time.monotonic()
        self._depth += 1

    def end(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._count += 1
            self._seconds += time.monotonic() - self._since

    def report(self) -> None:
        if not self._count:
            return
        trouble = self._trouble()
        reuse = f"they are not kept: {trouble}" if trouble else "later runs load them"
        self._progress.note(f"compiled {self._count} kernels in {self._seconds:.0f} s; {reuse}")


class StageProgress:
    """Step, speed, time left, memory and the stage's headline."""

    def __init__(self, console: Console, name: str, steps: int, done: int) -> None:
        self.console, self.name, self.steps, self.done = console, name, steps, done
        self._recent: list[tuple[float, int]] = []  # times at the end of the last steps

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, headline: str) -> None:
        """Show that so many steps are done, and the stage's headline."""
        raise NotImplementedError

    def _speed(self, done: int) -> float:
        """Steps a second over the last 20 steps; 0 after the first, whose time compilation may have taken."""
        self._recent.append((time.monotonic(), done))
        del self._recent[:-21]
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / max(t1 - t0, 1e-9)

    def _facts(self, done: int, headline: str) -> dict[str, str]:
        speed = self._speed(done)
        host, gpu = memory_mb(), peak_gpu_memory_mb()
        memory = [] if host is None else [f"{host / 1024:.1f} GB"]
        memory += [] if gpu is None else [f"GPU peak {gpu / 1024:.1f} GB"]
        return {
            "speed": "" if speed == 0 else f"{speed:.2f} it/s" if speed >= 1 else f"{1 / speed:.1f} s/it",
            "left": f"{duration((self.steps - done) / speed)} left" if speed else "",
            "memory": ", ".join(memory),
            "headline": headline,
        }


class _Plain(StageProgress):
    """A line now and then: the first step, every ten seconds, the last step."""

    _last = -PLAIN_EVERY_S

    def update(self, done: int, headline: str) -> None:
        facts = self._facts(done, headline)
        now = time.monotonic()
        if done < self.steps and now - self._last < PLAIN_EVERY_S:
            return
        self._last = now
        parts = [f"{done}/{self.steps}", facts["speed"], facts["left"], facts["memory"], headline]
        self.console.print(f"{self.name}  " + "  ".join(p for p in parts if p), markup=False)


class _Live(StageProgress):
    """A bar that redraws four times a second."""

    def __enter__(self) -> StageProgress:
        from rich import progress as rich

        self._bar = rich.Progress(
            rich.TextColumn("[bold]{task.description:<7}"),
            rich.BarColumn(bar_width=24),
            rich.TextColumn("{task.completed}/{task.total}"),
            *(
                rich.TextColumn(f"{{task.fields[{name}]}}", markup=False)
                for name in ("speed", "left", "memory", "headline")
            ),
            console=self.console,
            refresh_per_second=4,
        )
        blank = dict.fromkeys(("speed", "left", "memory", "headline"), "")
        self._bar.start()
        self._task = self._bar.add_task(self.name, total=self.steps, completed=self.done, **blank)
        return self

    def update(self, done: int, headline: str) -> None:
        facts = self._facts(done, headline)
        self._bar.update(self._task, completed=done, **facts)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _cache_trouble() -> str:
    try:
        from stages.kernels.cpu.jit import cache_trouble
    except ImportError:  # without numba, of which `pipeline doctor` tells
        return ""
    return cache_trouble()


def duration(seconds: float) -> str:
    """Return a time as '48 s', '3 min 05 s' or '2 h 10 min'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
