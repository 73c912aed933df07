"""Condition a diffusion prior on the picture of a layout: as the mean of what it denoises and as UNet residuals.

Mean. With mu the layout's picture in the prior's space, the network denoises x - mu: it is given
z_t - sqrt(alpha_bar) mu, whose noise is that of z_t. PriorGrad (arXiv 2106.06406) and ShiftDDPMs (arXiv 2302.02373)
move the mean alike. Where noise has drowned everything the prediction is the picture itself, and not a UNet's copy.
Residuals. The picture joins the UNet's skips and its middle as a T2I-Adapter's features do (arXiv 2302.08453).

A run asks about few texts: their objects are made once and kept. The part is optional, `layout/` beside `unet/`:
without it the network is an ordinary text-to-image model, which is what diffusers' own pipelines make of the folder.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.errors import UserError
from stages.guidance.diffusion.layout import Layout, Objects, Reading, Setting, look, radiance_at
from stages.guidance.prior import ViewContext, is_flat

if TYPE_CHECKING:
    from stages.render.volume import Radiance

RAYS = 128  # a side: a cell of the layout's finest volume is about one and a half of them wide
CACHE_SIZE = 6  # texts whose objects are kept; words of views do not count: a run has its prompt, its negative and none


class LayoutCondition(nn.Module):
    """A layout with the adapter that turns its picture into inputs of one UNet.

    Args:
        layout: see :class:`Layout`. side: of the picture in pixels. grid: of the UNet's finest features.
        levels: channels of the UNet's levels of one layer each, finest first.
        latents: channels of the prior's latents, which come in patches of 2 x 2; 0: the prior's space is the picture's.
        edges: width of a network beside the linear map from pictures to latents; 0: the linear map alone.
    """

    def __init__(
        self, layout: Layout, side: int, grid: int, levels: tuple[int, ...], latents: int = 0, edges: int = 0
    ) -> None:
        super().__init__()
        self.config = {"layout": layout.config, "side": side, "grid": grid, "levels": list(levels), "latents": latents}
        self.config["edges"] = edges
        self.layout, self.side, self.patch, self.latents = layout, side, side // grid, latents
        channels = 4 * self.patch**2
        strides = [2**k for k in range(len(levels))]
        shapes = [(3, 1, 1), *((2 * stride, stride, stride // 2) for stride in strides[1:])]
        self.levels = nn.ModuleList(
            nn.Conv2d(channels, width, *shape) for width, shape in zip(levels, shapes, strict=True)
        )
        for layer in self.levels:  # as a ControlNet's: nothing is added before something is learnt
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if latents:
            self.mean = nn.Conv2d(channels, 4 * latents, 3, padding=1)
        if edges:  # what a linear map cannot say, at a fraction of an autoencoder's cost
            self.edges = nn.Sequential(
                nn.Conv2d(channels, edges, 3, padding=1), nn.SiLU(), nn.Conv2d(edges, 4 * latents, 3, padding=1)
            )
            nn.init.zeros_(self.edges[-1].weight)
            nn.init.zeros_(self.edges[-1].bias)
        self._cache: OrderedDict[bytes, Objects] = OrderedDict()

    def conditions(self, picture: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of DiffusionPrior.noise for pictures [B, 4, side, side] of `look`."""
        signed = picture * 2 - 1
        patches = F.pixel_unshuffle(signed, self.patch)
        mean = F.pixel_shuffle(self._latents(patches), 2) if self.latents else signed[:, :3]
        return {"mean": mean} | self._residuals([layer(patches) for layer in self.levels])

    def _latents(self, patches: Tensor) -> Tensor:
        linear = self.mean(patches)
        return linear + self.edges(patches) if self.config["edges"] else linear

    def zero_conditions(self, batch: int) -> dict[str, Any]:
        """Return residuals of zero and no mean, for a network that was compiled with residuals."""
        like = self.levels[0].weight
        sides = [self.config["grid"] >> k for k in range(len(self.levels))]
        widths = zip(self.config["levels"], sides, strict=True)
        return self._residuals([like.new_zeros(batch, width, side, side) for width, side in widths])

    def _residuals(self, levels: list[Tensor]) -> dict[str, Any]:
        """Return the residual arguments of UNet2DConditionModel.forward from one residual a level.

        They are added to the input and to the one layer of every level but the last, whose residual joins the middle;
        zero is added to the downsampling layers.
        """
        none = levels[0].new_zeros(())
        down = [levels[0]]
        for k, residual in enumerate(levels):
            last = k == len(levels) - 1
            down += [none] if last else [residual, none]
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": levels[-1]}

    def look(self, objects: Objects, rows: Tensor, setting: Setting) -> Tensor:
        """Return pictures [B, 4, side, side] of the texts' objects in views [B], as `conditions` takes them."""
        return look(objects, rows, setting, self.side, supersample=max(1, RAYS // self.side))

    @torch.no_grad()
    def of(self, text: Tensor, context: ViewContext) -> dict[str, Any]:
        """Return the conditions of a batch's views; none where the context has no backdrop."""
        if context.backdrop is None:
            return {}
        return self.conditions(self.picture(text, context))

    @torch.no_grad()
    def shape(self, text: Tensor) -> Radiance:
        """Return density and albedo as a function of world points, of the objects in one text [1, L, W]."""
        distinct, _ = _distinct(self.layout.read(text.float()))
        objects = self._objects(*distinct[0])
        return partial(radiance_at, objects)

    @torch.no_grad()
    def picture(self, text: Tensor, context: ViewContext) -> Tensor:
        """Return sRGB and opacity [B, 4, side, side] of texts [B, L, W], seen by the context's cameras."""
        distinct, rows = _distinct(self.layout.read(text.float()))
        objects = _joined([self._objects(*entry) for entry in distinct])
        return self.look(objects, rows, self._setting(context, text.device))

    def _objects(self, counts: Tensor, reading: Reading) -> Objects:
        key = counts.cpu().numpy().tobytes()
        if key not in self._cache:
            self._cache[key] = self.layout.objects(reading)
            if len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _setting(self, context: ViewContext, device: torch.device) -> Setting:
        shading, backdrop = context.shading, context.backdrop.to(device)
        ambient, bare = (1.0, 0.0) if shading is None else (float(shading.ambient), float(shading.textureless))
        views = context.views.to(device)
        if backdrop.dim() == 4 and not is_flat(backdrop):
            pixels = backdrop.permute(0, 3, 1, 2).float()
            backdrop = F.interpolate(pixels, (self.side, self.side), mode="area").permute(0, 2, 3, 1)
        else:
            backdrop = (backdrop[:, 0, 0] if backdrop.dim() == 4 else backdrop).float().expand(len(views), 3)
        every = torch.ones(len(views), device=device)
        return Setting(views, ambient * every, bare * every, backdrop)

    def save(self, folder: Path, base: str = "") -> None:
        """Write config.json and model.safetensors, fp16.

        base: a folder of the same kind, relative to this one; only tensors that differ from its are written here.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        if base:
            base_state = load_file(folder / base / "model.safetensors")
            state = {k: v for k, v in state.items() if k not in base_state or not torch.equal(v, base_state[k])}
        (folder / "config.json").write_text(json.dumps(self.config | {"base": base}, indent=2) + "\n")
        save_file(state, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> LayoutCondition:
        """Inverse of save, in float32. Raises: UserError for a damaged folder, or one whose base is not there."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            base = config.pop("base", "")
            state = load_file(folder / base / "model.safetensors") if base else {}
            state |= load_file(folder / "model.safetensors")
            condition = cls(Layout(**config.pop("layout")), **config)
            names = condition.state_dict()
            condition.load_state_dict({k: v.float() for k, v in state.items() if not base or k in names})
        except Exception as error:
            raise UserError(
                f"Cannot load the layout {folder}",
                f"{type(error).__name__}: {error}",
                "get the folder again, or set prior.diffusion.camera=false to go without it",
            ) from None
        return condition.eval().requires_grad_(False)


def _distinct(reading: Reading) -> tuple[list[tuple[Tensor, Reading]], Tensor]:
    """Return the distinct readings of M texts, as rows of counts and as readings, and the index [M] of each text's."""
    parts = (reading.kinds, reading.patterns, reading.colours, reading.joints)
    counts = torch.cat([part.flatten(1) for part in parts], 1)
    distinct, rows = torch.unique(counts, dim=0, return_inverse=True)
    firsts = [int((rows == k).nonzero()[0, 0]) for k in range(len(distinct))]
    return [(distinct[k], reading.of(first)) for k, first in enumerate(firsts)], rows


def _joined(objects: list[Objects]) -> Objects:
    """Concatenate the objects of several texts."""
    if len(objects) == 1:
        return objects[0]
    index, first = [], 0
    for one in objects:
        index.append(torch.where(one.index >= 0, one.index + first, -1).int())
        first += len(one.grids)
    return Objects(torch.cat([o.grids for o in objects]), torch.cat(index), torch.cat([o.placement for o in objects]))
