"""Shading formula and the random mix of shadings."""

import pytest
import torch

from stages.render.shade import ALBEDO, TEXTURELESS_ALBEDO, Shading, ShadingSettings, sample_shading, shade


def draw(count, share=0.9, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return [sample_shading(ShadingSettings(**settings), share, generator) for _ in range(count)]


def test_shade_is_ambient_plus_diffuse_times_the_cosine():
    albedo, origin = torch.tensor([[0.5, 0.25, 1.0]]), torch.zeros(1, 3)
    normal, light = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 4.0]])  # cosine 0.8
    got = shade(albedo, normal, origin, light, Shading(0.1, 0.9))
    torch.testing.assert_close(got, albedo * (0.1 + 0.9 * 0.8))
    away = shade(albedo, -normal, origin, light, Shading(0.1, 0.9))
    torch.testing.assert_close(away, albedo * 0.1)


def test_light_direction_is_taken_from_each_point():
    points = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    normals = torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3)
    got = shade(torch.ones(2, 3), normals, points, torch.tensor([0.0, 0.0, 4.0]), Shading(0.0, 1.0))
    torch.testing.assert_close(got[:, 0], torch.tensor([1.0, 0.8]))


def test_plain_albedo_is_the_albedo_and_ignores_the_normal():
    albedo, normals = torch.rand(5, 3), torch.randn(5, 3, requires_grad=True)
    got = shade(albedo, normals, torch.rand(5, 3), torch.zeros(3), ALBEDO)
    assert torch.equal(got, albedo) and not got.requires_grad


def test_textureless_is_grey_with_a_gradient_to_normals_only():
    g = torch.Generator().manual_seed(0)
    albedo = torch.rand(5, 3, generator=g, requires_grad=True)
    normals = torch.randn(5, 3, generator=g, requires_grad=True)
    got = shade(albedo, normals, torch.zeros(5, 3), torch.ones(3), Shading(0.2, 0.8, True))
    assert torch.equal(got[:, 0], got[:, 2])
    assert got.max() <= TEXTURELESS_ALBEDO * (0.2 + 0.8 * normals.norm(dim=1).max())
    got.sum().backward()
    assert albedo.grad is None and normals.grad.abs().sum() > 0


def test_shade_gradients_match_finite_differences():
    g = torch.Generator().manual_seed(0)
    tensors = [torch.rand(4, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda a, n, p, light: shade(a, n, p, light + 2, Shading(0.3, 0.7)), tensors)


def test_first_steps_are_albedo_only():
    assert all(s == ALBEDO for s in draw(50, share=0.74, albedo_until=0.75))
    assert any(s != ALBEDO for s in draw(50, share=0.75, albedo_until=0.75))
    assert all(s == ALBEDO for s in draw(50, share=0.999, albedo_until=1))


def test_later_steps_follow_the_papers_mix():
    kinds = [s.kind for s in draw(4000)]
    share = {kind: kinds.count(kind) / len(kinds) for kind in ("albedo", "lambert", "textureless")}
    assert share == pytest.approx({"albedo": 0.25, "lambert": 0.375, "textureless": 0.375}, abs=0.03)


def test_ambient_covers_its_range_and_diffuse_is_the_rest():
    shaded = [s for s in draw(2000, ambient=(0.2, 0.6)) if s.kind != "albedo"]
    ambient = torch.tensor([s.ambient for s in shaded])
    assert 0.2 <= ambient.min() < 0.21 and 0.59 < ambient.max() <= 0.6
    torch.testing.assert_close(ambient + torch.tensor([s.diffuse for s in shaded]), torch.ones(len(shaded)))


def test_every_draw_takes_as_much_from_the_generator():
    states = []
    for settings, share in (({}, 0.0), ({}, 0.5), ({"diffuse_probability": 0}, 0.5), ({"ambient": (0.1, 0.1)}, 0.5)):
        generator = torch.Generator().manual_seed(7)
        sample_shading(ShadingSettings(**settings), share, generator)
        states.append(generator.get_state())
    assert all(torch.equal(states[0], s) for s in states)


@pytest.mark.parametrize(
    "bad", [{"ambient": (0.5, 0.1)}, {"ambient": (-0.1, 0.2)}, {"diffuse_probability": 1.5}, {"albedo": 3}]
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ShadingSettings(**bad)
