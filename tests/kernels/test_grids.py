"""Placed grids along rays: closed forms, the compiled kernel against its twin, gradients against finite differences."""

import math

import pytest
import torch

from stages.cameras import CameraSettings, rays, sample_views
from stages.kernels.grids import composite_grids
from stages.kernels.reference.grids import CHANNELS, CLEAR, DENSITY, EXTENT, activated

BACKENDS = ["torch", "numba"]
ALONE = [1.0, 0.0, 0.0, 0.0]


def solid(raw: float, side: int = 4) -> torch.Tensor:
    """One grid of one raw density everywhere, albedo (.1, .2, .3), normal (0, 0, 1)."""
    cell = torch.tensor([raw, 0.1, 0.2, 0.3, 0.0, 0.0, 1.0, 0.0])
    return cell.expand(1, side, side, side, CHANNELS).contiguous()


def ahead(x: float = 0.0, y: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """One ray of one view from z = 3 along -z through (x, y)."""
    return torch.tensor([[[x, y, 3.0]]]), torch.tensor([[[0.0, 0.0, -1.0]]])


def scene(seed: int, dtype: torch.dtype = torch.float32, side: int = 6, pixels: int = 7) -> tuple:
    """Three random grids seen alone and in pairs that overlap, by four cameras."""
    g = torch.Generator().manual_seed(seed)
    grids = torch.randn(3, side, side, side, CHANNELS, generator=g, dtype=dtype)
    grids[..., 0] *= 3
    origins, directions = (
        r.flatten(1, 2).to(dtype) for r in rays(sample_views(CameraSettings(), 4, g), pixels, pixels)
    )
    index = torch.tensor([[0, -1], [1, 2], [2, 0], [1, -1]], dtype=torch.int32)
    pair = [[0.5, -0.3, 0.0, 0.1], [0.6, 0.3, 0.1, 0.0]]
    placement = torch.tensor([[ALONE, ALONE], pair, pair, [ALONE, ALONE]], dtype=dtype)
    jitter = torch.rand(origins.shape[:2], generator=g, dtype=dtype)
    return grids, index, placement, origins.contiguous(), directions.contiguous(), jitter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [-3.0, -1.0, 0.5])
def test_opacity_of_an_even_block_is_one_minus_exp_of_its_depth(backend, raw):
    origins, directions = ahead()
    index, placement = torch.tensor([[0]], dtype=torch.int32), torch.tensor([[ALONE]])
    sums = composite_grids(solid(raw), index, placement, origins, directions, steps=64, backend=backend)[0, 0]
    density = math.exp(raw) if raw < 0 else 1 + raw
    opacity = 1 - math.exp(-DENSITY * 2 * EXTENT * density)
    assert sums[6] == pytest.approx(opacity, abs=2 * CLEAR)
    torch.testing.assert_close(sums[:6] / sums[6], torch.tensor([0.1, 0.2, 0.3, 0.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    assert 3 - EXTENT < sums[7] / sums[6] < 3  # the near half of the block


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_object_is_as_opaque_as_a_large_one_and_stands_where_it_is_placed(backend):
    index = torch.tensor([[0]], dtype=torch.int32)
    large, small = torch.tensor([[ALONE]]), torch.tensor([[[0.25, 0.5, 0.0, 0.0]]])
    through = composite_grids(solid(-3.0), index, large, *ahead(), steps=64, backend=backend)[0, 0]
    beside = composite_grids(solid(-3.0), index, small, *ahead(0.5), steps=64, backend=backend)[0, 0]
    past = composite_grids(solid(-3.0), index, small, *ahead(0.2), steps=64, backend=backend)[0, 0]
    torch.testing.assert_close(through[:7], beside[:7], atol=1e-4, rtol=0)
    assert torch.equal(past, torch.zeros(CHANNELS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_objects_overlap_colours_mix_by_density(backend):
    grids = torch.cat([solid(0.0), solid(1.0)])  # densities 1 and 2
    grids[1, ..., 1:4] = 0.9
    index, placement = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[ALONE, ALONE]])
    sums = composite_grids(grids, index, placement, *ahead(), steps=16, backend=backend)[0, 0]
    expected = (torch.tensor([0.1, 0.2, 0.3]) + 2 * 0.9) / 3
    torch.testing.assert_close(sums[:3] / sums[6], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cubes_corner_is_as_empty_beside_another_object_as_alone(backend):
    index = torch.tensor([[0, 1]], dtype=torch.int32)
    placement = torch.tensor([[[0.5, -0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]])
    grids = torch.cat([solid(0.5), solid(-20.0)])
    corner = (-0.5 + 0.5 * 0.85 * EXTENT, 0.5 * 0.85 * EXTENT)  # in the cube, not in its ball
    origins = torch.tensor([[[corner[0], corner[1], 3.0], [3.0, corner[1], 0.0]]])
    directions = torch.tensor([[[0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]]])
    sums = composite_grids(grids, index, placement, origins, directions, steps=64, backend=backend)[0]
    assert sums[0, 6] == 0 and sums[1, 6] > 0.9  # the second ray meets the ball's side on its way


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_seen_of_an_absent_object_or_past_the_camera(backend):
    index, placement = torch.tensor([[-1, -1]], dtype=torch.int32), torch.tensor([[ALONE, ALONE]])
    assert not composite_grids(solid(2.0), index, placement, *ahead(), steps=8, backend=backend).any()
    origins, directions = ahead()
    here = torch.tensor([[0, -1]], dtype=torch.int32)
    assert not composite_grids(solid(2.0), here, placement, origins, -directions, steps=8, backend=backend).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_compiled_kernel_and_its_gradient_are_those_of_the_twin(seed):
    grids, index, placement, origins, directions, jitter = scene(seed)
    weights = torch.randn(*origins.shape[:2], CHANNELS, generator=torch.Generator().manual_seed(seed))
    results = []
    for backend in BACKENDS:
        leaf = grids.clone().requires_grad_()
        options = {"steps": 12, "jitter": jitter, "backend": backend}
        sums = composite_grids(leaf, index, placement, origins, directions, **options)
        (sums * weights).sum().backward()
        results.append((sums.detach(), leaf.grad))
    (a, da), (b, db) = results
    assert a[..., 6].max() > 0.9 and (a[..., 6] == 0).any()  # rays that hit and rays that miss
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)  # a sample on a cell's rim may fall to either side
    assert (a - b).abs().mean() < 1e-5 and (da - db).abs().mean() < 1e-5 and da.abs().max() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_where_empty_blocks_are_skipped(seed):
    grids, index, placement, origins, directions, jitter = scene(seed, side=18, pixels=15)
    keep = torch.zeros(3, 18, 18, 18, dtype=torch.bool)
    for x, y, z in torch.randint(1, 17, (6, 3), generator=torch.Generator().manual_seed(seed)).tolist():
        keep[:, x : x + 2, y : y + 2, z] = True
    grids[..., 0] = torch.where(keep, grids[..., 0].abs() + 30, -20.0)
    options = {"steps": 24, "jitter": jitter}
    a, b = (composite_grids(grids, index, placement, origins, directions, backend=k, **options) for k in BACKENDS)
    assert (a[0, :, 6] > 0.5).any() and (a[0, :, 6] == 0).float().mean() > 0.5
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert (a - b).abs().mean() < 1e-5


@pytest.mark.slow
def test_the_twins_gradient_is_that_of_finite_differences():
    grids, index, placement, origins, directions, jitter = scene(3, torch.float64, side=2, pixels=3)

    def composite(cells: torch.Tensor) -> torch.Tensor:
        options = {"steps": 5, "jitter": jitter, "backend": "torch"}
        return composite_grids(cells, index, placement, origins, directions, **options)

    assert torch.autograd.gradcheck(composite, (0.2 * grids).requires_grad_(), atol=1e-5)


def test_activation_is_smooth_and_ends():
    raw = torch.tensor([-20.0, -8.0, 0.0, 3.0], dtype=torch.float64)
    expected = torch.tensor([0.0, math.exp(-8), 1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(activated(raw), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ray_that_is_not_finite_ends_and_leaves_the_others_alone(backend):
    grids, index, placement, origins, directions, jitter = scene(1)
    options = {"steps": 8, "jitter": jitter, "backend": backend}
    clean_sums = composite_grids(grids, index, placement, origins, directions, **options)
    origins[0, 3], directions[1, 5] = math.nan, math.inf
    sums = composite_grids(grids, index, placement, origins, directions, **options)
    same = torch.ones(origins.shape[:2], dtype=torch.bool)
    same[0, 3] = same[1, 5] = False
    torch.testing.assert_close(sums[same], clean_sums[same])


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("index", torch.zeros(3, 2, dtype=torch.int32)),
        ("placement", torch.zeros(4, 2, 3)),
        ("jitter", torch.zeros(4, 1)),
    ],
)
def test_wrong_shapes_are_refused_by_name(name, wrong):
    grids, index, placement, origins, directions, jitter = scene(0)
    parts = {"index": index, "placement": placement, "jitter": jitter} | {name: wrong}
    with pytest.raises(ValueError, match="placement|jitter|origins"):
        composite_grids(grids, parts["index"], parts["placement"], origins, directions, steps=8, jitter=parts["jitter"])
