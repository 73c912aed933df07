"""Standard streams that may be closed, full or short of letters: they end the printing, not the run."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, Any


class Output:
    """Standard output as a run writes to it: once a pipe, a terminal or a file takes no more, nothing is printed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        """Write text, or drop it where the stream takes no more; returns its length."""
        try:
            _write(sys.stdout, text)
        except OSError:
            silence(sys.stdout)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or stop printing where that fails."""
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            silence(sys.stdout)

    def isatty(self) -> bool:
        """Return whether standard output is a terminal."""
        return sys.stdout is not None and sys.stdout.isatty()


def _write(stream: IO[str] | None, text: str) -> None:
    if stream is None:  # closed before the start
        return
    try:
        stream.write(text)
    except UnicodeEncodeError:
        stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))


def print_error(text: str) -> None:
    """Print a line on standard error where somebody reads it; never fails."""
    try:
        _write(sys.stderr, f"{text}\n")
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        silence(sys.stderr)


def silent_rank() -> bool:
    """Return whether torchrun started this process beside a first one, which speaks for both."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def silence(stream: IO[str]) -> None:
    """Let what is still to come on a stream that takes no more go nowhere, the interpreter's last flush included."""
    with contextlib.suppress(OSError, ValueError):  # a stream of the caller's own may have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_missing() -> None:
    """Put nothing in the place of standard streams that are closed: the next file that is opened would be one of them,
    and what a library prints would go into it."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
