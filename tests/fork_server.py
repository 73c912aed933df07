"""`pipeline` processes for tests that kill them, forked from one process that has imported torch already.

As a script it reads JSON lines: {"arguments", "folder", "environment", "toy"} forks a `pipeline` command (with the
stages of tests/toy_pipeline.py where toy is true) and answers its pid, {"wait": pid} answers its exit code. Output goes
to FOLDER/out.txt and FOLDER/err.txt. Nothing is computed before the forks, so no thread pool is lost in them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Forked:
    """A `pipeline` process working in `folder`."""

    def __init__(self, server: subprocess.Popen, request: dict) -> None:
        self._server, self.folder = server, Path(request["folder"])
        self.pid = self._ask(request)

    def _ask(self, request: dict) -> int:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def finish(self) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        code = self._ask({"wait": self.pid})
        return code, (self.folder / "out.txt").read_text(), (self.folder / "err.txt").read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Poll a condition that the live process will meet."""
        deadline = time.monotonic() + 240
        while not true():
            assert time.monotonic() < deadline, self.finish()
            time.sleep(0.005)


@contextlib.contextmanager
def forking() -> Iterator[Callable[..., Forked]]:
    """A function (*arguments, cwd, toy, **environment) -> Forked."""
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(*arguments: object, cwd: Path, toy: bool = False, **environment: str) -> Forked:
        request = {"arguments": [str(a) for a in arguments], "folder": str(cwd), "environment": environment, "toy": toy}
        return Forked(server, request)

    try:
        yield start
    finally:
        server.stdin.close()
        server.wait(timeout=60)


def _child(request: dict) -> int:
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from pipeline.cli import main

    if request["toy"]:
        from tests import toy_pipeline

        toy_pipeline.install()
    try:
        main(request["arguments"])
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
    return 1


def _serve() -> None:
    import pipeline.output.write
    import pipeline.runs.run  # noqa: F401 (all are only to be loaded before the forks)
    import stages.coarse
    import stages.fine
    import stages.kernels.cpu.hashgrid  # noqa: F401
    import tests.toy_pipeline  # noqa: F401

    gc.freeze()  # a child's collection would otherwise copy every page of the parent
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = _child(request)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _serve()
