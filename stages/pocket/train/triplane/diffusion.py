"""Train the two diffusions of the tri-plane system on the planes that fit.py leaves, and write their folder.

Base: loss on v, told the CLIP's reading of the caption or, in a share of the rows, of the object's own picture, as
Rodin is told; a share of the rows is told nothing, for classifier-free guidance. Upsampler: the planes' L1 distance and
that of renderings through the frozen decoder and the toolkit's volume renderer, from low planes that are blurred and
noised as the base's may be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.cameras import orbit_views
from stages.guidance.clip import ClipScorer
from stages.kernels.srgb import linear_to_srgb
from stages.pocket.train.device import bfloat16
from stages.pocket.train.export import write_grid
from stages.pocket.train.layout import GRID_PROMPTS
from stages.pocket.train.loop import Training
from stages.triplane.diffusion import add_noise, cosine, next_noise, sigmoid, times, v_of
from stages.triplane.draw import draw, occupied
from stages.triplane.field import TriplaneField
from stages.triplane.model import Condition, TriplaneModel
from stages.triplane.planes import resize, roll_up

LR = {"base": 1e-3, "up": 5e-4}
NOTHING, PICTURE = 0.15, 0.1  # shares of the rows told nothing, and told a picture instead of words
SOFT, NOISE = 0.3, 0.25  # share of the low planes that are blurred; most noise added to them
RENDER, SIDE = 1.0, 32  # weight of the render loss, and side of its pictures
STEPS, UP_STEPS, SCALE = 24, 6, 3.0  # of the sample grids
CELLS = 24  # a side of the occupancy of all renders here
ANGLES = (25.0, 205.0)  # azimuths of the sample grids


class PlaneBank:
    """The fitted planes of a folder, normalised, and what the CLIP reads of each object.

    Args:
        folder: that fit.py filled.
        model: whose mean and spread are set: to those of the low planes when first asked, and the same ever after.
        scorer: the CLIP.
    """

    def __init__(self, folder: Path, model: TriplaneModel, scorer: ClipScorer) -> None:
        self.files = sorted((folder / "planes").glob("*.safetensors"))
        if not self.files:
            raise SystemExit(f"{folder / 'planes'} holds no planes: run --phase fit first")
        low, images = [], []
        for path in self.files:
            chunk = load_file(path)
            low.append(resize(chunk["planes"].float(), model.sizes.low))
            images.append(read_pictures(scorer, chunk["pictures"]))
        self.low, self.images = torch.cat(low), torch.cat(images)
        captions = [text for path in self.files for text in json.loads(path.with_suffix(".json").read_text())]
        unique = sorted(set(captions))
        index = {text: k for k, text in enumerate(unique)}
        self.number = torch.tensor([index[text] for text in captions])
        self.texts = read(scorer, unique)
        path = folder / "statistics.safetensors"
        if not path.exists():
            mean, spread = self.low.mean((0, 3, 4)), self.low.std((0, 3, 4))
            save_file({"mean": mean[:, :, None, None], "spread": spread[:, :, None, None]}, path)
        for name, value in load_file(path).items():
            getattr(model, name).copy_(value)

    @cached_property
    def high(self) -> Tensor:
        """Return the planes [N, 3, C, R, R] as they were fitted, float16; a gigabyte, so only read when asked."""
        return torch.cat([load_file(path)["planes"] for path in self.files])

    def __len__(self) -> int:
        return len(self.number)

    def condition(self, rows: np.ndarray, rng: np.random.Generator) -> Condition:
        """Return what objects are told as, mostly their captions."""
        number = self.number[rows]
        texts = self.texts
        pictures = torch.from_numpy(rng.random(len(rows)) < PICTURE)
        vector = torch.where(pictures[:, None], self.images[rows], texts.vector[number])
        condition = Condition(vector, texts.words[number], texts.mask[number] & ~pictures[:, None])
        return condition.dropped(torch.from_numpy(rng.random(len(rows)) < NOTHING))


def read(scorer: ClipScorer, texts: list[str]) -> Condition:
    """Return what networks are told of texts."""
    return Condition(*scorer.read_texts(texts))


def read_pictures(scorer: ClipScorer, pictures: Tensor) -> Tensor:
    """Return of pictures [N, 64, 64, 3] uint8 what read() has of texts: vectors [N, D] of the length sqrt(D)."""
    with torch.no_grad():
        vectors = scorer.embed_srgb(pictures.float() / 255)
    return vectors * vectors.shape[-1] ** 0.5


def train_base(
    model: TriplaneModel, bank: PlaneBank, scorer: ClipScorer, folder: Path, seed: int, batch: int, **schedule
) -> None:
    """Train the base; its state, averaged weights and sample grids are in folder / "base"."""
    training = Training({"base": model.base}, folder / "base", **({"lr": LR["base"]} | schedule))

    def loss_step(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step, 5])
        rows = rng.integers(len(bank), size=batch)
        x0 = model.normalised(bank.low[rows])
        t = torch.from_numpy((rng.random() + np.arange(batch)) / batch % 1).float()  # spread evenly
        eps = torch.from_numpy(rng.standard_normal(x0.shape, np.float32))
        condition, alpha_bar = bank.condition(rows, rng), cosine(t)
        with bfloat16():
            v = model.base(add_noise(x0, eps, alpha_bar), t, condition.vector, condition.words, condition.mask)
        return (v.float() - v_of(x0, eps, alpha_bar)).square().mean()

    def sample() -> None:
        low = sample_low(model, read(scorer, list(GRID_PROMPTS)), seed)
        draw_planes(model, low, folder / "base" / f"{training.step_index:06d}.png")

    training.run(loss_step, sample=sample, save_minutes=10)
    with training.averaged():
        sample()
        keep(training, "base", model)


def train_up(
    model: TriplaneModel, bank: PlaneBank, scorer: ClipScorer, folder: Path, seed: int, batch: int, **schedule
) -> None:
    """Train the upsampler; its state, averaged weights and sample grids are in folder / "up"."""
    training = Training({"up": model.up}, folder / "up", **({"lr": LR["up"]} | schedule))

    def loss_step(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step, 6])
        rows = rng.integers(len(bank), size=batch)
        x0 = model.normalised(bank.high[rows].float())
        low = degraded(model.normalised(bank.low[rows]), rng)
        t = torch.from_numpy(rng.random(batch)).float()
        eps = torch.from_numpy(rng.standard_normal(x0.shape, np.float32))
        condition = bank.condition(rows, rng)
        with bfloat16():
            x0_hat = model.up_x0(add_noise(x0, eps, sigmoid(t)), t, low, condition)
        loss = (x0_hat - x0).abs().mean()
        return loss + RENDER * render_loss(model, x0_hat[:1], x0[:1], rng)

    def sample() -> None:
        condition = read(scorer, list(GRID_PROMPTS))
        low = sample_low(model, condition, seed)
        draw_planes(model, sample_high(model, low, condition, seed), folder / "up" / f"{training.step_index:06d}.png")

    training.run(loss_step, sample=sample, save_minutes=10)
    with training.averaged():
        sample()
        keep(training, "up", model)


def keep(training: Training, name: str, model: TriplaneModel) -> None:
    """Write the averaged weights of a network, for the phases after it."""
    state = {key: value.detach().clone() for key, value in getattr(model, name).state_dict().items()}
    save_file(state, training.folder.parent / f"{name}.safetensors")


def degraded(low: Tensor, rng: np.random.Generator) -> Tensor:
    """Return low planes [B, C, R, 3 R] as the base may make them: some blurred, all with some noise."""
    soft = torch.from_numpy(rng.random(len(low)) < SOFT)[:, None, None, None]
    planes = roll_up(low)
    soft_planes = resize(resize(planes, planes.shape[-1] // 2), planes.shape[-1])
    low = torch.where(soft, torch.cat(soft_planes.unbind(1), -1), low)
    strength = torch.from_numpy(rng.uniform(0, NOISE, (len(low), 1, 1, 1))).float()
    return low + strength * torch.from_numpy(rng.standard_normal(low.shape, np.float32))


def render_loss(model: TriplaneModel, x0_hat: Tensor, x0: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the L1 distance of a rendering of planes [1, C, R, 3 R] to that of the true ones, from a random view."""
    truth, mine = (TriplaneField(model.planes(planes)[0], model.decoder) for planes in (x0, x0_hat))
    views = orbit_views([float(rng.uniform(0, 360))], float(rng.uniform(-10, 60)), fov_deg=float(rng.uniform(20, 40)))
    backdrop = torch.from_numpy(rng.random(3)).float()
    with torch.no_grad():
        cells = occupied(truth, backdrop.device, CELLS)
        goal = draw(truth, views, SIDE, backdrop, cells=cells)
    picture = draw(mine, views, SIDE, backdrop, cells=cells)
    return (picture.colour - goal.colour).abs().mean() + 0.5 * (picture.opacity - goal.opacity).abs().mean()


@torch.no_grad()
def sample_low(
    model: TriplaneModel, condition: Condition, seed: int, steps: int = STEPS, scale: float = SCALE
) -> Tensor:
    """Return clean planes [B, C, R, 3 R] of what is told, by DDIM."""
    side, generator = model.sizes.low, torch.Generator().manual_seed(seed)
    shape = (len(condition.vector), model.sizes.channels, side, 3 * side)
    return _sampled(shape, lambda z, t: model.base_x0(z, t, condition, scale), steps, cosine, generator)


@torch.no_grad()
def sample_high(model: TriplaneModel, low: Tensor, condition: Condition, seed: int, steps: int = UP_STEPS) -> Tensor:
    """Return clean planes [B, C, 2 R, 6 R] of low ones, by DDIM."""
    side, generator = model.sizes.high, torch.Generator().manual_seed(seed)
    shape = (len(low), model.sizes.channels, side, 3 * side)
    return _sampled(shape, lambda z, t: model.up_x0(z, t, low, condition), steps, sigmoid, generator)


def _sampled(
    shape: tuple[int, ...], predict: Callable[[Tensor, Tensor], Tensor], steps: int, schedule, generator
) -> Tensor:
    z, ladder = torch.randn(shape, generator=generator), times(steps)
    for k in range(steps):
        with bfloat16():
            x0 = predict(z, torch.full((shape[0],), ladder[k]))
        z = next_noise(z, x0, ladder[k], ladder[k + 1], schedule, 0.0, generator)
    return z


@torch.no_grad()
def draw_planes(model: TriplaneModel, rolled: Tensor, path: Path, size: int = 64) -> None:
    """Write a PNG of objects from two sides, one side a row."""
    views = orbit_views(list(ANGLES), 20.0)
    grey, rows = torch.full((3,), 0.5), []
    for planes in model.planes(rolled.float()):
        field = TriplaneField(planes, model.decoder)
        rows.append(draw(field, views, size, grey, cells=occupied(field, grey.device, CELLS)).colour)
    pictures = torch.stack(rows, 1).flatten(0, 1)  # [views * B, H, W, 3]
    write_grid(2 * linear_to_srgb(pictures).permute(0, 3, 1, 2) - 1, path, columns=len(rows))
