"""From an exception to what the user reads: what / why / fix on stderr, exit code 2, no traceback.

`UserError` (stages/errors.py) is raised where the cause is known. This module is the outer boundary: it turns the
failures of disk, memory and files that any code may meet into the same three lines. Anything else is a bug of ours
and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys

from pipeline.streams import print_error
from stages.errors import UserError, address_limit, out_of_memory

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C


class Interrupted(Exception):
    """The run was asked to stop and has saved itself. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def disk_full(path: object) -> UserError:
    """Return the one message for a full disk, from the check before a run and from a write that failed during it."""
    return UserError(
        f"cannot write {path}",
        "the disk is full",
        "free some space or choose another disk with --out; `pipeline resume RUN` goes on from the last checkpoint",
    )


def explain(error: BaseException) -> UserError | None:
    """Return the UserError that stands for `error`, or None where it is a bug and should keep its traceback."""
    if isinstance(error, UserError):
        return error
    if out_of_memory(error):
        return _shortage(error)
    if isinstance(error, OSError):
        return _explain_os(error)
    if type(error).__name__ == "SafetensorError":
        if "os error 28" in str(error):
            return disk_full("a checkpoint")
        return UserError(
            "a weights file cannot be read",
            _first_line(error),
            "the file is damaged or cut short: fetch or make it again",
        )
    return None


def _shortage(error: BaseException) -> UserError:
    why = _first_line(error) or "the machine refused an allocation"
    limit = address_limit()
    if limit:
        why += f"; this shell lets a process address {limit / 2**30:.1f} GB"
    fix = "close other programs, or make the step smaller: fewer views per step or a lower resolution"
    return UserError("out of memory", why, "ulimit -v unlimited" if limit else fix)


def _explain_os(error: OSError) -> UserError | None:
    name = error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(name or "a file of this run")
    if name is None or not isinstance(name, str | bytes):
        return None  # no file to point at: a socket, a pipe, or a bug
    if isinstance(error, FileNotFoundError):
        return UserError(f"no such file: {name}", "nothing is there", "check the path, relative to where you stand")
    if isinstance(error, PermissionError):
        return UserError(f"no permission: {name}", _first_line(error), "change its mode, or choose another --out")
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return UserError(f"cannot use {name}", _first_line(error), "choose another path")
    return UserError(f"cannot use {name}", _first_line(error), "choose another path")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def show(error: UserError) -> None:
    """Three lines on stderr, coloured only on a terminal; plain text so that scripts can read them."""
    bold, end = ("\x1b[1m", "\x1b[0m") if sys.stderr is not None and sys.stderr.isatty() else ("", "")
    for label, text in (("what", error.what), ("why", error.why), ("fix", error.fix)):
        indented = str(text).replace("\n", "\n      ")
        print_error(f"{bold}{label + ':':<5}{end} {indented}")
