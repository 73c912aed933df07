"""The science: stages, what guides them, what they optimise and what they hand on. Never imports `pipeline`.

The names of `__all__` are the library's own; each is imported when it is first asked for. README.md beside this file
has the conventions, a map of the folders, and a run of one stage from prior to file.
"""

import importlib
from typing import Any

__all__ = [
    "STAGES",
    "Asset",
    "ClipMeshSettings",
    "ClipMeshStage",
    "CoarseSettings",
    "CoarseStage",
    "ExportSettings",
    "FineSettings",
    "FineStage",
    "GanSettings",
    "GanStage",
    "Guidance",
    "GuidanceSettings",
    "Mesh",
    "ParticleSettings",
    "ParticleStage",
    "PointSettings",
    "PointStage",
    "Prior",
    "PromptSettings",
    "ReferencePrior",
    "ReferenceSettings",
    "Stage",
    "StageKind",
    "TriplaneSettings",
    "TriplaneStage",
    "UserError",
    "ViewPrompts",
    "finalise",
    "load_prior",
    "load_reference",
    "read_mesh",
]

_HOMES = {
    "Asset": "stages.stage",
    "ClipMeshSettings": "stages.clip_mesh",
    "ClipMeshStage": "stages.clip_mesh",
    "CoarseSettings": "stages.coarse",
    "CoarseStage": "stages.coarse",
    "ExportSettings": "stages.mesh.texture.finalise",
    "FineSettings": "stages.fine",
    "FineStage": "stages.fine",
    "GanSettings": "stages.gan.stage",
    "GanStage": "stages.gan.stage",
    "Guidance": "stages.guidance.guidance",
    "GuidanceSettings": "stages.guidance.settings",
    "Mesh": "stages.mesh.mesh",
    "ParticleSettings": "stages.particles",
    "ParticleStage": "stages.particles",
    "PointSettings": "stages.points.stage",
    "PointStage": "stages.points.stage",
    "Prior": "stages.guidance.prior",
    "PromptSettings": "stages.prompts",
    "ReferencePrior": "stages.guidance.exact",
    "ReferenceSettings": "stages.guidance.exact",
    "STAGES": "stages.kinds",
    "Stage": "stages.stage",
    "StageKind": "stages.kinds",
    "TriplaneSettings": "stages.triplane.stage",
    "TriplaneStage": "stages.triplane.stage",
    "UserError": "stages.errors",
    "ViewPrompts": "stages.prompts",
    "finalise": "stages.mesh.texture.finalise",
    "load_prior": "stages.guidance.diffusion.prior",
    "load_reference": "stages.guidance.exact",
    "read_mesh": "stages.mesh.files.read",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
