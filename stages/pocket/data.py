"""Training renders of the pocket world: captioned images in the stages' own camera, light and background terms.

A pool is a folder: images.npy [N, S, S, 3] uint8 sRGB, records.json (caption, view words, kind of shading) and
scenes.npz (:class:`Scenes`: cameras, lights, backdrops, where the objects stand).
It is a function of (size, count, seed), written once, read by memory map.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cameras import CameraSettings, Views, sample_views
from stages.guidance.diffusion.layout import Setting
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build_placed
from stages.prompts import PromptSettings, view_class
from stages.render.raster import render_mesh, render_vertex_colours
from stages.render.shade import Shading

COARSE_CAMERAS = CameraSettings()
FINE_CAMERAS = CameraSettings(fov_deg=(28.0, 34.0))
VIEWS_PER_MESH = 4
SRGB = (linear_to_srgb(torch.linspace(0, 1, 2**14)) * 255).round().byte()  # linear to sRGB byte, by table
LINEAR = srgb_to_linear(torch.arange(256) / 255)  # sRGB byte to linear
BACKGROUND = (0.35, 1.0)  # sRGB grey of the backgrounds the priors know; the stages draw from the same range
TINT = 0.02
SIDES = PromptSettings(sides=True)
TEXTURELESS = 0.15  # share of textureless renders, captioned ', clay render'
EDGE = 0.03  # a pixel that differs from the backdrop by this in any channel shows the object
FEWEST = 50  # object pixels of a picture that counts
ALBEDO = 0.4  # share of unshaded renders beside that share of textureless ones


def background(generator: np.random.Generator) -> np.ndarray:
    """Draw one nearly neutral background, linear RGB [3]."""
    srgb = generator.uniform(*BACKGROUND) + generator.uniform(-TINT, TINT, 3)
    return srgb_to_linear(torch.from_numpy(srgb.clip(0, 1))).numpy()


@dataclass(frozen=True)
class Scenes:
    """Cameras, light and backdrop of N pictures as float32 arrays, and where their objects stand."""

    c2w: np.ndarray  # [N, 4, 4]
    fov_deg: np.ndarray  # [N]
    light: np.ndarray  # [N, 3] world position
    ambient: np.ndarray  # [N]
    bare: np.ndarray  # [N] 1 for clay renders
    under: np.ndarray  # [N, 3] linear colour of the backdrop
    placement: np.ndarray  # [N, 2, 4] scale and offset of each object, nan for one that is not there

    def __getitem__(self, index) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    def views(self) -> Views:
        """Return the cameras as Views; azimuth and elevation follow from the camera's position."""
        c2w = torch.from_numpy(self.c2w)
        x, y, z = c2w[:, :3, 3].unbind(-1)
        azimuth = torch.rad2deg(torch.atan2(x, z)) % 360
        elevation = torch.rad2deg(torch.atan2(y, torch.hypot(x, z)))
        return Views(c2w, torch.from_numpy(self.fov_deg), azimuth, elevation, torch.from_numpy(self.light))


def make_pool(
    folder: Path,
    *,
    size: int,
    count: int,
    seed: int,
    cameras: CameraSettings = COARSE_CAMERAS,
    textureless: float = TEXTURELESS,
    split: str = "train",
    workers: int | None = None,
) -> Path:
    """Render a pool of `count` images of `size` pixels into `folder`, unless it is there already.

    `textureless` is the share of clay renders; the rest is albedo and Lambert in their usual proportion.
    One single-threaded process a core: small renders gain nothing from threads and lose much to waiting for them.

    Args:
        split: of the captions, see `world.sample_spec`. workers: processes; None: one a core.
    """
    records_file = folder / "records.json"
    if records_file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "images.npy.part"
    np.lib.format.open_memmap(part, "w+", np.uint8, (count, size, size, 3)).flush()
    workers = workers or min(os.cpu_count() or 1, 8)
    bounds = np.linspace(0, math.ceil(count / VIEWS_PER_MESH), 4 * workers + 1).astype(int)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as executor:
        jobs = [
            executor.submit(_render_meshes, part, int(low), int(high), size, seed, cameras, textureless, split)
            for low, high in pairwise(bounds)
        ]
        parts = [job.result() for job in jobs]
    records = [record for part_records, _ in parts for record in part_records]
    names = [f.name for f in fields(Scenes)]
    np.savez(folder / "scenes.npz", **{n: np.concatenate([getattr(s, n) for _, s in parts]) for n in names})
    os.replace(part, folder / "images.npy")
    records_file.write_text(json.dumps(records))
    return folder


def _one_thread() -> None:
    torch.set_num_threads(1)


def _render_meshes(
    part: Path, first: int, last: int, size: int, seed: int, cameras: CameraSettings, textureless: float, split: str
) -> tuple[list[dict], Scenes]:
    """Render meshes first..last of a pool into its file; returns their records and scenes."""
    albedo = (1 - textureless) * ALBEDO / (1 - TEXTURELESS)
    kinds, shares = ["textureless", "albedo", "lambert"], [textureless, albedo, 1 - textureless - albedo]
    images = np.load(part, mmap_mode="r+")
    records, rows = [], []
    for m in range(first, last):
        rng = np.random.default_rng([seed, m])
        spec = world.sample_spec(rng, split=split)
        mesh, placement, _ = build_placed(spec, rng)
        places = np.full((2, 4), np.nan, np.float32)
        places[: len(placement)] = placement
        views = sample_views(cameras, VIEWS_PER_MESH, torch.Generator().manual_seed(int(rng.integers(2**62))))
        for v in range(min(VIEWS_PER_MESH, len(images) - m * VIEWS_PER_MESH)):
            kind = rng.choice(kinds, p=shares)
            ambient = 1.0 if kind == "albedo" else float(rng.uniform(0.3, 0.7))
            shading = Shading(ambient, 1 - ambient, bool(kind == "textureless"))
            under = torch.from_numpy(background(rng)).float()
            images[m * VIEWS_PER_MESH + v] = render(mesh, views[v], size, shading, under)
            view = view_class(float(views.azimuth_deg[v]), float(views.elevation_deg[v]), SIDES)
            records.append({"caption": world.caption(spec), "view": view, "shading": str(kind)})
            camera = (views.c2w[v].numpy(), views.fov_deg[v].numpy(), views.light[v].numpy())
            rows.append((*camera, ambient, float(shading.textureless), under.numpy(), places))
    images.flush()
    return records, Scenes(*(np.array(column, np.float32) for column in zip(*rows, strict=True)))


@torch.no_grad()
def render(mesh: Mesh, views: Views, size: int, shading: Shading, under: Tensor) -> np.ndarray:
    """Render one picture, uint8 sRGB [size, size, 3]; supersampled if small, antialiased if large."""
    if size < 256:
        image = render_vertex_colours(mesh, views, size, shading, under)[0]
    else:
        vertices, faces, colours = (torch.from_numpy(a) for a in (mesh.vertices, mesh.faces, mesh.colours))
        image = render_mesh(vertices, faces, colours, views, size, size, shading=shading, backdrop=under).colour[0]
    return SRGB[(image * (len(SRGB) - 1)).round().clamp(0, len(SRGB) - 1).long()].numpy()


def load_pool(folder: Path) -> tuple[np.ndarray, list[dict], Scenes]:
    """Load images (memory-mapped), records and scenes of a pool."""
    with np.load(folder / "scenes.npz") as arrays:
        scenes = Scenes(**{f.name: arrays[f.name] for f in fields(Scenes)})
    return np.load(folder / "images.npy", mmap_mode="r"), json.loads((folder / "records.json").read_text()), scenes


def halved(images: np.ndarray) -> np.ndarray:
    """Return pictures [B, S, S, 3] uint8 sRGB at half the size, averaged in linear light."""
    linear = LINEAR[torch.from_numpy(np.ascontiguousarray(images)).long()]
    small = F.avg_pool2d(linear.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    return SRGB[(small * (len(SRGB) - 1)).round().long()].numpy()


def resized_pool(folder: Path, side: int) -> np.ndarray:
    """Return a pool's renders at half their size, a quarter ..., [N, side, side, 3] uint8, kept beside them."""
    path = folder / f"images{side}.npy"
    full = np.load(folder / "images.npy", mmap_mode="r")
    if full.shape[1] == side:
        return full
    if not path.exists():
        larger = resized_pool(folder, 2 * side)
        out = np.empty((len(larger), side, side, 3), np.uint8)
        for k in range(0, len(out), 256):
            out[k : k + 256] = halved(larger[k : k + 256])
        np.save(path, out)
    return np.load(path)


def setting_of(scenes: Scenes, device: torch.device | str = "cpu") -> Setting:
    """Return cameras, light and backdrop of a pool's renders."""
    facts = (torch.from_numpy(a).to(device) for a in (scenes.ambient, scenes.bare, scenes.under))
    return Setting(scenes.views().to(device), *facts)


def training_caption(record: dict, rng: np.random.Generator) -> str:
    """Return a caption for training: view words nearly always, left / right half of the time, clay words always."""
    text = record["caption"]
    if rng.random() < 0.9:
        view = "side" if record["view"].endswith("side") and rng.random() < 0.5 else record["view"]
        text += f", {view} view"
    if record["shading"] == "textureless":
        text += ", clay render"
    return text


def batch_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Return the indices of a step's images: consecutive slices of an epoch-wise permutation."""
    epoch, offset = divmod(step * batch, count - count % batch)
    return np.random.default_rng([seed, epoch]).permutation(count)[offset : offset + batch]


def object_psnr(picture: Tensor, truth: Tensor) -> float | None:
    """Return the PSNR in dB over the object of a picture [S, S, 3]; None for fewer than FEWEST object pixels."""
    mask = (truth - truth[:1, :1]).abs().amax(-1) > EDGE
    if int(mask.sum()) < FEWEST:
        return None
    return float(-10 * torch.log10((picture - truth)[mask].square().mean().clamp_min(1e-9)))
