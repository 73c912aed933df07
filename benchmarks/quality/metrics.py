"""What a picture of an asset says of it: CLIP score, R-Precision, saturation, brightness, detail, faces at the back.

R-Precision at 1 (Dream Fields sec. 4; DreamFusion table 1): among all candidate captions, is the asset's own the one
nearest to its pictures? An asset's embedding is the mean of its views' unit embeddings (several azimuths, 30 degrees
of elevation), made unit again. Two kinds of pictures are judged: colour, against the captions, and textureless,
against the captions without their colour and pattern words, each once, since a clay render says nothing of either;
a caption outside the pocket world's grammar stands as it is for both.

Letters: A assets, C candidates, V views, D embedding width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.kernels.srgb import linear_to_srgb
from stages.pocket import world

LUMA = (0.2126, 0.7152, 0.0722)


def mean_embedding(embeddings: Tensor) -> Tensor:
    """Return the unit mean [D] of unit embeddings [V, D]."""
    return F.normalize(embeddings.mean(0), dim=0)


def hits(scores: Tensor, truth: Tensor | list[int]) -> Tensor:
    """Return R-Precision at 1 of each asset.

    Args:
        scores: [A, C] similarities.
        truth: [A] index of each asset's own caption.
    Returns: [A] in [0, 1]: 1 where the own caption scores highest, 0 where another does, 1 / ties where it shares the
        first place, so that scores that say nothing are at chance.
    """
    truth = torch.as_tensor(truth)
    true_score = scores.gather(1, truth[:, None])  # [A, 1]
    best = (true_score >= scores.max(1, keepdim=True).values)[:, 0]
    return best.float() / (scores == true_score).sum(1)


def ranks(scores: Tensor, truth: Tensor | list[int]) -> Tensor:
    """Return the place [A] of each asset's own caption among the candidates, 1 the best; ties take the middle place."""
    true_score = scores.gather(1, torch.as_tensor(truth)[:, None])
    return 1 + (scores > true_score).sum(1) + ((scores == true_score).sum(1) - 1) / 2


def geometry_text(caption: str) -> str:
    """Return the caption without colour and pattern words where the pocket world's grammar reads it, else unchanged."""
    try:
        return world.geometry_caption(world.parse(caption))
    except ValueError:
        return caption


def meaning(text: str) -> str:
    """A key that captions of the same thing share: views from all around cannot tell X next to Y from Y next to X."""
    return " next to ".join(sorted(text.split(" next to ")))


def candidates(prompts: list[str], distractors: list[str], textureless: bool, most: int | None = None) -> list[str]:
    """The captions that assets are judged against: prompts, then distractors, each meaning once, at most `most`."""
    texts = [geometry_text(text) if textureless else text for text in [*prompts, *distractors]]
    unique: dict[str, str] = {}
    for text in texts:
        unique.setdefault(meaning(text), text)
    return list(unique.values())[:most]


def truth_of(prompts: list[str], texts: list[str], textureless: bool) -> list[int]:
    """Where each prompt's own caption stands among the candidates."""
    places = {meaning(text): k for k, text in enumerate(texts)}
    return [places[meaning(geometry_text(prompt) if textureless else prompt)] for prompt in prompts]


def saturation_brightness(albedo: Tensor, coverage: Tensor) -> tuple[float, float]:
    """Return mean chroma and mean brightness of an object's unshaded pictures.

    Chroma is max - min and brightness (max + min) / 2 of a pixel's sRGB channels, the hexcone's and HSL's: both are
    in [0, 1], and both are multiplied by k when unclipped sRGB colours are.

    Args:
        albedo: linear [V, H, W, 3].
        coverage: [V, H, W, 1]; only fully covered pixels count.
    Returns: (nan, nan) where nothing is covered.
    """
    pixels = linear_to_srgb(albedo)[coverage[..., 0] >= 1]  # [N, 3]
    if len(pixels) == 0:
        return float("nan"), float("nan")
    high, low = pixels.max(-1).values, pixels.min(-1).values
    return float((high - low).mean()), float((high + low).mean() / 2)


def mean_lab(albedo: Tensor, coverage: Tensor) -> Tensor:
    """The mean CIELAB colour [V, 3] of an object's unshaded pictures, view by view; nan where nothing is covered.

    Lab under D65, from linear sRGB (IEC 61966-2-1, CIE 15): L in [0, 100].

    Args:
        albedo: linear [V, H, W, 3].
        coverage: [V, H, W, 1]; only fully covered pixels count.
    """
    xyz = albedo.clamp(0, 1).double() @ _XYZ.T / _XYZ.sum(1)  # white is (1, 1, 1)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-12) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(-1)
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
    inside = (coverage >= 1).double()
    return ((lab * inside).sum((1, 2)) / inside.sum((1, 2))).float()


_XYZ = torch.tensor(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
    dtype=torch.float64,
)


def colour_difference(asset: Tensor, truth: Tensor) -> float:
    """Return the mean distance (CIE76 Delta E; 2.3 is just seen) of two assets' mean colours [V, 3] in the same views.

    A wrong hue shows here, of which saturation and brightness know nothing. nan where an asset covers nothing.
    """
    return float((asset - truth).norm(dim=-1).mean())


def detail(images: Tensor, coverage: Tensor, sigma: float = 1.5) -> float:
    """Return high-frequency energy inside the silhouette: root mean square of luma minus its Gaussian blur.

    The blur is normalised by the object's own coverage, so the silhouette, whatever its contrast, adds nothing.

    Args:
        images: linear [V, H, W, 3].
        coverage: [V, H, W, 1].
        sigma: of the blur in pixels.
    Returns: in sRGB units; nan where nothing is covered.
    """
    inside = (coverage >= 1).float().permute(0, 3, 1, 2)
    if not inside.any():
        return float("nan")
    luma = (linear_to_srgb(images) @ images.new_tensor(LUMA))[:, None]
    weight = _blur(inside, sigma)
    smooth = _blur(luma * inside, sigma) / weight.clamp_min(1e-6)
    return float((((luma - smooth) * inside) ** 2).sum().div(inside.sum()).sqrt())


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of [V, 1, H, W], zeros beyond the border."""
    radius = int(np.ceil(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    images = F.conv2d(images, kernel.view(1, 1, 1, -1), padding=(0, radius))
    return F.conv2d(images, kernel.view(1, 1, -1, 1), padding=(radius, 0))


JANUS_STEP = 15.0  # degrees between the views around an object
JANUS_FRONT = 45.0  # a view of the truth within this of azimuth 0 shows the front
JANUS_BEHIND = 90.0  # an asset's views beyond this must not
JANUS_SHARE = (
    0.3  # share of them that makes an asset two-faced; a mirrored front half gives 0.54, a mere variation < 0.25
)


def janus_azimuths() -> list[float]:
    """Return the azimuths in [0, 360) at which asset and truth are compared."""
    return [JANUS_STEP * k for k in range(round(360 / JANUS_STEP))]


def front_share(asset: Tensor, truth: Tensor, mirrored: Tensor) -> float:
    """Share of the views from behind an asset in which it shows its front, by the nearest view of the ground truth.

    Each view of the asset beyond JANUS_BEHIND is matched with the most similar view of the ground truth or of its
    mirror image (a second face is often a mirrored one); it shows the front if that view is within JANUS_FRONT.

    Args:
        asset, truth, mirrored: unit features [K, D] of the pictures at `janus_azimuths()`; `mirrored` those of the
            truth's pictures flipped left to right, which are seen from the azimuth's opposite.
    """
    azimuths = torch.tensor(janus_azimuths())
    signed = (azimuths + 180) % 360 - 180
    behind = signed.abs() >= JANUS_BEHIND
    nearest = (asset[behind] @ torch.cat([truth, mirrored]).T).argmax(1)
    front = torch.cat([signed, signed]).abs() <= JANUS_FRONT
    return float(front[nearest].float().mean())


def two_faced(share: float) -> bool:
    """Return whether a share of front-like views from behind makes a Janus."""
    return share >= JANUS_SHARE


def picture_features(images: Tensor, side: int = 24) -> Tensor:
    """Return unit features [K, D] of linear pictures [K, H, W, 3] that need no network: small sRGB copies, centred."""
    small = F.interpolate(linear_to_srgb(images).permute(0, 3, 1, 2), (side, side), mode="bilinear", antialias=True)
    flat = small.flatten(1)
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
