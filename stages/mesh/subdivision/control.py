"""The control mesh of a subdivision surface, with texture coordinates: a sphere, or a mesh that the user brings.

Control vertices are solved for, so that the limit surface passes through the vertices of what it starts from
(Halstead et al. 1993, sec. 3): without that a coarse mesh would shrink and round off before anything is optimised.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from stages.errors import UserError
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.clean import check_mesh, decimate
from stages.mesh.mesh import Mesh
from stages.mesh.orient import turned
from stages.mesh.subdivision.loop import control_of, icosphere
from stages.mesh.texture.bake import bake_vertex_colours
from stages.mesh.texture.uv import LayoutError, Unwrapper, check_layout, unwrap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlMesh:
    """vertices [V, 3] float32; faces [F, 3] int32; uv [T, 2] float32, v up, with uv_faces [F, 3] int32; texture
    [S, S, 3] float32 sRGB in [0, 1], row 0 at the top, or None where there is none to start from."""

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    uv_faces: np.ndarray
    texture: np.ndarray | None = None


def control_sphere(radius: float, levels: int, texture_size: int, padding: int) -> ControlMesh:
    """Return a sphere of 10 * 4^levels + 2 control vertices, in charts of its own; the same wherever it is made."""
    points, faces = icosphere(levels)
    mesh = Mesh((radius * points).astype(np.float32), faces)
    atlas = unwrap(mesh, texture_size, padding=padding, method="boxes")
    return ControlMesh(_solved(mesh), faces, atlas.uv, atlas.uv_faces)


def control_mesh(
    mesh: Mesh, most_faces: int, texture_size: int, padding: int, method: Unwrapper = "auto"
) -> ControlMesh:
    """Return a user's mesh as a control mesh: welded, and thinned out if it must be.

    Args:
        mesh: any triangle mesh with faces, in the scene.
        most_faces: more than these are decimated, and its texture coordinates made anew.
        texture_size: side in texels.
        padding: texels between the charts of new coordinates.
        method: how these are made, see stages.mesh.texture.uv.unwrap.
    Returns: with the mesh's own texture coordinates where they can carry a texture, and its own colours.
    Raises: UserError if the mesh cannot be used.
    """
    mesh = _facing_outwards(welded(mesh))
    if len(mesh.faces) > most_faces:
        log.warning("the start mesh has %d faces and is decimated to %d", len(mesh.faces), most_faces)
        mesh = decimate(Mesh(mesh.vertices, mesh.faces, _vertex_colours(mesh)), most_faces)
    mesh, same_layout = _with_layout(mesh, texture_size, padding, method)
    if mesh.texture is not None and same_layout:
        texture = _resized(mesh.texture, texture_size)
    else:
        colours = _vertex_colours(mesh)
        baked = None if colours is None else bake_vertex_colours(replace(mesh, colours=colours), texture_size)
        texture = None if baked is None else baked.astype(np.float32) / 255
    return ControlMesh(_solved(mesh), mesh.faces, mesh.uv, mesh.uv_faces, texture)


def welded(mesh: Mesh) -> Mesh:
    """Return the mesh with equal positions merged to one vertex.

    Faces that are left with two corners or one are removed; texture coordinates stay with their faces.
    """
    check_mesh(mesh)
    vertices, first, place = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    faces = place.reshape(-1)[mesh.faces]
    whole = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
    if not whole.any():
        raise UserError("The start mesh is empty", "all of its faces are degenerate (no area)", "give another mesh")
    return replace(
        mesh,
        vertices=vertices.astype(np.float32),
        faces=faces[whole].astype(np.int32),
        colours=None if mesh.colours is None else mesh.colours[first],
        uv_faces=None if mesh.uv_faces is None else mesh.uv_faces[whole],
    )


def _facing_outwards(mesh: Mesh) -> Mesh:
    over = turned(mesh.vertices, mesh.faces)[:, None]
    uv_faces = None if mesh.uv_faces is None else np.where(over, mesh.uv_faces[:, ::-1], mesh.uv_faces)
    return replace(mesh, faces=np.where(over, mesh.faces[:, ::-1], mesh.faces), uv_faces=uv_faces)


def _solved(mesh: Mesh) -> np.ndarray:
    control = control_of(mesh.faces, mesh.vertices)
    if not np.isfinite(control).all():
        raise UserError(
            "The start mesh cannot be made a subdivision surface",
            "no control vertices have a limit surface through its vertices",
            "remesh it to more even triangles, or start from the sphere",
        )
    return control.astype(np.float32)


def _with_layout(mesh: Mesh, size: int, padding: int, method: Unwrapper) -> tuple[Mesh, bool]:
    """The mesh with texture coordinates that can carry a texture, and whether they are its own."""
    if mesh.uv is not None and mesh.uv_faces is not None:
        try:
            check_layout(mesh, mesh.uv, mesh.uv_faces, size)
            return mesh, True
        except LayoutError as error:
            log.warning("the start mesh gets new texture coordinates: %s", error)
            mesh = replace(mesh, colours=_vertex_colours(mesh))
    atlas = unwrap(mesh, size, padding=padding, method=method)
    return replace(mesh, uv=atlas.uv, uv_faces=atlas.uv_faces, texture=None), False


def _vertex_colours(mesh: Mesh) -> np.ndarray | None:
    """Linear colours [V, 3]: the mesh's own, else the mean of what its texture shows at each vertex, else None."""
    if mesh.colours is not None or mesh.texture is None or mesh.uv is None or mesh.uv_faces is None:
        return mesh.colours
    height, width = mesh.texture.shape[:2]
    at = mesh.uv[mesh.uv_faces.reshape(-1)]
    column = np.clip((at[:, 0] * width).astype(int), 0, width - 1)
    row = np.clip(((1 - at[:, 1]) * height).astype(int), 0, height - 1)
    linear = srgb_to_linear(torch.from_numpy(mesh.texture[row, column].astype(np.float32) / 255)).numpy()
    total, corners = np.zeros((len(mesh.vertices), 3)), mesh.faces.reshape(-1)
    np.add.at(total, corners, linear)
    return (total / np.maximum(np.bincount(corners, minlength=len(total)), 1)[:, None]).astype(np.float32)


def _resized(texture: np.ndarray, size: int) -> np.ndarray:
    """A uint8 texture at [size, size, 3] as float32 in [0, 1]."""
    planes = torch.from_numpy(np.ascontiguousarray(texture)).permute(2, 0, 1)[None].float() / 255
    planes = torch.nn.functional.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    return planes[0].permute(1, 2, 0).clamp(0, 1).numpy()
