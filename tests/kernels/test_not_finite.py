"""What is not finite stays visible, comes to an end and reads no memory but its own; the same in every backend, and in
the torch twins."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels.density import hash_density
from stages.kernels.hashgrid import hash_encode, hash_gradient
from stages.kernels.mlp import mlp
from stages.kernels.volume import Samples, composite, cull, march
from tests.kernels.field_cases import EVERY, SMALL, SPECS, backends, head, problem

every = backends(*EVERY)


def test_a_ray_without_direction_or_not_finite_gets_no_samples_and_does_not_hang(every):
    """Inside the box such a ray has no far end; without a guard it would take 1e12 steps, or never stop."""
    backend, device = every
    nan, inf = float("nan"), float("inf")
    o = torch.tensor([[0.0, 0, 0]] * 6 + [[nan, 0, 0], [nan] * 3, [0, inf, 0], [-inf] * 3]).to(device)
    d = torch.tensor([[0.0, 0, 0], [5e-7, 0, 0], [nan, 0, 0], [0, inf, 0], [nan] * 3] + [[0.0, 0, 1]] * 5).to(device)
    full, jitter = torch.ones(4, 4, 4, dtype=torch.uint8, device=device), torch.full((10,), 0.5, device=device)
    for step_size in (1e9, 0.1):  # the first would end even so
        actual = march(o, d, full, step_size, jitter, backend=backend)
        assert actual.counts.tolist() == [0] * 5 + [10 if step_size < 1 else 0] + [0] * 4
    slow = march(o[5:6], 0.5 * d[5:6], full, 0.1, jitter[:1], backend=backend)
    assert len(slow) == 20  # the guard leaves a direction that is not a unit vector alone
    away = 10.0 ** torch.arange(2, 39, device=device).clamp(max=38)[:, None] * -d[5:6] + o[:1]  # and rounding aside
    count = march(away, d[5:6].expand_as(away), full, 0.1, jitter[:1].expand(37), backend=backend).counts
    assert count[:3].tolist() == [20, 20, 20] and count.max() <= 36  # no more than along the diagonal


BROKEN = [[v if axis == k else 0.3 for k in range(3)] for axis in range(3) for v in (float("nan"), float("inf"))]
BROKEN += [[float("-inf")] * 3, [float("nan")] * 3, [float("inf"), 2.0, -1.0]]


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_made_of_a_point_that_is_not_finite_is_nan_and_of_the_others_as_ever(spec, every):
    backend, device = every
    points, table, g, up = problem(40, device, spec)
    points[0], points[1] = torch.tensor([3.4e38] * 3), torch.tensor([-3.4e38, 0.5, 3.4e38])  # huge is not infinite
    bad = torch.zeros(40, dtype=torch.bool, device=device)
    bad[2 : 2 + len(BROKEN)] = True
    wild = points.clone()
    wild[bad] = torch.tensor(BROKEN, device=device)
    actual = []
    for p in (points, wild):
        p, t, h = p.clone().requires_grad_(), table.clone().requires_grad_(), g.clone().requires_grad_()
        encoded = hash_encode(p, t, spec, backend=backend)
        slope = hash_gradient(p, t, spec, h, backend=backend)
        (moved,) = torch.autograd.grad((encoded * g).sum(), p)
        (turned,) = torch.autograd.grad((slope * up).sum(), h)
        grads = torch.autograd.grad((hash_encode(p, t, spec, backend=backend) * g).sum(), t)
        grads += torch.autograd.grad((hash_gradient(p, t, spec, h, backend=backend) * up).sum(), t)
        actual.append(([encoded, slope, moved, turned], grads))
    for tame, broken in zip(actual[0][0], actual[1][0], strict=True):
        assert broken[bad].isnan().all() and torch.equal(broken[~bad], tame[~bad]) and tame.isfinite().all()
    assert all(grad.isnan().any() for grad in actual[1][1])
    weights = head(spec.width, 4, 1, device)
    features, raw, gradient = hash_density(wild, table, spec, weights, backend=backend)
    for out in (features, raw[:, None], gradient):
        assert out[bad].isnan().all() and out[~bad].isfinite().all()


def test_other_values_that_are_not_finite_stay_visible_too(every):
    backend, device = every
    points, table, *_ = problem(9, device)
    for bad in (float("nan"), float("inf")):
        t, g = table.clone().requires_grad_(), torch.ones(9, SMALL.width, device=device)
        g[2, 3] = bad
        (hash_encode(points, t, SMALL, backend=backend) * g).sum().backward()
        assert not t.grad.isfinite().all()
    x = torch.randn(5, 7, device=device)
    x[3, 2] = float("nan")
    weights = [w.requires_grad_() for w in head(7, 6, 3, device)]
    out = mlp(x, *weights, backend=backend)
    assert out[3].isnan().all() and out[:3].isfinite().all()
    b1 = weights[1]
    (grad,) = torch.autograd.grad(out[3].nan_to_num(0.0).sum() + (out[3] * float("nan")).sum(), b1)
    assert grad.isnan().all()  # a unit that is not a number is not one that is off


def test_a_density_that_is_not_finite_shows_in_its_ray_alone(every):
    """Dropped as faint, it would leave a clean background, and training would go on without a gradient."""
    backend, device = every
    sigmas, delta = torch.full((9,), 2.0, device=device), torch.full((9,), 0.1, device=device)
    sigmas[4], sigmas[7] = float("nan"), float("inf")
    samples = Samples(delta.cumsum(0), delta, torch.tensor([0, 3, 6, 9], device=device))
    index, survivors = cull(sigmas, samples, 1e-3, 1e-3, backend=backend)
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and survivors.ray_offsets.tolist() == [0, 3, 6, 8]
    out, weights, opacity, depth = composite(sigmas, torch.ones(9, 1, device=device), samples, backend=backend)
    for actual in (out[:, 0], opacity, depth):
        assert actual.isnan().tolist() == [False, True, False]
    assert weights.isnan().tolist() == [False] * 4 + [True] * 2 + [False] * 3
    assert opacity[2] == 1 and weights[8] == 0 and opacity[0] == pytest.approx(1 - math.exp(-0.6))
