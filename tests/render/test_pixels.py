"""Some pixels of a picture and a picture of some pixels (stages/render/pixels.py)."""

import torch

from stages.render.pixels import place, take

PIXELS = torch.tensor([5, 0, 11])


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 4, generator=g, dtype=torch.float64), torch.randn(
        3, 4, generator=g, dtype=torch.float64
    )


def test_values_are_taken_from_and_put_at_their_pixels():
    under, values = pictures()
    assert torch.equal(take(under, PIXELS), under.view(12, 4)[PIXELS])
    placed = place(values, PIXELS, under)
    assert torch.equal(take(placed, PIXELS), values)
    rest = torch.tensor([i for i in range(12) if i not in PIXELS.tolist()])
    assert torch.equal(take(placed, rest), take(under, rest))
    assert torch.equal(under, pictures()[0])  # which stays as it was


def test_gradients_go_back_where_they_came_from():
    under, values = (t.requires_grad_() for t in pictures())
    assert torch.autograd.gradcheck(lambda picture: take(picture, PIXELS), [under])
    assert torch.autograd.gradcheck(lambda v, picture: place(v, PIXELS, picture), [values, under])
    assert torch.autograd.gradgradcheck(lambda picture: take(picture, PIXELS).sin(), [under])


def test_a_picture_that_does_not_lie_in_order_is_read_as_it_looks():
    under, values = pictures()
    turned = under.movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(take(turned, PIXELS), take(under, PIXELS))
    assert torch.equal(place(values, PIXELS, turned), place(values, PIXELS, under))


def test_no_pixels():
    under, values = pictures()
    none = PIXELS[:0]
    assert take(under, none).shape == (0, 4)
    assert torch.equal(place(values[:0], none, under), under)
