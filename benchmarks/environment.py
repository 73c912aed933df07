"""What every result line says of where it came from: date, revision, machine, versions; and writing such lines."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.output.files import write_whole
from pipeline.runs.process import git_revision

FOLDER = Path(__file__).parent  # of the benchmarks: prompts, suites and cures lie in it
RESULTS = FOLDER / "results"
PACKAGES = ("torch", "numpy", "numba", "diffusers", "transformers", "trimesh")


def environment() -> dict[str, Any]:
    """Return the date (UTC), git revision, machine and package versions; no host or user names."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_revision(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": _device(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON line to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_whole(path, (before + json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All JSON lines of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def quiet_libraries() -> None:
    """No progress bars and advice of the model libraries on the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
