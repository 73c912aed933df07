"""The log of a run: run.json and metrics.jsonl.

On CUDA the seconds of run.json's phases are those of the launches (each session's `phase_clock` says so): nothing waits
for the device at their ends, which would slow the run. `pipeline run --profile` waits.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.output.files import write_whole
from pipeline.runs.checkpoint import read_json
from pipeline.runs.process import git_revision, peak_gpu_memory_mb, peak_memory_mb, version_of
from stages.errors import UserError

_CLOCKS = {  # what the seconds of run.json's phases are, by device
    "cpu": "the host's",
    "cuda": "the host's, without waiting for the GPU: a phase's seconds are those of its launches, and what the GPU "
    "has yet to do then counts in the phase that waits next; the seconds of a stage are whole",
}
UNFINISHED = "unfinished"  # what run.json says of a run until it ends: true as well once a kill has ended its process
_PACKAGES = ("torch", "numpy", "numba", "warp-lang", "diffusers", "transformers", "safetensors", "xatlas")


class Record:
    """run.json: kept current through the run, so that a killed one tells how far it came.

    Its status is "unfinished" until the run ends as "finished", "interrupted" or "failed". Whether a process works on
    it is not written down, for a killed one could not take it back: Result.status asks the folder's lock.

    Args:
        folder: of the run.
        writes: False in a process that leaves the file to another one.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self._path, self._writes = folder / "run.json", writes
        self.data: dict[str, Any] = {"stages": {}, "sessions": []}
        if self._path.exists():
            self.data = read_record(self._path)

    def open_session(self, device: dict[str, Any], kernels: dict[str, str], **facts: Any) -> None:
        """Note machine, versions, each kernel family's backend and the phases' clock; earlier sessions keep theirs."""
        session = {
            "started": _now(),
            "pipeline": __version__,
            "git": git_revision(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device,
            "phase_clock": _CLOCKS.get(device.get("type"), _CLOCKS["cpu"]),
            "kernels": kernels,
            "versions": {name: version_of(name) for name in _PACKAGES},
        }
        self.data |= facts
        self.data["sessions"].append(session)
        self.save(status=UNFINISHED)

    def save(self, **changes: Any) -> None:
        """Write run.json with these changes, once a session is open."""
        self.data |= changes
        if not self.data["sessions"]:  # stopped before one was opened
            return
        self.data["sessions"][-1]["ended"] = _now()
        for name, peak in {"peak_memory_mb": peak_memory_mb(), "peak_gpu_memory_mb": peak_gpu_memory_mb()}.items():
            earlier = [session.get(name) or 0 for session in self.data["sessions"][:-1]]
            self.data["sessions"][-1][name] = peak
            self.data[name] = max([*earlier, peak or 0]) or None
        if not self._writes:
            return
        write_whole(
            self._path, (json.dumps(self.data, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        )


def read_record(path: Path) -> dict[str, Any]:
    """Return what a run.json holds. Raises: UserError where it is damaged, or has something of the wrong kind."""
    fix = "remove it; `pipeline resume` writes a new one and loses only the times noted so far"
    data = {"stages": {}, "sessions": []} | read_json(path, fix)
    for name, kind in (("stages", dict), ("sessions", list), ("outputs", list), ("export", dict), ("prompt", str)):
        if name in data and not isinstance(data[name], kind):
            raise UserError(f"damaged file {path}", f"its {name} is {json.dumps(data[name])[:60]}", fix)
    seconds = [facts.get("seconds") if isinstance(facts, dict) else None for facts in data.get("stages", {}).values()]
    phases = data.get("export", {}).get("phases", {})
    seconds += phases.values() if isinstance(phases, dict) else [None]
    wrong = [value for value in seconds if not isinstance(value, int | float)]
    wrong += [session for session in data.get("sessions", []) if not isinstance(session, dict)]
    wrong += [name for name in data.get("outputs", []) if not isinstance(name, str)]
    if wrong:
        raise UserError(f"damaged file {path}", f"it holds {json.dumps(wrong[0])[:60]} out of place", fix)
    return data


class Metrics:
    """metrics.jsonl: one object per step, appended; lines past the checkpoint go when a run is resumed.

    Lines are buffered and flushed every second, so a kill loses at most that and never what a checkpoint counts on.

    Args:
        folder: of the run.
        writes: False in a process that leaves the file to another one.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self._path, self._writes = folder / "metrics.jsonl", writes
        self._lines: list[str] = []
        self._flushed = time.monotonic()

    def rewind(self, stage: str, step: int, later: tuple[str, ...]) -> None:
        """Drop lines of `stage` after `step` and of `later` stages, and those that are broken or cut short."""
        if not self._writes or not self._path.exists():
            return
        lines = []
        for line, row in _rows(self._path):
            if row is None or row["stage"] in later or (row["stage"] == stage and row["step"] > step):
                continue
            lines.append(line)
        write_whole(self._path, "".join(line + "\n" for line in lines).encode())

    def add(self, stage: str, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Append a step's line; the file gets it within a second or so."""
        line = {"stage": stage, "step": step, "seconds": round(seconds, 4)}
        self._lines.append(json.dumps(line | {name: float(f"{value:.6g}") for name, value in metrics.items()}))
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        """Write the lines to the file; durable: wait until the disk has them."""
        if self._writes:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in self._lines)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        self._lines.clear()
        self._flushed = time.monotonic()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a last line that a kill cut short, or that is being written, is left out.

    Raises: UserError for another line that is no row.
    """
    rows = _rows(path)
    if rows and rows[-1][1] is None:
        rows.pop()
    for number, (line, row) in enumerate(rows, 1):
        if row is None:
            fix = "remove the line; `pipeline resume` does so where the run has steps to take"
            raise UserError(f"damaged file {path}", f"its line {number} is no step of a stage: {line[:60]!r}", fix)
    return [row for _, row in rows if row is not None]


def _rows(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """The lines of a metrics.jsonl, and what each says; None where that is no step of a stage."""
    rows: list[tuple[str, dict[str, Any] | None]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        whole = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
        rows.append((line, row if whole else None))
    return rows


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
