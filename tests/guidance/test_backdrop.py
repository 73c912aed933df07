"""x0_hat put on the backdrop that its render was composited on."""

from dataclasses import replace

import pytest
import torch

from stages.cameras import orbit_views
from stages.guidance.residuals import RULES
from stages.guidance.rules import replace_backdrop
from tests.guidance.gaussian_prior import images, make, x0_of_gradient


def pictures(guess, thing, side=16):
    """x [2, 3, side, side]: a square of value `thing` on a backdrop of value `guess`."""
    x = torch.full((2, 3, side, side), guess)
    x[..., 5:11, 5:11] = thing
    return x


def test_the_guess_becomes_the_true_backdrop_and_the_thing_stays():
    truth = torch.tensor([-0.5, 0.9]).reshape(2, 1, 1, 1).expand(2, 3, 16, 16)
    got = replace_backdrop(pictures(0.3, 0.8), truth, width=0.1)  # 0.5 apart: exp(-25)
    thing = torch.zeros(16, 16, dtype=torch.bool)
    thing[5:11, 5:11] = True
    torch.testing.assert_close(got[..., thing], torch.full((2, 3, 36), 0.8), atol=1e-6, rtol=0)
    torch.testing.assert_close(got[..., ~thing], truth[..., ~thing])


def test_a_pixel_as_far_as_the_width_keeps_all_but_one_part_in_e():
    got = replace_backdrop(pictures(0.0, 0.1), torch.ones(2, 3, 16, 16), width=0.1)
    share = torch.exp(torch.tensor(-1.0))
    torch.testing.assert_close(got[..., 8, 8], torch.full((2, 3), 0.1) + share * 0.9)


def test_one_channel_that_differs_is_enough_to_be_a_thing():
    x = pictures(0.0, 0.0)
    x[:, 2, 8, 8] = 0.9
    got = replace_backdrop(x, torch.ones(2, 3, 16, 16), width=0.1)[..., 8, 8]
    torch.testing.assert_close(got, x[..., 8, 8], atol=1e-6, rtol=0)


def test_a_thing_that_touches_the_rim_is_not_taken_for_the_backdrop():
    x = pictures(0.2, 0.9)
    x[..., 5:11, :6] = 0.9  # an arm out of the picture
    got = replace_backdrop(x, torch.full_like(x, -0.7), width=0.1)
    torch.testing.assert_close(got[..., 8, 0], torch.full((2, 3), 0.9))
    torch.testing.assert_close(got[..., 0, 8], torch.full((2, 3), -0.7))


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"vsd"}))
def test_an_empty_picture_of_any_grey_is_left_alone_by_every_rule(rule):
    """The prior draws its own mean everywhere; put on the true backdrop, that is the render itself."""

    def x0_hat(**settings):
        guidance = make("bad", rule=rule, scale=7.5, inversion_steps=3, t_min=0.7, t_max=0.7, **settings)
        picture = images(0.6, batch=2)
        actual = []
        original = RULES[rule]
        RULES[rule] = replace(original, residual=lambda p, s: actual.append(original.residual(p, s)) or actual[-1])
        try:
            guidance(picture, orbit_views([0.0, 90.0]), 0.5, backdrop=picture.detach())
        finally:
            RULES[rule] = original
        z_t, alpha_bar = actual[0].z_t, guidance.prior.alphas_cumprod[700]
        return (z_t - (1 - alpha_bar).sqrt() * actual[0].eps_hat) / alpha_bar.sqrt()

    torch.testing.assert_close(x0_hat(backdrop_width=100.0), torch.full((2, 3, 16, 16), 0.6), atol=2e-3, rtol=0)
    assert (x0_hat() - 0.6).abs().max() > 0.1  # what the guess would have asked for


def test_the_target_of_sds_is_the_backdrop_after_the_threshold():
    got, metrics = x0_of_gradient(
        make(scale=30.0, threshold="static", backdrop_width=100.0, t_min=0.9, t_max=0.9),
        backdrop=images(-0.4, batch=4),
    )
    torch.testing.assert_close(got, torch.full_like(got, -0.4), atol=1e-3, rtol=0)
    assert metrics["clamped"] > 0.3


def test_a_stage_that_does_not_say_what_is_behind_is_told_so():
    with pytest.raises(ValueError, match="backdrop: wanted what the images were composited on"):
        make(backdrop_width=0.1)(images(batch=2), orbit_views([0.0, 90.0]), 0.0)
