"""What stands behind a step's views, whole and in parts, and what guidance sees of it."""

import torch

from stages.backdrop import PictureBackdrop, PlainBackdrop
from stages.cameras import orbit_views
from stages.render.volume import VolumeImages


def rendered(batch: int = 2, size: int = 4) -> VolumeImages:
    g = torch.Generator().manual_seed(0)
    colour, backdrop = torch.rand(2, batch, size, size, 3, generator=g, dtype=torch.float32)
    opacity = torch.rand(batch, size, size, 1, generator=g)
    zero = torch.zeros(())
    return VolumeImages(colour.requires_grad_(), opacity, opacity, None, backdrop.requires_grad_(), zero, 0)


def test_a_flat_backdrop_is_cut_with_its_views_and_the_environment_stays_whole():
    colours = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 1, 3)
    assert torch.equal(PlainBackdrop(colours).part(slice(1, 3)).under, colours[1:3])
    environment = torch.nn.Linear(3, 3)
    assert PlainBackdrop(environment).part(slice(1, 3)).under is environment


def test_over_a_plain_backdrop_guidance_sees_the_renders_themselves_and_cannot_learn_the_backdrop():
    images, views = rendered(), orbit_views([0.0, 90.0], 20.0)
    images_on_backdrop = PlainBackdrop(torch.ones(2, 1, 1, 3)).show(images, views)
    assert images_on_backdrop.colour is images.colour and images_on_backdrop.views is views
    assert torch.equal(images_on_backdrop.backdrop, images.backdrop) and not images_on_backdrop.backdrop.requires_grad


def test_every_view_is_shown_once_on_each_of_its_pictures():
    images, views = rendered(), orbit_views([0.0, 90.0], 20.0)
    pictures = torch.rand(6, 4, 4, 3, generator=torch.Generator().manual_seed(1))
    backdrop = PictureBackdrop(pictures, 3)
    assert torch.equal(backdrop.under, torch.zeros(3))  # what comes behind afterwards must not be there twice
    images_on_backdrop = backdrop.show(images, views)
    assert (
        images_on_backdrop.views.azimuth_deg.tolist() == [0, 0, 0, 90, 90, 90]
        and images_on_backdrop.backdrop is pictures
    )
    for k in range(6):
        expected = images.colour[k // 3] + (1 - images.opacity[k // 3]) * pictures[k]
        torch.testing.assert_close(images_on_backdrop.colour[k], expected)
    images_on_backdrop.colour.sum().backward()
    torch.testing.assert_close(images.colour.grad, torch.full_like(images.colour, 3.0))


def test_a_part_of_pictures_holds_those_of_its_views():
    pictures = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 1, 3)
    assert torch.equal(PictureBackdrop(pictures, 2).part(slice(1, 3)).pictures, pictures[2:6])
