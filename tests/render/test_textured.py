"""The textured material: colours and bent normals by hand, mirrored charts, gradients against finite differences."""

from __future__ import annotations

import pytest
import torch

from stages.cameras import orbit_views
from stages.kernels.raster import rasterise
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.render.raster import Material, render_mesh
from stages.render.shade import Shading
from stages.render.textured import TextureMaterial, blurred_maps, tangents

QUAD = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
FACES = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
UV = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
FRONT = orbit_views([0.0], 0.0)
Z_UP = torch.tensor([0.0, 0.0, 1.0])


def maps(normal=(0.0, 0.0, 1.0), dtype=torch.float32):
    colour = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return colour, torch.tensor(normal, dtype=dtype).expand(8, 8, 3).contiguous()


def test_the_picture_of_a_flat_square_is_its_texture():
    colour = torch.zeros(2, 2, 3)
    colour[0, 0], colour[0, 1], colour[1, 0] = torch.eye(3)  # red above left, green above right, blue below left
    material = TextureMaterial(QUAD, FACES, UV, FACES, colour)
    assert isinstance(material, Material)
    image = render_mesh(QUAD, FACES, material, orbit_views([0.0], 0.0, 5.0, 40.0), 64, 64)
    assert torch.allclose(image.colour[0, 20, 20], torch.tensor([1.0, 0, 0]), atol=0.02)
    assert torch.allclose(image.colour[0, 20, 43], torch.tensor([0.0, 1, 0]), atol=0.02)
    assert torch.allclose(image.colour[0, 43, 20], torch.tensor([0.0, 0, 1]), atol=0.02)
    middle = linear_to_srgb(image.colour[0, 32, 32])  # the map is in sRGB and interpolated there
    assert torch.allclose(middle, torch.full((3,), 0.25), atol=0.05)


def mirrored(u: float, v: float) -> torch.Tensor:
    return (UV - 0.5) * torch.tensor([u, v]) + 0.5


@pytest.mark.parametrize("uv, signs", [(UV, (1, 1)), (mirrored(-1, 1), (-1, 1)), (mirrored(1, -1), (1, -1))])
def test_normal_map_bends_along_growing_u_and_v_also_in_mirrored_charts(uv, signs):
    colour, normal = maps((0.6, 0.0, 0.8))
    across = maps((0.0, 0.6, 0.8))[1]
    for bent, expected in ((normal, [0.6 * signs[0], 0, 0.8]), (across, [0, 0.6 * signs[1], 0.8])):
        material = TextureMaterial(QUAD, FACES, uv, FACES, colour, bent)
        image = render_mesh(QUAD, FACES, material, orbit_views([0.0], 0.0, 5.0, 40.0), 32, 32)
        assert torch.allclose(image.normal[0, 16, 16], torch.tensor(expected), atol=1e-5)
    sign = tangents(QUAD, FACES, uv, FACES)[1]
    assert torch.equal(sign, torch.full((2,), float(signs[0] * signs[1])))


def test_flat_normal_map_changes_nothing_and_its_length_does_not_matter():
    points = QUAD + torch.tensor([[0, 0, 0.2], [0, 0, 0], [0, 0, -0.3], [0, 0, 0]])
    colour, flat = maps()
    light = Shading(0.2, 0.8)
    plain, mapped, longer = (
        render_mesh(points, FACES, material, FRONT, 24, 24, shading=light)
        for material in (TextureMaterial(points, FACES, UV, FACES, colour, n) for n in (None, flat, 3 * flat))
    )
    assert torch.allclose(plain.colour, mapped.colour, atol=1e-6)
    assert torch.allclose(mapped.colour, longer.colour, atol=1e-6)


def test_a_view_without_the_surface_has_no_pixels_to_colour():
    colour, flat = maps()
    far = QUAD + torch.tensor([0.0, 0, 50.0])
    image = render_mesh(far, FACES, TextureMaterial(far, FACES, UV, FACES, colour, flat), FRONT, 8, 8)
    assert not image.mask.any()


@pytest.mark.slow
def test_gradients_of_maps_and_vertices_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(1)
    points = (QUAD + 0.1 * torch.randn(4, 3, generator=generator)).double()
    colour, _ = maps(dtype=torch.float64)
    normal = (Z_UP + 0.2 * torch.randn(8, 8, 3, generator=generator)).double()
    uv = (0.1 + 0.8 * UV).double()
    clip = torch.cat([0.7 * points, torch.ones(4, 1, dtype=torch.float64)], 1)[None]  # seen square on
    rast = rasterise(clip, FACES, 5, 5, backend="torch").detach()
    covered = (rast[..., 3] > 0).reshape(-1).nonzero()[:, 0]
    normals = torch.randn(len(covered), 3, generator=generator).double() + 4 * Z_UP
    normals = torch.nn.functional.normalize(normals, dim=-1)

    def look(points, colour, normal, normals):
        material = TextureMaterial(points, FACES, uv, FACES, colour, normal, backend="torch")
        return torch.cat(material.at(rast, covered, normals), -1)

    inputs = [t.requires_grad_() for t in (points, 0.2 + 0.6 * colour, normal, normals)]
    assert len(covered) >= 4
    assert torch.autograd.gradcheck(look, inputs, atol=1e-6)


def test_numba_and_torch_agree_on_a_picture_and_its_gradient():
    results = []
    for backend in ("torch", "numba"):
        colour, normal = maps((0.3, 0.1, 0.9))
        points, colour, normal = (t.clone().requires_grad_() for t in (QUAD, colour, normal))
        material = TextureMaterial(points, FACES, UV, FACES, colour, normal, backend=backend)
        image = render_mesh(points, FACES, material, FRONT, 24, 24, shading=Shading(0.3, 0.7), backend=backend)
        (image.colour * torch.arange(24.0)[:, None]).sum().backward()
        results.append((image.colour.detach(), points.grad, colour.grad, normal.grad))
    for twin, fast in zip(*results, strict=True):
        assert torch.allclose(twin, fast, atol=1e-4 * float(twin.abs().max()))


def test_filter_of_the_maps_is_a_gaussian_of_five_texels():
    image = torch.rand(12, 10, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.exp(-0.5 * (torch.arange(-2.0, 3.0, dtype=torch.float64) / 3) ** 2)
    weights = weights / weights.sum()
    render = blurred_maps(image, 5, 3.0)
    assert torch.allclose(render[6, 4], torch.einsum("i,j,ijc->c", weights, weights, image[4:9, 2:7]))
    mirrored = image[[2, 1, 0, 1, 2]][:, 2:7]
    assert torch.allclose(render[0, 4], torch.einsum("i,j,ijc->c", weights, weights, mirrored))
    assert blurred_maps(image, 1, 3.0) is image and blurred_maps(image, 5, 0.0) is image
    assert torch.autograd.gradcheck(lambda m: blurred_maps(m, 3, 1.0), (image[:4, :4].clone().requires_grad_(),))


def test_colours_are_linear():
    colour = torch.full((4, 4, 3), 0.5)
    image = render_mesh(QUAD, FACES, TextureMaterial(QUAD, FACES, UV, FACES, colour), FRONT, 16, 16)
    assert torch.allclose(image.colour[0, 8, 8], srgb_to_linear(torch.full((3,), 0.5)))
