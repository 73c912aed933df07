"""`pipeline view`: the server of the page, on loopback unless asked otherwise in words."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from pathlib import Path
from types import TracebackType

from pipeline.view.follow import runs_in
from stages.errors import UserError

PORT = 8080
HOST = "127.0.0.1"


def view(folder: Path, port: int = PORT, host: str = HOST, *, open_it: bool = False, parent: int | None = None) -> None:
    """Show a run, or a folder of runs, until Ctrl-C.

    Args:
        folder: of a run that is finished, interrupted or running anywhere, or a folder of runs.
        port: of the page; 0 takes a free one.
        host: address to listen at; any other than loopback is open to others, who need the token in the address that is
            printed.
        open_it: whether to open the page in a browser of this machine.
        parent: process whose end ends this one as well; None: no such.
    Raises: UserError where there is no run, the port is taken, viser is not installed, or there is no browser to open.
    """
    runs_in(folder)
    check_viewer()
    check_port(port, host)
    browser = find_browser() if open_it else None
    import viser

    from pipeline.view.gate import Gate, behind_gate
    from pipeline.view.page import Page

    logging.basicConfig(format="%(message)s")
    secret = secrets.token_urlsafe(24)
    with contextlib.redirect_stdout(io.StringIO()), behind_gate(secret):  # its own words name the port behind the gate
        server = viser.ViserServer(HOST, check_port(0, HOST), label=f"pipeline view {folder.name}", verbose=False)
    server.request_share_url = lambda *_, **__: None  # it would open the page to the world
    try:
        page = Page(server, folder)
        try:
            gate = Gate(host, port, server.get_port(), secret)
        except OSError as error:  # taken since it was tried
            raise _cannot_listen(host, port, error) from None
        address = f"http://{_reached_as(host)}:{gate.port}/" + (f"?token={gate.token}" if gate.token else "")
        print(f"page: {address}", flush=True)
        if parent is not None:
            threading.Thread(target=_end_with, args=(parent, page), daemon=True).start()
        if browser is not None:
            threading.Thread(target=browser.open, args=(address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            page.serve()
        gate.close()
    finally:
        server.stop()


def find_browser() -> webbrowser.BaseBrowser:
    """Return the browser of this machine. Raises: UserError where there is none."""
    try:
        return webbrowser.get()
    except webbrowser.Error as error:
        fix = "leave --open away, and open the address that is printed in any browser"
        raise UserError("no browser to open the page in", str(error), fix) from None


def _reached_as(host: str) -> str:
    """The name to type for an address; one that stands for all of a machine's is no use to others."""
    if host in ("", "0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def check_viewer() -> None:
    """Raise UserError unless viser is installed."""
    try:
        import viser  # noqa: F401
    except ImportError as error:
        fix = "pip install 'text3d-pipeline[viewer]'"
        raise UserError("the page needs viser", f"it is not installed ({error})", fix) from None


def check_port(port: int, host: str) -> int:
    """Return the port, or a free one for 0. Raises: UserError where it cannot be listened at."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            if os.name == "posix":  # elsewhere it would let two listen at one port
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
            tried.listen(1)
            return tried.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot listen at {host}:{port}", why, "choose another --port; 0 takes a free one")


class Viewer:
    """Context of the page of a run that this process makes; the page is a process of its own.

    Args:
        port: of the page; 0 takes a free one.
        quiet: whether the page prints nothing, its address neither.
    Raises: UserError where the port is taken or viser is not installed, before the run begins.
    """

    def __init__(self, port: int, quiet: bool = False) -> None:
        check_viewer()
        self._port, self._quiet = check_port(port, HOST), quiet
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Viewer:
        return self

    def open(self, folder: Path) -> None:
        """Start the page of a run's folder."""
        words = ["view", str(folder.absolute()), "--port", str(self._port), "--parent", str(os.getpid())]
        package = Path(__file__).resolve().parents[2]  # the very code that runs here, wherever it lies
        paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if self._quiet else None,
            cwd=package,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for the run
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the page of a finished run until Ctrl-C; end that of any other with the run."""
        if self._process is None:
            return
        if kind is None and self._process.poll() is None:
            if not self._quiet:
                print("the page stays until Ctrl-C", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                self._process.wait()
        self._process.terminate()


def _end_with(parent: int, page: object) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    page.close()
