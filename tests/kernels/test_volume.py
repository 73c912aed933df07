"""Marching and compositing: closed forms, a slow loop as reference, finite differences, twin against numba."""

import math

import pytest
import torch

from stages.kernels.volume import Samples, composite, cull, march

BACKENDS = ["torch", "numba"]


def packed(counts: list[int], seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    n = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    t = torch.rand(n, generator=g).to(dtype).sort().values + 1
    samples = Samples(t, 0.02 + 0.1 * torch.rand(n, generator=g).to(dtype), offsets)
    return 5 * torch.rand(n, generator=g).to(dtype), torch.rand(n, 4, generator=g).to(dtype), samples


@pytest.mark.parametrize("backend", BACKENDS)
def test_composite_of_opaque_first_sample_is_its_colour(backend):
    _, values, samples = packed([5, 0, 3])
    sigmas = torch.tensor([1e4, 3, 3, 3, 3, 1e4, 9, 9])
    out, weights, opacity, depth = composite(sigmas, values, samples, backend=backend)
    assert torch.allclose(out[[0, 2]], values[[0, 5]])
    assert torch.equal(weights, torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 0]))
    assert torch.allclose(opacity, torch.tensor([1.0, 0, 1]))
    assert torch.allclose(depth, torch.stack([samples.t[0], torch.zeros(()), samples.t[5]]))
    assert not out[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_density_transmits_exp_of_minus_sigma_length(backend):
    sigma, length, n = 1.7, 0.8, 40
    samples = Samples(torch.linspace(1, 2, n), torch.full((n,), length / n), torch.tensor([0, n]))
    _, weights, opacity, _ = composite(torch.full((n,), sigma), torch.ones(n, 1), samples, backend=backend)
    assert float(1 - opacity) == pytest.approx(math.exp(-sigma * length), rel=1e-5)
    assert torch.allclose(weights[1:] / weights[:-1], torch.tensor(math.exp(-sigma * length / n)), rtol=1e-4)


def slow_composite(sigmas, values, samples):
    """The definition, one sample after another."""
    rays = []
    for low, high in samples.ray_offsets.unfold(0, 2, 1).tolist():
        light, out, opacity, depth = torch.ones((), dtype=sigmas.dtype), torch.zeros(4, dtype=sigmas.dtype), 0.0, 0.0
        for i in range(low, high):
            w = light * (1 - torch.exp(-sigmas[i] * samples.delta[i]))
            light = light * torch.exp(-sigmas[i] * samples.delta[i])
            out, opacity, depth = out + w * values[i], opacity + w, depth + w * samples.t[i]
        rays.append(torch.cat([out, torch.stack([torch.as_tensor(v, dtype=out.dtype) for v in (opacity, depth)])]))
    return torch.stack(rays)


@pytest.mark.parametrize("backend", BACKENDS)
def test_composite_is_the_slow_loop_in_values_and_gradients(backend):
    sigmas, values, samples = packed([4, 0, 1, 300, 7])
    g = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for fast in (True, False):
        s, v = sigmas.clone().requires_grad_(), values.clone().requires_grad_()
        if fast:
            out, _, opacity, depth = composite(s, v, samples, backend=backend)
            table = torch.cat([out, opacity[:, None], depth[:, None]], 1)
        else:
            table = slow_composite(s, v, samples)
        (table * g).sum().backward()
        results.append((table, s.grad, v.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-6)


def test_twin_is_differentiable_in_float64_and_numba_agrees_on_the_gradient_through_weights():
    sigmas, values, samples = packed([3, 2], dtype=torch.float64)
    arguments = (sigmas.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, v: composite(s, v, samples), arguments)
    sigmas, values, samples = packed([30, 1, 0, 50])
    expected = []
    for backend in BACKENDS:
        s = sigmas.clone().requires_grad_()
        (composite(s, values, samples, backend=backend)[1] * samples.t.sin()).sum().backward()
        expected.append(s.grad)
    assert torch.allclose(*expected, rtol=1e-4, atol=1e-6)


def scene(rays: int = 400, cells: int = 16):
    g = torch.Generator().manual_seed(2)
    o = 3 * torch.nn.functional.normalize(torch.randn(rays, 3, generator=g), dim=-1)
    d = torch.nn.functional.normalize(0.7 * torch.randn(rays, 3, generator=g) - o, dim=-1)
    return o, d, torch.rand(cells, cells, cells, generator=g) < 0.2, torch.rand(rays, generator=g)


def test_march_in_numba_is_its_twin():
    o, d, cells, jitter = scene()
    cells = cells.to(torch.uint8) + (torch.rand(cells.shape, generator=torch.Generator().manual_seed(3)) < 0.1) * cells
    assert cells.unique().tolist() == [0, 1, 2]
    a, b = (march(o, d, cells, 0.03, jitter, thin_stride=3, backend=backend) for backend in BACKENDS)
    assert len(b) > 1000
    # a sample within float rounding of a cell wall may fall on either side
    assert (a.counts != b.counts).float().mean() < 0.01
    same = a.counts == b.counts
    assert torch.allclose(a.t[same[a.rays]], b.t[same[b.rays]], atol=1e-5)
    assert torch.allclose(a.delta[same[a.rays]], b.delta[same[b.rays]]) and len(b.delta.unique()) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_thin_cells_are_stepped_coarsely_with_the_same_mean_length(backend):
    rays = 4000
    o, d = torch.tensor([[0.1, 0.2, 3.0]]).expand(rays, 3), torch.tensor([[0.0, 0.0, -1.0]]).expand(rays, 3)
    cells = torch.ones(8, 8, 8, dtype=torch.uint8)
    cells[:, :, 2:5] = 2  # 0.75 of the length of 2
    jitter = torch.rand(rays, generator=torch.Generator().manual_seed(0))
    samples = march(o, d, cells, 0.05, jitter, thin_stride=4, backend=backend)
    thin = samples.delta > 0.1
    assert torch.allclose(samples.delta[thin], torch.tensor(0.2))
    length = [float(samples.delta[chosen].sum()) / rays for chosen in (thin, ~thin)]
    assert length == pytest.approx([0.75, 1.25], abs=0.01)
    z = 3 - samples.t[thin]
    assert float(z.min()) > -0.5001 and float(z.max()) < 0.2501
    everywhere = march(o, d, cells, 0.05, jitter, backend=backend)
    assert len(everywhere) == rays * 40 and torch.allclose(everywhere.delta, torch.tensor(0.05))


@pytest.mark.parametrize("backend", BACKENDS)
def test_march_through_a_full_box_covers_the_chord_and_through_an_empty_one_nothing(backend):
    o, d = torch.tensor([[0.0, 0.0, 3.0], [0.0, 5.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, -1.0]])
    full = torch.ones(8, 8, 8, dtype=torch.uint8)
    samples = march(o, d, full, 0.1, torch.full((2,), 0.5), backend=backend)
    assert samples.ray_offsets.tolist() == [0, 20, 20]  # the second ray passes above the box
    assert torch.allclose(samples.t, 2.05 + 0.1 * torch.arange(20), atol=1e-5)
    assert float(samples.delta.sum()) == pytest.approx(2.0, abs=1e-4)
    assert samples.rays.tolist() == [0] * 20
    assert len(march(o, d, 0 * full, 0.1, torch.zeros(2), backend=backend)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_march_indexes_the_grid_as_x_y_z(backend):
    cells = torch.zeros(8, 8, 8, dtype=torch.uint8)
    cells[6, 1, 3] = 1
    o = torch.tensor([[0.625, -0.625, 3.0]])
    samples = march(o, torch.tensor([[0.0, 0.0, -1.0]]), cells, 0.01, torch.zeros(1), backend=backend)
    z = 3 - samples.t
    assert len(samples) in (24, 25, 26) and float(z.min()) > -0.2501 and float(z.max()) < 0.0001


@pytest.mark.parametrize("backend", BACKENDS)
def test_cull_keeps_the_samples_in_front_of_the_point_where_light_runs_out(backend):
    sigmas, values, samples = packed([40, 0, 25, 3])
    index, survivors = cull(20 * sigmas, samples, 1e-2, backend=backend)
    for ray, (low, high) in enumerate(samples.ray_offsets.unfold(0, 2, 1).tolist()):
        depth = (20 * sigmas * samples.delta)[low:high]
        expected = [i for i in range(low, high) if math.exp(-float(depth[: i - low].sum())) >= 1e-2]
        assert index[survivors.ray_offsets[ray] : survivors.ray_offsets[ray + 1]].tolist() == expected
    assert torch.equal(survivors.t, samples.t[index]) and len(survivors) < len(samples)
    full = composite(20 * sigmas, values, samples)[0]
    assert (composite(20 * sigmas[index], values[index], survivors)[0] - full).abs().max() < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_cull_drops_faint_samples_wherever_they_are(backend):
    sigmas = torch.tensor([0.001, 2.0, 0.0, 0.5, 0.002, 3.0])
    samples = Samples(torch.arange(6.0), torch.full((6,), 0.1), torch.tensor([0, 4, 4, 6]))
    index, survivors = cull(sigmas, samples, 0.0, 1e-3, backend=backend)
    assert index.tolist() == [1, 3, 5] and survivors.ray_offsets.tolist() == [0, 2, 2, 3]
    assert survivors.rays.tolist() == [0, 0, 2]


def test_no_samples_at_all_composite_to_zero():
    empty = Samples(torch.zeros(0), torch.zeros(0), torch.zeros(4, dtype=torch.int64))
    for backend in BACKENDS:
        sigmas = torch.zeros(0, requires_grad=True)
        out, _, opacity, _ = composite(sigmas, torch.zeros(0, 3), empty, backend=backend)
        (out.sum() + opacity.sum()).backward()
        assert cull(sigmas, empty, 1e-3, backend=backend)[0].shape == (0,)
        assert out.shape == (3, 3) and not opacity.any() and sigmas.grad.shape == (0,)
