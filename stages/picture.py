"""The picture of an object that both stages hold on to in its one view, while the prior draws the others.

The losses are those of Magic123 (arXiv 2306.17843, eq. 1 to 3): colour and mask as squared errors, depth as a
correlation, since a depth picture has neither scale nor origin. They are sums over pixels, in the size of one view of
the guidance: weight 1 pulls at the picture's view as hard as the prior does at one view of a step alone.
Letters: S the side of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.cameras import Views, orbit_views
from stages.errors import UserError
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear

SIDE = 512  # of a picture as it is kept, pixels
RENDERED = 256  # most pixels a side that the fine stage renders its view with
FILLED = 0.85  # share of the frame that an object of the scene takes up, which `fit` gives a picture's object
SMALLEST, LARGEST = 0.002, 0.98  # share of a picture that is an object
PLAIN, SAME = 14 / 255, 5 / 255  # colours as near as this to the border's are background; such a hole is one
BEHIND = 0.5  # linear grey behind object and picture
ADVICE = "give a PNG with transparency, or the object before one plain colour"


class PictureSettings(BaseModel):
    """Settings of the picture that a run holds on to."""

    model_config = ConfigDict(extra="forbid")

    file: str | None = Field(None, min_length=1, description="picture of the object, with alpha or a plain background")
    depth_file: str | None = Field(None, min_length=1, description="grey picture of its depth, brighter is farther")
    azimuth_deg: float = Field(0.0, ge=-360, le=360, description="where it was taken from; 0 in front, 90 from +x")
    elevation_deg: float = Field(0.0, ge=-85, le=85, description="height it was taken from")
    fov_deg: float = Field(36.0, gt=1, lt=120, description="vertical field of view in degrees")
    distance: float = Field(3.0, gt=1.8, le=100, description="from the object's middle; the object's radius is 0.85")
    fit: bool = Field(True, description="centre the object and let it fill the frame; no: the frame is right as it is")
    colour: float = Field(4.0, ge=0, description="weight of the squared error of its colours")
    mask: float = Field(8.0, ge=0, description="weight of the squared error of its silhouette")
    depth: float = Field(1.0, ge=0, description="weight of 1 - correlation of its depth, where that is given")


@dataclass(frozen=True)
class Picture:
    """An object seen once.

    Args:
        colour: [S, S, 3] linear, of the object; anything where it is not.
        mask: [S, S, 1] in [0, 1].
        depth: [S, S, 1], of any scale, or None.
        settings: of the view and the weights.
    """

    colour: Tensor
    mask: Tensor
    depth: Tensor | None
    settings: PictureSettings

    @property
    def view(self) -> Views:
        """The view that it was taken from."""
        s = self.settings
        return orbit_views([s.azimuth_deg], s.elevation_deg, s.distance, s.fov_deg)

    def mask_at(self, side: int) -> Tensor:
        """Return the silhouette [1, side, side, 1] in [0, 1]."""
        return _resized(self.mask, side)

    def colour_at(self, side: int) -> Tensor:
        """Return the colours before BEHIND, sRGB [1, side, side, 3]."""
        return linear_to_srgb(_resized(self.colour * self.mask + BEHIND * (1 - self.mask), side))

    def loss(self, colour: Tensor, mask: Tensor, depth: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a render of the view over BEHIND, and its metrics.

        Args:
            colour: [1, H, H, 3] linear.
            mask: [1, H, H, 1] opacity or coverage.
            depth: [1, H, H, 1] along the rays; needed where the picture has a depth.
        Returns: a loss, differentiable in all three; the silhouettes' IoU and the colours' PSNR in dB.
        """
        s, side = self.settings, colour.shape[1]
        wanted_mask = self.mask_at(side).to(colour.device)
        error = linear_to_srgb(colour) - self.colour_at(side).to(colour.device)
        loss = 2 * s.colour * error.square().sum() + 2 * s.mask * (mask - wanted_mask).square().sum()
        if self.depth is not None and s.depth > 0 and depth is not None:
            inside = (wanted_mask > 0.5) & (mask.detach() > 0.5)
            if int(inside.sum()) > 16:
                far = _resized(self.depth, side).to(colour.device)[inside]
                near = depth[inside] / mask[inside].clamp_min(1e-3)
                loss = loss + s.depth * len(far) * (1 - _correlation(near, far))
        with torch.no_grad():
            both, either = (f(mask > 0.5, wanted_mask > 0.5).sum() for f in (torch.logical_and, torch.logical_or))
            iou = float(both / either.clamp_min(1))
            psnr = float(-10 * error.square().mean().clamp_min(1e-6).log10())
        return loss, {"picture_iou": iou, "picture_db": psnr}


def read_picture(settings: PictureSettings, file: Path, depth_file: Path | None = None) -> Picture:
    """Read a picture and tell the object from what is behind it.

    Args:
        settings: of view and weights; its own file names are not looked at.
        file: the picture.
        depth_file: the picture of its depth, of the same shape, or None.
    Raises: UserError where a file is no picture, or the object cannot be told from what is behind it.
    """
    pixels = _pixels(file)
    mask = _mask(pixels, file)
    depth = None
    if depth_file is not None:
        depth = _pixels(depth_file, grey=True)
        if depth.shape[:2] != pixels.shape[:2]:
            shapes = " and ".join(f"{x.shape[1]} x {x.shape[0]}" for x in (depth, pixels))
            raise UserError(
                f"the depth {depth_file} does not go with the picture", f"they have {shapes} pixels", "give equal ones"
            )
    frame = _frame(mask, settings.fit)
    colour = srgb_to_linear(torch.from_numpy(_filled(pixels[..., :3], mask)))
    layers = [colour, torch.from_numpy(mask)[..., None]] + ([] if depth is None else [torch.from_numpy(depth)])
    cut = [_cut(layer.float(), frame) for layer in layers]
    return Picture(cut[0], cut[1], cut[2] if depth is not None else None, settings)


def _pixels(file: Path, grey: bool = False) -> np.ndarray:
    """[H, W, 4] float32 in [0, 1], or [H, W, 1] of a grey picture."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            if grey:
                values = np.asarray(image if image.mode in ("L", "I;16", "I", "F") else image.convert("L"), np.float32)
                return np.ascontiguousarray(values[..., None] / max(float(values.max()), 1e-6))
            return np.asarray(image.convert("RGBA"), np.float32) / 255
    except FileNotFoundError:
        raise UserError(f"no such picture: {file}", "nothing is there", "check the path") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the picture {file}", reason, "give a PNG, JPEG or WebP file") from None


def _mask(pixels: np.ndarray, file: Path) -> np.ndarray:
    """Where the object is [H, W] float32 in [0, 1]: by alpha, else by the plain colour of the border."""
    alpha = pixels[..., 3]
    if alpha.min() > 0.98:
        alpha = _before_plain(pixels[..., :3], file)
    share = float((alpha > 0.5).mean())
    if not SMALLEST <= share <= LARGEST:
        raise UserError(f"there is no object in {file}", f"{100 * share:.1f} % of it is not background", ADVICE)
    return np.ascontiguousarray(alpha)


def _before_plain(rgb: np.ndarray, file: Path) -> np.ndarray:
    from scipy import ndimage

    width = max(1, min(rgb.shape[:2]) // 50)
    border = np.ones(rgb.shape[:2], bool)
    border[width:-width, width:-width] = False
    behind = np.median(rgb[border], axis=0)
    off = np.abs(rgb - behind).max(-1)
    odd = float((off[border] > PLAIN).mean())
    if odd > 0.1:
        why = f"it has no transparency, and {100 * odd:.0f} % of its border differs from the border's own colour"
        raise UserError(f"cannot tell the object of {file} from what is behind it", why, ADVICE)
    regions, count = ndimage.label(off <= PLAIN)
    around = np.zeros(count + 1, bool)
    around[np.unique(regions[border])] = True
    size = np.bincount(regions.reshape(-1), minlength=count + 1)
    around |= np.bincount(regions.reshape(-1), off.reshape(-1)) <= SAME * size  # seen through a handle
    around[0] = False
    return (~around[regions]).astype(np.float32)


def _filled(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Colours with those of the object's border carried outwards, so that resizing mixes no background in."""
    from scipy import ndimage

    inside = mask > 0.9
    if not inside.any():
        return np.ascontiguousarray(rgb)
    rows, columns = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return np.ascontiguousarray(rgb[rows, columns])


def _frame(mask: np.ndarray, fit: bool) -> tuple[int, int, int]:
    """Left, top and side of the square to cut out, in pixels; it may reach beyond the picture."""
    height, width = mask.shape
    if not fit:
        side = max(height, width)
        return (width - side) // 2, (height - side) // 2, side
    rows, columns = np.flatnonzero((mask > 0.5).any(1)), np.flatnonzero((mask > 0.5).any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = round(max(bottom - top, right - left) / FILLED)
    return int(left + right - side) // 2, int(top + bottom - side) // 2, side


def _cut(layer: Tensor, frame: tuple[int, int, int]) -> Tensor:
    """The square of a layer [H, W, C] at SIDE pixels; zero, and the border's colour, beyond the picture."""
    left, top, side = frame
    height, width, channels = layer.shape
    rows = torch.arange(top, top + side)
    columns = torch.arange(left, left + side)
    square = layer[rows.clamp(0, height - 1)][:, columns.clamp(0, width - 1)]
    if channels == 1:
        beyond = ((rows < 0) | (rows >= height))[:, None] | ((columns < 0) | (columns >= width))[None]
        square = square * ~beyond[..., None]
    return _resized(square, SIDE)[0]


def _resized(layer: Tensor, side: int) -> Tensor:
    """[1, side, side, C] of a square layer, averaged where it gets smaller."""
    x = layer.permute(2, 0, 1)[None]
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False).permute(0, 2, 3, 1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-6)


def nearest_caption(picture: Picture, scorer: Any, captions: list[str]) -> tuple[str, float]:
    """Return the caption that a CLIP finds nearest to a picture, and their cosine.

    Args:
        picture: the object.
        scorer: a stages.guidance.clip.ClipScorer.
        captions: to choose among.
    """
    image = picture.colour * picture.mask + BEHIND * (1 - picture.mask)
    with torch.no_grad():
        cosines = scorer.embed_texts(captions) @ scorer.embed_images(image[None])[0]
    best = int(cosines.argmax())
    return captions[best], float(cosines[best])
