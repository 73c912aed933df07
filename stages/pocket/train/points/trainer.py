"""Train the three networks of the point system, and write their folder.

Base and upsampler: squared error of the noise, as in Point-E without its variance term; embedding and grid are each
left out of a share of the rows, which also trains what guidance needs. Clouds grow while they train: most steps see a
part of the points, which a network without positions reads as well, at a quarter of the price. Signed distance: L1,
inside points weighed more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.cameras import orbit_views
from stages.guidance.clip import ClipScorer
from stages.pocket.models import WEIGHTS
from stages.pocket.train.device import bfloat16
from stages.pocket.train.export import write_grid
from stages.pocket.train.layout import GRID_PROMPTS
from stages.pocket.train.loop import Training
from stages.pocket.train.points.bank import CloudBank
from stages.points.cloud import cloud_of
from stages.points.diffusion import MOST, add_noise, heun, ladder, v_of
from stages.points.draw import draw_cloud
from stages.points.model import LOW, Condition, PointModel, make_sizes
from stages.points.surface import SEEN

PHASES = {"base": 0.55, "up": 0.25, "sdf": 0.2}  # with their shares of --minutes
OBJECTS = 6000  # where --images says nothing
LR = {"base": 6e-4, "up": 6e-4, "sdf": 1e-3}
GROWTH = {  # up to which share of the schedule, how many points of a cloud, how many clouds a step
    "base": ((0.5, 128, 24), (0.85, 256, 16), (1.0, LOW, 4)),
    "up": ((0.5, 128, 16), (0.8, 256, 8), (1.0, LOW, 2)),  # of the low clouds twice as many, at most LOW
    "sdf": ((0.6, 256, 8), (1.0, SEEN, 6)),
}
NO_WORDS, NO_PICTURE = 0.3, 0.35  # shares of the rows without an embedding, and without a grid
NOISE = 0.08  # most noise on the pictures that the CLIP sees, and half of them are blurred
ROUGH = 0.04  # most noise on the low clouds that the upsampler is told, which the base's have too
INSIDE = 4.0  # weight of the signed distance's error at points inside
JITTER = 0.02  # most noise on the points that the signed distance is told
SKETCH, SKETCH_STEPS, SCALE = 512, 16, 3.0  # points, steps and guidance of the sample grids


def train_points(args: argparse.Namespace) -> None:
    """Base diffusion, upsampling diffusion, signed distance; then the folder, fp16 safetensors.

    With --phase one of them, for all of --minutes; else all that are not done.
    """
    folder = args.work / "points"
    scorer = ClipScorer(args.out / "clip" if (args.out / "clip").is_dir() else WEIGHTS / "clip")
    config = scorer.model.config
    torch.manual_seed(args.seed)
    model = PointModel(make_sizes(config.projection_dim, config.vision_config.hidden_size))
    phases = [args.phase] if args.phase else list(PHASES)
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise SystemExit(f"points has no phase {unknown[0]}: {', '.join(PHASES)}")
    if not args.export:
        bank = CloudBank(args.data / "clouds", args.images or OBJECTS, args.seed)
        for phase in phases:
            minutes = args.minutes and args.minutes * (1 if args.phase else PHASES[phase])
            schedule = {"steps": None if minutes else args.steps, "minutes": minutes, "lr": args.lr or LR[phase]}
            train_phase(phase, model, bank, scorer, folder, args.seed, **schedule)
    if args.export or "sdf" in phases:
        load_parts(model, folder)
        model.save(args.out / "points")


def train_phase(
    phase: str, model: PointModel, bank: CloudBank, scorer: ClipScorer, folder: Path, seed: int, **schedule
) -> None:
    """Train one network; its state, averaged weights and sample grids are in folder / phase."""
    training = Training({phase: getattr(model, phase)}, folder / phase, **schedule)
    if phase == "sdf":
        loss_step, sample = _sdf_loss(model, bank, seed, training), None
    else:
        told = Told(bank, scorer)
        loss_step = _noise_loss(phase, model, bank, told, seed, training)
        sketch = _sketch_base if phase == "base" else _sketch_up

        def sample() -> None:
            sketch(model, bank, told, folder / phase / f"{training.step_index:06d}.png", seed)

    training.run(loss_step, sample=sample, save_minutes=10)
    with training.averaged():
        if sample is not None:
            sample()
        state = {key: value.detach().clone() for key, value in getattr(model, phase).state_dict().items()}
        save_file(state, folder / f"{phase}.safetensors")


def load_parts(model: PointModel, folder: Path) -> None:
    """Take over the networks that all phases left."""
    for name in PHASES:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            raise SystemExit(f"there is no {path}: its phase comes first, {' -> '.join(PHASES)}")
        getattr(model, name).load_state_dict(load_file(path))


class Told:
    """What networks are told of the objects of a bank: the CLIP's reading of captions and pictures."""

    def __init__(self, bank: CloudBank, scorer: ClipScorer) -> None:
        self.bank, self.scorer = bank, scorer
        unique = {text: k for k, text in enumerate(dict.fromkeys(bank.captions))}
        self.number = torch.tensor([unique[text] for text in bank.captions])
        self.vectors = self.words(list(unique))

    def words(self, texts: list[str]) -> Tensor:
        """Return embeddings [N, V] of the length sqrt(V)."""
        vectors = self.scorer.embed_texts(texts)
        return vectors * vectors.shape[-1] ** 0.5

    def pictures(self, rows: np.ndarray, rng: np.random.Generator, rough: bool = True) -> Tensor:
        """Return grids [B, L, G] of pictures of objects, noisy and some blurred as a prior's may be."""
        images = self.bank.pictures[rows, torch.from_numpy(rng.integers(self.bank.pictures.shape[1], size=len(rows)))]
        images = images.float() / 255
        if rough:
            soft = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
            images = torch.where(torch.from_numpy(rng.random(len(rows)) < 0.5)[:, None, None, None], soft, images)
            strength = torch.from_numpy(rng.uniform(0, NOISE, (len(rows), 1, 1, 1))).float()
            images = (images + strength * torch.from_numpy(rng.standard_normal(images.shape, np.float32))).clamp(0, 1)
        return self.scorer.grid(images)

    def condition(self, rows: np.ndarray, rng: np.random.Generator) -> Condition:
        """Return what objects are told as in a step of the training."""
        condition = Condition(self.vectors[self.number[rows]], self.pictures(rows, rng))
        drops = (torch.from_numpy(rng.random(len(rows)) < share) for share in (NO_WORDS, NO_PICTURE))
        return condition.dropped(*drops)


def _size(phase: str, training: Training) -> tuple[int, int]:
    """How many points of a cloud, and how many clouds, a step of the training has where it now is."""
    return next((points, clouds) for end, points, clouds in GROWTH[phase] if training.progress <= end)


def _noise_loss(
    phase: str, model: PointModel, bank: CloudBank, told: Told, seed: int, training: Training
) -> Callable[[int], Tensor]:
    network, schedule = getattr(model, phase), model.schedules[phase]

    def loss_step(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step, 8 + (phase == "up")])
        count, batch = _size(phase, training)
        rows = rng.integers(len(bank), size=batch)
        order = torch.from_numpy(rng.permutation(bank.clouds.shape[1]))
        clouds = bank.clouds[rows].float()
        x0, low = clouds[:, order[:count]], None
        if phase == "up":
            low = clouds[:, order[count : count + min(2 * count, LOW)]]
            strength = torch.from_numpy(rng.uniform(0, ROUGH, (batch, 1, 1))).float()
            low = low + strength * torch.from_numpy(rng.standard_normal(low.shape, np.float32))
        t = torch.from_numpy(rng.integers(len(schedule), size=batch))
        eps = torch.from_numpy(rng.standard_normal(x0.shape, np.float32))
        condition = told.condition(rows, rng)
        with bfloat16():
            out = network(add_noise(x0, eps, schedule[t]), t, condition.vector, condition.grid, low)
        return (out.float() - v_of(x0, eps, schedule[t])).square().mean()

    return loss_step


def _sdf_loss(model: PointModel, bank: CloudBank, seed: int, training: Training) -> Callable[[int], Tensor]:
    first = torch.searchsorted(bank.geometry, torch.arange(len(bank.queries)))  # an object of each geometry

    def loss_step(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step, 10])
        count, batch = _size("sdf", training)
        shapes = rng.integers(len(bank.queries), size=batch)
        points = bank.clouds[first[shapes]][:, torch.from_numpy(rng.permutation(bank.clouds.shape[1])[:count])]
        points = points[..., :3].float()
        strength = torch.from_numpy(rng.uniform(0, JITTER, (batch, 1, 1))).float()
        points = points + strength * torch.from_numpy(rng.standard_normal(points.shape, np.float32))
        asked = torch.from_numpy(rng.integers(bank.queries.shape[1], size=count))
        queries = bank.queries[shapes][:, asked].float()
        with bfloat16():
            distance = model.sdf(model.sdf.encode(points), queries[..., :3]).float()
        truth = queries[..., 3]
        weight = torch.where(truth < 0, INSIDE, 1.0)
        return (weight * (distance - truth).abs()).mean()

    return loss_step


@torch.no_grad()
def sample(
    model: PointModel, name: str, condition: Condition, low: Tensor | None, count: int, steps: int, seed: int
) -> Tensor:
    """Return clean clouds [B, K, 6] by Heun's method, the base's guided."""
    levels, scale = ladder(steps, MOST[name]), SCALE if name == "base" else 1.0
    generator = torch.Generator().manual_seed(seed)
    x = levels[0] * torch.randn((len(condition.vector), count, 6), generator=generator)
    for sigma, after in pairwise(levels):
        with bfloat16():
            x, _ = heun(x, sigma, after, lambda x, sigma: model.x0(name, x, sigma, condition, low, scale))
    return x


def _sketch_base(model: PointModel, bank: CloudBank, told: Told, path: Path, seed: int) -> None:
    """Clouds of words alone above, below of pictures alone, those of the bank's first objects."""
    texts, rng = list(GRID_PROMPTS)[:8], np.random.default_rng(seed)
    vectors, grids = told.words(texts), told.pictures(np.arange(0, min(24, len(bank)), 3), rng, rough=False)
    by_words = Condition(vectors, torch.zeros(len(vectors), *grids.shape[1:]))
    by_picture = Condition(torch.zeros(len(grids), vectors.shape[-1]), grids)
    rows = [sample(model, "base", c, None, SKETCH, SKETCH_STEPS, seed) for c in (by_words, by_picture)]
    draw_clouds(torch.cat(rows), path, columns=len(texts))


def _sketch_up(model: PointModel, bank: CloudBank, told: Told, path: Path, seed: int) -> None:
    """Low clouds above, with their upsampled points below."""
    rows = np.arange(0, min(12, len(bank)), 3)
    low = bank.clouds[rows, :LOW].float()
    condition = Condition(told.vectors[told.number[rows]], told.pictures(rows, np.random.default_rng(seed), False))
    high = sample(model, "up", condition, low, LOW, SKETCH_STEPS // 2, seed)
    draw_clouds(torch.cat([low, high]), path, columns=len(rows))


def draw_clouds(clouds: Tensor, path: Path, columns: int, size: int = 96) -> None:
    """Write a PNG of clouds [B, K, 6]."""
    views = orbit_views([25.0], 20.0)
    pictures = torch.cat([draw_cloud(cloud_of(cloud), views, size) for cloud in clouds])
    write_grid(2 * pictures.permute(0, 3, 1, 2) - 1, path, columns=columns)
