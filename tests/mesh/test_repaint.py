"""A mesh that keeps its faces and its layout while its texture is made anew."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.mesh import Mesh
from stages.mesh.sample import colours_at, points_at, surface_samples
from stages.mesh.texture.repaint import repaint
from stages.mesh.texture.uv import unwrap
from tests.mesh.mesh_shapes import box, make, sphere

SIZE = 128


def field(points):
    return 0.5 + 0.4 * torch.sin(2 * points + torch.tensor([0.0, 1.0, 2.0]))


def in_charts(mesh: Mesh) -> Mesh:
    """As a GLB holds it: vertices repeated along the seams of a layout, one index for both."""
    atlas = unwrap(mesh, SIZE, method="boxes")
    pairs, corner = np.unique(
        np.stack([mesh.faces.reshape(-1), atlas.uv_faces.reshape(-1)], -1), axis=0, return_inverse=True
    )
    faces = corner.reshape(-1, 3).astype(np.int32)
    return replace(make(mesh.vertices[pairs[:, 0]], faces), uv=atlas.uv[pairs[:, 1]], uv_faces=faces)


def shown_error(mesh: Mesh) -> float:
    """Mean difference between what the texture shows on the surface and the field."""
    face, weights = surface_samples(mesh, 2000, torch.Generator().manual_seed(0))
    expected = field(torch.from_numpy(points_at(mesh, face, weights)).float())
    return float((colours_at(mesh, face, weights) - expected).abs().mean())


def test_own_faces_and_own_layout_are_kept_to_the_bit():
    charted = in_charts(sphere(0.7, 24, 12))
    before = {k: v.copy() for k, v in vars(charted).items() if v is not None}
    notes = {}
    result = repaint(charted, field, SIZE, notes=notes)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(result, name), value)
        np.testing.assert_array_equal(getattr(charted, name), value)
    assert notes["unwrap"] == "own" and notes["note"] == "" and notes["charts"] >= 6
    assert 0.2 < notes["coverage"] < 1 and {"clean", "unwrap", "bake"} <= notes["times"].keys()
    assert result.texture.shape == (SIZE, SIZE, 3) and shown_error(result) < 0.02


def test_normals_do_not_show_the_seams():
    charted = in_charts(sphere(0.7, 24, 12))
    result = repaint(charted, field, 32)
    radial = charted.vertices / np.linalg.norm(charted.vertices, axis=1, keepdims=True)
    assert (result.vertex_normals() * radial).sum(1).min() > 0.99
    assert (charted.vertex_normals() * radial).sum(1).min() < 0.99  # as they would be without


def test_a_mesh_without_a_layout_gets_one():
    cube, notes = box(), {}
    result = repaint(cube, field, SIZE, method="boxes", notes=notes)
    np.testing.assert_array_equal(result.vertices, cube.vertices)
    np.testing.assert_array_equal(result.faces, cube.faces)
    assert notes["unwrap"] == "boxes" and shown_error(result) < 0.02


def test_a_layout_that_shows_texels_twice_is_replaced_unless_it_must_stay():
    ball = sphere(0.7, 24, 12)
    mirrored = replace(ball, uv=np.abs(ball.vertices[:, :2]) * 0.9 / 0.7, uv_faces=ball.faces)
    mirrored.uv = mirrored.uv.astype(np.float32)
    notes = {}
    result = repaint(mirrored, field, SIZE, method="boxes", notes=notes)
    assert notes["unwrap"] == "boxes" and "export.own_uv=always" in notes["note"] and shown_error(result) < 0.02
    rest = repaint(mirrored, field, SIZE, own_uv="always", notes=notes)
    np.testing.assert_array_equal(rest.uv, mirrored.uv)
    assert notes["unwrap"] == "own" and "overlap" in notes["note"]


def test_a_palette_layout_cannot_carry_a_texture_even_if_it_must():
    cube = box()
    palette = replace(cube, uv=np.full((1, 2), 0.25, np.float32), uv_faces=np.zeros_like(cube.faces))
    for own_uv in ("auto", "always"):
        notes = {}
        result = repaint(palette, field, SIZE, method="boxes", own_uv=own_uv, notes=notes)
        assert notes["unwrap"] == "boxes" and shown_error(result) < 0.02


def test_a_good_layout_can_be_replaced_on_request():
    notes = {}
    result = repaint(in_charts(box()), field, SIZE, own_uv="never", method="boxes", notes=notes)
    assert notes["unwrap"] == "boxes" and notes["note"] == "" and shown_error(result) < 0.02


def test_an_open_mesh_with_unused_vertices_and_inward_faces_is_painted_as_it_is():
    sheet = make([[9, 9, 9], [-0.5, 0, 0], [0.5, 0, 0], [0.5, 0.8, 0], [-0.5, 0.8, 0]], [[1, 3, 2], [1, 4, 3]])
    result = repaint(sheet, field, SIZE, method="boxes")
    np.testing.assert_array_equal(result.faces, sheet.faces)
    np.testing.assert_array_equal(result.vertices, sheet.vertices)
    assert shown_error(result) < 0.02


def test_damaged_meshes_and_broken_fields_are_refused():
    with pytest.raises(UserError, match="empty"):
        repaint(make(np.zeros((0, 3)), np.zeros((0, 3))), field, SIZE)
    with pytest.raises(UserError, match="could not be baked"):
        repaint(box(), lambda p: torch.full_like(p, float("nan")), SIZE, method="boxes")


def test_colours_are_the_fields():
    cube = box()
    result = repaint(cube, field, SIZE, method="boxes")
    np.testing.assert_allclose(result.colours, field(torch.from_numpy(cube.vertices)), atol=1e-6)
    assert srgb_to_linear(torch.from_numpy(result.texture / 255.0)).max() <= 0.92
