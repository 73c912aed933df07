"""Pictures of one class's objects, each from a camera that is known: all that the discriminators ever see.

Training captions in all their colours, without patterns, none held out. Pictures are black where nothing is, as GET3D's
are; a light beside the camera shades them, as it shades the generator's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.cameras import Views, orbit_views, to_clip
from stages.kernels.raster import interpolate, rasterise, vertex_normals
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build
from stages.render.shade import Shading, shade

SIDE = 64  # of a picture, pixels
FINE = 3  # samples of a pixel along a side
VIEWS = 8  # of each object
VARIATION = 0.6  # of the proportions, see build
ELEVATION = (0.0, 45.0)  # degrees, evenly; GET3D's end at 30, from where no mug shows that it is hollow
SHADING = Shading(ambient=0.6, diffuse=0.4)


def camera(azimuth_deg: Tensor, elevation_deg: Tensor) -> Views:
    """Return the views that pictures of the bank are seen from, [B] degrees."""
    return orbit_views(azimuth_deg, elevation_deg)


def draw_angles(count: int, rng: np.random.Generator) -> Tensor:
    """Return azimuth and elevation [B, 2] in degrees, as the bank's pictures have them."""
    return torch.from_numpy(
        np.stack([rng.uniform(0, 360, count), rng.uniform(*ELEVATION, count)], -1).astype(np.float32)
    )


@dataclass(frozen=True)
class PictureBank:
    """pictures [N, 4, 64, 64] uint8, sRGB and coverage; angles [N, 2] azimuth and elevation in degrees."""

    pictures: Tensor
    angles: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def to(self, device: torch.device) -> PictureBank:
        """Return the same pictures on a device."""
        return PictureBank(self.pictures.to(device), self.angles.to(device))


def make_bank(folder: Path, kind: str, count: int, seed: int) -> PictureBank:
    """Return about `count` pictures of a class, made once, then read from a file of the folder."""
    path = folder / f"{kind}-{count}-{seed}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, list(world.KINDS).index(kind), count])
        specs = [world.Spec(kind, colour) for colour in world.COLOURS]
        specs = [spec for spec in specs if not world.held_out(spec)]
        rows = []
        for k in range(max(1, count // VIEWS)):
            mesh = build(specs[k % len(specs)], rng, VARIATION)
            angles = draw_angles(VIEWS, rng)
            rows.append((render(mesh, camera(*angles.unbind(1))), angles))
        pictures, angles = (torch.cat(part) for part in zip(*rows, strict=True))
        save_file({"pictures": pictures, "angles": angles}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return PictureBank(**load_file(path))


@torch.no_grad()
def render(mesh: Mesh, views: Views) -> Tensor:
    """Return pictures [B, 4, 64, 64] uint8 of a mesh with vertex colours: sRGB on black, and coverage."""
    vertices, faces, colours = (torch.from_numpy(part) for part in (mesh.vertices, mesh.faces, mesh.colours))
    fine = SIDE * FINE
    rast = rasterise(to_clip(vertices, views), faces, fine, fine)
    attributes = torch.cat([vertices, vertex_normals(vertices, faces), colours], -1)
    points, normals, albedo = interpolate(attributes, rast, faces).split(3, -1)
    normals = torch.nn.functional.normalize(normals, dim=-1)
    shaded = shade(albedo, normals, points, views.light[:, None, None], SHADING)
    mask = (rast[..., 3:] > 0).float()
    samples = torch.cat([shaded * mask, mask], -1).view(len(views), SIDE, FINE, SIDE, FINE, 4).mean((2, 4))
    picture = torch.cat([linear_to_srgb(samples[..., :3]), samples[..., 3:]], -1)
    return (picture.clamp(0, 1) * 255).round().byte().permute(0, 3, 1, 2).contiguous()
