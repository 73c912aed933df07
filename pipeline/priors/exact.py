"""`reference`: the exact prior of the mesh that reference.mesh names (stages/guidance/exact.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.priors.source import Ask, Facts, Offer, PriorSource, check_guidance
from stages.errors import UserError
from stages.kinds import STAGES

if TYPE_CHECKING:
    import torch

    from stages.guidance.prior import Prior


class ReferenceSource(PriorSource):
    """The exact denoiser of renders of a mesh, at the size that the stage renders at unless another is asked for."""

    form = "reference"

    def reads(self, stage: str) -> list[str]:
        return [f"guidance.{stage}", "reference"]

    def facts(self, ask: Ask) -> Facts:
        from stages.guidance.compatibility import PriorDescription
        from stages.mesh.files.read import read_mesh

        read_mesh(_mesh(ask))
        description = PriorDescription("reference", reads_prompts=False)
        check_guidance(ask, description)
        return Facts(description)

    def load(self, ask: Ask, facts: Facts, device: torch.device, *, keep_text: bool = False) -> Prior:
        from stages.guidance.exact import load_reference

        _mesh(ask)
        settings = ask.config.reference
        resolution = settings.resolution or ask.settings.resolution
        return load_reference(settings.model_copy(update={"resolution": resolution}), ask.config.prompts)

    @classmethod
    def offers(cls) -> list[Offer]:
        stages = ", ".join(stage for stage, kind in STAGES.items() if kind.prior == "pocket")
        return [Offer("reference", "the exact prior of a given mesh", stages, "any", "< 0.1", "-")]


def _mesh(ask: Ask) -> str:
    """The mesh's file. Raises: UserError where none is named."""
    if not ask.config.reference.mesh:
        raise UserError(
            "the reference prior has no mesh",
            "reference.mesh is not set",
            "pipeline run --config reference reference.mesh=FILE.glb --stages coarse,fine; "
            'in Python mesh="FILE.glb", or settings={"reference.mesh": "FILE.glb"}',
        )
    return ask.config.reference.mesh
