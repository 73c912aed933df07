"""Whether a picture shows an object's front: a small network for each kind of the pocket world, trained on its renders.

What counts as a Janus: a view from behind (105 deg of azimuth and more) in which the classifier sees a front, where in
the same view of the ground truth it sees none. Benchmarks' own eye: no prior and no CLIP has a part in it.
Pictures are 48 pixels, sRGB, each to zero mean and unit width; in training they are shifted, scaled, blurred, tinted
and mirrored, so that the fuzzy, oddly coloured objects of a distillation are judged by what they show, and shapeless
blobs are among them, which show no front.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.assess import JANUS_ELEVATION
from benchmarks.quality.metrics import janus_azimuths
from benchmarks.quality.render import Subject, shoot
from benchmarks.quality.systems import random_blob
from pipeline.output.files import write_whole
from stages.cameras import Views, direction, look_at, orbit_views
from stages.kernels.srgb import linear_to_srgb
from stages.pocket import world
from stages.pocket.build import build
from stages.render.shade import Shading

SIDE = 48  # of the pictures, pixels
FACING, AWAY = 75.0, 105.0  # a front is seen up to this azimuth, and from this one on none is; between, who can say
MESHES, UNSEEN, BLOBS = 28, 8, 8  # meshes of a kind to learn from and to be tested on; blobs to learn from
STEPS, BATCH = 800, 64
VERSION = 2  # of all of the above; part of a saved classifier


class _Net(nn.Module):
    """48 x 48 pictures [N, 3, 48, 48] to logits [N] of a front."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 16), (16, 32), (32, 48))])
        self.last = nn.Linear(48 * 36, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        for convolution in self.convolutions:
            pictures = F.silu(convolution(pictures))
        return self.last(pictures.flatten(1))[:, 0]


@dataclass
class ViewClassifier:
    """A trained network. accuracy: on views of meshes it has not seen. false_fronts: share of those from behind that it
    takes for fronts."""

    kind: str
    net: _Net
    accuracy: float
    false_fronts: float

    @torch.no_grad()
    def fronts(self, images: Tensor) -> Tensor:
        """Return which of the linear pictures [K, H, W, 3], of any size, show a front: bool [K]."""
        return self.net(_pictures(images)) > 0


def away_from_front(azimuth_deg: Tensor) -> Tensor:
    """Return degrees in [0, 180] between azimuths and the front."""
    return ((azimuth_deg + 180) % 360 - 180).abs()


def janus_views(classifier: ViewClassifier, asset: Subject, truth: Subject) -> dict[str, Any]:
    """The Janus facts of an asset: `fronts` of `views` from behind in which it, and not the truth, shows a front."""
    cameras = orbit_views(janus_azimuths(), JANUS_ELEVATION)
    asset_fronts, truth_fronts = (classifier.fronts(shoot(s, cameras, 2 * SIDE)[0]) for s in (asset, truth))
    counted = (away_from_front(cameras.azimuth_deg) >= AWAY) & ~truth_fronts
    fronts, views = int((counted & asset_fronts).sum()), int(counted.sum())
    return {"fronts": fronts, "views": views, "share": round(fronts / views, 4) if views else None}


def train(kind: str, seed: int = 0) -> ViewClassifier:
    """Return the classifier of one kind, a function of kind and seed. ValueError for a kind without a front."""
    if not world.true_front(kind):
        raise ValueError(f"kind: wanted one with a true front, got {kind!r}")
    rng, generator = np.random.default_rng([seed, *kind.encode()]), torch.Generator().manual_seed(seed)
    pictures, fronts = _renders(kind, MESHES, rng, BLOBS)
    net = _Net()
    for parameter in net.parameters():  # not torch's global generator
        bound = (3 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.0
        parameter.data.uniform_(-bound, bound, generator=generator) if bound else parameter.data.zero_()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(fronts), (BATCH,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(net(_disturbed(pictures[chosen], generator)), fronts[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    classifier = ViewClassifier(kind, net.eval().requires_grad_(False), 0.0, 0.0)
    return _tested(classifier, *_renders(kind, UNSEEN, rng))


def _tested(classifier: ViewClassifier, pictures: Tensor, fronts: Tensor) -> ViewClassifier:
    with torch.no_grad():
        answers = (classifier.net(_standardised(pictures)) > 0).float()
    classifier.accuracy = round(float((answers == fronts).float().mean()), 4)
    classifier.false_fronts = round(float(answers[fronts == 0].mean()), 4)
    return classifier


def _renders(kind: str, meshes: int, rng: np.random.Generator, blobs: int = 0) -> tuple[Tensor, Tensor]:
    """sRGB pictures [N, 3, 48, 48] of varied meshes of a kind and of blobs from all around; 1 where they show the front
    of the kind, else 0: [N]."""
    pictures, fronts = [], []
    colours = list(world.COLOURS)
    for k in range(meshes + blobs):
        pattern = str(rng.choice(world.PATTERNS)) if kind in world.PATTERNED and rng.random() < 0.2 else "plain"
        spec = world.Spec(kind, str(rng.choice(colours)), pattern)
        subject = Subject.of(build(spec, rng) if k < meshes else random_blob(rng))
        count = 24
        azimuth = torch.from_numpy((np.arange(count) + rng.random(count)) * 360 / count).float()
        elevation = torch.from_numpy(rng.uniform(JANUS_ELEVATION - 12, JANUS_ELEVATION + 12, count)).float()
        distance = torch.from_numpy(rng.uniform(2.8, 3.6, count)).float()
        ambient = float(rng.uniform(0.3, 1.0))
        views = _views(azimuth, elevation, distance)
        images, _ = shoot(subject, views, SIDE, Shading(ambient, 1 - ambient), float(rng.uniform(0.5, 0.8)))
        away = away_from_front(azimuth)
        sure = (away <= FACING) | (away >= AWAY)
        pictures.append(linear_to_srgb(images).permute(0, 3, 1, 2)[sure])
        fronts.append(((away <= FACING) & (k < meshes)).float()[sure])
    return torch.cat(pictures), torch.cat(fronts)


def _views(azimuth: Tensor, elevation: Tensor, distance: Tensor) -> Views:
    """orbit_views with a distance for each view."""
    position = distance[:, None] * direction(azimuth, elevation)
    c2w = look_at(position, torch.zeros_like(position), torch.tensor([0.0, 1.0, 0.0]).expand_as(position))
    light = position + 0.8 * c2w[:, :3, 0] + 1.2 * c2w[:, :3, 1]
    return Views(c2w, torch.full_like(azimuth, 36.0), azimuth % 360, elevation, light)


def _disturbed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, shifted, scaled, blurred, tinted and noisy copies of pictures [N, 3, H, W], standardised."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    scale, flip = uniform(0.85, 1.2), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    move = torch.zeros(n, 2, 3)
    move[:, 0, 0], move[:, 1, 1], move[:, :, 2] = scale * flip, scale, uniform(-0.12, 0.12, 2)
    grid = F.affine_grid(move, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(moved, 2), moved.shape[-2:], mode="bilinear", align_corners=False)
    blur = (uniform(-0.5, 1.0).clamp_min(0)).view(-1, 1, 1, 1)  # a third of them stay sharp
    tinted = (moved + blur * (coarse - moved)) * uniform(0.7, 1.3, 3, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    noise = torch.randn(tinted.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return _standardised(tinted + noise)


def _standardised(pictures: Tensor) -> Tensor:
    centred = pictures - pictures.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-3)


def _pictures(images: Tensor) -> Tensor:
    """Linear [K, H, W, 3] to the network's [K, 3, 48, 48]."""
    pictures = linear_to_srgb(images).permute(0, 3, 1, 2)
    if pictures.shape[-1] != SIDE:
        pictures = F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return _standardised(pictures)


def load_or_train(kind: str, folder: Path) -> ViewClassifier:
    """Return the classifier of a kind from `folder`, trained and saved there the first time."""
    from safetensors.torch import load_file, save

    weights, facts = folder / f"{kind}.safetensors", folder / f"{kind}.json"
    if facts.is_file():
        saved = json.loads(facts.read_text())
        if saved["version"] == VERSION:
            net = _Net()
            net.load_state_dict(load_file(weights))
            net.eval().requires_grad_(False)
            return ViewClassifier(kind, net, saved["accuracy"], saved["false_fronts"])
    classifier = train(kind)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(weights, save(classifier.net.state_dict()))
    known = {"version": VERSION, "accuracy": classifier.accuracy, "false_fronts": classifier.false_fronts}
    write_whole(facts, (json.dumps(known) + "\n").encode())
    return classifier
