"""From a stage's asset to the mesh that is written: the coarse stage's density is given a surface first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.phases import phase

if TYPE_CHECKING:
    import torch

    from pipeline.export.settings import ExportSettings
    from stages.mesh.mesh import Mesh
    from stages.stage import Asset

_COARSE_LATTICE = 64  # cells a side: twice finer than a 64x64 render resolves


def check_formats(text: str) -> list[str]:
    """Names of mesh formats from a comma-separated list. Raises UserError for one without a writer."""
    from pipeline.export.write import FORMATS

    names = [name.strip().lower().removeprefix(".") for name in text.split(",")]
    unknown = [name or "nothing" for name in names if name not in FORMATS]
    if unknown:
        raise UserError(
            f"cannot write {', '.join(unknown)}", f"known formats: {', '.join(FORMATS)}", "choose from these"
        )
    return list(dict.fromkeys(names))


def finished_mesh(asset: Asset, settings: ExportSettings, device: torch.device, facts: dict[str, Any]) -> Mesh:
    """The mesh that leaves the toolkit: cleaned, decimated, unwrapped, baked.

    Args:
        facts: filled with what run.json tells of the export: seconds by phase, the mesh report, how it was unwrapped.
    """
    from pipeline.export.finalise import finalise

    times: dict[str, float] = {}
    with phase("extract", times):
        if asset.mesh is None:
            asset = replace(asset, mesh=_surface(asset, device))
    notes: dict[str, Any] = {}
    mesh = finalise(asset, settings, notes=notes)
    times |= notes.pop("times")
    facts |= notes | {"report": notes["report"].as_dict()}
    facts["phases"] = {phase: round(seconds, 3) for phase, seconds in times.items()}
    return mesh


def _surface(asset: Asset, device: torch.device) -> Mesh:
    """The level set of the density that the fine stage would start from."""
    import torch

    from stages.mesh.initialise import dmtet_from_density
    from stages.mesh.mesh import Mesh
    from stages.mesh.tetrahedra import Lattice

    tets, _ = dmtet_from_density(asset.density, Lattice(_COARSE_LATTICE), device=device)
    with torch.no_grad():
        surface = tets.surface()
    return Mesh(surface.vertices.cpu().numpy(), surface.faces.cpu().numpy())
