"""Train one generator a class against its two discriminators, and write the folder of those that there are.

A step draws one batch of fakes, which the discriminators learn by first and the generator after them, where GET3D draws
anew for each. Both have Adam with betas (0, 0.99); R1 every R1_EVERY-th step with its weight raised as much. What is
exported is the generator's moving average. All randomness is that of (seed, step).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.cameras import Views
from stages.gan.draw import Pictures, draw
from stages.gan.generator import GanSizes, Generator
from stages.gan.model import GanModel, Sizes
from stages.gan.tets import TetGrid, edge_loss, rescued
from stages.kernels.srgb import linear_to_srgb
from stages.pocket import world
from stages.pocket.train.device import bfloat16, device_of
from stages.pocket.train.export import write_grid
from stages.pocket.train.gan.bank import SHADING, SIDE, PictureBank, camera, draw_angles, make_bank
from stages.pocket.train.gan.discriminator import Discriminator
from stages.pocket.train.gan.losses import discriminator_loss, generator_loss, r1
from stages.pocket.train.loop import Schedule

CLASSES = ("mug", "car", "chair", "house")
PICTURES = 6000  # of a class, where --images says nothing
LR = 3e-3
BATCH = 8
GAMMA, R1_EVERY = 1.0, 16
EDGES = 0.01  # weight of the edges' cross-entropies
RESCUE = 1.0  # weight of the lost shapes' |s|
HALF_LIFE, RAMP = 2500, 0.05  # of the moving average in pictures: that, or this share of those seen so far
SAVE_MINUTES = 2.5
SHEET = 8  # columns of a sample grid
DECAY_FROM = 0.7  # share of the schedule after which the learning rates fall, to a tenth


def train_gan(args: argparse.Namespace) -> None:
    """Train the classes one after another, each for its share of --minutes; then the folder, fp16 safetensors."""
    folder, device = args.work / "gan", device_of(args)
    classes = tuple(args.classes.split(",")) if args.classes else CLASSES
    if unknown := [name for name in classes if name not in world.KINDS]:
        raise SystemExit(f"the world has no {unknown[0]}: {', '.join(world.KINDS)}")
    for name in () if args.export else classes:
        bank = make_bank(args.data / "gan", name, args.images or PICTURES, args.seed)
        minutes = args.minutes and args.minutes / len(classes)
        schedule = {"steps": None if minutes else args.steps, "minutes": minutes}
        training = GanTraining(name, folder / name, bank, args.seed, device, lr=args.lr or LR, **schedule)
        training.run()
    export(folder, args.out / "gan")


def export(folder: Path, out: Path) -> None:
    """Write the folder of all classes whose average is below `folder`."""
    states = {path.parent.name: path for path in sorted(folder.glob("*/average.safetensors"))}
    if not states:
        raise SystemExit(f"there is no trained class in {folder}")
    others = tuple(name for name in world.KINDS if name not in states)
    model = GanModel(Sizes(GanSizes(), tuple(states), others))
    for name, path in states.items():
        model.generators[name].load_state_dict(load_file(path))
    model.save(out)


class GanTraining:
    """Generator, its average, discriminators and optimisers of one class, in `folder`: state, log, sample grids.

    Args:
        bank: the class's pictures.
        steps, minutes: the length of the schedule, exactly one of them.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        bank: PictureBank,
        seed: int,
        device: torch.device,
        *,
        lr: float = LR,
        steps: int | None = None,
        minutes: float | None = None,
        batch: int = BATCH,
        sizes: GanSizes | None = None,
    ) -> None:
        self.schedule, self.name, self.folder, self.seed = Schedule(steps, minutes), name, folder, seed
        self.device, self.lr, self.batch, self.bank = device, lr, batch, bank.to(device)
        torch.manual_seed(seed)
        sizes = sizes or GanSizes()
        self.generator, self.average, self.discriminator = (
            module.to(device, memory_format=torch.channels_last)
            for module in (Generator(sizes), Generator(sizes).requires_grad_(False), Discriminator())
        )
        self.average.load_state_dict(self.generator.state_dict())
        self.grid = TetGrid(sizes.cells, device)
        every = R1_EVERY / (R1_EVERY + 1)  # lazy R1: StyleGAN2 app. B
        self.optimisers = {
            "g": torch.optim.Adam(self.generator.parameters(), lr=lr, betas=(0.0, 0.99), eps=1e-8, fused=True),
            "d": torch.optim.Adam(
                self.discriminator.parameters(), lr=lr * every, betas=(0.0, 0.99**every), eps=1e-8, fused=True
            ),
        }
        self.step_index, self.seconds, self.sums = 0, 0.0, {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.safetensors").exists():
            self._load()

    @property
    def progress(self) -> float:
        """Return the share of the schedule that is over, in [0, 1]."""
        return self.schedule.share(self.step_index, self.seconds)

    def run(self) -> None:
        """Train to the end of the schedule; saves and draws samples every few minutes and at the end."""
        last = time.perf_counter()
        while self.progress < 1:
            start = time.perf_counter()
            metrics = self.step()
            self.seconds += time.perf_counter() - start
            self._log(metrics)
            if time.perf_counter() - last > 60 * SAVE_MINUTES:
                self.save()
                self.sheet()
                last = time.perf_counter()
        self.save()
        self.sheet()

    def step(self) -> dict[str, float]:
        """Take one step of the discriminators and one of the generator; returns metrics."""
        rng = np.random.default_rng([self.seed, self.step_index, 11])
        rows = torch.from_numpy(rng.integers(len(self.bank), size=self.batch))
        real, real_angles = channels_last(self.bank.pictures[rows].float() / 255), self.bank.angles[rows]
        angles = draw_angles(self.batch, rng).to(self.device)
        fall = max(0.0, self.progress - DECAY_FROM) / (1 - DECAY_FROM)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                rate = self.lr * (R1_EVERY / (R1_EVERY + 1) if name == "d" else 1)
                group["lr"] = rate * (1 - 0.9 * fall)

        w_geo, w_tex = self._styles(rng)
        pictures, lost, edges = fakes(self.generator, self.grid, w_geo, w_tex, camera(*angles.cpu().unbind(1)))
        fake = torch.cat([linear_to_srgb(pictures.colour), pictures.mask], -1).permute(0, 3, 1, 2)

        self.discriminator.requires_grad_(True)
        self.optimisers["d"].zero_grad(set_to_none=True)
        with bfloat16(self.device):
            logits = self.discriminator(fake.detach(), angles), self.discriminator(real, real_angles)
        d_loss = discriminator_loss(logits[1], logits[0])
        d_loss.backward()
        metrics = {"d": d_loss, "real": logits[1].mean(), "fake": logits[0].mean()}
        if self.step_index % R1_EVERY == 0:
            penalty = r1(lambda x: self.discriminator(x, real_angles), real, GAMMA)
            (R1_EVERY * penalty).backward()
            metrics["r1"] = penalty
        self.optimisers["d"].step()

        self.discriminator.requires_grad_(False)
        self.optimisers["g"].zero_grad(set_to_none=True)
        with bfloat16(self.device):
            logits = self.discriminator(fake, angles)
        g_loss = generator_loss(logits)
        (g_loss + EDGES * edges + RESCUE * lost).backward()
        self.optimisers["g"].step()
        self._follow()
        self.step_index += 1
        metrics |= {"g": g_loss, "edges": edges, "lost": lost, "cover": pictures.mask.mean()}
        return {key: float(value.detach()) for key, value in metrics.items()}

    def _styles(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        latent = self.generator.sizes.latent
        z = torch.from_numpy(rng.standard_normal((2, self.batch, latent), np.float32)).to(self.device)
        return self.generator.map_geo(z[0]), self.generator.map_tex(z[1])

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the generator."""
        seen = (self.step_index + 1) * self.batch
        keep = 0.5 ** (self.batch / max(min(HALF_LIFE, RAMP * seen), 1e-8))
        pair = (list(module.state_dict().values()) for module in (self.average, self.generator))
        torch._foreach_lerp_(*pair, 1 - keep)

    @torch.no_grad()
    def sheet(self) -> None:
        """Write a PNG of the average's samples, three views of each, with real pictures below."""
        rng = np.random.default_rng([self.seed, 12])
        z = torch.from_numpy(rng.standard_normal((2, SHEET, self.average.sizes.latent), np.float32)).to(self.device)
        w_geo, w_tex = self.average.map_geo(z[0]), self.average.map_tex(z[1])
        rows = []
        for azimuth in (25.0, 115.0, 250.0):
            views = camera(torch.full((SHEET,), azimuth), torch.full((SHEET,), 25.0))
            pictures, _, _ = fakes(self.average, self.grid, w_geo, w_tex, views)
            rows.append(linear_to_srgb(pictures.colour).permute(0, 3, 1, 2).cpu())
        real = self.bank.pictures[torch.arange(SHEET) * (len(self.bank) // SHEET)].float().cpu() / 255
        write_grid(2 * torch.cat([*rows, real[:, :3]]) - 1, self.folder / f"{self.step_index:06d}.png", columns=SHEET)

    def save(self) -> None:
        """Write the whole state, and the average alone, each under a temporary name first."""
        modules = {"generator": self.generator, "average": self.average, "discriminator": self.discriminator}
        tensors = {f"{name}/{key}": v for name, m in modules.items() for key, v in m.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for k, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}/{k}/{key}": value for key, value in state.items()}
        tensors["step"] = torch.tensor(self.step_index)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        _write(tensors, self.folder / "state.safetensors")
        _write(dict(self.average.state_dict()), self.folder / "average.safetensors")

    def _load(self) -> None:
        tensors = load_file(self.folder / "state.safetensors", device=str(self.device))
        self.step_index, self.seconds = int(tensors["step"]), float(tensors["seconds"])
        for name in ("generator", "average", "discriminator"):
            part = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
            getattr(self, name).load_state_dict(part)
        for name, optimiser in self.optimisers.items():
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"{name}/"):
                    _, number, entry = key.split("/")
                    p = parameters[int(number)]
                    if value.shape == p.shape:  # laid out as the parameter is, which the fused Adam relies on
                        value = torch.empty_like(p).copy_(value)
                    state.setdefault(int(number), {})[entry] = value
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
        print(f"{self.name}: resumed at step {self.step_index}, {self.seconds:.0f} s", flush=True)

    def _log(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self.sums.setdefault(key, []).append(value)
        if self.step_index % 50 == 0:
            row = {key: round(sum(values) / len(values), 4) for key, values in self.sums.items()}
            row = {"step": self.step_index, "pictures": self.step_index * self.batch, "s": round(self.seconds, 1)} | row
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            print(self.name, row, flush=True)
            self.sums = {}


def fakes(
    generator: Generator, grid: TetGrid, w_geo: Tensor, w_tex: Tensor, views: Views
) -> tuple[Pictures, Tensor, Tensor]:
    """Return pictures of styles [B, W] from B views, the loss of lost shapes, and the edges' cross-entropies."""
    planes = generator.planes(w_geo, w_tex)
    sdf, offset = generator.lattice_values(planes, grid)
    sdf, lost = rescued(sdf, grid)
    surfaces = grid.surfaces(sdf, offset)
    pictures = draw(generator, planes, surfaces, views.to(grid.device), SIDE, SHADING)
    return pictures, lost, edge_loss(sdf, surfaces.ends)


def channels_last(pictures: Tensor) -> Tensor:
    """Return the same pictures as a CPU's convolutions like them best."""
    return pictures.contiguous(memory_format=torch.channels_last)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
