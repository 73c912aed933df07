"""A user's mesh with a new texture and nothing else changed: its own faces, and where they can carry it its own layout.

A layout can carry a texture if it lies in [0, 1] and shows no texel at two places of the surface. Mirrored halves that
share their texels do, and palettes give whole faces one point; such meshes are laid out anew unless told otherwise.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from stages.mesh.clean import check_mesh
from stages.mesh.measure import face_components, measure
from stages.mesh.mesh import Mesh
from stages.mesh.orient import smooth_normals
from stages.mesh.texture.bake import Albedo, bake, evaluate, texel_points
from stages.mesh.texture.uv import Atlas, LayoutError, Unwrapper, check_layout, texel_corners, unwrap
from stages.phases import phase

log = logging.getLogger(__name__)

OwnLayout = Literal["auto", "always", "never"]
FAIR, STARVED = 0.01, 0.05  # people give a face more or less detail as they please; an unwrapper should not


def repaint(
    mesh: Mesh,
    albedo: Albedo,
    size: int,
    *,
    own_uv: OwnLayout = "auto",
    padding: int = 4,
    method: Unwrapper = "auto",
    time_limit_s: float = 60,
    device: torch.device | str = "cpu",
    notes: dict[str, object] | None = None,
) -> Mesh:
    """Bake a colour field over a mesh that stays as it is.

    Args:
        mesh: in the scene.
        albedo: linear colour at scene points [N, 3] on `device`.
        size: texture side in texels.
        own_uv: whether the mesh's own texture coordinates are kept: where they can carry a texture, always, never.
        padding, method, time_limit_s: of a new layout, see stages.mesh.texture.uv.unwrap.
        notes: filled as by stages.mesh.texture.finalise.finalise.
    Returns: the same vertices and faces in the same order, with texture, texture coordinates, vertex colours and
        the mesh's own normals, or where it has none such that are smooth across seams.
    Raises: UserError if the mesh is damaged, cannot be unwrapped, or the colour field is broken.
    """
    notes = {} if notes is None else notes
    times: dict[str, float] = {}
    with phase("clean", times):
        check_mesh(replace(mesh, colours=None))
        report = measure(mesh)
    with phase("unwrap", times):
        atlas = _layout(mesh, size, own_uv, padding, method, time_limit_s)
        normals = smooth_normals(mesh) if mesh.normals is None else mesh.normals
        result = replace(mesh, uv=atlas.uv, uv_faces=atlas.uv_faces, normals=normals)
    with phase("bake", times):
        colours = np.nan_to_num(evaluate(albedo, result.vertices, device), posinf=1.0)
        result = replace(result, colours=np.clip(colours, 0, 1), texture=bake(result, albedo, size, device=device))
    notes.update(report=report, times=times, unwrap=atlas.method, charts=atlas.charts)
    notes.update(coverage=atlas.coverage, note=atlas.note)
    return result


def _layout(mesh: Mesh, size: int, own_uv: OwnLayout, padding: int, method: Unwrapper, time_limit_s: float) -> Atlas:
    note = ""
    if own_uv != "never" and mesh.uv is not None and mesh.uv_faces is not None:
        try:
            coverage = check_layout(mesh, mesh.uv, mesh.uv_faces, size, fair=FAIR, starved=STARVED)
        except LayoutError as error:
            note, coverage = str(error), _covered(mesh, size) if own_uv == "always" else 0.0
        if coverage > 0:
            charts = len(np.unique(face_components(mesh.uv_faces, len(mesh.uv))))
            return Atlas(mesh.uv, mesh.uv_faces, "own", charts, coverage, note)
        note = f"the mesh's own texture coordinates were replaced: {note} (export.own_uv=always keeps what can be kept)"
        log.warning(note)
    atlas = unwrap(mesh, size, padding=padding, method=method, time_limit_s=time_limit_s)
    return replace(atlas, note="; ".join(filter(None, [note, atlas.note])))


def _covered(mesh: Mesh, size: int) -> float:
    """Share of the texels that a layout's faces touch; 0 where it leaves [0, 1] or is less than a texel in all."""
    if not np.isfinite(mesh.uv).all() or mesh.uv.min() < 0 or mesh.uv.max() > 1:
        return 0.0
    a, b, c = texel_corners(mesh.uv, mesh.uv_faces, size).swapaxes(0, 1)
    if np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]).sum() < 2:
        return 0.0
    return len(texel_points(mesh.uv, mesh.uv_faces, size)[0]) / size**2
