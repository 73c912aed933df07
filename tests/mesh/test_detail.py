"""Normal and occlusion maps that make a decimated mesh look like the full one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stages.cameras import orbit_views
from stages.mesh.clean import decimate
from stages.mesh.measure import face_areas
from stages.mesh.mesh import Mesh
from stages.mesh.texture.charts import unwrap_by_boxes
from stages.mesh.texture.detail import bake_detail
from stages.mesh.texture.tangents import corner_tangents, mirrored_faces
from stages.mesh.tree import TriangleTree
from tests.mesh.mesh_shapes import box, isosurface, make, noisy_blob, sphere
from tests.mesh.normal_pictures import normal_error_deg
from tests.mesh.painted_shapes import bumpy_torus

VIEWS = orbit_views([0.0, 100.0, 220.0], 20.0)


def unwrapped(mesh: Mesh, size: int) -> Mesh:
    uv, uv_faces, _ = unwrap_by_boxes(mesh, size, 4)
    return replace(mesh, uv=uv, uv_faces=uv_faces, texture=np.zeros((size, size, 3), np.uint8))


def ribbed(resolution: int) -> Mesh:
    """A body with flat sides, sharp edges and grooves."""

    def sdf(p):
        body = np.linalg.norm(np.maximum(np.abs(p) - [0.5, 0.35, 0.4], 0), axis=1) - 0.05
        return np.maximum(body, 0.03 * np.cos(40 * p[:, 1]) - 0.02 + body)

    return isosurface(sdf, resolution)


@pytest.mark.slow
@pytest.mark.parametrize(("full", "faces"), [(noisy_blob(40), 1500), (ribbed(40), 1200)], ids=["blob", "ribbed"])
def test_the_normal_map_at_least_halves_the_error_of_the_normals(full, faces):
    low = unwrapped(decimate(full, faces), 512)
    assert len(low.faces) < len(full.faces) / 8
    mapped = bake_detail(low, full, 512, occlusion=False)
    plain, better = normal_error_deg(low, full, VIEWS), normal_error_deg(mapped, full, VIEWS)
    print(f"{len(full.faces)} faces as {len(low.faces)}: {plain:.2f} deg, with the map {better:.2f} deg")
    assert better < 0.5 * plain
    green = mapped.normal_map.copy()
    green[..., 1] = 255 - green[..., 1]  # the other convention of up
    assert normal_error_deg(replace(mapped, normal_map=green), full, VIEWS) > 1.3 * better


@pytest.mark.slow
def test_a_surface_that_lost_nothing_has_a_flat_map():
    mesh = unwrapped(sphere(n=24, m=12), 64)
    told = bake_detail(mesh, mesh, 64, occlusion=False).normal_map.astype(int)
    assert np.abs(told - [128, 128, 255]).max() <= 2


@pytest.mark.slow
def test_occlusion_is_dark_in_a_pit_and_light_on_a_bump():
    def sdf(p):
        pit = 0.15 - np.linalg.norm(p[:, [0, 2]], axis=1)
        return np.maximum(np.abs(p).max(1) - 0.5, np.where(p[:, 1] > -0.3, pit, -1))

    mesh = unwrapped(isosurface(sdf, 24), 256)
    maps = bake_detail(mesh, mesh, 256, normals=False)
    assert maps.normal_map is None and maps.occlusion.shape == (256, 256)
    centre = mesh.vertices[mesh.faces].mean(1)
    uv = mesh.uv[mesh.uv_faces].mean(1)
    seen = maps.occlusion[((1 - uv[:, 1]) * 256).astype(int), (uv[:, 0] * 256).astype(int)] / 255
    bottom = (np.abs(centre[:, [0, 2]]).max(1) < 0.1) & (np.abs(centre[:, 1] + 0.3) < 0.05)
    side = centre[:, 0] > 0.49
    assert bottom.sum() > 4 and side.sum() > 4
    assert seen[bottom].max() < 0.35 and seen[side].min() > 0.95


def test_light_above_a_floor_and_in_a_corner():
    floor = make([[-9, 0, -9], [-9, 0, 9], [9, 0, 9], [9, 0, -9]], [[0, 1, 2], [0, 2, 3]])
    wall = make([[0, 0, -9], [0, 9, -9], [0, 9, 9], [0, 0, 9]], [[0, 1, 2], [0, 2, 3]])
    triangles = np.concatenate([floor.vertices[floor.faces], wall.vertices[wall.faces]])
    up = np.float64([[0, 1, 0]])
    point = np.float64([[1e-3, 0, 0]])
    assert TriangleTree(floor.vertices[floor.faces]).open_share(point, up, 1.0)[0] == 1
    assert TriangleTree(triangles).open_share(point, up, 1.0, rays=1024)[0] == pytest.approx(0.5, abs=0.02)


def test_the_nearest_place_faces_the_same_way():
    thin = box((1, 0.1, 1))
    tree = TriangleTree(thin.vertices[thin.faces])
    point = np.float64([[0.1, 0.01, 0.2]])  # nearer to the upper side
    for direction, y in ((1, 0.05), (-1, -0.05)):
        place, weights = tree.nearest(point, np.float64([[0, direction, 0]]))
        at = np.einsum("nc,nck->nk", weights, thin.vertices[thin.faces[place]].astype(float))
        np.testing.assert_allclose(at, [[0.1, y, 0.2]], atol=1e-6)


def reference_tangents(mesh: Mesh) -> np.ndarray:
    """The convention by loops: for every corner all faces that share its vertex, coordinate and handedness."""
    normals, mirrored = mesh.vertex_normals().astype(float), mirrored_faces(mesh)
    result = np.zeros((*mesh.faces.shape, 3))
    around: dict[tuple, list[tuple[int, int]]] = {}
    for f in range(len(mesh.faces)):
        for c in range(3):
            around.setdefault((mesh.faces[f, c], mesh.uv_faces[f, c], mirrored[f]), []).append((f, c))
    for (v, _, _), members in around.items():
        n, total = normals[v], np.zeros(3)
        for f, c in members:
            p, q = mesh.vertices[mesh.faces[f]].astype(float), mesh.uv[mesh.uv_faces[f]].astype(float)
            along = np.linalg.solve(np.stack([q[1] - q[0], q[2] - q[0]]), np.stack([p[1] - p[0], p[2] - p[0]]))[0]
            flat = along - n * (n @ along)
            arms = [p[(c + k) % 3] - p[c] for k in (1, 2)]
            arms = [arm - n * (n @ arm) for arm in arms]
            cosine = arms[0] @ arms[1] / np.linalg.norm(arms[0]) / np.linalg.norm(arms[1])
            total += np.arccos(cosine) * flat / np.linalg.norm(flat)
        for f, c in members:
            result[f, c] = total / np.linalg.norm(total)
    return result


@pytest.mark.parametrize("mirror", [False, True])
def test_tangents_are_those_of_the_convention(mirror):
    mesh = bumpy_torus(mirror)
    tangents = corner_tangents(mesh)
    np.testing.assert_allclose(tangents[..., :3], reference_tangents(mesh), atol=1e-4)
    assert set(tangents[..., 3].reshape(-1)) == {-1.0 if mirror else 1.0}
    assert face_areas(mesh.vertices, mesh.faces).min() > 0
