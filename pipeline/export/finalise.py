"""From what a run ends with to the mesh that leaves the toolkit."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.export.settings import ExportSettings
from stages.errors import UserError
from stages.mesh.finalise import finalise as finalise_mesh
from stages.mesh.mesh import Mesh
from stages.stage import Asset


def _device_of(asset: Asset) -> torch.device:
    tensors = [] if asset.field is None else asset.field.parameters()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def surface_of(asset: Asset, resolution: int) -> Mesh:
    """The asset's mesh, or the surface of its density where no mesh stage ran.

    Args:
        resolution: lattice cells a side for the latter.
    Raises: UserError if the asset has neither, or its density holds no object.
    """
    if asset.mesh is not None:
        return asset.mesh
    if asset.density is None:
        raise UserError("There is no mesh to export", "the last stage made neither mesh nor density", "run fine")
    from stages.mesh.initialise import dmtet_from_density
    from stages.mesh.tetrahedra import Lattice

    dmtet, _ = dmtet_from_density(asset.density, Lattice(resolution), device=_device_of(asset))
    with torch.no_grad():
        surface = dmtet.surface()
    return Mesh(surface.vertices.cpu().numpy(), surface.faces.cpu().numpy().astype(np.int32))


def finalise(asset: Asset, settings: ExportSettings, *, notes: dict[str, object] | None = None) -> Mesh:
    """The asset's surface cleaned, decimated, unwrapped and baked with the asset's colour.

    Args:
        asset: with a mesh or a density. notes: filled with times, the mesh report and how it was unwrapped.
    Raises: UserError if there is no surface, or it cannot be used.
    """
    mesh = surface_of(asset, settings.tets)
    return finalise_mesh(mesh, asset.albedo, settings, device=_device_of(asset), notes=notes)
