"""Worker processes that make a suite's cells, several at once; `python -m benchmarks.quality.workers` is one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from benchmarks.quality.cells import Cell, load_result, make_cell


def serve() -> None:
    """A worker: makes the cells that come as JSON lines on stdin, answers each with a line on stdout.

    A cell that raises leaves its traceback in its folder's error.txt. Ends at the end of stdin, or when the suite dies.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, lambda *_: None)  # the run in progress gets it too, saves itself and says so
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    for text in sys.stdin:
        words = json.loads(text)
        cell, out = Cell(words["system"], words["prompt"], words["seed"]), Path(words["out"])
        error = cell.folder(out) / "error.txt"
        error.unlink(missing_ok=True)
        try:
            clips = [Path(clip) for clip in words["clips"]]
            make_cell(cell, out, clips, tuple(words["options"]), words["threads"], words["take_over"])
        except Exception:  # reported with its traceback; the other cells go on
            cell.folder(out).mkdir(parents=True, exist_ok=True)
            error.write_text(traceback.format_exc())
        print(json.dumps({"finished": not error.exists()}), file=answers, flush=True)


def _die_with_parent() -> None:
    """End this process and the run it started when the suite that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Worker:
    """One worker process, started when first needed and again when it has died."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        self._args, self._log = args, args.out / f"worker-{number}.log"
        self._process: subprocess.Popen | None = None

    def make(self, cell: Cell) -> None:
        """Have a cell made; afterwards it has a result or it broke."""
        args = self._args
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        words = {"system": cell.system, "prompt": cell.prompt, "seed": cell.seed, "out": str(args.out)}
        words |= {"clips": [str(c) for c in args.clip]}
        words |= {"options": list(args.words[cell.system])}
        words |= {"threads": args.threads, "take_over": args.take_over}
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return
        self._process.stdout.readline()  # empty when the process died

    def _start(self) -> subprocess.Popen:
        with open(self._log, "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.quality.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def end(self) -> None:
        """Stop the process and a run it may have started, which keeps its last checkpoint."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        for number in (signal.SIGINT, signal.SIGKILL):
            if self._process is None or self._process.poll() is not None:
                return
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return


def run_cells(cells: list[Cell], args: argparse.Namespace) -> list[Cell]:
    """Make what is missing, `args.workers` at a time; returns the cells that broke (a bug or a lost machine).

    Cells of one prompt and seed go to one worker in turn, since a two-stage system takes over its coarse cell's stage.
    """
    waiting = [c for c in cells if load_result(c, args.out) is None]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before", flush=True)
    tasks: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for group in _groups(waiting):
        tasks.put(group)
    workers = [Worker(args, k) for k in range(min(args.workers, len(waiting)))]
    done: list[Cell] = []
    stopped, began = threading.Event(), time.monotonic()

    def work(worker: Worker) -> None:
        while not stopped.is_set():
            try:
                group = tasks.get_nowait()
            except queue.Empty:
                return
            for cell in group:
                if stopped.is_set():
                    return
                worker.make(cell)
                done.append(cell)
                if not stopped.is_set():
                    left = (len(waiting) - len(done)) * (time.monotonic() - began) / len(done)
                    progress = f"{_headline(cell, args.out)}; about {left / 60:.0f} min left"
                    print(f"{cell.system:>10}  {cell.prompt} (seed {cell.seed}): {progress}", flush=True)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stopped.set()
        for worker in workers:
            worker.end()
    return [cell for cell in waiting if load_result(cell, args.out) is None]


def _groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells by prompt and seed, in their order."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.prompt, cell.seed), []).append(cell)
    return list(groups.values())


def _headline(cell: Cell, out: Path) -> str:
    result = load_result(cell, out)
    if result is None:
        return f"broke, see {cell.folder(out)}"
    if "failed" in result:
        return "no object: " + result["failed"].splitlines()[-1][:100]
    parts = [f"{result['cost']['wall_s']:.0f} s"] if result["cost"].get("wall_s") else []
    parts += [f"chamfer {result['geometry']['chamfer']}"] if "geometry" in result else []
    return ", ".join([*parts, f"{result['mesh']['faces']} faces"])


if __name__ == "__main__":
    serve()
