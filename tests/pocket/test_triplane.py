"""The trainer of the tri-plane system: points of objects, the decoder and planes, both diffusions, in a tiny world."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from stages.guidance.clip import ClipScorer
from stages.pocket import world
from stages.pocket.build import build
from stages.pocket.models import WEIGHTS
from stages.pocket.train.triplane import diffusion, fit, trainer
from stages.pocket.train.triplane.bank import COLOURINGS, make_objects
from stages.pocket.train.triplane.inside import winding
from stages.triplane.field import TriplaneField
from stages.triplane.model import TriplaneModel, load_model
from tests.stages.drafts.triplane_cases import tiny_sizes


@pytest.fixture(scope="module")
def objects():
    return make_objects(2, np.random.default_rng(4))


@pytest.fixture(scope="module")
def scorer():
    return ClipScorer(WEIGHTS / "clip")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scorer):
    """A folder after all phases, each of a few steps, and its networks."""
    folder = tmp_path_factory.mktemp("triplane")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "GRID_PROMPTS", ("a red mug", "a blue car"))
        patch.setattr(diffusion, "STEPS", 3)
        return _train(folder, scorer)


def _train(folder, scorer):
    sizes = tiny_sizes()
    decoder, start = fit.fit_decoder(folder, sizes, 0, steps=400, minutes=None, shapes=1)
    options = {"count": 2 * COLOURINGS, "shapes": 1, "steps": 150}
    fit.fit_objects(folder, sizes, decoder, start, 0, **options)
    torch.manual_seed(0)
    model = TriplaneModel(sizes)
    trainer.load_parts(model, folder, ("decoder",))
    bank = diffusion.PlaneBank(folder, model, scorer)
    diffusion.train_base(model, bank, scorer, folder, 0, 4, steps=150, lr=4e-3, warmup=5)
    diffusion.train_up(model, bank, scorer, folder, 0, 2, steps=50, warmup=5)
    model.save(folder / "out")
    return folder, model, bank


def losses(path):
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_crossings_count_how_many_parts_a_point_is_in():
    """Two overlapping boxes: none, one or two, by their corners."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    boxes = np.concatenate([corners[faces], corners[faces] + 0.5])
    points = np.random.default_rng(0).uniform(-0.5, 2, (4000, 3))
    truth = sum(((points > low) & (points < low + 1)).all(1).astype(int) for low in (0, 0.5))
    assert (winding(boxes, points) == truth).all() and set(truth) == {0, 1, 2}


def test_crossings_agree_with_solid_angles_on_an_object_of_the_world():
    from stages.mesh.tree import TriangleTree

    mesh = build(world.parse("a red mug"), np.random.default_rng(0))
    points = np.random.default_rng(1).uniform(-0.7, 0.7, (400, 3))
    triangles = mesh.vertices[mesh.faces]
    angles = TriangleTree(triangles).winding_numbers(points)
    assert ((winding(triangles.astype(float), points) > 0) == (angles > 0.5)).mean() > 0.995


def test_objects_of_one_geometry_differ_in_colours_alone_and_none_is_held_out(objects):
    assert len(objects) == 2 * COLOURINGS and objects.pictures.shape == (len(objects), 64, 64, 3)
    assert not any(world.held_out(world.parse(text)) for text in objects.captions)
    first = slice(0, COLOURINGS)
    assert (objects.points[first] == objects.points[0]).all() and (objects.inside[first] == objects.inside[0]).all()
    assert not torch.equal(objects.points[0], objects.points[COLOURINGS])
    assert 0.1 < objects.inside.float().mean() < 0.7 and 0.3 < objects.near.float().mean() < 0.9


def test_objects_are_those_of_the_seed(objects):
    again = make_objects(2, np.random.default_rng(4))
    assert again.captions == objects.captions and torch.equal(again.colours, objects.colours)


@pytest.mark.slow
def test_fitted_planes_know_their_objects(trained):
    """Better than the best that planes which know nothing can do: everything outside, one colour."""
    folder, model, bank = trained
    assert len(bank) == 2 * COLOURINGS
    objects_again = make_objects(1, np.random.default_rng([0, 3, 0]))
    facts = fit.measured(bank.high[:COLOURINGS].float(), model.decoder, objects_again, model.sizes)
    assert facts["overlap_16"] > 0.5 and facts["overlap_8"] > 0.4


@pytest.mark.slow
def test_a_fit_goes_on_where_it_stopped(trained, scorer):
    folder, model, _ = trained
    sizes, before = model.sizes, (folder / "planes" / "00001.safetensors").stat().st_mtime_ns
    decoder, start = fit.fit_decoder(folder, sizes, 0, steps=400, minutes=None)
    options = {"count": 3 * COLOURINGS, "shapes": 1, "steps": 2, "minutes": 0.0}
    fit.fit_objects(folder, sizes, decoder, start, 0, **options)
    assert (folder / "planes" / "00001.safetensors").stat().st_mtime_ns == before
    assert not (folder / "planes" / "00002.safetensors").exists()  # there were no minutes left


@pytest.mark.slow
def test_both_diffusions_lower_their_losses_and_what_they_sample_is_no_constant(trained, scorer):
    folder, model, _ = trained
    base = losses(folder / "base" / "log.jsonl")
    assert len(base) == 3 and base[-1] < 0.9 * base[0] and losses(folder / "up" / "log.jsonl")[-1] < 2
    condition = diffusion.read(scorer, ["a red mug", "a blue car"])
    low = diffusion.sample_low(model, condition, 0, steps=6)
    high = diffusion.sample_high(model, low, condition, 0, steps=3)
    assert low.std() > 0.3 and high.std() > 0.3 and not torch.allclose(low[0], low[1])
    assert list((folder / "base").glob("*.png")) and list((folder / "up").glob("*.png"))


@pytest.mark.slow
def test_saved_networks_sample_as_the_trained_ones(trained, scorer, tmp_path):
    folder, model, _ = trained
    trainer.load_parts(model, folder, ("base", "up"))
    model.save(tmp_path / "out")
    from_folder = load_model(tmp_path / "out")
    assert from_folder.sizes == model.sizes
    condition = diffusion.read(scorer, ["a red mug"])
    model = copy.deepcopy(model).half().float()  # as they are saved
    theirs, mine = (diffusion.sample_low(m, condition, 0, steps=3) for m in (from_folder, model))
    torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_render_loss_of_the_true_planes_is_nothing_and_reaches_others(trained):
    _, model, bank = trained
    truth = model.normalised(bank.high[:1].float())
    assert diffusion.render_loss(model, truth, truth, np.random.default_rng(0)) == 0
    other = (truth + 0.5).requires_grad_()
    diffusion.render_loss(model, other, truth, np.random.default_rng(0)).backward()
    assert torch.isfinite(other.grad).all() and other.grad.abs().max() > 0


@pytest.mark.slow
def test_dropped_conditions_say_nothing(trained):
    _, _, bank = trained
    condition = bank.condition(np.zeros(400, int), np.random.default_rng(0))
    silent = ~condition.mask.any(1)
    shares = float((condition.vector == 0).all(1).float().mean()), float(silent.float().mean())
    assert abs(shares[0] - diffusion.NOTHING) < 0.06
    assert abs(shares[1] - diffusion.NOTHING - diffusion.PICTURE * (1 - diffusion.NOTHING)) < 0.06


@pytest.mark.slow
def test_field_of_fitted_planes_can_be_drawn(trained, tmp_path):
    _, model, bank = trained
    diffusion.draw_planes(model, model.normalised(bank.low[:2]), tmp_path / "two.png", size=16)
    assert (tmp_path / "two.png").is_file()
    assert TriplaneField(bank.low[0], model.decoder).density(torch.zeros(1, 3)).shape == (1,)
