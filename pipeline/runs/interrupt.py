"""Ctrl-C and its kin that lose nothing: the first asks the running step to be the last, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # SIGTERM is how a batch system asks
_SIGNALS += [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # and SIGHUP a terminal that goes away


class StopRequest:
    """Context in which a signal sets `requested` while `gentle`, and raises KeyboardInterrupt otherwise.

    The signals are SIGINT, SIGTERM and SIGHUP. A terminal that goes away may send more than one SIGHUP, which ask no
    more than the first; a SIGHUP that the process is told to ignore, as by nohup, stays ignored.

    Args:
        say: called once with a line for the user when a stop is first asked for.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self.gentle = False  # true only where someone looks at `requested` soon
        self.exit_code = 128 + signal.SIGINT
        self._say = say
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in _SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def request(self, text: str) -> None:
        """Ask for a stop as the first Ctrl-C does, and say so."""
        self.requested = True
        self._say(text)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested and number not in (signal.SIGINT, signal.SIGTERM):
            return
        self.exit_code = 128 + number
        if self.requested or not self.gentle:
            raise KeyboardInterrupt
        self.requested = True
        self._say("stopping after this step; press Ctrl-C again to stop at once")
