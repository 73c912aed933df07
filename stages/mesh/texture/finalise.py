"""The last step of every mesh: clean, decimate, unwrap and bake, so that what leaves the toolkit can be used."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from stages.mesh.clean import check_mesh, decimate, drop_floaters, tidy
from stages.mesh.measure import MeshReport, face_components, measure
from stages.mesh.mesh import Mesh
from stages.mesh.texture.bake import Albedo, bake, bake_vertex_colours, evaluate, texel_points
from stages.mesh.texture.detail import bake_detail
from stages.mesh.texture.uv import Unwrapper, unwrap
from stages.phases import phase

log = logging.getLogger(__name__)


class ExportSettings(BaseModel):
    """Settings of an exported mesh; the defaults take about 5 s for a mesh of 40,000 faces on one thread."""

    model_config = ConfigDict(extra="forbid")

    faces: int = Field(20000, ge=4, le=2_000_000, description="most faces; more are decimated")
    floaters: float = Field(0.02, ge=0, le=1, description="drop parts below this share of the largest's area")
    texture_size: int = Field(1024, ge=16, le=8192, description="side of the texture in texels")
    padding: int = Field(4, ge=2, le=64, description="least distance between UV charts in texels")
    unwrap: Unwrapper = Field("auto", description="auto: xatlas, and our own box charts where it fails; or one of them")
    normal_map: bool = Field(False, description="bake the shape before the decimation into a normal map")
    occlusion: bool = Field(False, description="bake how much of the sky each place sees into an occlusion map")
    metallic: float | None = Field(None, ge=0, le=1, description="of the material; none: as the mesh says, or 0")
    roughness: float | None = Field(None, ge=0, le=1, description="of the material; none: as the mesh says, or 0.9")
    unwrap_limit_s: float = Field(60, gt=0, description="seconds for xatlas before our own charts step in")


def finalise(
    mesh: Mesh,
    albedo: Albedo | None,
    settings: ExportSettings,
    *,
    device: torch.device | str = "cpu",
    notes: dict[str, object] | None = None,
) -> Mesh:
    """Return a raw surface ready for export: floaters removed, under the face budget, unwrapped, colour baked.

    Args:
        mesh: a raw surface.
        albedo: linear colour at world points [N, 3] on `device`; None takes the mesh's vertex colours, and mid grey
            where it has none. With a texture of its own and no albedo a mesh stays as it is, above the face budget too:
            neither its texture coordinates nor what they show survive another surface.
        settings: face budget, texture size and how it is unwrapped.
        device: where `albedo` computes.
        notes: filled with what was done: seconds by phase, the final MeshReport, how it was unwrapped and why.
    Returns: a mesh with uv, texture, vertex colours and the maps asked for; closed and manifold if the input was.
    Raises: UserError if there is nothing to export, or the colour field is broken.

    Example:
        >>> mesh = finalise(asset.mesh, asset.albedo, ExportSettings(texture_size=512))
    """
    notes = {} if notes is None else notes
    times: dict[str, float] = {}
    if albedo is None and mesh.texture is not None and mesh.uv is not None and mesh.uv_faces is not None:
        return _as_it_is(mesh, notes)
    with phase("clean", times):
        full = drop_floaters(tidy(mesh), settings.floaters)
    with phase("decimate", times):
        result = decimate(full, settings.faces)
    with phase("unwrap", times):
        atlas = unwrap(
            result,
            settings.texture_size,
            padding=settings.padding,
            method=settings.unwrap,
            time_limit_s=settings.unwrap_limit_s,
        )
        result = replace(result, uv=atlas.uv, uv_faces=atlas.uv_faces)
    with phase("bake", times):
        if albedo is not None:
            colours = np.nan_to_num(evaluate(albedo, result.vertices, device), posinf=1.0)
            result = replace(result, colours=np.clip(colours, 0, 1))
            texture = bake(result, albedo, settings.texture_size, device=device)
        else:
            if result.colours is None:
                result = replace(result, colours=np.full_like(result.vertices, 0.5))
            texture = bake_vertex_colours(result, settings.texture_size)
        result = replace(result, texture=texture)
        if settings.normal_map or settings.occlusion:
            kinds = {"normals": settings.normal_map, "occlusion": settings.occlusion}
            result = bake_detail(result, full, settings.texture_size, **kinds)
    notes.update(report=_reported(result), times=times, unwrap=atlas.method, charts=atlas.charts)
    notes.update(coverage=atlas.coverage, note=atlas.note)
    return result


def _as_it_is(mesh: Mesh, notes: dict[str, object]) -> Mesh:
    """A mesh that brings its own texture, checked and measured."""
    times: dict[str, float] = {}
    with phase("clean", times):
        check_mesh(mesh)
        report, size = _reported(mesh), min(mesh.texture.shape[:2])
        texel, _, _ = texel_points(mesh.uv, mesh.uv_faces, size)
    charts = len(np.unique(face_components(mesh.uv_faces, len(mesh.uv))))
    notes.update(report=report, times=times, unwrap="own", charts=charts, coverage=len(texel) / size**2, note="")
    return mesh


def _reported(mesh: Mesh) -> MeshReport:
    """The report of a finished mesh, with a warning where it is not a closed manifold."""
    report = measure(mesh)
    if not (report.watertight and report.manifold and report.oriented):
        log.warning(
            "the mesh is not a closed manifold: %d open edges, %d edges and %d vertices shared by too many faces",
            report.boundary_edges, report.nonmanifold_edges, report.nonmanifold_vertices,
        )  # fmt: skip
    return report
