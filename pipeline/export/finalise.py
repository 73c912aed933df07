"""From what a run ends with to the mesh that leaves the toolkit."""

from __future__ import annotations

import torch

from stages.errors import UserError
from stages.mesh.finalise import ExportSettings
from stages.mesh.finalise import finalise as finalise_mesh
from stages.mesh.mesh import Mesh
from stages.stage import Asset


def finalise(asset: Asset, settings: ExportSettings, *, notes: dict[str, object] | None = None) -> Mesh:
    """The asset's mesh cleaned, decimated, unwrapped and baked with the asset's colour.

    Args:
        asset: with a mesh. notes: filled with times, the mesh report and how it was unwrapped.
    Raises: UserError if there is no mesh, or it cannot be used.
    """
    if asset.mesh is None:
        raise UserError(
            "There is no mesh to export", "the last stage made a radiance field only", "add fine to --stages"
        )
    device: torch.device | str = "cpu"
    if asset.field is not None:
        device = next((p.device for p in asset.field.parameters()), device)
    return finalise_mesh(asset.mesh, asset.albedo, settings, device=device, notes=notes)
