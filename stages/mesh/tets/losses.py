"""Losses of a body at its first surface on a lattice, part by part.

Nearness to the new surface does not tell: a plate thinner than a cell leaves specks that are near to all of it. So a
ray goes inwards from points spread over the visible surface, half way to the other side but no deeper than a cell, and
what counts is the share of the ray that lies outside the new surface.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.mesh.measure import face_areas, face_components
from stages.mesh.mesh import Mesh
from stages.mesh.orient import welded_faces
from stages.mesh.sample import points_at, surface_samples
from stages.mesh.tree import TriangleTree

PROBES, LEAST = 4000, 24  # rays in all, and of each part
PARTS = 200  # largest parts that get the least number
STEPS = 4  # places along a ray
NEAR = 0.01  # cells from the surface where a ray begins


@dataclass(frozen=True)
class Losses:
    """The share of a body that is lost.

    Args:
        share: of the body beneath the visible surface, by area.
        parts: share [P] of each part of the mesh, NaN where nothing of it can be seen or encloses anything.
        thickness: below which a tenth of the visible surface lies; at most two cells.
        reach: longest side of the largest part's box, as a share of the whole mesh's; 1 where that part has less than
            half of the area.
    """

    share: float
    parts: np.ndarray
    thickness: float
    reach: float


def losses(mesh: Mesh, body: TriangleTree, surface: TriangleTree, cell: float) -> Losses:
    """Return what of the body that a mesh bounds lies outside a new surface.

    Args:
        mesh: in the scene.
        body: its triangles, facing outwards.
        surface: those of the new surface.
        cell: of the lattice.
    """
    _, welded = welded_faces(mesh)
    part = face_components(welded, int(welded.max()) + 1)
    areas = np.bincount(part, face_areas(mesh.vertices, mesh.faces))
    largest, every = (mesh.vertices[mesh.faces[which]].reshape(-1, 3) for which in (part == areas.argmax(), part >= 0))
    reach = float(np.ptp(largest, axis=0).max() / np.ptp(every, axis=0).max()) if 2 * areas.max() > areas.sum() else 1.0
    face, weights = _probes(mesh, part, areas)
    points, normals = points_at(mesh, face, weights), mesh.face_normals()[face]
    solid = np.stack([body.winding_numbers(points + way * NEAR * cell * normals) for way in (1, -1)]) > 0.5
    on_surface = solid[0] != solid[1]
    inwards = np.where(solid[1], -1.0, 1.0)[:, None] * normals
    part_of, points, inwards = part[face[on_surface]], points[on_surface], inwards[on_surface]
    if not len(points):
        return Losses(0.0, np.full(len(areas), np.nan), 2 * cell, reach)
    begin = points + NEAR * cell * inwards
    thick = 2 * cell * body.hits(begin, begin + 2 * cell * inwards)[1]
    depth = np.minimum(thick / 2, cell)
    steps = (np.arange(STEPS) + 0.5) / STEPS
    places = points[:, None] + (depth[:, None] * steps)[..., None] * inwards[:, None]  # [N, STEPS, 3]
    gone = (surface.winding_numbers(places.reshape(-1, 3)) < 0.5).reshape(-1, STEPS).mean(1)
    count = np.bincount(part_of, minlength=len(areas))
    with np.errstate(invalid="ignore"):
        shares = np.bincount(part_of, gone, len(areas)) / count
    probes = np.bincount(part[face], minlength=len(areas))
    weight = (areas / np.maximum(count, 1))[part_of] * (count / np.maximum(probes, 1))[part_of]
    order = np.argsort(thick)
    thin = np.searchsorted(np.cumsum(weight[order]), 0.1 * weight.sum())
    return Losses(float(np.average(gone, weights=weight)), shares, float(thick[order][thin]), reach)


def _probes(mesh: Mesh, part: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places on the surface, face [N] and barycentric weights [N, 3]: evenly by area, and some on each large part."""
    generator = torch.Generator().manual_seed(0)
    face, weights = surface_samples(mesh, PROBES, generator)
    faces, many = [face], [weights]
    count = np.bincount(part[face], minlength=len(areas))
    for k in np.argsort(-areas, kind="stable")[:PARTS]:
        if count[k] < LEAST and areas[k] > 0:
            part_faces = np.flatnonzero(part == k)
            face, weights = surface_samples(Mesh(mesh.vertices, mesh.faces[part_faces]), LEAST, generator)
            faces.append(part_faces[face])
            many.append(weights)
    return np.concatenate(faces), np.concatenate(many)
