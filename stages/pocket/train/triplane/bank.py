"""Objects of the pocket world at points of space, in the colours of their captions, for tri-planes to be fitted to.

As solids.py has them, but drawn as the training captions are (pairs too), each instance for itself, in several colours
of one geometry, and told apart by crossings (inside.py), a hundred times as fast. Held-out captions are never drawn.
Letters: N objects, P points of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from stages.cameras import orbit_views
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.mesh import Mesh
from stages.mesh.sample import points_at, surface_samples
from stages.pocket import data, world
from stages.pocket.build import build
from stages.pocket.train.triplane.inside import winding
from stages.render.shade import ALBEDO, LAMBERT
from stages.triplane.planes import BOX

POINTS = 20_000  # of each object
SURFACE = 8000  # points that stand for a surface
NEAR = 0.75  # share of the points that lie beside the surface, the rest anywhere in the box
SPREADS = (0.01, 0.04)  # standard deviations of their distance, by halves
SHELL = 0.04  # distance to the surface up to which a point has its colour
COLOURINGS = 3  # of one geometry
TURN = 30.0  # largest azimuth of the picture that the CLIP sees, degrees


@dataclass(frozen=True)
class Objects:
    """N objects.

    captions: of each. points: [N, P, 3]. inside, near: [N, P] bool. colours: [N, P, 3] sRGB where near, else anything.
    pictures: [N, 64, 64, 3] uint8 sRGB, seen about from the front.
    """

    captions: list[str]
    points: Tensor
    inside: Tensor
    near: Tensor
    colours: Tensor
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)


def make_objects(shapes: int, rng: np.random.Generator) -> Objects:
    """Return COLOURINGS objects of each of so many geometries."""
    rows = [row for _ in range(shapes) for row in _objects(rng)]
    captions, points, inside, near, colours, pictures = zip(*rows, strict=True)
    tensors = (torch.from_numpy(np.stack(part)) for part in (points, inside, near, colours))
    return Objects(list(captions), *tensors, np.stack(pictures))


def _objects(rng: np.random.Generator) -> list[tuple]:
    """One geometry in several colours."""
    specs = colourings(rng)
    seed = int(rng.integers(2**62))
    meshes = [build(spec, np.random.default_rng(seed)) for spec in specs]
    triangles = meshes[0].vertices[meshes[0].faces].astype(np.float64)
    points, face, weights, near = _points(meshes[0], triangles, rng)
    inside = winding(triangles, points) > 0
    corners = meshes[0].faces[face]
    rows = []
    for spec, mesh in zip(specs, meshes, strict=True):
        paint = np.einsum("nc,nck->nk", weights, mesh.colours[corners])
        colours = linear_to_srgb(torch.from_numpy(paint)).numpy().astype(np.float32)
        rows.append((world.caption(spec), points.astype(np.float32), inside, near, colours, picture(mesh, rng)))
    return rows


def colourings(rng: np.random.Generator) -> list[world.Spec]:
    """Return COLOURINGS training captions' specs that differ in colours alone."""
    specs = [world.sample_spec(rng)]
    for _ in range(100):
        other = _recoloured(specs[0], rng)
        if len(specs) < COLOURINGS and not world.held_out(other):
            specs.append(other)
    return specs


def _recoloured(spec: world.Spec, rng: np.random.Generator) -> world.Spec:
    colour = str(rng.choice(list(world.COLOURS)))
    if spec.other is None:
        return replace(spec, colour=colour)
    return replace(spec, colour=colour, other=replace(spec.other, colour=str(rng.choice(list(world.COLOURS)))))


def _points(mesh: Mesh, triangles: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Points [P, 3]; the face [P] and place on it [P, 3] whose colour each has; which are near enough to have one."""
    face, weights = outer_samples(mesh, triangles, SURFACE, rng)
    surface = points_at(mesh, face, weights)
    close = round(NEAR * POINTS)
    spread = np.where(np.arange(close) % 2, *SPREADS)[:, None]
    beside = surface[rng.integers(len(surface), size=close)] + spread * rng.normal(size=(close, 3))
    points = rng.permutation(np.concatenate([beside, rng.uniform(-BOX, BOX, (POINTS - close, 3))]))
    distance, nearest = cKDTree(surface).query(points)
    return points, face[nearest], weights[nearest], distance < SHELL


def outer_samples(
    mesh: Mesh, triangles: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the face [N] and the place on it [N, 3] of up to `count` even samples of the outer surface.

    Parts overlap: what of one lies in another is no surface.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    face, weights = surface_samples(mesh, count, generator)
    a, b, c = triangles[face].transpose(1, 0, 2)
    normal = np.cross(b - a, c - a)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    outward = winding(triangles, points_at(mesh, face, weights) + 1e-3 * normal) < 1
    return face[outward], weights[outward]


def picture(mesh: Mesh, rng: np.random.Generator) -> np.ndarray:
    """Return a picture [64, 64, 3] uint8 sRGB, seen about from the front, as a CLIP is shown it."""
    view = orbit_views([float(rng.uniform(-TURN, TURN))], float(rng.uniform(0, 30)))
    under = torch.from_numpy(data.background(rng)).float()
    return data.render(mesh, view, 64, ALBEDO if rng.random() < 0.4 else LAMBERT, under)
