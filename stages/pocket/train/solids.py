"""Occupancy, colours and normals of the world's objects at points: the layout's first training data.

A ray's colour says little about where along it the colour stands, and a pupil is a few pixels of few renders. The
objects are the world's own, so each point has a target instead: whether it is inside, and near the surface the colour
and normal of the surface there, in every colour that training captions name. Occupancy networks are trained this way
(Mescheder et al. 2019, arXiv 1812.03828); the targets average several instances of an object, so that a volume becomes
their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from stages.guidance.diffusion.layout import VIVID, Layout
from stages.kernels.reference.grids import DENSITY, EXTENT
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.mesh import Mesh
from stages.mesh.orient import smooth_normals
from stages.mesh.sample import points_at, surface_samples
from stages.mesh.tree import TriangleTree
from stages.pocket import world
from stages.pocket.build import build
from stages.pocket.pattern import PATTERNS

INSTANCES = 4  # of each shape
POINTS = 8000  # of each instance
SPREADS = (0.01, 0.04)  # of the points near a surface, standard deviations by halves
NEAR = 0.65  # share of them; the rest are anywhere in the ball
SHELL = 0.03  # distance to the surface up to which a point has its colour and normal
SURFACE = 16_000  # points that stand for a surface
ALIKE = 0.09  # sRGB distance up to which colours are one: instances vary a little
LENGTH = 0.03  # of the ray whose opacity an occupancy is, about a cell's side


@dataclass(frozen=True)
class Solids:
    """N shapes, a kind with a pattern each, and P points of each.

    points: [N, P, 3]. occupancy: [N, P] mean over instances, in [0, 1]. near: [N, P] whether the point has a colour and
    a normal. colours: [N, C, P, 3] sRGB in [0, 1] for each of the world's colours, float16. normals: [N, P, 3].
    """

    points: np.ndarray
    occupancy: np.ndarray
    near: np.ndarray
    colours: np.ndarray
    normals: np.ndarray


def shape_captions() -> list[list[str]]:
    """Return captions of each shape in the world's colours, in their order."""
    return [
        [world.caption(world.Spec(kind, colour, pattern)) for colour in world.COLOURS]
        for kind in world.KINDS
        for pattern in ("plain", *PATTERNS)
        if pattern == "plain" or kind in world.PATTERNED
    ]


def make_solids(folder: Path, seed: int) -> Solids:
    """Sample points of all shapes of the world; made once, then read from `folder`."""
    names = [field.name for field in fields(Solids)]
    if not all((folder / f"{name}.npy").exists() for name in names):
        shapes = [_shape(captions, np.random.default_rng([seed, n])) for n, captions in enumerate(shape_captions())]
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in zip(names, zip(*shapes, strict=True), strict=True):
            np.save(folder / f"{name}.npy", np.stack(rows))
    return Solids(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def _shape(captions: list[str], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return the fields of Solids for one shape."""
    seeds = rng.integers(2**62, size=INSTANCES)
    instances = [[build(world.parse(c), np.random.default_rng(s)) for c in captions] for s in seeds]
    trees = [TriangleTree(mesh.vertices[mesh.faces]) for mesh, *_ in instances]
    parts = [_points(alike, tree, rng) for alike, tree in zip(instances, trees, strict=True)]
    points, near, colours, normals = (
        np.concatenate(rows, axis) for rows, axis in zip(zip(*parts, strict=True), (0, 0, 1, 0), strict=True)
    )
    inside = np.mean([tree.winding_numbers(points) > 0.5 for tree in trees], 0)
    return points.astype(np.float32), inside.astype(np.float16), near, colours, normals.astype(np.float16)


def _points(alike: list[Mesh], tree: TriangleTree, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Sample points [P, 3] of one instance: also which are near its surface, colours [C, P, 3] and normals [P, 3]."""
    mesh = alike[0]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    face, weights = surface_samples(mesh, SURFACE, generator)
    surface = points_at(mesh, face, weights)
    outward = _outside(surface, mesh, face, tree)  # parts overlap: what lies in another part is no surface
    surface, face, weights = surface[outward], face[outward], weights[outward]
    close = round(NEAR * POINTS)
    spread = np.where(np.arange(close) % 2, *SPREADS)[:, None]
    beside = surface[rng.integers(len(surface), size=close)] + spread * rng.normal(size=(close, 3))
    anywhere = rng.normal(size=(POINTS - close, 3))
    anywhere *= EXTENT * rng.random((len(anywhere), 1)) ** (1 / 3) / np.linalg.norm(anywhere, axis=1, keepdims=True)
    points = np.concatenate([beside, anywhere])
    distance, nearest = cKDTree(surface).query(points)
    normals = np.einsum("nc,nck->nk", weights, smooth_normals(mesh)[mesh.faces[face]])[nearest]
    corners = mesh.faces[face[nearest]]
    linear = [np.einsum("nc,nck->nk", weights[nearest], other.colours[corners]) for other in alike]
    colours = linear_to_srgb(torch.from_numpy(np.stack(linear))).numpy()
    inside = np.linalg.norm(points, axis=1) < EXTENT
    return points, (distance < SHELL) & inside, colours.astype(np.float16), normals


def _outside(surface: np.ndarray, mesh: Mesh, face: np.ndarray, tree: TriangleTree) -> np.ndarray:
    """Return which points [P] of the surface are not inside another part, bool."""
    a, b, c = (mesh.vertices[mesh.faces[face, k]].astype(np.float64) for k in range(3))
    normal = np.cross(b - a, c - a)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    return tree.winding_numbers(surface + 1e-3 * normal) < 0.5


@dataclass(frozen=True)
class Roles:
    """The parts that objects are painted by: two parts in one role have one colour in every caption of the training.

    colours: [R, C, 3] sRGB in each of the world's colours. number: [N, P] the role of each point of the bank.
    in_training: [N, C] whether a shape's caption in a colour belongs to the training. weight: [N, P] of each point near
        a surface, mean 1 over them, else 0: a pupil has few points, but an error in it shows.
    """

    colours: Tensor
    number: Tensor
    in_training: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Roles:
        """Return the same roles on a device."""
        return Roles(*(getattr(self, f.name).to(device) for f in fields(self)))


def find_roles(solids: Solids, captions: list[list[str]], limit: int) -> Roles:
    """Find the roles of the training captions' parts, at most `limit`, those that paint most points first."""
    in_training = torch.tensor([[not world.held_out(world.parse(text)) for text in alike] for alike in captions])
    colours = torch.tensor(np.asarray(solids.colours)).float().clamp(0, 1).transpose(1, 2)  # [N, P, C, 3]
    near = torch.tensor(np.asarray(solids.near))
    roles, role_masks, counts = [], [], []
    number = torch.zeros(near.shape, dtype=torch.long)
    for n in range(len(captions)):
        rest = near[n].clone()
        while rest.any():
            first = colours[n][rest][0]
            alike = rest & ((colours[n] - first).abs().amax(-1)[:, in_training[n]].amax(-1) < ALIKE)
            mean = colours[n][alike].mean(0)
            fits = [
                (mean - role).abs().amax(-1)[in_training[n] & mask].amax().item()
                if (in_training[n] & mask).any()
                else 1.0
                for role, mask in zip(roles, role_masks, strict=True)
            ]
            best = int(np.argmin(fits)) if fits else -1
            if best < 0 or fits[best] > ALIKE:
                best = len(roles)
                roles.append(mean.clone())
                role_masks.append(in_training[n].clone())
                counts.append(0)
            fresh = in_training[n] & ~role_masks[best]
            roles[best][fresh], role_masks[best] = mean[fresh], role_masks[best] | in_training[n]
            counts[best] += int(alike.sum())
            number[n][alike] = best
            rest &= ~alike
    order = torch.tensor(counts).argsort(descending=True)
    if len(order) > limit:
        raise ValueError(f"limit: the world has {len(order)} roles, got {limit}")
    for role, mask in zip(roles, role_masks, strict=True):  # as in most colours where no training caption shows it
        role[~mask] = role[mask].median(0).values
    number = order.argsort()[number]
    role_points = F.one_hot(number, len(order)) * near[..., None]
    shares = role_points.sum(1) / near.sum(1, keepdim=True)  # [N, R]
    weight = near * shares.gather(1, number).clamp_min(1e-3) ** -0.5
    return Roles(torch.stack(roles)[order], number, in_training.float(), weight * near.sum() / weight.sum())


def paint_roles(layout: Layout, roles: Roles) -> None:
    """Set a layout's palettes to the colours of the roles; paints beyond them stay as they are."""
    linear = srgb_to_linear(roles.colours.transpose(0, 1))  # [C, R, 3]
    logits = torch.logit((linear ** (1 / 2.2)).clamp(0.01, 0.99)) / VIVID
    with torch.no_grad():
        layout.palette[: logits.shape[1]] = logits.mean(0)
        layout.palette_of[:, : logits.shape[1]] = logits - logits.mean(0)


def solid_loss(
    layout: Layout, shapes: Tensor, colours: Tensor, roles: Roles, solids: Solids, rows: np.ndarray, index: np.ndarray
) -> Tensor:
    """Return the loss of the volumes' opacity, colour and normal at points of shapes.

    Args:
        shapes: [N, kinds and patterns] counts of words of the shapes `rows` [N]. colours: [C, colours] of the world's
            colours. index: [Q] which points of each.
    """
    device = shapes.device
    points = torch.from_numpy(solids.points[rows][:, index]).to(device)
    values = layout.at(shapes, points)  # [N, Q, 4 + paints]
    occupancy = torch.from_numpy(solids.occupancy[rows][:, index]).to(device).float()
    raw = values[..., 0]
    depth = DENSITY * LENGTH * torch.where(raw < 0, raw.clamp_max(0).exp(), 1 + raw)  # `activated`, without its end
    solid = -torch.log(-torch.expm1(-depth - 1e-7))  # -log of the opacity; depth is -log of what is left
    loss = (occupancy * solid + (1 - occupancy) * depth).mean()
    near = torch.from_numpy(solids.near[rows][:, index]).to(device).float()
    normals = torch.from_numpy(solids.normals[rows][:, index]).to(device).float()
    loss = loss + (near[..., None] * (values[..., 1:4] - normals).square()).sum() / (3 * near.sum())
    palettes = layout.palettes(colours)  # [C, paints, 3]
    point_colours = linear_to_srgb(torch.einsum("nqp,cpk->ncqk", values[..., 4:], palettes))
    truth = torch.from_numpy(solids.colours[rows][:, :, index]).to(device).float()
    number = roles.number[rows][:, index]
    shares = values[..., 4:].square().sum(-1) - 2 * values[..., 4:].gather(-1, number[..., None])[..., 0] + 1
    weight = roles.weight[rows][:, index]
    loss = loss + 0.5 * (weight * shares).sum() / weight.sum()  # squared distance to all of the one paint
    weight = (weight[:, None] * roles.in_training[rows][..., None])[..., None]
    return loss + 20 * (weight * (point_colours - truth).square()).sum() / (3 * weight.sum())
