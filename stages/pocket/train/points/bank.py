"""Objects of the pocket world as coloured clouds, with pictures of each and signed distances at points of space.

As the tri-planes' objects (triplane/bank.py): training captions, several colours of one geometry, none held out.
Otherwise than in Point-E, points are drawn evenly from the surface itself, not from depth images, and no farthest ones
are chosen among them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial import cKDTree
from torch import Tensor

from stages.kernels.srgb import linear_to_srgb
from stages.mesh.sample import points_at
from stages.pocket import world
from stages.pocket.build import build
from stages.pocket.train.triplane.bank import colourings, outer_samples, picture
from stages.pocket.train.triplane.inside import winding
from stages.points.cloud import REACH, channels_of
from stages.points.model import HIGH
from stages.points.surface import BOX

PICTURES = 2  # of each object
QUERIES = 2048  # points of each geometry whose signed distance is known
DENSE = 12_000  # surface points that it is measured from
NEAR, SPREADS = 0.75, (0.02, 0.08)  # share of the queries beside the surface, and how far, by halves
CHUNK = 48  # geometries of a file


class CloudBank:
    """Objects in files of a folder, made where they are missing; the same for a seed.

    Args:
        folder: where the files are.
        count: of objects, about.
        seed: of the objects.
        chunk: geometries of a file.

    clouds [N, 4096, 6] float16 as networks see them; pictures [N, 2, 64, 64, 3] uint8; captions; queries [S, Q, 4]
    float16, place and signed distance in a network's scale, of S geometries; `geometry` [N] which one an object has.
    """

    def __init__(self, folder: Path, count: int, seed: int, chunk: int = CHUNK) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, list[Tensor]] = {"clouds": [], "pictures": [], "queries": [], "geometry": []}
        self.captions: list[str] = []
        made, shapes = 0, 0
        for number in range(1_000_000):
            if made >= count:
                break
            path = folder / f"{number:05d}.safetensors"
            if not path.exists():
                _write_chunk(path, chunk, np.random.default_rng([seed, 7, number]))
            tensors = load_file(path)
            tensors["geometry"] = tensors["geometry"] + shapes
            for name, value in tensors.items():
                parts[name].append(value)
            self.captions += json.loads(path.with_suffix(".json").read_text())
            made, shapes = len(self.captions), shapes + len(tensors["queries"])
        joined = {name: torch.cat(values) for name, values in parts.items()}
        self.clouds, self.pictures = joined["clouds"], joined["pictures"]
        self.queries, self.geometry = joined["queries"], joined["geometry"]

    def __len__(self) -> int:
        return len(self.captions)


def _write_chunk(path: Path, shapes: int, rng: np.random.Generator) -> None:
    rows, queries, geometry = [], [], []
    for shape in range(shapes):
        objects, places = _objects(rng)
        rows += objects
        queries.append(places)
        geometry += [shape] * len(objects)
    captions, clouds, pictures = zip(*rows, strict=True)
    tensors = {
        "clouds": torch.stack(clouds).half(),
        "pictures": torch.from_numpy(np.stack(pictures)),
        "queries": torch.stack(queries).half(),
        "geometry": torch.tensor(geometry),
    }
    path.with_suffix(".json").write_text(json.dumps(captions))
    save_file(tensors, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _objects(rng: np.random.Generator) -> tuple[list[tuple], Tensor]:
    """The colourings of one geometry, as (caption, cloud, pictures), and its queries [Q, 4]."""
    specs = colourings(rng)
    seed = int(rng.integers(2**62))
    meshes = [build(spec, np.random.default_rng(seed)) for spec in specs]
    triangles = meshes[0].vertices[meshes[0].faces].astype(np.float64)
    face, weights = outer_samples(meshes[0], triangles, DENSE, rng)
    surface = points_at(meshes[0], face, weights)
    corners, rows = meshes[0].faces[face], []
    for spec, mesh in zip(specs, meshes, strict=True):
        chosen = rng.choice(len(surface), HIGH, replace=len(surface) < HIGH)
        paint = np.einsum("nc,nck->nk", weights[chosen], mesh.colours[corners[chosen]])
        colours = linear_to_srgb(torch.from_numpy(paint)).float()
        cloud = channels_of(torch.from_numpy(surface[chosen]).float(), colours)
        rows.append((world.caption(spec), cloud, np.stack([picture(mesh, rng) for _ in range(PICTURES)])))
    return rows, _queries(surface, triangles, rng)


def _queries(surface: np.ndarray, triangles: np.ndarray, rng: np.random.Generator) -> Tensor:
    close = round(NEAR * QUERIES)
    spread = np.where(np.arange(close) % 2, *SPREADS)[:, None]
    beside = surface[rng.integers(len(surface), size=close)] + spread * rng.normal(size=(close, 3))
    places = rng.permutation(np.concatenate([beside, rng.uniform(-BOX, BOX, (QUERIES - close, 3))]))
    distance, _ = cKDTree(surface).query(places)
    signed = np.where(winding(triangles, places) > 0, -distance, distance)
    return torch.from_numpy(np.concatenate([places, signed[:, None]], 1) / REACH).float()
