"""The folder of a run: made, found again, locked, on a disk with room.

RUN/config.yaml   what the run reads, can be given to --config   RUN/run.json      machine, versions, times, status
RUN/metrics.jsonl one line per step                              RUN/<stage>/      checkpoint.safetensors, previews/
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import IO

from pipeline.runs.checkpoint import remove_temporaries
from stages.errors import UserError

log = logging.getLogger(__name__)

_BEGUN = re.compile(r"\.lock|\.config\.yaml\..*\.part")  # what a run leaves that is killed as it begins
RUNS = "runs"  # where runs go that are told no place
MIN_FREE_MB = 300  # checkpoints of both stages with a 128^3 grid, written beside their predecessors, and the exports


def new_folder(out: Path | None, prompt: str, seed: int) -> Path:
    """Make the folder of a new run: `out` where it is new, empty or begun in vain, else runs/<prompt>-<seed>[-k]."""
    check_place(out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    runs = Path(RUNS)
    runs.mkdir(exist_ok=True)
    name, k = folder_name(prompt, seed), 1
    while True:
        folder = runs / (name if k == 1 else f"{name}-{k}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            k += 1


def folder_name(prompt: str, seed: int) -> str:
    """Return the name of a run's folder, before the number that tells it from others of the name."""
    text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:60].rstrip("-") or "run"
    return f"{slug}-{seed}"


def check_place(out: Path | None) -> None:
    """Raise UserError unless a new run can begin in `out`, None: in the usual folder; makes nothing."""
    if out is not None and out.is_dir() and not all(_BEGUN.fullmatch(path.name) for path in out.iterdir()):
        run = (out / "config.yaml").is_file()
        raise UserError(
            f"{out} already holds {'a run' if run else 'files'}",
            "a new run never writes over what is there",
            f"choose another --out, or go on with that run: pipeline resume {out}" if run else "choose another --out",
        )
    check_disk(Path(RUNS) if out is None else out)


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


def in_use(folder: Path) -> bool:
    """Return whether a process works on the run in `folder` now, by its lock."""
    if os.name != "posix":
        try:
            with Lock(folder):
                return False
        except UserError:
            return True
    import fcntl

    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return False


def open_folder(folder: Path) -> Path:
    """Check that `folder` holds a run. Raises UserError."""
    if not (folder / "config.yaml").is_file():
        near = sorted(p.name for p in Path("runs").glob("*") if (p / "config.yaml").is_file())
        known = f"runs here: {', '.join(near[-8:])}" if near else "start one with: pipeline run"
        why = "it has no config.yaml" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} is not a run", why, known)
    return folder
