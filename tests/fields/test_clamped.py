"""Clamped colours: the line, its bounds, and a gradient that brings back what lies at them."""

from __future__ import annotations

import pytest
import torch

from stages.fields.clamped import before_clamping, clamped
from stages.fields.hashfield import FieldSettings, HashField


def test_clamped_is_the_logistics_line_within_its_bounds():
    raw = torch.tensor([-9.0, -2, -1, 0, 1, 2, 9], dtype=torch.float64, requires_grad=True)
    value = clamped(raw)
    assert value.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    inside = torch.tensor([0.0, 0.3, 1.0])
    assert torch.allclose(clamped(before_clamping(inside)), inside)
    near = raw.detach()[2:5].requires_grad_()
    assert torch.autograd.gradcheck(clamped, near)
    slope = torch.autograd.grad(torch.sigmoid(raw)[3], raw)[0][3]
    assert torch.autograd.grad(value[3], raw)[0][3] == slope == 0.25


def test_only_gradients_that_point_outwards_are_stopped_at_a_bound():
    raw = torch.tensor([-9.0, -9, 9, 9], requires_grad=True)
    clamped(raw).backward(torch.tensor([1.0, -1, 1, -1]))  # descent moves against them
    assert raw.grad.tolist() == [0, -0.25, 0.25, 0]


def burnt(albedo: str) -> float:
    """How far a field that was pushed to pure white for long is from grey, after a few steps towards it."""
    field = HashField(FieldSettings(levels=4, albedo=albedo), torch.Generator().manual_seed(0))
    points = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    optimiser = torch.optim.Adam(field.albedo_parameters(), lr=0.03, eps=1e-15)
    for step in range(160):
        colours = field.albedo(points)
        loss = -colours.sum() if step < 150 else (colours - 0.5).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float((field.albedo(points).detach() - 0.5).abs().max())


@pytest.mark.slow
def test_a_burnt_colour_comes_back_clamped_and_does_not_squashed():
    assert burnt("clamped") < 0.3
    assert burnt("sigmoid") > 0.49


def test_a_field_starts_with_the_colour_it_is_given():
    colour = torch.tensor([0.2, 0.5, 0.9])
    for albedo in ("sigmoid", "clamped"):
        field = HashField(FieldSettings(levels=4, albedo=albedo), torch.Generator().manual_seed(0))
        field.start_albedo(colour)
        assert torch.allclose(field.albedo(torch.zeros(1, 3))[0], colour, atol=0.02)
