"""The trainer of the gan stage: pictures of a class, the discriminators, their losses, and a training that resumes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.gan.generator import GanSizes
from stages.gan.model import load_model
from stages.pocket import world
from stages.pocket.train.gan import trainer
from stages.pocket.train.gan.bank import ELEVATION, VIEWS, make_bank
from stages.pocket.train.gan.discriminator import Discriminator, camera_numbers, deviation
from stages.pocket.train.gan.losses import discriminator_loss, generator_loss, r1
from stages.pocket.train.gan.trainer import GanTraining, export
from tests.stages.drafts.gan_cases import TINY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("bank"), "mug", 96, 0)


def training(bank, folder, steps=4, sizes=TINY, **options):
    return GanTraining("mug", folder, bank, 0, CPU, steps=steps, batch=4, sizes=sizes, **options)


def test_pictures_are_of_training_colours_black_outside_and_made_once(bank, tmp_path):
    assert bank.pictures.shape == (96, 4, 64, 64) and bank.angles.shape == (96, 2)
    colour, mask = bank.pictures[:, :3].float() / 255, bank.pictures[:, 3:].float() / 255
    assert (colour * (mask == 0)).max() == 0 and 0.1 < mask.mean() < 0.5
    assert bank.angles[:, 1].min() >= ELEVATION[0] and bank.angles[:, 1].max() <= ELEVATION[1]
    means = torch.stack([(colour[k] * mask[k]).sum((1, 2)) / mask[k].sum() for k in range(0, 96, VIEWS)])
    assert torch.pdist(means).min() > 0.02  # twelve objects, each of another colour
    again = make_bank(tmp_path, "mug", 96, 0)
    assert torch.equal(again.pictures, bank.pictures)
    assert torch.equal(make_bank(tmp_path, "mug", 96, 0).angles, again.angles)
    assert any(world.held_out(world.Spec("mug", name)) for name in world.COLOURS)


def test_losses_are_the_non_saturating_ones_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    soft = lambda x: float(np.log1p(np.exp(x)))  # noqa: E731 - softplus
    by_hand = (soft(0) + soft(-2)) / 2 + (soft(-1) + soft(1)) / 2
    assert float(generator_loss(logits)) == pytest.approx(by_hand, rel=1e-5)
    real = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    fakes = (soft(0) + soft(2)) / 2 + (soft(1) + soft(-1)) / 2
    reals = (soft(-3) + soft(-1)) / 2 + soft(0)
    assert float(discriminator_loss(real, logits)) == pytest.approx(fakes + reals, rel=1e-5)


def test_r1_of_linear_discriminators_is_half_gamma_times_their_squared_weights():
    torch.manual_seed(0)
    weights = torch.randn(2, 3 * 5 * 5, requires_grad=True)
    penalty = r1(lambda x: x.flatten(1) @ weights.t(), torch.randn(7, 3, 5, 5), gamma=3.0)
    torch.testing.assert_close(penalty, 1.5 * weights.square().sum())
    (gradient,) = torch.autograd.grad(penalty, weights)
    torch.testing.assert_close(gradient, 3.0 * weights)


def test_r1_of_a_square_is_its_slope():
    """D = (sum x)^2 has the gradient 2 sum x at each of the n numbers: gamma / 2 * mean of 4 n (sum x)^2."""
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]]).view(2, 1, 1, 2)
    penalty = r1(lambda x: x.sum((1, 2, 3)).square()[:, None], x, gamma=1.0)
    assert penalty.item() == pytest.approx(0.5 * (8 * 9 + 8 * 0.25) / 2)


def test_discriminators_hear_the_camera_colours_and_coverage():
    torch.manual_seed(0)
    discriminator, x = Discriminator(), torch.rand(4, 4, 64, 64)
    angles = torch.tensor([[0.0, 10.0], [90.0, 10.0], [180.0, 30.0], [270.0, 30.0]])
    logits = discriminator(x, angles)
    assert logits.shape == (4, 2) and camera_numbers(angles).shape == (4, 14)
    turned = discriminator(x, angles + torch.tensor([45.0, 0.0]))
    assert ((turned - logits).abs() > 1e-3).all()
    assert ((discriminator(x, angles + torch.tensor([0.0, 10.0])) - logits).abs() > 1e-4).all()
    bare, lit = x.clone(), x.clone()
    bare[:, 3], lit[:, 0] = 1.0, 1.0
    assert torch.equal(discriminator(bare, angles)[:, 0], logits[:, 0])
    assert not torch.equal(discriminator(bare, angles)[:, 1], logits[:, 1])
    assert torch.equal(discriminator(lit, angles)[:, 1], logits[:, 1])
    assert not torch.equal(discriminator(lit, angles)[:, 0], logits[:, 0])


def test_deviation_is_that_of_a_group_at_one_place():
    x = torch.tensor([1.0, 10.0, 3.0, 10.0, 5.0, 10.0, 7.0, 10.0]).view(8, 1, 1, 1)
    spread = deviation(x)  # of 1, 3, 5, 7 in one group, of four tens in the other
    assert spread.flatten().tolist() == pytest.approx([5**0.5, 1e-4] * 4, abs=1e-3)


def test_a_resumed_training_is_the_uninterrupted_one(bank, tmp_path):
    whole, first = training(bank, tmp_path / "whole"), training(bank, tmp_path / "parts")
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    first.save()
    second = training(bank, tmp_path / "parts")
    assert second.step_index == 2
    for _ in range(2):
        second.step()
    for name in ("generator", "average", "discriminator"):
        pairs = zip(getattr(second, name).state_dict().items(), getattr(whole, name).state_dict().items(), strict=True)
        for (key, value), (_, truth) in pairs:
            assert torch.equal(value, truth), f"{name}.{key}"
    states = [t.optimisers["g"].state_dict()["state"] for t in (second, whole)]
    assert all(torch.equal(states[0][k]["exp_avg_sq"], states[1][k]["exp_avg_sq"]) for k in states[1])


def test_average_follows_the_generator_and_is_what_is_exported(bank, tmp_path, monkeypatch):
    run = training(bank, tmp_path / "gan" / "mug", steps=2)
    run.run()
    assert (tmp_path / "gan" / "mug" / "000002.png").is_file()
    monkeypatch.setattr(trainer, "GanSizes", lambda: TINY)
    export(tmp_path / "gan", tmp_path / "out")
    model = load_model(tmp_path / "out")
    assert model.sizes.classes == ("mug",) and "robot" in model.sizes.others and "mug" not in model.sizes.others
    truth, start = run.average.state_dict(), run.generator.state_dict()
    value = model.generators["mug"].state_dict()["first.1.weight"]
    torch.testing.assert_close(value, truth["first.1.weight"], atol=2e-3, rtol=1e-3)
    assert not torch.equal(truth["first.1.weight"], start["first.1.weight"])


def test_classes_that_the_world_has_not_and_empty_folders_are_refused(tmp_path):
    args = SimpleNamespace(work=tmp_path, data=tmp_path, out=tmp_path, classes="mug,sofa", device="cpu")
    with pytest.raises(SystemExit, match="the world has no sofa"):
        trainer.train_gan(args)
    with pytest.raises(SystemExit, match="no trained class"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_short_training_lowers_the_discriminators_loss_and_draws_no_constant(bank, tmp_path):
    run = training(bank, tmp_path, steps=150, sizes=GanSizes(cells=12))
    run.run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["d"] < log[0]["d"] and np.isfinite(log[-1]["g"])
    z = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    views = trainer.camera(torch.zeros(4), torch.full((4,), 20.0))
    with torch.no_grad():
        styles = run.average.map_geo(z[0]), run.average.map_tex(z[1])
        pictures, _, _ = trainer.fakes(run.average, run.grid, *styles, views)
    assert 0.02 < pictures.mask.mean() < 0.6 and pictures.colour.std() > 0.05
    assert not torch.allclose(pictures.colour[0], pictures.colour[1])
