"""A colour field taught what a surface shows."""

import numpy as np
import pytest
import torch

from stages.fields.colour_fit import FitSettings, fit_albedo
from stages.fields.hashfield import FieldSettings, HashField
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.mesh import Mesh
from stages.mesh.sample import colours_at, painted_samples, points_at, surface_samples
from tests.mesh.mesh_shapes import sphere

FIELD = FieldSettings(levels=6, log2_table=12, base=4, finest=64, hidden=16)


def field():
    fitted_field = HashField(FIELD, torch.Generator().manual_seed(0))
    fitted_field.set_progress(1.0)
    return fitted_field


def generator():
    return torch.Generator().manual_seed(1)


def halves() -> Mesh:
    """Red above, blue below, by a texture."""
    mesh = sphere(0.7, 32, 16)
    v = (mesh.vertices[:, 1] / 1.4 + 0.5).clip(0, 1)
    mesh.uv, mesh.uv_faces = np.stack([np.full_like(v, 0.5), v], -1).astype(np.float32), mesh.faces
    mesh.texture = np.zeros((64, 64, 3), np.uint8)
    mesh.texture[:32, :, 0], mesh.texture[32:, :, 2] = 200, 200
    return mesh


@pytest.mark.slow
def test_a_field_learns_a_texture():
    fitted_field = field()
    error = fit_albedo(fitted_field, painted_samples(halves(), generator()), FitSettings(steps=150, points=2048))
    assert error < 0.08
    colours = fitted_field.albedo(torch.tensor([[0.0, 0.6, 0.36], [0.0, -0.6, 0.36]])).detach()
    expected = srgb_to_linear(torch.tensor([[200 / 255, 0, 0], [0, 0, 200 / 255]]))
    torch.testing.assert_close(colours, expected, atol=0.05, rtol=0)


def test_a_plain_mesh_needs_no_training():
    mesh = sphere()
    mesh.colours = np.full_like(mesh.vertices, 0.3)
    fitted_field = field()
    before = {k: v.clone() for k, v in fitted_field.state_dict().items()}
    assert fit_albedo(fitted_field, painted_samples(mesh, generator()), FitSettings()) < 0.01
    changed = [k for k, v in fitted_field.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["albedo_head.b2"]


def test_no_steps_leave_the_field_as_it_is():
    fitted_field = field()
    before = {k: v.clone() for k, v in fitted_field.state_dict().items()}
    fit_albedo(fitted_field, painted_samples(halves(), generator()), FitSettings(steps=0))
    assert all(torch.equal(v, before[k]) for k, v in fitted_field.state_dict().items())


def test_fitting_leaves_no_gradient_behind_and_repeats_with_its_generator():
    fitted_field = [field(), field()]
    for each in fitted_field:
        fit_albedo(each, painted_samples(halves(), generator()), FitSettings(steps=5, points=256))
    assert torch.equal(fitted_field[0].table, fitted_field[1].table)
    assert all(p.grad is None for p in fitted_field[0].parameters())


def test_samples_lie_evenly_on_the_surface_and_colours_are_interpolated():
    mesh = Mesh(
        np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 3]]),
        np.int32([[0, 1, 2], [0, 3, 1]]),
        np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    )
    face, weights = surface_samples(mesh, 4000, generator())
    assert (face == 0).mean() == pytest.approx(0.25, abs=0.01)
    points = points_at(mesh, face, weights)
    np.testing.assert_allclose(points[face == 0].mean(0), [1 / 3, 1 / 3, 0], atol=0.02)
    np.testing.assert_allclose(colours_at(mesh, face, weights)[:, :2], points[:, :2], atol=1e-6)
    np.testing.assert_allclose(colours_at(mesh, face, weights)[:, 2] * 3, points[:, 2], atol=1e-6)


def test_a_mesh_without_colours_is_grey():
    face, weights = surface_samples(sphere(), 10, generator())
    assert (colours_at(Mesh(sphere().vertices, sphere().faces), face, weights) == 0.5).all()
