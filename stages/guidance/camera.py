"""Camera tokens: a prior told in numbers what it looks at, behind the words of its prompt.

MVDream (arXiv 2308.16512) and Zero-1-to-3 (arXiv 2303.11328) condition on the camera, since "side view" leaves a
quarter turn open and a prior that cannot know the turn draws the mean of all: round things with faces on every side.
Here a small perceptron turns camera, light and backdrop into tokens that follow those of the text, as IP-Adapter
(arXiv 2308.06721) adds an image's; without them the same network is an ordinary text-to-image model, which is what
diffusers' own pipelines make of the folder. The part is optional: `camera/` beside `unet/`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.cameras import Views, linear_to_srgb
from stages.errors import UserError
from stages.guidance.prior import ViewContext

NUMBERS = 16


def view_numbers(views: Views, background: Tensor, ambient: float = 1.0, textureless: bool = False) -> Tensor:
    """What a prior is told of each view: [B, 16], all about as wide as one.

    Args:
        views: their exact poses, jitter included. background: linear colour [3], [B, 3] or [B, H, W, 3] (its mean).
        ambient: share of the light that has no direction; 1 is plain albedo. textureless: the object is plain clay.
    """
    rotation = views.c2w[:, :3, :3].float()
    back = rotation[:, :, 2]  # from the object to the camera
    x, z = back[:, 0], back[:, 2]
    origin = -torch.einsum("bij,bi->bj", rotation, views.position.float())  # the object's centre as the camera sees it
    reach = -origin[:, 2] * torch.tan(torch.deg2rad(views.fov_deg.float()) / 2)  # half the picture's height there
    if background.dim() == 4:
        background = background.mean((1, 2))
    grey = linear_to_srgb(background.float()).expand(len(views), 3)
    light = torch.einsum("bij,bi->bj", rotation, nn.functional.normalize(views.light.float(), dim=-1)) * (1 - ambient)
    flags = torch.tensor([2 * ambient - 1, float(textureless)]).to(back).expand(len(views), 2)
    columns = [
        back,
        torch.stack([2 * x * z, z * z - x * x], 1),  # twice the azimuth: fronts and backs from sides
        5 * origin[:, :2] / reach[:, None],
        5 * (1 / reach[:, None] - 1),
        4 * (grey.to(back) - 0.65),
        flags,
        2 * light,
    ]
    return torch.cat(columns, 1)


class CameraTokens(nn.Module):
    """view_numbers [B, 16] to tokens [B, tokens, width] for the network's cross-attention."""

    def __init__(self, width: int, tokens: int = 4, hidden: int = 256) -> None:
        super().__init__()
        self.config = {"width": width, "tokens": tokens, "hidden": hidden}
        self.layers = nn.Sequential(
            nn.Linear(NUMBERS, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, tokens * width)
        )
        for layer in self.layers[::2]:  # tokens about as large as those of a text encoder's last norm
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.layers(numbers.to(self.layers[0].weight)).unflatten(-1, (self.config["tokens"], -1))

    def of(self, context: ViewContext) -> Tensor | None:
        """The tokens of a batch's views; None where the stage does not say what lies behind the object."""
        if context.background is None:
            return None
        shading = context.shading
        ambient, textureless = (1.0, False) if shading is None else (float(shading.ambient), shading.textureless)
        return self(view_numbers(context.views, context.background, ambient, textureless).to(self.layers[0].weight.device))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> CameraTokens:
        """Inverse of save, in float32. Raises: UserError for a damaged folder."""
        try:
            made = cls(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
            made.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        except Exception as error:
            raise UserError(
                f"Cannot load the camera tokens {folder}",
                f"{type(error).__name__}: {error}",
                "get the folder again, or set prior.diffusion.camera=false to go without them",
            ) from None
        return made.eval().requires_grad_(False)
