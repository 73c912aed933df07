"""The transmittance term: the formula, its annealing, what zoom does to it, where its gradient ends."""

from __future__ import annotations

import math

import pytest
import torch

from stages.cameras import orbit_views
from stages.render.transmittance import TransmittanceSettings, target_opacity, transmittance_loss

# The paper's camera: radius 4 and 1.2 times the Blender scenes' focal length, 1111.111 of 800 pixels.
PAPER = {"distance": 4.0, "fov_deg": math.degrees(2 * math.atan(400 / (1.2 * 1111.1111)))}
SETTINGS = TransmittanceSettings(weight=0.5)


def views(count: int = 1, **changes):
    return orbit_views([0.0] * count, 30.0, **(PAPER | changes))


def test_target_falls_exponentially_and_then_stays():
    actual = [float(target_opacity(views(), p, SETTINGS)) for p in (0.0, 0.025, 0.05, 0.5)]
    assert actual == pytest.approx([1.2 * 0.5, 1.2 * math.sqrt(0.5 * 0.1), 1.2 * 0.1, 1.2 * 0.1], rel=1e-4)


def test_target_grows_with_the_square_of_the_focal_length_and_shrinks_with_that_of_the_distance():
    fov = PAPER["fov_deg"]
    longer = math.degrees(2 * math.atan(math.tan(math.radians(fov / 2)) / 1.5))  # 1.5 times the focal length
    assert float(target_opacity(views(fov_deg=longer), 1.0, SETTINGS)) == pytest.approx(0.12 * 1.5**2, rel=1e-4)
    assert float(target_opacity(views(distance=8.0), 1.0, SETTINGS)) == pytest.approx(0.12 / 4, rel=1e-4)
    assert float(target_opacity(views(distance=1.0), 1.0, SETTINGS)) == 1.0


def test_term_is_the_formula_for_every_view_by_itself():
    opacity = torch.zeros(2, 4, 4, 1, dtype=torch.float64)
    opacity[0, :, :1], opacity[1, :, :2] = 1.0, 0.1  # mean transmittance 0.75 and 0.95; tau = 0.88
    loss = transmittance_loss(opacity, views(2), 1.0, SETTINGS)
    assert float(loss) == pytest.approx(-0.5 * (0.75 + 0.88) / 2, abs=1e-5)


def test_gradient_reaches_only_views_that_are_too_opaque():
    generator = torch.Generator().manual_seed(0)
    opacity = torch.rand(2, 3, 3, 1, generator=generator, dtype=torch.float64)
    opacity[1] *= 0.1
    opacity.requires_grad_()

    def loss(o):
        return transmittance_loss(o, views(2), 0.5, SETTINGS)

    assert torch.autograd.gradcheck(loss, (opacity,))
    (gradient,) = torch.autograd.grad(loss(opacity), opacity)
    assert torch.allclose(gradient[0], torch.tensor(0.5 / 2 / 9, dtype=torch.float64)) and not gradient[1].any()


@pytest.mark.parametrize("opacity", [(0.0, 0.1), (0.5, 1.1), 0])
def test_targets_outside_the_unit_interval_are_refused(opacity):
    with pytest.raises(ValueError, match="opacity"):
        TransmittanceSettings(opacity=opacity)
