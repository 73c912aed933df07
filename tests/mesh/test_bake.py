"""A baked texture shows the colour field it was baked from: inside charts, at seams, and in mip maps."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stages.errors import UserError
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.measure import edges_of, face_areas
from stages.mesh.mesh import Mesh
from stages.mesh.texture.bake import bake, bake_vertex_colours, evaluate, push_pull, texel_points
from stages.mesh.texture.charts import unwrap_by_boxes
from stages.mesh.texture.finalise import ExportSettings, finalise
from stages.mesh.texture.uv import unwrap
from tests.mesh.mesh_shapes import box, join, make, moved, noisy_blob, sphere, tetrahedron, torus


def solid_texture(points: torch.Tensor) -> torch.Tensor:
    """A smooth linear colour of position; at most 3 per unit of length."""
    return 0.5 + 0.4 * torch.sin(points * torch.tensor([7.0, 6.0, 5.0]) + torch.tensor([0.3, 1.1, 2.0]))


def srgb(linear: torch.Tensor) -> np.ndarray:
    return linear_to_srgb(linear).numpy() * 255


def laid_out(mesh: Mesh, size: int, padding: int = 4) -> Mesh:
    uv, uv_faces, _ = unwrap_by_boxes(mesh, size, padding)
    return replace(mesh, uv=uv, uv_faces=uv_faces)


def look_up(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear lookup written out: texel centres at half integers, v up, clamped."""
    height, width = texture.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]

    def texel(row, column):
        return texture[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)].astype(np.float64)

    top = texel(y0, x0) * (1 - fx) + texel(y0, x0 + 1) * fx
    return top * (1 - fy) + (texel(y0 + 1, x0) * (1 - fx) + texel(y0 + 1, x0 + 1) * fx) * fy


def surface_samples(mesh: Mesh, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    areas = face_areas(mesh.vertices, mesh.faces)
    face = random.choice(len(areas), count, p=areas / areas.sum())
    w = random.dirichlet((1, 1, 1), count)
    corners = mesh.vertices[mesh.faces[face]], mesh.uv[mesh.uv_faces[face]]
    return tuple(np.einsum("nc,nck->nk", w, values) for values in corners)


@pytest.mark.parametrize("mesh", [torus(), sphere(), box(), noisy_blob(20)], ids=["torus", "sphere", "box", "blob"])
def test_lookup_anywhere_gives_the_fields_colour(mesh):
    mesh = laid_out(mesh, 512)
    texture = bake(mesh, solid_texture, 512)
    assert texture.shape == (512, 512, 3) and texture.dtype == np.uint8
    points, uv = surface_samples(mesh)
    error = np.abs(look_up(texture, uv) - srgb(solid_texture(torch.from_numpy(points).float())))
    assert error.mean() < 0.6 and np.percentile(error, 99.9) < 5 and error.max() < 10  # of 255


def test_both_sides_of_a_seam_show_the_same_colour():
    mesh = laid_out(torus(), 512)
    texture = bake(mesh, solid_texture, 512)
    pairs = np.stack([mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)], -1)
    by_vertex = np.unique(pairs, axis=0)
    split = np.flatnonzero(by_vertex[1:, 0] == by_vertex[:-1, 0])
    assert len(split) > 100
    one, other = (look_up(texture, mesh.uv[by_vertex[split + k, 1]]) for k in (0, 1))
    assert np.abs(one - other).max() < 6
    truth = srgb(solid_texture(torch.from_numpy(mesh.vertices[by_vertex[split, 0]])))
    assert np.abs(one - truth).max() < 6


def test_charts_of_opposite_colour_do_not_bleed_under_bilinear_filtering():
    """Two far bodies, black and white: no lookup on either sees anything but its own colour."""
    mesh = laid_out(join(torus(n=24, m=12), moved(sphere(n=16, m=8), (5, 0, 0))), 128)
    texture = bake(mesh, lambda p: (p[:, :1] > 2.5).float().expand(-1, 3), 128)
    points, uv = surface_samples(mesh)
    np.testing.assert_array_equal(look_up(texture, uv), np.where(points[:, :1] > 2.5, 255, 0) * np.ones(3))


def test_mip_maps_see_no_background():
    mesh = laid_out(torus(), 256)
    texture = bake(mesh, lambda p: torch.full_like(p, 0.5), 256)
    assert (texture == 188).all()  # linear 0.5 in sRGB, in every texel of every level
    wild = bake(mesh, solid_texture, 256)
    texel, _, _ = texel_points(mesh.uv, mesh.uv_faces, 256)
    covered = wild.reshape(-1, 3)[texel]
    assert (wild.reshape(-1, 3).min(0) >= covered.min(0)).all() and (wild.reshape(-1, 3).max(0) <= covered.max(0)).all()


def test_texture_rows_run_downwards():
    quad = make([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    quad = replace(quad, uv=quad.vertices[:, :2].copy(), uv_faces=quad.faces)
    texture = bake(quad, lambda p: torch.stack([p[:, 0], p[:, 1], 0 * p[:, 0]], -1), 4)
    expected = srgb(torch.tensor([0.125, 0.375, 0.625, 0.875])).round().astype(int)
    np.testing.assert_array_equal(texture[0, :, 0], expected)  # left to right: u
    np.testing.assert_array_equal(texture[::-1, 1, 1], expected)  # bottom to top: v


def test_each_texel_shows_the_point_under_it():
    mesh = laid_out(tetrahedron(), 64)
    texel, face, weights = texel_points(mesh.uv, mesh.uv_faces, 64)
    assert len(np.unique(texel)) == len(texel) and weights.min() >= 0
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    uv = np.einsum("nc,nck->nk", weights, mesh.uv[mesh.uv_faces[face]])
    centre = np.stack([texel % 64 + 0.5, 64 - (texel // 64 + 0.5)], -1) / 64
    assert np.linalg.norm((uv - centre) * 64, axis=1).max() <= 1.5 + 1e-4
    assert (np.linalg.norm((uv - centre) * 64, axis=1) < 1e-3).mean() > 0.7


def test_push_pull_keeps_what_is_there_and_fills_with_means():
    image = np.zeros((5, 7, 1), np.float32)
    filled = np.zeros((5, 7), bool)
    image[0, 0], image[4, 6] = 1, 3
    filled[0, 0] = filled[4, 6] = True
    result = push_pull(image, filled)
    assert result[0, 0] == 1 and result[4, 6] == 3 and result.min() >= 1 and result.max() <= 3
    assert result[1, 1] == 1 and result[0, 6] == pytest.approx(2)


def test_vertex_colours_bake_as_interpolated():
    mesh = laid_out(sphere(n=96, m=48), 512)
    mesh = replace(mesh, colours=solid_texture(torch.from_numpy(mesh.vertices)).numpy())
    texture = bake_vertex_colours(mesh, 512)
    points, uv = surface_samples(mesh)
    error = np.abs(look_up(texture, uv) - srgb(solid_texture(torch.from_numpy(points).float())))
    assert error.mean() < 1 and error.max() < 8


def test_field_is_asked_in_chunks_without_gradients():
    sizes = []

    def field(points):
        assert not torch.is_grad_enabled()
        sizes.append(len(points))
        return points

    result = evaluate(field, np.zeros((200_000, 3)))
    assert sum(sizes) == 200_000 and max(sizes) <= 65536 and result.shape == (200_000, 3)


def test_a_field_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"albedo: wanted shape \[8, 3\], got \[8\]"):
        evaluate(lambda p: p[:, 0], box().vertices)


def test_few_broken_colours_are_filled_and_many_refused(caplog):
    mesh = laid_out(sphere(), 256)

    def blemished(points):
        return torch.where(points[:, 1:2] > 0.695, torch.nan, 0.5).expand(-1, 3)

    with caplog.at_level(logging.WARNING):
        assert (bake(mesh, blemished, 256) == 188).all()
    assert "without a finite colour" in caplog.text
    with pytest.raises(UserError, match="not finite"):
        bake(mesh, lambda p: torch.full_like(p, torch.nan), 256)


@pytest.mark.slow
def test_finalised_mesh_is_ready_and_says_what_was_done():
    crumbs = moved(tetrahedron(), (0.9, 0.9, 0.9), 0.05)
    notes: dict = {}
    result = finalise(
        join(noisy_blob(32), crumbs), solid_texture, ExportSettings(faces=3000, texture_size=256), notes=notes
    )
    assert notes["report"].solid and notes["report"].components == 1 and 2990 <= len(result.faces) <= 3000
    assert result.texture.shape == (256, 256, 3) and result.uv_faces.shape == result.faces.shape
    assert set(notes["times"]) == {"clean", "decimate", "unwrap", "bake"} and notes["unwrap"] in ("xatlas", "boxes")
    points, uv = surface_samples(result)
    error = np.abs(look_up(result.texture, uv) - srgb(solid_texture(torch.from_numpy(points).float())))
    assert error.mean() < 2 and np.percentile(error, 99) < 8
    np.testing.assert_allclose(result.colours, solid_texture(torch.from_numpy(result.vertices)).numpy(), atol=1e-6)


def test_finalise_without_a_field_takes_vertex_colours_or_grey():
    settings = ExportSettings(texture_size=64, unwrap="boxes")
    assert (finalise(box(), None, settings).texture == 188).all()
    red = replace(box(), colours=np.tile(np.array([[1, 0, 0]], np.float32), (8, 1)))
    assert (finalise(red, None, settings).texture == [255, 0, 0]).all()


@pytest.mark.slow
def test_finalise_is_deterministic():
    settings = ExportSettings(faces=1500, texture_size=128)
    one, other = (finalise(noisy_blob(20), solid_texture, settings) for _ in range(2))
    for name in ("vertices", "faces", "uv", "uv_faces", "texture", "colours"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_finalise_refuses_nothing_with_advice():
    with pytest.raises(UserError, match="no faces"):
        finalise(make(np.zeros((0, 3)), np.zeros((0, 3))), solid_texture, ExportSettings())


@pytest.mark.slow
def test_xatlas_layout_bakes_as_well():
    mesh = noisy_blob(20)
    atlas = unwrap(mesh, 512)
    mesh = replace(mesh, uv=atlas.uv, uv_faces=atlas.uv_faces)
    texture = bake(mesh, solid_texture, 512)
    points, uv = surface_samples(mesh)
    error = np.abs(look_up(texture, uv) - srgb(solid_texture(torch.from_numpy(points).float())))
    assert error.mean() < 0.6 and np.percentile(error, 99.9) < 5
    picture = Image.fromarray(texture).resize((64, 64), Image.Resampling.BOX)
    error = np.abs(look_up(np.asarray(picture), uv) - srgb(solid_texture(torch.from_numpy(points).float())))
    assert error.mean() < 6  # three mip levels up


def test_borders_are_where_the_charts_end():
    mesh = laid_out(box(), 64)
    edges = edges_of(mesh.uv_faces)
    assert (edges.count == 1).sum() == 24 and (edges.count == 2).sum() == 6
