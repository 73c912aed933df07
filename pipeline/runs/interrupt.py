"""Ctrl-C that loses nothing: the first asks the running step to be the last, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # SIGTERM is how a batch system asks


class StopRequest:
    """Context in which SIGINT and SIGTERM set `requested` while `gentle`, and raise KeyboardInterrupt otherwise.

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
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.exit_code = 128 + number
        if self.requested or not self.gentle:
            raise KeyboardInterrupt
        self.requested = True
        self._say("stopping after this step; press Ctrl-C again to stop at once")
