"""Fit tri-planes to objects: first some objects' with the decoder that all share, then every object's with it frozen.

As in Rodin, planes are read at random resolutions while they are fitted, so that the decoder is as good on the base's
32^2 planes as on the upsampler's 64^2, and all objects start from the same planes, so that they stay comparable.
Otherwise than there the loss is at points, not at pixels (Neural Field Diffusion, arXiv 2211.16677, sec. 3.1): cross
entropy of the occupancy, squared error of the colours near the surface, total variation and size of the planes. The
world's objects are our own, so this is allowed, and ten times cheaper than rays.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.pocket.train.loop import Training
from stages.pocket.train.triplane.bank import COLOURINGS, Objects, make_objects
from stages.triplane.field import Decoder
from stages.triplane.model import Sizes
from stages.triplane.planes import features_at, resize

SHARED = 48  # geometries that the decoder is fitted to
CHUNK = 16  # geometries fitted together
STEPS = 120  # of each chunk
BATCH, SEEN = 16, 1024  # objects of a decoder's step, and points of each object in a step
LR, LR_PLANES = 3e-3, 4e-2
COLOUR, VARIATION, SIZE = 5.0, 1e-2, 1e-3  # weights
PLAIN, AT_LOW = 0.5, 0.3  # shares of the steps that read the planes as they are, and at the base's side
START = 0.1  # standard deviation of the first planes
LEVELS = (4, 2, 1)  # of the pyramid that planes are fitted as: by how many cells their sides are divided
TRIED = 0.9  # share of an object's points that it is fitted to; the rest measures


class _Planes(nn.Module):
    """Planes [N, 3, C, R, R] that begin at `start` [1, 3, C, R, R], as a pyramid of differences to it.

    Coarse levels move many cells at once, so what no point has seen follows its surroundings: planes become smooth, and
    in fewer steps.
    """

    def __init__(self, start: Tensor, count: int) -> None:
        super().__init__()
        side, shape = start.shape[-1], (count, *start.shape[1:3])
        self.start = start
        self.levels = nn.ParameterList(torch.zeros(*shape, side // k, side // k) for k in LEVELS)

    def forward(self, rows: Tensor | slice) -> Tensor:
        """Return the planes of some objects."""
        side = self.start.shape[-1]
        total = self.levels[0][rows]
        for level in self.levels[1:]:
            total = resize(total, level.shape[-1]) + level[rows]
        return self.start + resize(total, side)


def fit_loss(planes: Tensor, decoder: Decoder, objects: Objects, rows: Tensor, index: Tensor, side: int) -> Tensor:
    """Return the loss of planes [B, 3, C, R, R] of the objects `rows` [B] at the points `index` [Q], read at a side."""
    logits, colours = decoder(features_at(resize(planes, side), objects.points[rows][:, index]))
    loss = F.binary_cross_entropy_with_logits(logits, objects.inside[rows][:, index].float())
    near = objects.near[rows][:, index].float()
    wrong = (colours - objects.colours[rows][:, index]).square().mean(-1)
    loss = loss + COLOUR * (near * wrong).sum() / near.sum().clamp_min(1)
    variation = planes.diff(dim=-1).square().mean() + planes.diff(dim=-2).square().mean()
    return loss + VARIATION * variation + SIZE * planes.square().mean()


def random_side(sizes: Sizes, rng: np.random.Generator) -> int:
    """Return the resolution that a step reads planes at."""
    draw = rng.random()
    if draw < PLAIN:
        return sizes.high
    return sizes.low if draw < PLAIN + AT_LOW else int(rng.integers(sizes.low // 2, sizes.high))


def some_points(objects: Objects, rng: np.random.Generator) -> Tensor:
    """Return the numbers of the points that a step looks at."""
    return torch.from_numpy(rng.integers(int(TRIED * objects.points.shape[1]), size=SEEN))


def fit_decoder(
    folder: Path, sizes: Sizes, seed: int, *, steps: int | None, minutes: float | None, shapes: int = SHARED
) -> tuple[Decoder, Tensor]:
    """Return the decoder and the planes [1, 3, C, R, R] that every object starts from; kept in `folder`."""
    path = folder / "decoder.safetensors"
    decoder = Decoder(sizes.channels, sizes.decoder)
    if path.exists():
        return _read_decoder(path, decoder)
    torch.manual_seed(seed)
    decoder = Decoder(sizes.channels, sizes.decoder)
    objects = make_objects(shapes, np.random.default_rng([seed, 1]))
    start = START * torch.randn(1, 3, sizes.channels, sizes.high, sizes.high)
    planes = _Planes(start, len(objects))
    parts = {"decoder": decoder, "planes": planes}
    training = Training(
        parts, folder / "decoder", lr=LR, steps=steps, minutes=minutes, weight_decay=0, warmup=50,
        rates={"planes": LR_PLANES / LR},
    )  # fmt: skip

    def loss_step(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step, 2])
        rows = torch.from_numpy(rng.choice(len(objects), min(BATCH, len(objects)), replace=False))
        return fit_loss(planes(rows), decoder, objects, rows, some_points(objects, rng), random_side(sizes, rng))

    training.run(loss_step)
    with training.averaged(), torch.no_grad():
        everything = planes(slice(None))
        print(measured(everything, decoder, objects, sizes), flush=True)
        tensors = {name: value.clone() for name, value in decoder.state_dict().items()}
        save_file(tensors | {"start": everything.mean(0, keepdim=True)}, path)
    return _read_decoder(path, decoder)


def _read_decoder(path: Path, decoder: Decoder) -> tuple[Decoder, Tensor]:
    tensors = load_file(path)
    start = tensors.pop("start")
    decoder.load_state_dict(tensors)
    return decoder.requires_grad_(False), start


def fit_objects(
    folder: Path,
    sizes: Sizes,
    decoder: Decoder,
    start: Tensor,
    seed: int,
    *,
    count: int,
    minutes: float | None = None,
    shapes: int = CHUNK,
    steps: int = STEPS,
) -> None:
    """Fit objects in chunks of their own files until there are `count`, or for so many minutes, those before included.

    A file holds planes [N, 3, C, R, R] float16 and the objects' pictures [N, 64, 64, 3] uint8; a JSON its captions.
    """
    place = folder / "planes"
    place.mkdir(parents=True, exist_ok=True)
    spent = json.loads((folder / "fit.json").read_text())["seconds"] if (folder / "fit.json").exists() else 0.0
    for chunk in range(-(-count // (shapes * COLOURINGS))):
        path = place / f"{chunk:05d}.safetensors"
        if path.exists():
            continue
        if minutes is not None and spent > 60 * minutes:
            break
        began = time.perf_counter()
        objects = make_objects(shapes, np.random.default_rng([seed, 3, chunk]))
        planes, loss = _fit_chunk(objects, sizes, decoder, start, np.random.default_rng([seed, 4, chunk]), steps)
        path.with_suffix(".json").write_text(json.dumps(objects.captions))
        pictures = torch.from_numpy(objects.pictures)
        save_file({"planes": planes.half(), "pictures": pictures}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        spent += time.perf_counter() - began
        (folder / "fit.json").write_text(json.dumps({"chunks": chunk + 1, "seconds": round(spent, 1)}))
        row = {"chunk": chunk, "loss": round(loss, 4), "s": round(spent, 1)}
        print(row | (measured(planes, decoder, objects, sizes) if chunk % 10 == 0 else {}), flush=True)


def _fit_chunk(
    objects: Objects, sizes: Sizes, decoder: Decoder, start: Tensor, rng: np.random.Generator, steps: int
) -> tuple[Tensor, float]:
    planes = _Planes(start, len(objects))
    optimiser = torch.optim.Adam(planes.parameters(), lr=LR_PLANES, betas=(0.9, 0.99), fused=True)
    rows = torch.arange(len(objects))
    total = 0.0
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LR_PLANES * (1 - 0.9 * step / steps)
        index, side = some_points(objects, rng), random_side(sizes, rng)
        loss = len(objects) * fit_loss(planes(slice(None)), decoder, objects, rows, index, side)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total = loss.item() / len(objects)
    return planes(slice(None)).detach(), total


@torch.no_grad()
def measured(planes: Tensor, decoder: Decoder, objects: Objects, sizes: Sizes) -> dict[str, float]:
    """Return, at both sides, the overlap of the occupancies and the colours' error near the surface.

    At points that the planes were not fitted to.
    """
    rest = slice(int(TRIED * objects.points.shape[1]), None)
    inside, near, truth = objects.inside[:, rest], objects.near[:, rest], objects.colours[:, rest]
    facts = {}
    for side in (sizes.low, sizes.high):
        logits, colours = decoder(features_at(resize(planes, side), objects.points[:, rest]))
        solid = logits > 0
        overlap = (solid & inside).sum() / (solid | inside).sum()
        error = (colours - truth).square().mean(-1)[near].mean().sqrt()
        facts |= {f"overlap_{side}": round(float(overlap), 4), f"colour_error_{side}": round(float(error), 4)}
    return facts
