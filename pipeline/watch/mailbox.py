"""How a page in another process looks into a run, and what it may ask of it: two files in RUN/.view/.

    wish.json           of the page: {"action": run | pause | stop, "camera", "page"}; written again every second
    sight.safetensors   of the run: its answer, a picture or a mesh

Between two steps the run asks for the time of the first one, which is all that it costs while nobody is there. What it
draws takes at most a share of its time. It waits for no answer; nothing in the file can break it; and a page that no
longer writes is a page that is gone, whose wishes are void.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.watch.sight import Camera, can_show, is_mesh, mesh_of, picture_of

if TYPE_CHECKING:
    import numpy as np

    from stages.stage import Stage

log = logging.getLogger(__name__)

FOLDER, WISH, SIGHT = ".view", "wish.json", "sight.safetensors"
ACTIONS = ("run", "pause", "stop")
SHARE = 0.08  # of the run's time, at most, for pictures and meshes
DRAW_S = 0.15  # a picture's size is chosen to take so long
SIZES = (48, 384)  # pixels
SHARP = 4  # times that size, while the run is paused and the camera rests: 16 times as long
GONE_S = 10.0  # a wish that is so old is nobody's
AGAIN_S = 2.0  # after an answer that could not be written


class Stop(Protocol):
    """What ends a run after its step; see pipeline.runs.interrupt.StopRequest."""

    requested: bool

    def request(self, text: str) -> None:
        """Ask for a stop, and say so."""


class Mailbox:
    """The run's end: call :meth:`answer` between two steps.

    Args:
        folder: of the run.
        note: called with a line for the user.
        alone: whether this process is the only one of the run; else nobody may hold it up, for the others would wait.
    """

    def __init__(self, folder: Path, note: Callable[[str], None], *, alone: bool = True) -> None:
        self._folder, self._note, self._alone = folder / FOLDER, note, alone
        self._changed, self._heard = 0, 0.0
        self._wish: dict[str, Any] = {}
        self._answered: Any = None
        self._sharp = False  # the picture that was drawn last
        self._size, self._due = 96, 0.0
        self._hidden: set[str] = set()  # stages that could not be drawn

    def empty(self) -> None:
        """Throw away what is there: an earlier session's pause or stop is not meant for this one."""
        with contextlib.suppress(OSError):
            for name in (WISH, SIGHT):
                (self._folder / name).unlink(missing_ok=True)
            self._folder.rmdir()

    def wished(self) -> bool:
        """Return whether somebody asks for something."""
        self._read()
        return bool(self._wish)

    def answer(self, name: str, stage: Stage, stop: Stop) -> float:
        """Do what the page asks: draw, wait while it says pause, ask for a stop.

        Args:
            name: of the stage.
            stage: between two steps.
            stop: asked where the page says stop; a signal ends a pause as well.
        Returns: the seconds that a pause took.
        """
        began, waited = time.monotonic(), 0.0
        while self._wish.get("action") == "pause" and self._alone and not stop.requested:
            if not waited:
                self._note("paused by the page, which can go on or stop; Ctrl-C stops as well")
            self._due = 0.0  # nothing else is done meanwhile
            self._draw(name, stage, paused=True)
            time.sleep(0.1)
            self._read()
            waited = time.monotonic() - began
        if self._wish.get("action") == "stop":
            if not stop.requested:
                stop.request("the page asks to stop: stopping after this step")
        else:
            self._draw(name, stage)
        return waited

    def _read(self) -> None:
        """Read the wish where it is another than before; a file that is no wish, or an old one, counts as none."""
        try:
            changed = os.stat(self._folder / WISH).st_mtime_ns
        except OSError:
            self._wish = {}
            return
        if changed == self._changed:
            if time.monotonic() - self._heard > GONE_S:
                self._wish = {}
            return
        self._changed, self._heard = changed, time.monotonic()
        try:
            wish = json.loads((self._folder / WISH).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            wish = {}
        self._wish = wish if isinstance(wish, dict) and wish.get("action") in ACTIONS else {}

    def _draw(self, name: str, stage: Stage, *, paused: bool = False) -> None:
        camera = Camera.read(self._wish.get("camera"))
        if camera is None or time.monotonic() < self._due or name in self._hidden or not can_show(stage):
            return
        as_mesh = is_mesh(stage)
        asked = (name, stage.step_index, None if as_mesh else camera)
        sharp = paused and asked == self._answered and not as_mesh and not self._sharp  # once the camera rests
        if asked == self._answered and not sharp:
            return
        size = min(SHARP * self._size, SIZES[1]) if sharp else self._size
        began = time.monotonic()
        try:
            sight = mesh_of(stage) if as_mesh else {"picture": picture_of(stage, camera, size)}
            write_sight(self._folder.parent, sight)
        except OSError:  # a full disk, or a page that is reading where an open file cannot be replaced
            self._due = time.monotonic() + AGAIN_S
            return
        except Exception as error:  # whatever it is, the run goes on without being seen
            log.warning("cannot show the %s stage: %s: %s", name, type(error).__name__, error)
            self._hidden.add(name)
            return
        self._answered, self._sharp = asked, sharp
        took = max(time.monotonic() - began, 1e-3)
        self._due = time.monotonic() + took * (1 / SHARE - 1)
        if not as_mesh and not sharp:
            self._size = int(min(max(self._size * (DRAW_S / took) ** 0.5, SIZES[0]), SIZES[1]))


def write_wish(run: Path, action: str, camera: Camera | None) -> None:
    """Leave a wish for a run; the page's end. Raises: OSError where the folder takes no files."""
    words = None if camera is None else {"c2w": camera.c2w, "fov_deg": camera.fov_deg, "aspect": camera.aspect}
    _replace(run / FOLDER / WISH, json.dumps({"action": action, "camera": words, "page": os.getpid()}).encode())


def action_of_others(run: Path) -> str | None:
    """Return what another page of a run asked for last, None where this one did, or where it is long ago."""
    path = run / FOLDER / WISH
    try:
        wish = json.loads(path.read_text(encoding="utf-8"))
        fresh = abs(time.time() - path.stat().st_mtime) < GONE_S
    except (OSError, ValueError, RecursionError):
        return None
    if not fresh or not isinstance(wish, dict) or wish.get("page") in (None, os.getpid()):
        return None
    return wish["action"] if wish.get("action") in ACTIONS else None


def write_sight(run: Path, sight: dict[str, np.ndarray]) -> None:
    """Write an answer; the run's end."""
    from safetensors.numpy import save

    _replace(run / FOLDER / SIGHT, save(sight))


class Sights:
    """The answers of a run, read by the page."""

    def __init__(self, run: Path) -> None:
        self._path, self._seen = run / FOLDER / SIGHT, 0

    def next(self) -> dict[str, np.ndarray]:
        """Return the answer that came since; empty where there is none, or one that cannot be read."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            changed = os.stat(self._path).st_mtime_ns
            if changed == self._seen:
                return {}
            self._seen = changed
            return load(self._path.read_bytes())
        except (OSError, SafetensorError, ValueError):
            return {}


def _replace(path: Path, data: bytes) -> None:
    """Put a whole file in place, without waiting for the disk: nothing of it has to outlive a power cut."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
