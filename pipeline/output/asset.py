"""From a stage's asset to the mesh that leaves the toolkit, and what run.json tells of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.output.settings import ExportSettings
from stages.errors import UserError
from stages.mesh.mesh import Mesh
from stages.mesh.place import SPECK
from stages.mesh.tets.initialise import InitialiseSettings, dmtet_from_density
from stages.mesh.tets.tetrahedra import Lattice
from stages.mesh.texture.detail import bake_detail
from stages.mesh.texture.finalise import finalise as finalise_mesh
from stages.mesh.texture.repaint import repaint
from stages.phases import phase
from stages.stage import Asset

log = logging.getLogger(__name__)


def _device_of(asset: Asset) -> torch.device:
    tensors = [] if asset.field is None else asset.field.parameters()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def surface_of(asset: Asset, resolution: int, initialise: InitialiseSettings | None = None) -> Mesh:
    """Return the asset's mesh, or the surface of its density where no mesh stage ran.

    Args:
        resolution: lattice cells a side for the latter.
        initialise: how its level is found.
    Raises: UserError if the asset has neither, or its density holds no object.
    """
    if asset.mesh is not None:
        return asset.mesh
    if asset.density is None:
        raise UserError("There is no mesh to export", "the last stage made neither mesh nor density", "run fine")
    try:
        dmtet, _ = dmtet_from_density(asset.density, Lattice(resolution), initialise, device=_device_of(asset))
    except UserError as error:  # the advice is written for the fine stage, whose lattice this is not
        raise UserError(error.what, error.why, error.fix.replace("fine.tets", "export.tets")) from error
    with torch.no_grad():
        surface = dmtet.surface()
    return Mesh(surface.vertices.cpu().numpy(), surface.faces.cpu().numpy().astype(np.int32))


def finalise(
    asset: Asset,
    settings: ExportSettings,
    *,
    initialise: InitialiseSettings | None = None,
    notes: dict[str, object] | None = None,
) -> Mesh:
    """Clean, decimate, unwrap and bake the asset's surface with the asset's colour; a locked one only baked.

    Args:
        asset: with a mesh or a density.
        initialise: how the level of a density is found.
        notes: filled with times, the mesh report and how it was unwrapped.
    Returns: the mesh in the scene.
    Raises: UserError if there is no surface, or it cannot be used.
    """
    notes, times = {} if notes is None else notes, {}
    with phase("extract", times):
        mesh = surface_of(asset, settings.tets, initialise)
    result = _finished(mesh, asset, settings, notes)
    notes["times"] = times | notes["times"]
    return result


def _finished(mesh: Mesh, asset: Asset, settings: ExportSettings, notes: dict[str, object]) -> Mesh:
    device = _device_of(asset)
    if asset.locked:
        painted = repaint(
            mesh,
            asset.albedo,
            settings.texture_size,
            own_uv=settings.own_uv,
            padding=settings.padding,
            method=settings.unwrap,
            time_limit_s=settings.unwrap_limit_s,
            device=device,
            notes=notes,
        )
        return _with_occlusion(painted, settings)
    if asset.placement is not None:  # the small parts of a user's mesh are no floaters
        settings = settings.model_copy(update={"floaters": min(settings.floaters, SPECK)})
    return finalise_mesh(mesh, asset.albedo, settings, device=device, notes=notes)


def _with_occlusion(mesh: Mesh, settings: ExportSettings) -> Mesh:
    """A locked mesh with the occlusion map that is asked for; a normal map has nothing to add to its own triangles."""
    if settings.normal_map:
        log.warning("export.normal_map is left out: a locked mesh keeps all its faces")
    return bake_detail(mesh, mesh, settings.texture_size, normals=False) if settings.occlusion else mesh


def in_own_place(mesh: Mesh, asset: Asset) -> Mesh:
    """Return a finished mesh as its files hold it: at the place and size of the user's mesh it was made from.

    A locked mesh has the positions of the user's file to the bit (its up axis turned to y).
    """
    place = asset.placement
    if place is None:
        return mesh
    vertices = place.original if asset.locked else place.out_of_scene(mesh.vertices)
    normals = None if mesh.normals is None else place.turned_back(mesh.normals)
    return replace(mesh, vertices=vertices, normals=normals)


def finished_mesh(
    asset: Asset, settings: ExportSettings, initialise: InitialiseSettings, facts: dict[str, Any]
) -> Mesh:
    """Return the mesh that leaves the toolkit: cleaned, decimated, unwrapped, baked.

    Args:
        initialise: the fine stage's settings of how a density gets a surface; where the coarse stage was the last, its
            density gets the one that the fine stage would start from, on a lattice of its own.
        facts: filled with what run.json tells of the export: seconds by phase, the mesh report, how it was unwrapped.
    """
    notes: dict[str, Any] = {}
    mesh = finalise(asset, settings, initialise=initialise, notes=notes)
    finish = {name: getattr(settings, name) for name in ("metallic", "roughness")}
    finish = {name: value for name, value in finish.items() if value is not None}
    if mesh.materials is not None:
        mesh = replace(mesh, materials=tuple(replace(material, **finish) for material in mesh.materials))
    mesh = replace(mesh, **finish)
    times = notes.pop("times")
    facts |= notes | {"report": notes["report"].as_dict()}
    facts["phases"] = {name: round(seconds, 3) for name, seconds in times.items()}
    return mesh
