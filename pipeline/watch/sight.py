"""What a stage looks like between two steps: a picture from any camera, or its mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from stages.stage import Stage

BEHIND = 0.6  # linear grey behind an object, on the page too


@dataclass(frozen=True)
class Camera:
    """A camera in the scene's conventions (see stages/cameras.py).

    Args:
        c2w: 16 numbers, row by row.
        fov_deg: vertical, of the whole picture.
        aspect: width by height of the picture.
    """

    c2w: tuple[float, ...]
    fov_deg: float
    aspect: float

    @classmethod
    def read(cls, words: Any) -> Camera | None:
        """Return the camera that JSON describes, None where it describes none."""
        try:
            c2w = tuple(float(value) for value in words["c2w"])
            fov_deg, aspect = float(words["fov_deg"]), float(words["aspect"])
        except (TypeError, KeyError, ValueError, OverflowError):
            return None
        usable = len(c2w) == 16 and all(map(math.isfinite, c2w)) and 1 < fov_deg < 170 and 0.1 < aspect < 10
        return cls(c2w, fov_deg, aspect) if usable else None


def is_mesh(stage: Stage) -> bool:
    """Return whether a stage is shown as a mesh, with its field's colours; others are shown as pictures."""
    return hasattr(stage, "surface") and hasattr(stage, "field")


def can_show(stage: Stage) -> bool:
    """Return whether a stage can be shown at all."""
    return is_mesh(stage) or hasattr(stage, "render")


def picture_of(stage: Stage, camera: Camera, size: int) -> np.ndarray:
    """Return what a stage looks like, uint8 sRGB [H, W, 3] before grey; takes no randomness from the run.

    Args:
        stage: one with `render`.
        camera: from where.
        size: longer side in pixels.
    """
    import torch

    from stages.cameras import Views
    from stages.kernels.srgb import linear_to_srgb

    c2w = torch.tensor(camera.c2w, dtype=torch.float32).reshape(1, 4, 4)
    # a square picture whose side is the longer one, of which the middle is kept
    wide = 2 * math.degrees(math.atan(math.tan(math.radians(camera.fov_deg) / 2) * max(1.0, camera.aspect)))
    zero = torch.zeros(1)
    light = c2w[:, :3, 3] + 0.8 * c2w[:, :3, 0] + 1.2 * c2w[:, :3, 1]
    views = Views(c2w, torch.full((1,), wide), zero, zero, light).to(stage.device)
    with torch.no_grad():
        colour = stage.render(views, size, backdrop=torch.full((3,), BEHIND, device=stage.device)).colour[0]
        pixels = linear_to_srgb(colour).clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    height = size if camera.aspect <= 1 else max(round(size / camera.aspect), 1)
    width = size if camera.aspect >= 1 else max(round(size * camera.aspect), 1)
    top, left = (size - height) // 2, (size - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def mesh_of(stage: Stage) -> dict[str, np.ndarray]:
    """Return the present mesh of a stage: vertices float32 [V, 3], faces int32 [F, 3], colours uint8 sRGB [V, 3]."""
    import torch

    from stages.kernels.srgb import linear_to_srgb

    with torch.no_grad():
        surface = stage.surface()
        vertices, faces = surface.vertices.detach().float(), surface.faces.to(torch.int32)
        colours = linear_to_srgb(stage.field.albedo(vertices).float()).clamp(0, 1).mul(255).round().to(torch.uint8)
    shown = {"vertices": vertices, "faces": faces, "colours": colours}
    return {name: np.ascontiguousarray(values.cpu().numpy()) for name, values in shown.items()}
