"""Occupancy, colours and roles of the world's objects at points, and the layout's loss on them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.kernels.srgb import linear_to_srgb
from stages.pocket import models, world
from stages.pocket.build import build
from stages.pocket.palette import COLOURS
from stages.pocket.train import solids
from stages.pocket.train.solids import (
    Roles,
    Solids,
    find_roles,
    make_solids,
    paint_roles,
    shape_captions,
    solid_loss,
)


def captions(name):
    return next(alike for alike in shape_captions() if alike[0].endswith(name))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(solids, "INSTANCES", 2)
    monkeypatch.setattr(solids, "POINTS", 400)
    monkeypatch.setattr(solids, "SURFACE", 4000)


def shape(name, seed=0):
    return Solids(*(rows[None] for rows in solids._shape(captions(name), np.random.default_rng(seed))))


def test_a_ball_is_inside_its_radius_has_its_colour_and_faces_outwards(few):
    ball, radius = shape(" ball"), world.RADIUS
    far = np.linalg.norm(ball.points[0], axis=1)
    assert (ball.occupancy[0][far < 0.97 * radius] == 1).all() and (ball.occupancy[0][far > 1.01 * radius] == 0).all()
    near = ball.near[0]
    assert (abs(far - radius) < solids.SHELL + 0.02)[near].all() and not near[abs(far - radius) > 0.06].any()
    outwards = (ball.normals[0] * ball.points[0] / far[:, None]).sum(-1)
    assert outwards[near].min() > 0.95
    for name, colours in zip(COLOURS, ball.colours[0], strict=True):
        assert abs(colours[near] - COLOURS[name]).max() < 0.08, name


@pytest.mark.slow
def test_points_inside_another_part_are_no_surface(few):
    """A snowman's balls go into each other; nothing in there has a colour of its own."""
    snowman, mesh = shape(" snowman"), build(world.parse("a white snowman"))
    deep = solids.TriangleTree(mesh.vertices[mesh.faces]).winding_numbers(snowman.points[0]) > 1.5
    assert deep.any() and (snowman.occupancy[0][deep] == 1).mean() > 0.9 and not snowman.near[0][deep].all()


def test_the_bank_is_made_once(few, monkeypatch, tmp_path):
    monkeypatch.setattr(solids, "shape_captions", lambda: [captions(" ball"), captions(" cube")])
    first = make_solids(tmp_path, 0)
    assert first.points.shape == (2, 800, 3) and first.colours.shape == (2, len(COLOURS), 800, 3)
    monkeypatch.setattr(solids, "_shape", None)
    assert np.array_equal(make_solids(tmp_path, 0).points, first.points)


@pytest.fixture
def bank(few, monkeypatch, tmp_path):
    shape_texts = [captions(" robot"), captions(" duck"), captions(" striped mug")]
    monkeypatch.setattr(solids, "shape_captions", lambda: shape_texts)
    return make_solids(tmp_path, 0), shape_texts


def test_each_point_has_the_role_whose_colour_it_has_in_every_caption_of_the_training(bank):
    samples, shape_texts = bank
    roles = find_roles(samples, shape_texts, 48)
    near = torch.tensor(np.asarray(samples.near))
    role_colours = roles.colours[roles.number].transpose(1, 2)  # [N, C, P, 3]
    error = (role_colours - torch.tensor(np.asarray(samples.colours)).float()).abs().amax(-1)
    mask = roles.in_training[..., None].bool() & near[:, None]
    assert error[mask].max() < 2 * solids.ALIKE and 6 < len(roles.colours) < 30
    held_out_texts = [text for alike in shape_texts for text in alike if world.held_out(world.parse(text))]
    assert int((1 - roles.in_training).sum()) == len(held_out_texts) > 0


@pytest.mark.slow
def test_a_small_part_weighs_more_than_its_points_and_what_is_far_from_a_surface_nothing(bank):
    samples, shape_texts = bank
    roles = find_roles(samples, shape_texts, 48)
    near = torch.tensor(np.asarray(samples.near))
    assert roles.weight[near].mean() == pytest.approx(1, abs=1e-4) and not roles.weight[~near].any()
    many = torch.bincount(roles.number[0][near[0]])
    small, large = many.masked_fill(many == 0, 10**6).argmin(), many.argmax()
    weights = roles.weight[0][near[0]]
    number = roles.number[0][near[0]]
    assert weights[number == small].mean() > 2 * weights[number == large].mean()


@pytest.mark.slow
def test_more_roles_than_paints_are_refused(bank):
    with pytest.raises(ValueError, match="roles, got 3"):
        find_roles(*bank, 3)


@pytest.mark.slow
def test_a_layouts_palettes_become_the_roles(bank):
    roles = find_roles(*bank, 48)
    layout = models.make_layout(fine=False)
    paint_roles(layout, roles)
    palettes = linear_to_srgb(layout.palettes(torch.eye(len(COLOURS))))
    torch.testing.assert_close(palettes[:, : len(roles.colours)].transpose(0, 1), roles.colours, atol=0.02, rtol=0)


def test_the_truth_costs_least():
    """The loss of the true values, and with an error in each of opacity, colour, paint and normal."""
    generator = np.random.default_rng(0)
    points = generator.uniform(-0.5, 0.5, (1, 200, 3)).astype(np.float32)
    inside = (points[..., 0] > 0).astype(np.float16)
    number = torch.arange(200)[None] % 3
    paints = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.7, 0.1], [0.2, 0.2, 0.9]])  # linear
    normals = np.broadcast_to(np.float16([0, 0, 1]), points.shape)
    bank = Solids(points, inside, np.ones((1, 200), bool), linear_to_srgb(paints[number])[:, None].numpy(), normals)

    def loss(density=30.0, colour=0.0, normal=0.0, share=0.0, in_training=1.0):
        raw = torch.where(torch.from_numpy(inside) > 0.5, density, -density)
        facing = torch.tensor([0.0, normal, 1.0]).expand(1, 200, 3)
        shares = (1 - share) * torch.nn.functional.one_hot(number, 3) + share / 3
        values = torch.cat([raw[..., None], facing, shares], -1)
        layout = SimpleNamespace(at=lambda shapes, where: values, palettes=lambda colours: paints[None] + colour)
        roles = Roles(linear_to_srgb(paints)[:, None], number, torch.full((1, 1), in_training), torch.ones(1, 200))
        return float(
            solid_loss(layout, torch.zeros(1, 0), torch.zeros(0, 0), roles, bank, np.arange(1), np.arange(200))
        )

    assert loss() < 1e-3
    assert loss(density=0.1) > 0.1 and loss(density=-30.0) > 5
    assert loss(normal=0.6) == pytest.approx(0.36 / 3, rel=1e-2)
    assert loss(colour=0.05) > 0.005 and loss(share=0.3) > 0.3**2 / 3
    assert loss(colour=0.05) == pytest.approx(loss(colour=0.05, in_training=0.5))  # a mean over what is known
