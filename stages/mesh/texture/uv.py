"""UV unwrapping: xatlas in a child process with a time limit, checked; our own charts where it fails.

UV coordinates lie in [0, 1], v up. A layout is accepted only if it covers every face, no texel twice, and gives every
face a fair share of texels.
"""

from __future__ import annotations

import importlib.util
import logging
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from stages.errors import UserError
from stages.mesh.measure import face_areas
from stages.mesh.mesh import Mesh
from stages.mesh.texture.charts import unwrap_by_boxes
from stages.mesh.texture.texels import double_covered

log = logging.getLogger(__name__)

Unwrapper = Literal["auto", "xatlas", "boxes"]

WORKER = Path(__file__).with_name("uv_worker.py")
# A layout may give at most this share of the surface less than a tenth of its fair share of texels.
STARVED = 0.01
# A layout may cover at most this share of its texels twice (xatlas leaves one or two on rough meshes).
DOUBLE = 1e-3


@dataclass(frozen=True)
class Atlas:
    """A UV layout of a mesh's faces.

    uv [T, 2] float32 in [0, 1], v up. uv_faces [F, 3] int32, in the mesh's face order. method: who made it. charts:
    how many pieces. coverage: share of the texels inside faces. note: why a fallback was taken, or "".
    """

    uv: np.ndarray
    uv_faces: np.ndarray
    method: str
    charts: int
    coverage: float
    note: str = ""


class LayoutError(Exception):
    """A UV layout that cannot be used, with the reason."""


def texel_corners(uv: np.ndarray, uv_faces: np.ndarray, size: int) -> np.ndarray:
    """Return corners [F, 3, 2] of a layout's faces in texels, float64, y up."""
    return (uv.astype(np.float64) * size)[uv_faces]


def check_layout(
    mesh: Mesh, uv: np.ndarray, uv_faces: np.ndarray, size: int, *, fair: float = 0.1, starved: float = STARVED
) -> float:
    """Raise LayoutError unless the layout can carry a texture of `size`; returns its coverage in [0, 1].

    At most `starved` of the surface may get less than `fair` of its share of texels.
    """
    if uv_faces.shape != mesh.faces.shape or uv_faces.min() < 0 or uv_faces.max() >= len(uv):
        raise LayoutError(f"it has {len(uv_faces)} faces for {len(mesh.faces)}, or indices out of range")
    if not np.isfinite(uv).all() or uv.min() < 0 or uv.max() > 1:
        raise LayoutError("its coordinates are not all within [0, 1]")
    corners = texel_corners(uv, uv_faces, size)
    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    texels = np.abs(edge1[:, 0] * edge2[:, 1] - edge1[:, 1] * edge2[:, 0]) / 2
    if texels.sum() <= 0:
        raise LayoutError("it gives the surface no texels")
    if texels.sum() > 1.01 * size**2:  # before looking at each of them
        raise LayoutError(f"its faces overlap: together they are {texels.sum() / size**2:.1f} times the texture")
    double, covered = double_covered(corners)
    if len(double) > DOUBLE * max(covered, 1):
        raise LayoutError(f"it covers {len(double)} of {covered} texels twice")
    areas = face_areas(mesh.vertices, mesh.faces)
    poor = areas[texels < fair * areas * (texels.sum() / areas.sum())].sum() / areas.sum()
    if poor > starved:
        raise LayoutError(f"{100 * poor:.1f} % of the surface gets under {fair:g} of its share of texels")
    return covered / size**2


def unwrap_by_xatlas(mesh: Mesh, size: int, padding: int, time_limit_s: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Return UV coordinates by xatlas in a child process.

    The limit is on computing time, so the result does not depend on how busy the machine is; ten times as long on the
    clock is the backstop (and the only limit on Windows).

    Returns: uv [T, 2], uv_faces [F, 3], the number of charts; texels are square.
    Raises: LayoutError with the reason: not installed, too slow, crashed, or an unusable result.
    """
    if importlib.util.find_spec("xatlas") is None:
        raise LayoutError("the package xatlas is not installed")
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="unwrap-") as folder:
        source, target = Path(folder) / "mesh.safetensors", Path(folder) / "atlas.safetensors"
        save_file({"vertices": mesh.vertices.astype(np.float32), "faces": mesh.faces.astype(np.int32)}, source)
        # xatlas takes the resolution as a wish and often makes a quarter more; the padding must survive the scaling.
        numbers = [size, int(np.ceil(1.4 * padding)), int(np.ceil(time_limit_s))]
        # -P: the worker's own folder stays off the import path.
        command = [sys.executable, "-P", str(WORKER), str(source), str(target), *map(str, numbers)]
        try:
            # A session of its own: Ctrl-C in the terminal is ours to answer and must not push us into the fallback.
            child = subprocess.run(
                command, capture_output=True, timeout=10 * time_limit_s, check=False, start_new_session=True
            )
        except subprocess.TimeoutExpired:
            raise LayoutError(f"xatlas took longer than {10 * time_limit_s:g} s on the clock") from None
        if child.returncode == -getattr(signal, "SIGXCPU", 0) != 0:
            raise LayoutError(f"xatlas took longer than {time_limit_s:g} s")
        if child.returncode != 0:
            lines = child.stderr.decode(errors="replace").strip().splitlines()
            reason = f"signal {-child.returncode}" if child.returncode < 0 else (lines[-1] if lines else "no message")
            raise LayoutError(f"xatlas failed ({reason})")
        try:
            data = load_file(target)
        except Exception as error:
            raise LayoutError(f"xatlas left no readable result ({error})") from None
    width, height, charts = data["shape"].tolist()
    return (data["texels"] / np.float32(max(width, height))).astype(np.float32), data["uv_faces"], charts


def unwrap(mesh: Mesh, size: int, *, padding: int = 4, method: Unwrapper = "auto", time_limit_s: float = 60) -> Atlas:
    """Lay a mesh's faces out in texture space without overlaps.

    Args:
        mesh: a triangle mesh with faces; best below about 40,000 of them.
        size: texture side in texels.
        padding: least distance between charts in texels.
        method: `auto` tries xatlas and falls back to `boxes`.
        time_limit_s: computing time for xatlas.
    Raises: UserError if the chosen method fails, or nothing fits into the texture.
    """
    note = ""
    if method in ("auto", "xatlas"):
        try:
            uv, uv_faces, charts = unwrap_by_xatlas(mesh, size, padding, time_limit_s)
            return Atlas(uv, uv_faces, "xatlas", charts, check_layout(mesh, uv, uv_faces, size))
        except LayoutError as error:
            if method == "xatlas":
                raise UserError("The mesh could not be unwrapped", str(error), "set export.unwrap=boxes") from None
            note = f"UV charts by box projection: {error}"
            log.warning(note)
    try:
        uv, uv_faces, charts = unwrap_by_boxes(mesh, size, padding)
        return Atlas(uv, uv_faces, "boxes", charts, check_layout(mesh, uv, uv_faces, size), note)
    except (ValueError, LayoutError) as error:
        fix = "raise export.texture_size or lower export.faces"
        raise UserError("The mesh could not be unwrapped", str(error), fix) from None
