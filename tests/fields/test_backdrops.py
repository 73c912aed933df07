"""Backdrops: their statistics by kind and at any size; blur and compositing against slow references; determinism."""

from __future__ import annotations

import math

import pytest
import torch

from stages.fields.backdrops import (
    AMPLITUDE,
    COLOURS,
    GAIN,
    SIDE,
    BackdropSettings,
    blurred,
    checkerboards,
    fourier_textures,
    random_backdrops,
    show_on,
)
from stages.kernels.srgb import linear_to_srgb

NOTHING = {"noise": 0.0, "checkerboard": 0.0, "fourier": 0.0, "blur": (0.0, 0.0)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(**changes) -> BackdropSettings:
    return BackdropSettings(**(NOTHING | changes))


def test_noise_is_uniform_in_srgb():
    images = linear_to_srgb(random_backdrops(only(noise=1.0), 8, 64, generator()))
    assert abs(float(images.mean()) - 0.5) < 0.005 and abs(float(images.var()) - 1 / 12) < 0.002
    neighbours = torch.corrcoef(torch.stack([images[:, :, :-1].flatten(), images[:, :, 1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.02


@pytest.mark.parametrize("size", [64, 50])
def test_checkerboard_alternates_two_colours_in_eight_squares_a_side(size):
    board = checkerboards(3, size, 8, generator())
    assert board.shape == (3, size, size, 3)
    middles = ((torch.arange(8) + 0.5) * size / 8).long()
    odd = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 1
    for picture in board:
        cells = picture[middles][:, middles]
        assert len(cells[odd].unique(dim=0)) == len(cells[~odd].unique(dim=0)) == 1
        assert len(picture.reshape(-1, 3).unique(dim=0)) == 2
        assert (picture[0, 1:] != picture[0, :-1]).any(-1).sum() == 7


@pytest.mark.slow
def test_fourier_texture_has_the_contrast_of_its_spectrum_at_any_size():
    # var = 2 sd^2 S sum |k|^-3 before the gain, times 224 / S, over the plane's integers k; those on the axis of the
    # halved transform count half, since only the real part of their waves is kept, and the mean counts as |k| = 1
    for size in (32, 96):
        logits = torch.logit(fourier_textures(200, size, generator()).double(), eps=1e-9)
        matrix = torch.tensor(COLOURS, dtype=torch.float64)
        matrix = matrix / matrix.norm(dim=0).max()
        raw = torch.linalg.solve(matrix, logits.reshape(-1, 3).T)
        k = torch.arange(-(size // 2), size - size // 2).double()
        radius = (k[:, None].square() + k.square()).sqrt().clamp_min(1)
        total = (radius.pow(-3) * torch.where((k == 0) | (k == -(size // 2)), 0.5, 1.0)).sum()
        expected = GAIN * AMPLITUDE * math.sqrt(2 * SIDE * float(total))
        inner = raw[:, (logits.abs() < 15).all(-1).flatten()]  # float32's sigmoid saturates beyond
        assert inner.shape[1] > 0.99 * raw.shape[1]
        assert float(inner.std()) == pytest.approx(expected, rel=0.06)


def test_fourier_texture_is_smooth_and_hardly_coloured():
    images = fourier_textures(50, 64, generator(3))
    red, green, blue = images.flatten(0, 2).T
    assert float(torch.corrcoef(torch.stack([red, green]))[0, 1]) > 0.8
    assert float(torch.corrcoef(torch.stack([red, blue]))[0, 1]) > 0.5
    assert float((images[:, :, 1:] - images[:, :, :-1]).abs().mean()) < 0.3 * float(
        (images - images.flip(2)).abs().mean()
    )


def test_flat_kinds_are_flat_and_greys_are_grey():
    colour = random_backdrops(only(colour=1.0), 5, 16, generator())
    assert torch.allclose(colour, colour[:, :1, :1].expand_as(colour), atol=1e-6)
    assert len(colour[:, 0, 0].unique(dim=0)) == 5
    grey = linear_to_srgb(random_backdrops(only(grey=1.0, grey_range=(0.4, 0.6)), 200, 4, generator()))
    assert torch.allclose(grey, grey[..., :1].expand_as(grey), atol=1e-6)
    assert 0.399 < float(grey.min()) < 0.41 and 0.59 < float(grey.max()) < 0.601


def test_kinds_come_in_their_shares():
    images = random_backdrops(only(colour=3.0, grey=1.0), 400, 4, generator())
    neutral = ((images - images.mean(-1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5).double().mean()
    assert abs(float(neutral) - 0.25) < 0.06


def test_blur_is_a_normalised_gaussian_of_its_own_width_for_each_picture():
    pictures = torch.rand(3, 96, 96, 3, generator=generator(), dtype=torch.float64)
    deviation = torch.tensor([0.0, 1.0, 30.0], dtype=torch.float64)
    images = blurred(pictures, deviation)
    assert torch.equal(images[0], pictures[0])
    reach = 3  # 7 of 224 pixels
    x = torch.arange(-reach, reach + 1, dtype=torch.float64)
    for k in (1, 2):
        kernel = torch.exp(-0.5 * (x / deviation[k]) ** 2)
        kernel = kernel / kernel.sum()
        around = pictures[k, 40 - reach : 41 + reach, 50 - reach : 51 + reach]
        assert torch.allclose(images[k, 40, 50], torch.einsum("i,j,ijc->c", kernel, kernel, around))
    assert torch.allclose(blurred(torch.full((1, 20, 20, 3), 0.3), torch.tensor([2.0])), torch.tensor(0.3))
    assert float(images[2].std()) < float(images[1].std()) < float(pictures[1].std())


def test_pictures_depend_on_the_generator_alone():
    settings = BackdropSettings(colour=1.0, grey=1.0)
    first, again = (random_backdrops(settings, 12, 24, generator(5)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (12, 24, 24, 3)
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    assert not torch.equal(first, random_backdrops(settings, 12, 24, generator(6)))


def test_copies_of_a_view_stand_beside_each_other_on_their_own_pictures():
    colour, opacity = torch.rand(2, 4, 4, 3, generator=generator()), torch.rand(2, 4, 4, 1, generator=generator(1))
    pictures = torch.rand(6, 4, 4, 3, generator=generator(2))
    images = show_on(colour, opacity, pictures)
    for view in range(2):
        for copy in range(3):
            k = 3 * view + copy
            assert torch.allclose(images[k], colour[view] + (1 - opacity[view]) * pictures[k])
    with pytest.raises(ValueError, match="pictures"):
        show_on(colour, opacity, pictures[:5])


def test_gradient_of_the_compositing_agrees_with_finite_differences():
    pictures = torch.rand(4, 3, 3, 3, generator=generator(), dtype=torch.float64)
    colour = torch.rand(2, 3, 3, 3, generator=generator(1), dtype=torch.float64, requires_grad=True)
    opacity = torch.rand(2, 3, 3, 1, generator=generator(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, o: show_on(c, o, pictures), (colour, opacity))


@pytest.mark.parametrize("changes", [{"blur": (0.2, 0.1)}, {"grey_range": (0.5, 1.5)}, NOTHING])
def test_settings_that_draw_nothing_or_are_out_of_order_are_refused(changes):
    with pytest.raises(ValueError):
        BackdropSettings(**changes)
