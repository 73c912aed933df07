"""What the world's objects are at points of space, and that a layout learns it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.kernels.srgb import linear_to_srgb
from stages.pocket import world
from stages.pocket.build import build
from stages.pocket.palette import COLOURS
from stages.pocket.train import solids
from stages.pocket.train.solids import Solids, make_solids, shape_captions, solid_loss


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
    for name, painted in zip(COLOURS, ball.colours[0], strict=True):
        assert abs(painted[near] - COLOURS[name]).max() < 0.08, name


def test_points_inside_another_part_are_no_surface(few):
    """A snowman's balls go into each other; nothing in there has a colour of its own."""
    snowman, mesh = shape(" snowman"), build(world.parse("a white snowman"))
    deep = solids.TriangleTree(mesh.vertices[mesh.faces]).winding_numbers(snowman.points[0]) > 1.5
    assert deep.any() and (snowman.occupancy[0][deep] == 1).mean() > 0.9 and not snowman.near[0][deep].all()


def test_the_bank_is_made_once(few, monkeypatch, tmp_path):
    monkeypatch.setattr(solids, "shape_captions", lambda: [captions(" ball"), captions(" cube")])
    made = make_solids(tmp_path, 0)
    assert made.points.shape == (2, 800, 3) and made.colours.shape == (2, len(COLOURS), 800, 3)
    monkeypatch.setattr(solids, "_shape", None)
    assert np.array_equal(make_solids(tmp_path, 0).points, made.points)


def test_the_truth_costs_least():
    """A layout that says what is there, and one that errs in each of opacity, colour and normal."""
    generator = np.random.default_rng(0)
    points = generator.uniform(-0.5, 0.5, (1, 200, 3)).astype(np.float32)
    inside = (points[..., 0] > 0).astype(np.float16)
    truth = torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1  # linear
    normals = np.broadcast_to(np.float16([0, 0, 1]), points.shape)
    bank = Solids(points, inside, np.ones((1, 200), bool), linear_to_srgb(truth)[:, None].numpy(), normals)

    def loss(density=30.0, colour=0.0, normal=0.0, known=1.0):
        raw = torch.where(torch.from_numpy(inside) > 0.5, density, -density)
        facing = torch.tensor([0.0, normal, 1.0]).expand(1, 200, 3)
        seen = torch.cat([raw[..., None], facing, (truth + colour)], -1)
        layout = SimpleNamespace(at=lambda shapes, where: seen, palettes=lambda colours: torch.eye(3)[None])
        return float(solid_loss(layout, None, None, torch.full((1, 1), known), bank, np.arange(1), np.arange(200)))

    assert loss() < 1e-3
    assert loss(density=0.1) > 0.1 and loss(density=-30.0) > 5
    assert loss(normal=0.6) == pytest.approx(0.36 / 3, rel=1e-2)
    assert loss(colour=0.05) > 0.005
    wrong = loss(colour=0.05, known=1.0), loss(colour=0.05, known=0.5)
    assert wrong[0] == pytest.approx(wrong[1])  # a mean over what is known
