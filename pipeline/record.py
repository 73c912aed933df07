"""What a run remembers of itself: its folder and lock, run.json, metrics.jsonl.

RUN/config.yaml   every setting, can be given to --config        RUN/run.json      machine, versions, times, status
RUN/metrics.jsonl one line per step                              RUN/<stage>/      checkpoint.safetensors, previews/

On CUDA the seconds of run.json's phases are those of the launches (each session's `phase_clock` says so): nothing waits
for the device at their ends, which would slow the run. `pipeline run --profile` waits.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import IO, Any

from pipeline import __version__
from pipeline.checkpoint import read_json, remove_temporaries
from pipeline.export.files import write_whole
from stages.errors import UserError

log = logging.getLogger(__name__)

MIN_FREE_MB = 300  # checkpoints of both stages with a 128^3 grid, written beside their predecessors, and the exports
_CLOCKS = {  # what the seconds of run.json's phases are, by device
    "cpu": "the host's",
    "cuda": "the host's, without waiting for the GPU: a phase's seconds are those of its launches, and what the GPU "
    "has yet to do then counts in the phase that waits next; the seconds of a stage are whole",
}
_PACKAGES = ("torch", "numpy", "numba", "warp-lang", "diffusers", "transformers", "safetensors", "xatlas")


def new_folder(out: Path | None, prompt: str, seed: int) -> Path:
    """Make the folder of a new run: `out` where it is new or empty, else runs/<prompt>-<seed>[-k]."""
    if out is not None:
        if out.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
            run = (out / "config.yaml").is_file()
            raise UserError(
                f"{out} already holds {'a run' if run else 'files'}",
                "a new run never writes over what is there",
                f"choose another --out, or go on with that run: pipeline resume {out}"
                if run
                else "choose another --out",
            )
        check_disk(out)
        out.mkdir(parents=True, exist_ok=True)
        return out
    text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:60].rstrip("-") or "run"
    runs = Path("runs")
    check_disk(runs)
    runs.mkdir(exist_ok=True)
    k = 1
    while True:
        folder = runs / (f"{slug}-{seed}" if k == 1 else f"{slug}-{seed}-{k}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            k += 1


def check_disk(path: Path) -> None:
    """Raise UserError unless a run's files fit on the disk that holds (or will hold) `path`."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free / 2**20
    if free < MIN_FREE_MB:
        raise UserError(
            f"not enough room on the disk of {path}",
            f"{free:.0f} MB are free and a run may need {MIN_FREE_MB} MB",
            "free some space or choose another disk with --out",
        )


class Lock:
    """One process at a time in a run folder; the operating system drops the lock when its holder dies, however."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> Lock:
        self._file = open(self._path, "a")
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                log.warning("%s: this disk cannot lock files (%s); one process at a time, please", self._path, error)
                return self
            self._file.close()
            raise UserError(
                f"{self._path.parent} is in use",
                "another process is working on this run",
                "wait for it, or stop it with Ctrl-C",
            ) from None
        remove_temporaries(self._path.parent)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def open_folder(folder: Path) -> Path:
    """Check that `folder` holds a run. Raises UserError."""
    if not (folder / "config.yaml").is_file():
        near = sorted(p.name for p in Path("runs").glob("*") if (p / "config.yaml").is_file())
        known = f"runs here: {', '.join(near[-8:])}" if near else "start one with: pipeline run"
        why = "it has no config.yaml" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} is not a run", why, known)
    return folder


class Record:
    """run.json: kept current through the run, so that a killed one tells how far it came."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "run.json"
        self.data: dict[str, Any] = {"stages": {}, "sessions": []}
        if self._path.exists():
            fix = "remove it; `pipeline resume` writes a new one and loses only the times noted so far"
            self.data |= read_json(self._path, fix)

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
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        self.data |= facts
        self.data["sessions"].append(session)
        self.save(status="running")

    def save(self, **changes: Any) -> None:
        self.data |= changes
        self.data["sessions"][-1]["ended"] = _now()
        for name, peak in {"peak_memory_mb": peak_memory_mb(), "peak_gpu_memory_mb": peak_gpu_memory_mb()}.items():
            earlier = [session.get(name) or 0 for session in self.data["sessions"][:-1]]
            self.data["sessions"][-1][name] = peak
            self.data[name] = max([*earlier, peak or 0]) or None
        write_whole(self._path, (json.dumps(self.data, indent=2, ensure_ascii=False) + "\n").encode())


class Metrics:
    """metrics.jsonl: one object per step, appended; lines past the checkpoint go when a run is resumed.

    Lines are buffered and flushed every second, so a kill loses at most that and never what a checkpoint counts on.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._lines: list[str] = []
        self._flushed = time.monotonic()

    def rewind(self, stage: str, step: int, later: tuple[str, ...]) -> None:
        """Drop lines of `stage` after `step` and of `later` stages, and a last line cut short."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("stage") in later or (entry.get("stage") == stage and entry.get("step", 0) > step):
                continue
            kept.append(line)
        write_whole(self._path, "".join(line + "\n" for line in kept).encode())

    def add(self, stage: str, step: int, seconds: float, metrics: dict[str, float]) -> None:
        line = {"stage": stage, "step": step, "seconds": round(seconds, 4)}
        self._lines.append(json.dumps(line | {name: float(f"{value:.6g}") for name, value in metrics.items()}))
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def flush(self, durable: bool = False) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self._lines)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        self._lines.clear()
        self._flushed = time.monotonic()


def memory_mb() -> float | None:
    """Resident memory of this process now, in MB; None where the system does not tell cheaply."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return None


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process in MB. ru_maxrss is not used on Linux: it survives fork and exec."""
    try:
        text = Path("/proc/self/status").read_text()
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) / 1024, 1)
    except (OSError, TypeError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)


def peak_gpu_memory_mb() -> float | None:
    """Highest memory of this process's tensors on the GPU in MB, as torch's allocator counts it; None without a GPU.

    The driver's own share and what kernels take beside torch are not in it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


MAKES_RESULTS = ("pipeline", "stages", "configs", "benchmarks", "pyproject.toml", ":(exclude)benchmarks/results")

ROOT = Path(__file__).resolve().parent.parent


def git_revision(root: Path = ROOT) -> str | None:
    """The source's revision, with -dirty where files that make results differ; None for an installed package.

    Texts, tests and published results are none of these: a second benchmark may run after the first has published.
    """
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *MAKES_RESULTS)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
