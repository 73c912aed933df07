"""The sRGB transfer curve and its inverse (stages/kernels/srgb.py)."""

import pytest
import torch

from stages.kernels.srgb import KNEE, linear_to_srgb, srgb_to_linear


def results(linear: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = linear.clone().requires_grad_()
    srgb = linear_to_srgb(leaf, backend=backend)
    g = torch.Generator().manual_seed(1)
    return srgb.detach(), torch.autograd.grad(srgb, leaf, torch.randn(srgb.shape, generator=g))[0]


@pytest.mark.parametrize("shape", [(0,), (1,), (300, 301, 3), (2, 5, 4, 3)])
def test_numba_agrees_with_torch(shape):
    linear = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    linear.view(-1)[:4] = torch.tensor([0.0, 1.0, KNEE, 1e-9])[: linear.numel()]
    for one in (linear, linear.movedim(-1, 0).contiguous().movedim(0, -1), linear[:1].expand(linear.shape)):
        want, got = results(one, "torch"), results(one, "numba")
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_srgb_matches_the_standard_and_inverts(backend):
    linear = torch.tensor([0.0, 0.0031308, 0.21404114, 0.5, 1.0])
    srgb = linear_to_srgb(linear, backend=backend)
    torch.testing.assert_close(srgb, torch.tensor([0.0, 0.040449936, 0.5, 0.7353569, 1.0]), atol=1e-6, rtol=0)
    ramp = torch.linspace(0, 1, 257)
    torch.testing.assert_close(srgb_to_linear(linear_to_srgb(ramp)), ramp, atol=1e-5, rtol=0)
    assert linear_to_srgb(torch.tensor([-1.0, 2.0])).tolist() == pytest.approx([0, 1], abs=1e-6)


def test_srgb_has_a_finite_gradient_at_black_and_white():
    linear = torch.tensor([0.0, 1e-9, 0.003, 1.0], requires_grad=True)
    linear_to_srgb(linear).sum().backward()
    assert torch.isfinite(linear.grad).all() and linear.grad[0] == pytest.approx(12.92, rel=1e-4)
    assert 0.3 < linear.grad[3] < 0.5


def test_the_gradient_of_srgb_is_its_slope_and_none_outside():
    linear = torch.tensor([0.001, 0.003, 0.0032, 0.2, 0.7, 0.999], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_to_srgb, [linear])
    outside = torch.tensor([-0.5, -1e-6, 1.001, 3.0], requires_grad=True)
    linear_to_srgb(outside).sum().backward()
    assert (outside.grad == 0).all()
    broken = torch.tensor([torch.nan], requires_grad=True)
    linear_to_srgb(broken).sum().backward()
    assert broken.grad.isnan().all()  # is seen by whoever looks for it
