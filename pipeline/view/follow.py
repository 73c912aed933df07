"""A run folder as a page shows it: read again and again while another process writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.model import read_config
from pipeline.runs.folder import in_use
from pipeline.runs.log import UNFINISHED, read_record
from stages.errors import UserError


@dataclass
class Followed:
    """The metrics of a run by stage, read on from where they were read to."""

    folder: Path
    steps: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    last: tuple[str, int] | None = None  # stage and step
    _read: int = 0
    _planned: dict[str, int] = field(default_factory=dict)
    _settings_of: int = 0  # when they were written

    def read_on(self) -> bool:
        """Read the lines that came since; returns whether there were any."""
        path = self.folder / "metrics.jsonl"
        if not is_inside(path, self.folder):
            return False
        try:
            size = path.stat().st_size
            if size < self._read:  # the run was resumed, and its last lines went
                self.steps, self.values, self._read = {}, {}, 0
            if size == self._read:
                return False
            with open(path, "rb") as file:
                file.seek(self._read)
                text = file.read(size - self._read)
        except OSError:
            return False
        whole, _, _ = text.rpartition(b"\n")
        self._read += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            self._add(line)
        return bool(whole)

    def planned(self) -> dict[str, int]:
        """Return how many steps each stage is to take, empty where the settings cannot be read."""
        try:
            written = (self.folder / "config.yaml").stat().st_mtime_ns
            if written != self._settings_of:
                self._settings_of, self._planned = written, {}
                config = read_config(self.folder)
                self._planned = {name: getattr(config, name).steps for name in config.stages}
        except (UserError, AttributeError, OSError):
            pass
        return self._planned

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            stage, step = str(row.pop("stage")), int(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        steps, values = self.steps.setdefault(stage, []), self.values.setdefault(stage, {})
        if steps and step <= steps[-1]:  # taken again after a kill
            keep = sum(known < step for known in steps)
            del steps[keep:]
            for column in values.values():
                del column[keep:]
        for name in {*values, *row}:
            column = values.setdefault(name, [float("nan")] * len(steps))
            value = row.get(name)
            column.append(float(value) if isinstance(value, int | float) else float("nan"))
        steps.append(step)
        self.last = (stage, step)


@dataclass(frozen=True)
class Facts:
    """Where a run stands.

    Args:
        status: finished, interrupted, failed, running or unfinished; see Result.status.
        stage, step, steps: the last step of which there is a line, and how many the stage has, 0 where unknown.
    """

    prompt: str
    seed: int
    status: str
    stage: str
    step: int
    steps: int


def facts_of(followed: Followed) -> Facts:
    """Return where a run stands; its metrics are as old as the last :meth:`Followed.read_on`."""
    record, (stage, step) = record_of(followed.folder), followed.last or ("", 0)
    prompt, seed = str(record.get("prompt", followed.folder.name)), record.get("seed", 0)
    saved = record.get("stages", {}).get(stage, {}).get("steps", 0)  # of settings that only another version can read
    steps = followed.planned().get(stage, saved)
    return Facts(prompt, seed, status_of(followed.folder), stage, step, steps if isinstance(steps, int) else 0)


def record_of(folder: Path) -> dict[str, Any]:
    """Return run.json, empty where it cannot be read now."""
    try:
        return read_record(folder / "run.json")
    except (UserError, OSError):
        return {}


def status_of(folder: Path) -> str:
    """Return finished, interrupted, failed, running or unfinished; see Result.status."""
    status = record_of(folder).get("status", UNFINISHED)
    return "running" if status == UNFINISHED and in_use(folder) else status


def previews_of(folder: Path) -> list[Path]:
    """Return the preview pictures of a run in the order in which they were made; none outside."""
    paths = [path for path in folder.glob("*/previews/*.png") if is_inside(path, folder)]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))


def downloads_of(folder: Path) -> list[Path]:
    """Return the files that may be fetched: results by the record, settings, record and metrics; none outside."""
    names = [*record_of(folder).get("outputs", []), "config.yaml", "run.json", "metrics.jsonl"]
    paths = [folder / name for name in dict.fromkeys(names)]
    return [path for path in paths if path.is_file() and is_inside(path, folder)]


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


def runs_in(folder: Path) -> list[Path]:
    """Return the runs to show: the folder itself, or those that lie in it. Raises: UserError where there is none."""
    if (folder / "config.yaml").is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not runs:
        why = "there is neither a config.yaml nor a folder with one" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} holds no run", why, "give a run folder, or a folder of runs")
    return runs
