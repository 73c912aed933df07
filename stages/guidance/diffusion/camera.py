"""Camera layout: a prior told in numbers what it looks at, beside the words of its prompt.

MVDream (arXiv 2308.16512) and Zero-1-to-3 (arXiv 2303.11328) condition on the camera, since "side view" leaves a
quarter turn open and a prior that cannot know the turn draws the mean of all: round things with faces on every side.
Here the prompt becomes a small volume of features, and the camera looks into it (HoloGAN, arXiv 1904.01326;
SyncDreamer, arXiv 2309.03453): turning the volume is exact and need not be learnt, so one kind of object seen from all
around teaches a single volume. What the camera sees, in the light and before the backdrop it is told of, joins the UNet
as a ControlNet's residuals do (arXiv 2302.05543). Without them the same network is an ordinary text-to-image model,
which is what diffusers' own pipelines make of the folder. The part is optional: `camera/` beside `unet/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.cameras import Views
from stages.errors import UserError
from stages.guidance.prior import ViewContext, is_flat
from stages.kernels.srgb import linear_to_srgb

NUMBERS = 16
DISTANCE = 3.0  # of the cameras, about: bends the rays through the volume


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
        background = background[:, 0, 0] if is_flat(background) else background.mean((1, 2))
    grey = linear_to_srgb(background.float()).expand(len(views), 3)
    light = torch.einsum("bij,bi->bj", rotation, F.normalize(views.light.float(), dim=-1)) * (1 - ambient)
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


class CameraLayout(nn.Module):
    """Words and view numbers to features of the picture on the UNet's finest grid, and to its residuals.

    Args:
        width: of the text tokens. channels: of the UNet's two levels, finest first. patch: numbers of one patch of the
            picture. code, volume, depth, hidden: widths of the prompt's code, of the volume, samples along a ray, of
            the picture's features.
    """

    def __init__(
        self,
        width: int,
        channels: tuple[int, int],
        patch: int,
        *,
        side: int = 16,
        code: int = 256,
        volume: int = 24,
        depth: int = 8,
        hidden: int = 96,
        features: int = 64,
    ) -> None:
        super().__init__()
        self.config = {"width": width, "channels": list(channels), "patch": patch, "side": side, "code": code}
        self.config |= {"volume": volume, "depth": depth, "hidden": hidden, "features": features}
        self.query, self.key = nn.Parameter(0.3 * torch.randn(4, width)), nn.Linear(width, width)
        self.code = nn.Sequential(nn.Linear(4 * width, 2 * code), nn.SiLU(), nn.Linear(2 * code, code), nn.SiLU())
        self.volume = nn.Linear(code, 64 * volume)
        self.solid = nn.ModuleList(nn.Conv3d(volume, volume, 3, padding=1) for _ in range(2))
        self.look = nn.Sequential(nn.Linear(NUMBERS, 64), nn.SiLU(), nn.Linear(64, 2 * hidden))
        self.flat = nn.Conv2d(volume * depth, hidden, 1)
        self.refine = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.narrow = nn.Conv2d(hidden, features, 3, padding=1)
        self.again = nn.Conv2d(features, features, 3, padding=1)
        self.patches = nn.Conv2d(features, patch, 3, padding=1)
        self.fine, self.coarse = nn.Conv2d(features, channels[0], 1), nn.Conv2d(features, channels[1], 2, stride=2)
        for layer in (self.fine, self.coarse):  # as a ControlNet's: nothing is added before something is learnt
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def features(self, text: Tensor, numbers: Tensor) -> Tensor:
        """Features [B, features, side, side] of the picture of text [B, L, width] seen as numbers [B, 16] tell."""
        s = self.config
        shares = (self.query @ self.key(text).transpose(1, 2)).softmax(-1)
        grid = F.silu(self.volume(self.code((shares @ text).flatten(1)))).view(-1, s["volume"], 4, 4, 4)
        grid = F.interpolate(grid, scale_factor=2, mode="trilinear")
        for layer in self.solid:
            grid = grid + F.silu(layer(grid))
        seen = F.grid_sample(grid, self._points(numbers), align_corners=False)  # [B, volume, depth, side, side]
        scale, shift = self.look(numbers)[..., None, None].chunk(2, 1)
        x = F.silu(self.flat(seen.flatten(1, 2)) * (1 + scale) + shift)
        x = F.silu(self.narrow(x + F.silu(self.refine(x))))
        return x + F.silu(self.again(x))

    def _points(self, numbers: Tensor) -> Tensor:
        """Where the rays of the views meet the volume: [B, depth, side, side, 3] in world coordinates."""
        side, depth = self.config["side"], self.config["depth"]
        back = F.normalize(numbers[:, :3], dim=1)
        level = torch.zeros_like(back[:, 0])
        right = F.normalize(torch.stack([back[:, 2], level, -back[:, 0]], 1), dim=1)
        axes = torch.stack([right, torch.linalg.cross(back, right), back], 1)  # rows
        u = (torch.arange(side, device=back.device) + 0.5) / side * 2 - 1
        z, y, x = torch.meshgrid(torch.linspace(-0.95, 0.95, depth, device=back.device), -u, u, indexing="ij")
        reach = 1 / (numbers[:, 7] / 5 + 1)  # half the picture's height at the object
        middle = numbers[:, 5:7] / 5
        spread = (reach[:, None, None, None] * (1 - z / DISTANCE))[..., None]
        across = (torch.stack([x, y], -1) - middle[:, None, None, None]) * spread
        return torch.cat([across, z[None, ..., None].expand(len(back), -1, -1, -1, 1)], -1) @ axes[:, None, None]

    def picture(self, features: Tensor) -> Tensor:
        """The mean picture that the features stand for, in patches [B, patch, side, side]; what they are taught by."""
        return self.patches(features)

    def residuals(self, features: Tensor) -> dict[str, Any]:
        """What UNet2DConditionModel.forward takes: residuals of its skips, one of two levels with one layer each, and
        of its middle."""
        fine, none = self.fine(features), features.new_zeros(())
        return {
            "down_block_additional_residuals": (fine, fine, none, none),
            "mid_block_additional_residual": self.coarse(features),
        }

    def of(self, text: Tensor, context: ViewContext) -> dict[str, Any]:
        """The residuals of a batch's views; none where the stage does not say what lies behind the object."""
        if context.background is None:
            return {}
        shading = context.shading
        ambient, textureless = (1.0, False) if shading is None else (float(shading.ambient), shading.textureless)
        numbers = view_numbers(context.views, context.background, ambient, textureless)
        weight = self.volume.weight
        return self.residuals(self.features(text.to(weight), numbers.to(weight)))

    def save(self, folder: Path, base: str = "") -> None:
        """Write config.json and model.safetensors, fp16.

        base: a folder of the same kind, relative to this one; only layers that differ from its are written here.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        if base:
            there = load_file(folder / base / "model.safetensors")
            state = {k: v for k, v in state.items() if k not in there or not torch.equal(v, there[k])}
        (folder / "config.json").write_text(json.dumps(self.config | {"base": base}, indent=2) + "\n")
        save_file(state, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> CameraLayout:
        """Inverse of save, in float32. Raises: UserError for a damaged folder, or one whose base is not there."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            base = config.pop("base", "")
            state = load_file(folder / base / "model.safetensors") if base else {}
            made = cls(**config)
            made.load_state_dict({k: v.float() for k, v in (state | load_file(folder / "model.safetensors")).items()})
        except Exception as error:
            raise UserError(
                f"Cannot load the camera layout {folder}",
                f"{type(error).__name__}: {error}",
                "get the folder again, or set prior.diffusion.camera=false to go without it",
            ) from None
        return made.eval().requires_grad_(False)
