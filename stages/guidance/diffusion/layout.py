"""Layout: a network from words to one small volume per object, and the rendering of these volumes for a camera.

A prior that is told a camera only in words must draw the mean of a quarter turn. MVDream (arXiv 2308.16512) and
Zero-1-to-3 (arXiv 2303.11328) condition on the camera; here a small feed-forward network makes density, colour and
normals of each object that the words name, and the camera looks into them (HoloGAN, arXiv 1904.01326; SyncDreamer,
arXiv 2309.03453), in the stage's own light and before its own backdrop. layout_condition.py tells a diffusion prior
that picture.

What is known is not learnt: perspective, Lambert's law under a point light, the backdrop and the grey of clay renders
are computed. Words are read one by one and sorted by their classes, which the model's config lists: kinds and patterns
decide shapes, colours decide what the shapes are painted with, joints stand between two objects. So a kind has one
shape in all colours, also in those that training never showed. Both objects of a pair are made as if each stood alone,
then placed by the boxes they fill.

Letters: B views, M texts, K = 2 objects a text at most, N objects in all, G cells a side, W width of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.cameras import Views, rays
from stages.kernels.grids import composite_grids
from stages.kernels.reference.grids import DENSITY, EXTENT, activated
from stages.kernels.srgb import linear_to_srgb
from stages.render.shade import TEXTURELESS_ALBEDO

OBJECTS = 2
BASE = 8  # cells a side where a volume begins
SAMPLES = 1.25  # of a ray, a cell
SHARPNESS = 10.0  # gain of the density: a surface is a step within a cell or two
VIVID = 20.0  # gain of a palette's logits, which have far to go at the rate of the other weights
FINENESS = 64  # steps in which words are counted: texts that say the same are read the same, mixed ones in parts
CLASSES = ("kinds", "patterns", "colours", "joints")


class Residual(nn.Module):
    """x + SiLU(conv(x)), 3 x 3 x 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.conv(x))


@dataclass(frozen=True)
class Reading:
    """Word counts of M texts by class, in [0, 1].

    kinds, patterns, colours: [M, K, words of the class] of each object. joints: [M, words] of the whole text.
    """

    kinds: Tensor
    patterns: Tensor
    colours: Tensor
    joints: Tensor

    @property
    def pair(self) -> Tensor:
        """Whether there are two objects: [M] bool."""
        return self.kinds[:, 1].sum(-1) > 0.5

    def of(self, index: int) -> Reading:
        """The reading of one text, M = 1."""
        rows = slice(index, index + 1)
        return Reading(self.kinds[rows], self.patterns[rows], self.colours[rows], self.joints[rows])


@dataclass(frozen=True)
class Objects:
    """The objects of M texts as grids, with their places.

    grids: [N, G, G, G, 8], see stages/kernels/grids.py. index: [M, K] int32, the grids of a text, -1 for none.
    placement: [M, K, 4] scale and offset of each.
    """

    grids: Tensor
    index: Tensor
    placement: Tensor


@dataclass(frozen=True)
class Setting:
    """Cameras, light and backdrop of B views.

    views: cameras and lights. ambient: [B] share of the light without direction. bare: [B] 1 for clay renders, else 0.
    under: linear colour behind the object, [B, 3] or [B, side, side, 3].
    """

    views: Views
    ambient: Tensor
    bare: Tensor
    under: Tensor


class Layout(nn.Module):
    """The network from texts to objects.

    Args:
        width: W. words: the words of each of CLASSES.
        code: width of a shape's code. channels: of the volume at 8^3, 16^3 and 32^3.
        paints: how many colours an object can have; which ones is decided by its colour's word alone.
        fine: also a level of 64^3 cells, added to the interpolated coarser one.
    """

    def __init__(
        self,
        width: int,
        words: dict[str, list[str]],
        *,
        code: int = 256,
        channels: tuple[int, int, int] = (48, 32, 16),
        paints: int = 24,
        fine: bool = False,
    ) -> None:
        super().__init__()
        self.config = {"width": width, "words": words, "code": code, "channels": list(channels), "paints": paints}
        self.config["fine"] = fine
        self.half = False  # bfloat16 inside the volume: for training, where cores have it
        a, b, c = channels
        counts = {name: len(words[name]) for name in CLASSES}
        shape = counts["kinds"] + counts["patterns"]
        self.reader = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, sum(counts.values()) + 1)
        )
        self.box = nn.Linear(shape, 6)
        self.place = nn.Sequential(
            nn.Linear(6 * OBJECTS + counts["joints"] + counts["kinds"], code),
            *(nn.SiLU(), nn.Linear(code, code), nn.SiLU(), nn.Linear(code, 4 * OBJECTS)),
        )
        self.palette = nn.Parameter(torch.randn(paints, 3) / VIVID)
        self.palette_of = nn.Parameter(torch.randn(counts["colours"], paints, 3) / VIVID)  # added, by colour
        self.code = nn.Sequential(nn.Linear(shape, 2 * code), nn.SiLU(), nn.Linear(2 * code, code), nn.SiLU())
        self.volume = nn.Linear(code, BASE**3 * a)
        self.level8 = nn.Sequential(nn.SiLU(), Residual(a))
        self.level16 = nn.Sequential(nn.ConvTranspose3d(a, b, 2, 2), nn.SiLU(), Residual(b), Residual(b))
        self.level32 = nn.Sequential(nn.ConvTranspose3d(b, c, 2, 2), nn.SiLU(), Residual(c))
        self.cells = nn.Conv3d(c, 4 + paints, 1)
        if fine:
            self.level64 = Residual(c)
            self.eighths = nn.Parameter(torch.zeros(c, 8, 4 + paints))  # of a cell's features, for its eight children
        self.to(memory_format=torch.channels_last_3d)

    def word_logits(self, text: Tensor) -> Tensor:
        """Return word logits [M, L, words of CLASSES in their order, and any other] of tokens [M, L, W]."""
        return self.reader(text)

    def read(self, text: Tensor) -> Reading:
        """Return the word counts of texts [M, L, W]; the first joint divides the two objects."""
        sizes = [len(self.config["words"][name]) for name in CLASSES]
        kinds, patterns, colours, joints, _ = self.word_logits(text).softmax(-1).split([*sizes, 1], -1)
        after = joints.sum(-1).cumsum(1).clamp_max(1)  # [M, L]
        sides = torch.stack([1 - after, after], 1)  # [M, K, L]

        def word_counts(words: Tensor) -> Tensor:
            count = torch.einsum("mkl,mlw->mkw", sides, words)
            return (count / count.sum(-1, keepdim=True).clamp_min(1) * FINENESS).round() / FINENESS

        joint_counts = (joints.sum(1).clamp_max(1) * FINENESS).round() / FINENESS
        return Reading(word_counts(kinds), word_counts(patterns), word_counts(colours), joint_counts)

    def placement(self, reading: Reading, boxes: Tensor | None = None) -> Tensor:
        """Predict scale and offset [M, K, 4] of a pair's objects from their boxes and from the kind of the second one.

        Seeing boxes in place of the first object's kind, it can place kinds that it never saw together.

        Args:
            boxes: [M, K, 6] low and high corner of each object alone; None: predicted from the words.
        """
        boxes = self.boxes(reading) if boxes is None else boxes
        rows = self.place(torch.cat([boxes.flatten(1), reading.joints, reading.kinds[:, 1]], 1)).view(-1, OBJECTS, 4)
        return torch.cat([0.6 * torch.exp(rows[..., :1]), rows[..., 1:]], -1)

    def boxes(self, reading: Reading) -> Tensor:
        """Predict the low and high corner [M, K, 6] of each object alone."""
        return self.box(torch.cat([reading.kinds, reading.patterns], -1))

    def grids(self, shapes: Tensor, colours: Tensor) -> Tensor:
        """Return volumes [N, G, G, G, 8] of objects, see stages/kernels/grids.py; equal shapes are made once.

        Args:
            shapes: [N, kinds and patterns]. colours: [N, colours], counts of words.
        """
        shapes, rows = torch.unique(shapes, dim=0, return_inverse=True)
        palette = self.palettes(colours)
        density, normal, shares, x = self._cells(shapes)
        cells = torch.cat([density, normal, torch.zeros_like(density)], -1).unbind()
        shares, number = shares.unbind(), rows.tolist()
        paints = [shares[k] @ palette_n for k, palette_n in zip(number, palette.unbind(), strict=True)]
        solids = [cells[k] for k in number]
        grids = torch.stack([torch.cat([c[..., :1], p, c[..., 1:]], -1) for c, p in zip(solids, paints, strict=True)])
        return grids if not self.config["fine"] else self._finer(grids, x, palette, rows)

    def palettes(self, colours: Tensor) -> Tensor:
        """Return linear paints [N, paints, 3] of objects of colours [N, colours], counts of words."""
        logits = self.palette + torch.einsum("nc,cpk->npk", colours, self.palette_of)
        return torch.sigmoid(VIVID * logits) ** 2.2

    def at(self, shapes: Tensor, points: Tensor) -> Tensor:
        """Return the values of shapes [N, kinds and patterns] at points [N, Q, 3], before painting: [N, Q, 4 + paints].

        Raw density, normal and shares of the paints, as `grids` with its palette would be read there.
        """
        *cells, x = self._cells(shapes)
        cells = torch.cat(cells, -1)  # [N, side, side, side, 4 + paints]
        if not self.config["fine"]:
            return _weighted(cells.flatten(1, 3), *_corners(points, cells.shape[1]))
        side = cells.shape[1]
        weights = torch.cat([SHARPNESS * self.eighths[..., :1], self.eighths[..., 1:]], -1).flatten(1)
        children = (self._features(x) @ weights).view(len(shapes), 8 * side**3, -1)
        smooth = _weighted(cells.flatten(1, 3), *_smooth_corners(points, side))
        return smooth + _weighted(children, *_child_corners(points, side))

    def _cells(self, shapes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw density, normal and shares of paints [N, 32, 32, 32, .] of shapes, and features for a finer level."""
        x = self.volume(self.code(shapes)).view(-1, self.config["channels"][0], BASE, BASE, BASE)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            x = self.level32(self.level16(self.level8(x.contiguous(memory_format=torch.channels_last_3d))))
        cells = self.cells(x.float()).permute(0, 2, 3, 4, 1)  # [shapes, 32, 32, 32, 4 + paints]
        side = cells.shape[1]
        at = ((torch.arange(side, device=x.device) + 0.5) / side * 2 - 1) * EXTENT
        place = torch.stack(torch.meshgrid(at, at, at, indexing="ij"), -1)
        ball = 4 * (0.6 - place.norm(dim=-1, keepdim=True))  # what it all begins from: a soft ball
        density = SHARPNESS * cells[..., :1] + ball
        return density, cells[..., 1:4] + F.normalize(place, dim=-1), cells[..., 4:].softmax(-1), x

    def _features(self, x: Tensor) -> Tensor:
        """Features [N, cells, features] of each cell of the coarser level, for its eight children."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            x = self.level64(x)
        return x.float().permute(0, 2, 3, 4, 1).reshape(len(x), -1, x.shape[1])

    def _finer(self, grids: Tensor, x: Tensor, palette: Tensor, rows: Tensor) -> Tensor:
        """Return grids of twice the side: the interpolated grids plus a residual from each cell's features x.

        The palette goes into the weights, so that nothing wider than a grid is ever made at this size.
        """
        n, side = len(grids), grids.shape[1]
        density, normal, paint = self.eighths.split([1, 3, self.config["paints"]], -1)
        colour = torch.einsum("fkp,npc->nfkc", paint, palette)
        parts = [(SHARPNESS * density).expand(n, -1, -1, -1), colour, normal.expand(n, -1, -1, -1)]
        weights = F.pad(torch.cat(parts, -1), (0, 1))  # [N, features, 8 children, 8]
        features, weights = self._features(x).unbind(), weights.flatten(2).unbind()
        details = torch.stack([features[k] @ weight for k, weight in zip(rows.tolist(), weights, strict=True)])
        details = details.view(n, side, side, side, 2, 2, 2, 8)
        details = details.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, 2 * side, 2 * side, 2 * side, 8)
        smooth = F.interpolate(grids.permute(0, 4, 1, 2, 3), scale_factor=2, mode="trilinear").permute(0, 2, 3, 4, 1)
        return smooth + details

    def objects(self, reading: Reading) -> Objects:
        """Return the objects of texts, at the placement that the network predicts."""
        return self.placed(reading, self.placement(reading))

    def placed(self, reading: Reading, placement: Tensor) -> Objects:
        """Return the objects of texts, those of pairs at placement [M, K, 4]; a single one stays where it is."""
        pair = reading.pair
        present = torch.stack([torch.ones_like(pair), pair], 1)
        index = torch.where(present, present.flatten().cumsum(0).view_as(present) - 1, -1).int()
        alone = placement.new_tensor([1.0, 0, 0, 0])
        shapes = torch.cat([reading.kinds, reading.patterns], -1)[present]
        grids = self.grids(shapes, reading.colours[present])
        return Objects(grids, index, torch.where(pair[:, None, None], placement, alone))


def _weighted(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sums [N, Q, F] of rows [N, M, F], those of index [N, Q, K] times weights [N, Q, K]."""
    n, count, _ = rows.shape
    first = count * torch.arange(n, device=rows.device)[:, None, None]
    table, bags = rows.flatten(0, 1), (index + first).flatten(0, 1)
    return F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights.flatten(0, 1)).unflatten(0, (n, -1))


def _axes(points: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """By axis [N, Q, 3]: the lower cell of the two that points lie between, from -1 on, and the share of the upper."""
    at = (points / EXTENT + 1) * (side / 2) - 0.5
    low = at.floor()
    return low.long(), at - low


def _crossed(cells: Tensor, weights: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Numbers of the cells of a cube and their weights [N, Q, K^3], from those by axis [N, Q, 3, K]."""
    x, y, z = cells.clamp(0, side - 1).unbind(2)
    a, b, c = weights.unbind(2)
    number = (x[..., :, None, None] * side + y[..., None, :, None]) * side + z[..., None, None, :]
    product = a[..., :, None, None] * b[..., None, :, None] * c[..., None, None, :]
    return number.flatten(2), product.flatten(2)


def _corners(points: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The eight cells around each point and their trilinear weights."""
    low, share = _axes(points, side)
    return _crossed(torch.stack([low, low + 1], -1), torch.stack([1 - share, share], -1), side)


def _smooth_corners(points: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Cells and weights of a grid that is enlarged twice by interpolation and then read at points."""
    low, share = _axes(points, 2 * side)
    middle, odd = low.div(2, rounding_mode="floor"), (low % 2).bool()
    even = torch.stack([0.25 * (1 - share), torch.full_like(share, 0.75), 0.25 * share], -1)
    uneven = torch.stack([0.75 - 0.5 * share, 0.25 + 0.5 * share, torch.zeros_like(share)], -1)
    first = torch.where(odd, middle, middle - 1)
    cells = first[..., None] + torch.arange(3, device=points.device)
    return _crossed(cells, torch.where(odd[..., None], uneven, even), side)


def _child_corners(points: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """As _corners at twice the side, where cells are numbered as the children of those of a grid of `side`."""
    low, share = _axes(points, 2 * side)
    cells = torch.stack([low, low + 1], -1).clamp(0, 2 * side - 1)
    weights = torch.stack([1 - share, share], -1)
    number, product = _crossed(cells // 2, weights, side)
    return 8 * number + _crossed(cells % 2, weights, 2)[0], product


def look(objects: Objects, rows: Tensor, setting: Setting, side: int, supersample: int = 1) -> Tensor:
    """Pictures [B, 4, side, side] of objects: sRGB and opacity, in [0, 1].

    Args:
        rows: [B] which of the M texts each view looks at.
        side: pixels.
        supersample: rays a pixel and axis, averaged in linear light.
    """
    many = side * supersample
    origins, directions = (r.flatten(1, 2).contiguous() for r in rays(setting.views, many, many))
    if setting.under.dim() == 4:
        under = setting.under.repeat_interleave(supersample, 1).repeat_interleave(supersample, 2)
        setting = replace(setting, under=under.flatten(1, 2))
    pixels = radiance(objects, rows, setting, origins, directions).transpose(1, 2).unflatten(2, (many, many))
    pixels = F.avg_pool2d(pixels, supersample) if supersample > 1 else pixels
    return torch.cat([linear_to_srgb(pixels[:, :3]), pixels[:, 3:]], 1)


def radiance_at(objects: Objects, points: Tensor) -> tuple[Tensor, Tensor]:
    """Density [N] per world length and linear albedo [N, 3] of the first text's objects at world points [N, 3].

    As stages/kernels/grids.py composites them: where two objects meet, the denser one colours more.
    """
    total, paint = points.new_zeros(len(points)), points.new_zeros(len(points), 3)
    for grid, placement in zip(objects.index[0].tolist(), objects.placement[0], strict=True):
        if grid < 0:
            continue
        near = (points - placement[1:]) / placement[0]
        cells = objects.grids[grid].permute(3, 0, 1, 2)[None]
        where = (near.flip(-1) / EXTENT)[None, None, None]
        raw = F.grid_sample(cells, where, align_corners=False, padding_mode="border")[0, :, 0, 0].T  # [N, 8]
        inside = near.norm(dim=-1) < EXTENT
        density = torch.where(inside, DENSITY * activated(raw[:, 0]) / placement[0], 0.0)
        total, paint = total + density, paint + density[:, None] * raw[:, 1:4]
    return total, (paint / total.clamp_min(1e-6)[:, None]).clamp(0, 1)


def radiance(
    objects: Objects, rows: Tensor, setting: Setting, origins: Tensor, directions: Tensor, jitter: Tensor | None = None
) -> Tensor:
    """Linear colour and opacity [B, R, 4] along rays [B, R, 3] of the setting's views; `under` is [B, 3] or [B, R, 3].

    Lambert's law (stages/render/shade.py) at the mean point and with the mean normal of what a ray met.
    """
    scene = (objects.index[rows], objects.placement[rows].detach(), origins, directions)
    steps = round(SAMPLES * objects.grids.shape[1])
    sums = composite_grids(objects.grids, *scene, steps=steps, jitter=jitter)
    albedo, normal, opacity = sums[..., :3], sums[..., 3:6], sums[..., 6:7]
    solid = opacity.clamp_min(1e-3)
    normal = normal / solid
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp_min(1)
    points = origins + sums[..., 7:] / solid * directions
    towards = F.normalize(setting.views.light.to(points)[:, None] - points, dim=-1)
    cosine = (normal * towards).sum(-1, keepdim=True).clamp_min(0)
    ambient, bare = setting.ambient[:, None, None], setting.bare[:, None, None]
    colour = torch.lerp(albedo, TEXTURELESS_ALBEDO * opacity, bare) * (ambient + (1 - ambient) * cosine)
    under = setting.under[:, None] if setting.under.dim() == 2 else setting.under
    return torch.cat([colour + (1 - opacity) * under, opacity], -1)
