"""Training renders of the pocket world: captioned images in the stages' own camera, light and background terms.

A pool is a folder: images.npy [N, S, S, 3] uint8 sRGB and records.json (caption, view words, kind of shading,
what a prior is told of the view in numbers).
It is a function of (size, count, seed), written once, read by memory map.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cameras import CameraSettings, Views, sample_views
from stages.guidance.diffusion.camera import view_numbers
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.prompts import PromptSettings, view_class
from stages.render.raster import render_mesh, render_vertex_colours
from stages.render.shade import Shading

COARSE_CAMERAS = CameraSettings()
FINE_CAMERAS = CameraSettings(fov_deg=(28.0, 34.0))
VIEWS_PER_MESH = 4
SRGB = (linear_to_srgb(torch.linspace(0, 1, 2**14)) * 255).round().byte()  # linear to sRGB byte, by table
BACKGROUND = (0.35, 1.0)  # sRGB grey of the backgrounds the priors know; the stages draw from the same range
TINT = 0.02
SIDES = PromptSettings(sides=True)
TEXTURELESS = 0.15  # share of textureless renders, captioned ', clay render'
UNSEEN = 5  # every so many training steps go without the camera
ALBEDO = 0.4  # share of unshaded renders beside that share of textureless ones


def background(generator: np.random.Generator) -> np.ndarray:
    """One nearly neutral background, linear RGB [3]."""
    srgb = generator.uniform(*BACKGROUND) + generator.uniform(-TINT, TINT, 3)
    return srgb_to_linear(torch.from_numpy(srgb.clip(0, 1))).numpy()


def make_pool(
    folder: Path,
    *,
    size: int,
    count: int,
    seed: int,
    cameras: CameraSettings = COARSE_CAMERAS,
    textureless: float = TEXTURELESS,
) -> Path:
    """Render a pool of `count` training images of `size` pixels into `folder`, unless it is there already.

    `textureless` is the share of clay renders; the rest is albedo and Lambert in their usual proportion.
    One single-threaded process a core: small renders gain nothing from threads and lose much to waiting for them.
    """
    done = folder / "records.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "images.npy.part"
    np.lib.format.open_memmap(part, "w+", np.uint8, (count, size, size, 3)).flush()
    workers = min(os.cpu_count() or 1, 8)
    bounds = np.linspace(0, math.ceil(count / VIEWS_PER_MESH), 4 * workers + 1).astype(int)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as executor:
        jobs = [
            executor.submit(_render_meshes, part, int(low), int(high), size, seed, cameras, textureless)
            for low, high in pairwise(bounds)
        ]
        records = [record for job in jobs for record in job.result()]
    os.replace(part, folder / "images.npy")
    done.write_text(json.dumps(records))
    return folder


def _one_thread() -> None:
    torch.set_num_threads(1)


def _render_meshes(
    part: Path, first: int, last: int, size: int, seed: int, cameras: CameraSettings, textureless: float
) -> list[dict]:
    """Render meshes first..last of a pool into its file; returns their records."""
    albedo = (1 - textureless) * ALBEDO / (1 - TEXTURELESS)
    kinds, shares = ["textureless", "albedo", "lambert"], [textureless, albedo, 1 - textureless - albedo]
    images = np.load(part, mmap_mode="r+")
    records = []
    for m in range(first, last):
        rng = np.random.default_rng([seed, m])
        spec = world.sample_spec(rng, split="train")
        mesh = world.build(spec, rng)
        views = sample_views(cameras, VIEWS_PER_MESH, torch.Generator().manual_seed(int(rng.integers(2**62))))
        for v in range(min(VIEWS_PER_MESH, len(images) - m * VIEWS_PER_MESH)):
            kind = rng.choice(kinds, p=shares)
            ambient = 1.0 if kind == "albedo" else float(rng.uniform(0.3, 0.7))
            shading = Shading(ambient, 1 - ambient, bool(kind == "textureless"))
            under = torch.from_numpy(background(rng)).float()
            images[m * VIEWS_PER_MESH + v] = render(mesh, views[v], size, shading, under)
            view = view_class(float(views.azimuth_deg[v]), float(views.elevation_deg[v]), SIDES)
            numbers = view_numbers(views[v], under, ambient, shading.textureless)[0]
            record = {"caption": world.caption(spec), "view": view, "shading": str(kind)}
            records.append(record | {"numbers": [round(float(n), 4) for n in numbers]})
    images.flush()
    return records


@torch.no_grad()
def render(mesh: Mesh, views: Views, size: int, shading: Shading, under: Tensor) -> np.ndarray:
    """One picture, uint8 sRGB [size, size, 3]: supersampled when small, antialiased as the fine stage's when large."""
    if size < 256:
        image = render_vertex_colours(mesh, views, size, shading, under)[0]
    else:
        vertices, faces, colours = (torch.from_numpy(a) for a in (mesh.vertices, mesh.faces, mesh.colours))
        image = render_mesh(vertices, faces, colours, views, size, size, shading=shading, background=under).colour[0]
    return SRGB[(image * (len(SRGB) - 1)).round().clamp(0, len(SRGB) - 1).long()].numpy()


def load_pool(folder: Path) -> tuple[np.ndarray, list[dict]]:
    """Images (memory-mapped) and records of a pool."""
    return np.load(folder / "images.npy", mmap_mode="r"), json.loads((folder / "records.json").read_text())


def training_caption(record: dict, rng: np.random.Generator) -> str:
    """The caption a model trains on: view words nearly always, left / right half of the time, clay words always."""
    text = record["caption"]
    if rng.random() < 0.9:
        view = "side" if record["view"].endswith("side") and rng.random() < 0.5 else record["view"]
        text += f", {view} view"
    if record["shading"] == "textureless":
        text += ", clay render"
    return text


def batch_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """The step's images: consecutive slices of an epoch-wise permutation."""
    epoch, offset = divmod(step * batch, count - count % batch)
    return np.random.default_rng([seed, epoch]).permutation(count)[offset : offset + batch]


def captions_for(records: list[dict], indices: np.ndarray, seed: int, step: int, drop: float) -> list[str]:
    rng = np.random.default_rng([seed, step, 1])
    return ["" if rng.random() < drop else training_caption(records[i], rng) for i in indices]


def view_numbers_of(records: list[dict], indices: np.ndarray) -> Tensor:
    """What a prior is told of the views of a batch: [B, 16]."""
    return torch.tensor([records[i]["numbers"] for i in indices])


def shift(latents: Tensor, rng: np.random.Generator, most: int = 2) -> Tensor:
    """Move every latent image by up to `most` cells, edges repeated: the camera's jitter, free of charge."""
    padded = F.pad(latents, (most,) * 4, mode="replicate")
    size = latents.shape[-1]
    moves = rng.integers(0, 2 * most + 1, (len(latents), 2))
    return torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, moves, strict=True)])
