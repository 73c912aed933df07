"""From a stage's asset to the mesh that is written, and what run.json tells of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.errors import UserError

if TYPE_CHECKING:
    from pipeline.export.settings import ExportSettings
    from stages.mesh.initialise import InitialiseSettings
    from stages.mesh.mesh import Mesh
    from stages.stage import Asset


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


def finished_mesh(
    asset: Asset, settings: ExportSettings, initialise: InitialiseSettings, facts: dict[str, Any]
) -> Mesh:
    """The mesh that leaves the toolkit: cleaned, decimated, unwrapped, baked.

    Args:
        initialise: the fine stage's settings of how a density gets a surface; where the coarse stage was the last, its
            density gets the one that the fine stage would start from, on a lattice of its own.
        facts: filled with what run.json tells of the export: seconds by phase, the mesh report, how it was unwrapped.
    """
    from pipeline.export.finalise import finalise

    notes: dict[str, Any] = {}
    mesh = finalise(asset, settings, initialise=initialise, notes=notes)
    times = notes.pop("times")
    facts |= notes | {"report": notes["report"].as_dict()}
    facts["phases"] = {phase: round(seconds, 3) for phase, seconds in times.items()}
    return mesh
