"""The page: the object in the middle, and the panel beside it.

The page reads the run's folder and leaves wishes there (see pipeline.watch.mailbox). It works in a process of its own,
so that no browser can hold up the run.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.view.follow import downloads_of, facts_of, runs_in
from pipeline.view.gallery import cards_of
from pipeline.view.panel import Panel
from pipeline.watch.mailbox import Sights, action_of_others, write_wish
from pipeline.watch.sight import BEHIND, Camera, can_show, is_mesh, mesh_of, picture_of
from stages.errors import UserError

if TYPE_CHECKING:
    import viser

log = logging.getLogger(__name__)

WATCHED_S, ALONE_S = 0.1, 1.0  # between two looks at the folder, with and without a browser
FACTS_S = 1.0  # between two updates of the panel, and two letters to the run
GALLERY_S = 3.0
STILL = 384  # pixels of a picture of a run that stands still
START, FOV_DEG = (0.0, 1.03, 2.82), 36.0  # of the camera: 3 away, 20 degrees up; in front
GREY = round(255 * (1.055 * BEHIND ** (1 / 2.4) - 0.055))  # sRGB


class Page:
    """The page of one run, or of a folder of runs, on a viser server.

    Args:
        server: of viser.
        folder: of a run, or of runs, of which one is shown and the others are in the gallery.
    Raises: UserError where there is no run.
    """

    def __init__(self, server: viser.ViserServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        runs = runs_in(folder)
        self._several = runs != [folder]
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._object: Any = None
        self._picture: np.ndarray | None = None  # what is behind an empty scene
        self._troubles: set[str] = set()
        server.scene.set_up_direction("+y")
        server.initial_camera.position, server.initial_camera.look_at = START, (0.0, 0.0, 0.0)
        server.initial_camera.fov = math.radians(FOV_DEG)
        server.gui.configure_theme(show_logo=False, show_share_button=False, control_layout="collapsible")
        self._panel = Panel(server.gui, self._ask, self._choose, self._send, several=self._several)
        self._choose(runs[0])
        server.on_client_connect(self._welcome)
        server.on_client_disconnect(self._part)

    def serve(self) -> None:
        """Keep the page up to date until :meth:`close`."""
        due = {"facts": 0.0, "gallery": 0.0}
        while not self._ended.wait(WATCHED_S if self._server.get_clients() else ALONE_S):
            try:
                with self._lock:
                    self._keep(due)
            except Exception as error:  # a folder that changes under the page; the next look may be better
                self._warn(f"the page cannot show {self._run}: {type(error).__name__}: {error}")
                self._ended.wait(FACTS_S)

    def close(self) -> None:
        """End :meth:`serve`."""
        self._ended.set()

    def _keep(self, due: dict[str, float]) -> None:
        """Bring what is due up to date."""
        watched, now = bool(self._server.get_clients()), time.monotonic()
        if not watched:
            self._camera = self._mover = None  # nobody looks: the run need not draw
        if now > due["facts"] and (watched or self._action != "run"):
            due["facts"] = now + FACTS_S
            self._followed.read_on()
            self._facts = facts_of(self._followed)
            running = self._facts.status == "running"
            self._action = (action_of_others(self._run) or self._action) if running else "run"
            self._panel.tell(self._facts, self._action == "pause")
            self._wish()
        if self._several and watched and now > due["gallery"]:
            due["gallery"] = now + GALLERY_S
            self._panel.show_gallery(cards_of(self._folder))
        if watched:
            self._show()

    def _choose(self, run: Path) -> None:
        """Show another run."""
        with self._lock:
            self._run, self._action = run, "run"
            self._followed = self._panel.open(run)
            self._followed.read_on()
            self._facts = facts_of(self._followed)
            self._panel.tell(self._facts, False)
            self._sights = Sights(run)
            self._camera: Camera | None = None
            self._mover: Any = None
            self._stage: Any = None  # of a run that stands still; False where it has none to show
            self._shown: Any = None
            self._clear()
            for client in self._server.get_clients().values():
                self._moved(client)

    def _welcome(self, client: viser.ClientHandle) -> None:
        with self._lock:
            self._behind(client, self._picture)  # a browser's own, unlike what is in the scene
            self._moved(client)
        client.camera.on_update(lambda _: self._moved(client))

    def _part(self, client: viser.ClientHandle) -> None:
        with self._lock:
            left = [other for other in self._server.get_clients().values() if other is not client]
            if self._mover is client and left:
                self._moved(left[-1])

    def _moved(self, client: viser.ClientHandle) -> None:
        camera = client.camera
        self._camera, self._mover = scene_camera(camera.wxyz, camera.position, camera.fov, camera.aspect), client

    def _ask(self, action: str) -> None:
        with self._lock:
            if facts_of(self._followed).status == "running":
                self._action = action
                self._wish()

    def _wish(self) -> None:
        """Write to the run; one whose folder takes no files is shown all the same."""
        if self._facts.status != "running":
            return
        try:
            write_wish(self._run, self._action, self._camera)
        except OSError as error:
            self._warn(f"cannot ask the run for anything: {error}")

    def _warn(self, text: str) -> None:
        """Say what is wrong, once."""
        if text not in self._troubles:
            self._troubles.add(text)
            log.warning("%s", text)

    def _send(self, client: Any, path: Path) -> None:
        if client is not None and path in downloads_of(self._run):  # again: a file may have become a link since
            client.send_file_download(path.name, path.read_bytes(), save_immediately=True)

    def _show(self) -> None:
        """Show the object: the result, what the running run draws, or what its checkpoint holds."""
        result = self._run / "mesh.glb"
        if self._facts.status == "finished" and result in downloads_of(self._run):
            changed = ("result", result.stat().st_mtime_ns)
            if self._shown != changed:
                self._put(self._server.scene.add_glb("/object", result.read_bytes()))
                self._shown = changed
        elif self._facts.status == "running":
            self._stage = None
            if self._camera is not None and self._camera != self._shown:
                self._shown = self._camera
                self._wish()
            self._show_sight(self._sights.next())
        else:
            self._show_still()

    def _show_still(self) -> None:
        """Draw a run that stands still from its last checkpoint, in this process."""
        if self._stage is None:
            self._stage = _stage_at_rest(self._run)
        if self._stage is False:
            return
        wanted = self._stage.step_index if is_mesh(self._stage) else self._camera
        if wanted is None or wanted == self._shown:
            return
        self._shown = wanted
        as_mesh = is_mesh(self._stage)
        self._show_sight(mesh_of(self._stage) if as_mesh else {"picture": picture_of(self._stage, self._camera, STILL)})

    def _show_sight(self, sight: dict[str, np.ndarray]) -> None:
        if "picture" in sight and self._mover is not None:
            self._clear(behind=False)
            self._picture = sight["picture"]
            self._behind(self._mover, self._picture)
        elif "vertices" in sight:
            import trimesh

            colours = sight["colours"]
            shown = trimesh.Trimesh(sight["vertices"], sight["faces"], vertex_colors=colours, process=False)
            self._put(self._server.scene.add_mesh_trimesh("/object", shown))

    def _put(self, shown: Any) -> None:
        """Note what is in the scene, with no picture behind it."""
        self._object, self._picture = shown, None
        for client in self._server.get_clients().values():
            self._behind(client)

    def _clear(self, behind: bool = True) -> None:
        """Take the object out of the scene, and the pictures from behind it."""
        if self._object is not None:
            self._object.remove()
            self._object = None
        if behind:
            self._picture = None
            for client in self._server.get_clients().values():
                self._behind(client)

    def _behind(self, client: viser.ClientHandle, picture: np.ndarray | None = None) -> None:
        if picture is None:
            client.scene.set_background_image(np.full((2, 2, 3), GREY, np.uint8), format="png")
        else:
            client.scene.set_background_image(picture, format="png")  # small: a JPEG's blocks would show


def _stage_at_rest(run: Path) -> Any:
    """The last stage of a run that has a checkpoint; False without one that can be shown."""
    from pipeline.runs.run import read_run, restore_stage

    try:
        for name in reversed(read_run(run).stages):
            if (run / name / "checkpoint.safetensors").is_file():
                stage = restore_stage(run, name)
                return stage if can_show(stage) else False
    except UserError as error:
        log.warning("%s: %s", error.what, error.why)
    except Exception as error:  # a checkpoint of other versions, or no memory for it: the panel is of use without it
        log.warning("cannot show what %s came to: %s: %s", run, type(error).__name__, error)
    return False


def scene_camera(wxyz: Any, position: Any, fov: float, aspect: float) -> Camera | None:
    """Return viser's camera, which looks along +z with y down, in the scene's conventions: along -z with y up.

    Args:
        wxyz: quaternion of the camera in the world.
        position: [3].
        fov: vertical, radians.
        aspect: width by height.
    """
    w, x, y, z = (float(value) for value in wxyz)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    c2w = np.eye(4)
    c2w[:3, :3] = rotation * np.array([1.0, -1.0, -1.0])
    c2w[:3, 3] = position
    return Camera.read({"c2w": c2w.reshape(-1).tolist(), "fov_deg": math.degrees(fov), "aspect": aspect})
