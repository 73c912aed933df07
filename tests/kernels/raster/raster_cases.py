"""Meshes, views and backends that the tests of the rasteriser's ops share."""

from importlib.util import find_spec

import pytest
import torch
import trimesh

from stages.cameras import orbit_views

WARP = pytest.param("warp", marks=pytest.mark.skipif(find_spec("warp") is None, reason="warp-lang is not installed"))
FAST = pytest.mark.parametrize("backend", ["numba", WARP])
EVERY = pytest.mark.parametrize("backend", ["numba", "torch", WARP])
ONE = torch.tensor([[0, 1, 2]], dtype=torch.int32)


def flat(points, z=0.0, dtype=torch.float32):
    """Clip coordinates [1, V, 4] of points in normalised device coordinates, w = 1."""
    points = torch.as_tensor(points, dtype=dtype)
    return torch.cat([points, torch.full_like(points[:, :1], z), torch.ones_like(points[:, :1])], 1)[None]


def tensors(mesh):
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces, dtype=torch.int32)


def sphere(subdivisions, squash=(1.0, 0.7, 0.5)):
    vertices, triangles = tensors(trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.8))
    return vertices * torch.tensor(squash), triangles


def soup(vertices=60, triangles=80, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(vertices, 3, generator=g), torch.randint(0, vertices, (triangles, 3), generator=g).int()


MESHES = {
    "sphere": (*sphere(3), orbit_views([13.0, 200.0], 20.0)),
    "fine sphere": (*sphere(5), orbit_views([40.0], -20.0)),
    "torus": (*tensors(trimesh.creation.torus(0.5, 0.2, 24, 12)), orbit_views([10.0, 100.0], 50.0)),
    "box": (*tensors(trimesh.creation.box()), orbit_views([10.0, 45.0], 30.0)),
    "soup around the camera": (*soup(), orbit_views([0.0, 90.0], 10.0, distance=1.0)),
}
EACH = pytest.mark.parametrize("name", MESHES)
