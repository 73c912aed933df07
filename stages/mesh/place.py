"""A user's mesh brought into the scene (centred, scaled, y up, front towards +z), and the way back for what is made.

    scene = scale * R_y(yaw) (own - centre)      own: the file's coordinates, turned so that y is up

`own` is a swap of axes and signs of what the file says, so it keeps its bits; an exported mesh goes back to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from stages.errors import UserError
from stages.mesh.measure import face_areas, face_components
from stages.mesh.mesh import Mesh
from stages.mesh.orient import welded_faces

Axis = Literal["x", "-x", "y", "-y", "z", "-z"]
SPECK = 1e-3  # of the largest part's area: below it a part is dirt, above it a part of a user's mesh
FAR = 0.5  # specks are left out where the sphere around the rest is smaller than this share of the sphere around all
LIMIT = 0.95  # a mesh that keeps its own place must lie within this half side of the scene's box

# (source axis, sign) of the new x, y and z: rotations that bring the named axis to +y
_TURNS: dict[str, tuple[tuple[int, int], ...]] = {
    "x": ((1, -1), (0, 1), (2, 1)),
    "-x": ((1, 1), (0, -1), (2, 1)),
    "y": ((0, 1), (1, 1), (2, 1)),
    "-y": ((0, 1), (1, -1), (2, -1)),
    "z": ((0, 1), (2, 1), (1, -1)),
    "-z": ((0, 1), (2, -1), (1, 1)),
}


class PlaceSettings(BaseModel):
    """Settings of a user's mesh's place in the scene."""

    model_config = ConfigDict(extra="forbid")

    up: Literal["auto", Axis] = Field(
        "auto", description="axis of the file that points up; auto: z in STL files (but for our own), y in all others"
    )
    yaw_deg: float = Field(0.0, ge=-360, le=360, description="turn about the vertical that brings its front to +z")
    radius: float | None = Field(
        0.85, gt=0.05, le=LIMIT, description="of its sphere about the box's centre; none: the file's own place and size"
    )


@dataclass(frozen=True)
class Placement:
    """The transform from a mesh's own place into the scene.

    Args:
        original: [V, 3] float32, the user's vertices, y up.
        centre: [3] of them, see the module's docstring.
        scale: from there to the scene.
        yaw_deg: about the vertical axis.
        up: axis of the user's file that points up.
        format: of the user's file, its ending without the dot; empty where there is none.
    """

    original: np.ndarray
    centre: np.ndarray
    scale: float
    yaw_deg: float
    up: str = "y"
    format: str = ""

    def into_scene(self, points: np.ndarray) -> np.ndarray:
        """Return scene coordinates [N, 3] float32 of points in the user's own."""
        return (self.scale * (points.astype(np.float64) - self.centre) @ _yaw(self.yaw_deg).T).astype(np.float32)

    def out_of_scene(self, points: np.ndarray) -> np.ndarray:
        """Return the user's own coordinates [N, 3] float32 of points in the scene."""
        return (points.astype(np.float64) @ _yaw(self.yaw_deg) / self.scale + self.centre).astype(np.float32)

    def turned(self, directions: np.ndarray) -> np.ndarray:
        """Return directions [N, 3] float32 of the user's own coordinates, such as normals, in the scene."""
        return (directions.astype(np.float64) @ _yaw(self.yaw_deg).T).astype(np.float32)

    def turned_back(self, directions: np.ndarray) -> np.ndarray:
        """Return directions [N, 3] float32 of the scene, such as normals, in the user's own coordinates."""
        return (directions.astype(np.float64) @ _yaw(self.yaw_deg)).astype(np.float32)


def upright(mesh: Mesh, up: str) -> Mesh:
    """Return the mesh with its axis `up` turned to +y, to the bit."""
    if up == "y":
        return mesh

    def turned(rows: np.ndarray) -> np.ndarray:
        return np.stack([rows[:, axis] * np.float32(sign) for axis, sign in _TURNS[up]], -1)

    return replace(mesh, vertices=turned(mesh.vertices), normals=None if mesh.normals is None else turned(mesh.normals))


def laid(mesh: Mesh, up: str) -> Mesh:
    """Return the mesh with its +y axis turned to `up`, to the bit: what `upright` undoes."""
    if up == "y":
        return mesh

    def turned(rows: np.ndarray) -> np.ndarray:
        result = np.empty_like(rows)
        for column, (axis, sign) in enumerate(_TURNS[up]):
            result[:, axis] = rows[:, column] * np.float32(sign)
        return result

    return replace(mesh, vertices=turned(mesh.vertices), normals=None if mesh.normals is None else turned(mesh.normals))


def without_far_specks(mesh: Mesh) -> tuple[Mesh, int]:
    """Return the mesh without specks that lie so far away that it would be small in the scene, and how many those are.

    Specks are parts of less than SPECK of the largest part's area. Vertices keep their places.
    """
    used = mesh.vertices[np.unique(mesh.faces)].astype(np.float64)
    away = np.linalg.norm(used - np.median(used, axis=0), axis=1)
    if 4 * np.median(away) > away.max():  # most of it is not small beside all of it: no need to look at the parts
        return mesh, 0
    _, welded = welded_faces(mesh)
    part = face_components(welded, int(welded.max()) + 1)
    areas = np.bincount(part, face_areas(mesh.vertices, mesh.faces))
    large = (areas >= SPECK * areas.max())[part]
    if _radius(mesh.vertices[np.unique(mesh.faces[large])].astype(np.float64)) >= FAR * _radius(used):
        return mesh, 0
    uv_faces = None if mesh.uv_faces is None else mesh.uv_faces[large]
    of_face = None if mesh.face_materials is None else mesh.face_materials[large]
    result = replace(mesh, faces=mesh.faces[large], uv_faces=uv_faces, face_materials=of_face)
    return result, int((areas < SPECK * areas.max()).sum())


def _radius(points: np.ndarray) -> float:
    """Of the sphere around points [N, 3] whose centre is that of their box."""
    return float(np.linalg.norm(points - (points.min(0) + points.max(0)) / 2, axis=1).max())


def place(mesh: Mesh, settings: PlaceSettings, up: str = "y", format: str = "") -> tuple[Mesh, Placement]:
    """Return the mesh in scene coordinates, faces, colours and texture kept, and how it came there.

    Args:
        mesh: as read.
        up: its axis that points up, where the settings leave it to the file's format.
        format: of its file, the ending without the dot.
    Raises: UserError where it has no size, or is to keep a place outside the scene.
    """
    up = up if settings.up == "auto" else settings.up
    mesh = upright(mesh, up)
    used = mesh.vertices[np.unique(mesh.faces)].astype(np.float64)
    centre, scale = np.zeros(3), 1.0
    if settings.radius is not None:
        centre = (used.min(0) + used.max(0)) / 2
        radius = _radius(used)
        if radius <= 0 or not math.isfinite(settings.radius / radius):
            raise UserError("The mesh cannot be placed", f"its radius is {radius:g}", "give a mesh with some extent")
        scale = settings.radius / radius
    placement = Placement(mesh.vertices, centre, scale, settings.yaw_deg, up, format)
    placed = placement.into_scene(mesh.vertices)
    reach = float(np.abs(placement.into_scene(used.astype(np.float32))).max())
    if settings.radius is None and reach > LIMIT:
        raise UserError(
            "The mesh does not fit into the scene",
            f"it reaches {reach:.3g} from the origin, and the scene ends at {LIMIT:g}",
            "leave place.radius alone, so that the mesh is centred and scaled",
        )
    normals = None if mesh.normals is None else placement.turned(mesh.normals)
    return replace(mesh, vertices=placed, normals=normals), placement


def _yaw(degrees: float) -> np.ndarray:
    """Turn about +y, +z towards +x."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
