"""The trainer of the point system: objects as clouds, and a short training of all three networks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.guidance.clip import ClipScorer
from stages.pocket import world
from stages.pocket.models import WEIGHTS
from stages.pocket.train.points import trainer
from stages.pocket.train.points.bank import CloudBank
from stages.pocket.train.triplane.bank import COLOURINGS
from stages.points.model import Condition, PointModel, load_model
from stages.points.surface import distance_grid
from tests.stages.drafts.points_cases import tiny_sizes

GROWTH = {"base": ((0.9, 32, 8), (1.0, 64, 4)), "up": ((1.0, 32, 4),), "sdf": ((0.9, 64, 8), (1.0, 128, 4))}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return CloudBank(tmp_path_factory.mktemp("clouds"), 4, 0, chunk=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, bank):
    """A folder after all phases, each of a few steps, and its networks."""
    folder = tmp_path_factory.mktemp("points")
    torch.manual_seed(0)
    model, scorer = PointModel(tiny_sizes()), ClipScorer(WEIGHTS / "clip")
    small = {"GROWTH": GROWTH, "LOW": 64, "SKETCH": 32, "SKETCH_STEPS": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(trainer, name, value)
        for phase, steps in {"base": 150, "up": 100, "sdf": 300}.items():
            trainer.train_phase(phase, model, bank, scorer, folder, 0, steps=steps, lr=4e-3, warmup=5)
    trainer.load_parts(model, folder)
    model.save(folder / "out")
    return folder, model


def losses(path):
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_objects_are_training_captions_in_several_colours_and_read_back_as_made(bank, tmp_path):
    assert len(bank) == 2 * COLOURINGS and bank.geometry.tolist() == [0, 0, 0, 1, 1, 1]
    assert not any(world.held_out(world.parse(text)) for text in bank.captions)
    assert bank.clouds.shape == (6, 4096, 6) and bank.clouds[..., :3].float().norm(dim=-1).max() < 1.01
    assert bank.clouds[..., 3:].abs().max() <= 1 and not torch.equal(bank.clouds[0, :, 3:], bank.clouds[1, :, 3:])
    again = CloudBank(tmp_path, 3, 0, chunk=1)
    assert again.captions == bank.captions[:3] and torch.equal(again.clouds, bank.clouds[:3])
    assert torch.equal(CloudBank(tmp_path, 3, 0, chunk=1).queries, again.queries)


def test_points_lie_where_the_signed_distance_is_nothing(bank):
    """Each query is as far from the nearest point as it says, up to the gaps between points; few are inside out."""
    points, queries = bank.clouds[0, :, :3].float(), bank.queries[0].float()
    gap = torch.cdist(queries[:, :3], points).amin(1) - queries[:, 3].abs()
    assert gap.min() > -0.01 and gap.mean() < 0.02
    assert 0.05 < (queries[:, 3] < 0).float().mean() < 0.7


@pytest.mark.slow
def test_short_trainings_lower_each_loss_and_what_they_sample_is_no_constant(trained):
    folder, model = trained
    for phase, share in {"base": 0.9, "up": 1.0, "sdf": 0.8}.items():
        log = losses(folder / phase / "log.jsonl")
        assert log[-1] < share * log[0], phase
    assert list((folder / "base").glob("*.png")) and list((folder / "up").glob("*.png"))
    condition = Condition(torch.randn(2, 96), torch.randn(2, 4, 144))
    clouds = trainer.sample(model, "base", condition, None, 40, 4, seed=0)
    assert clouds.shape == (2, 40, 6) and clouds.std() > 0.1 and not torch.allclose(clouds[0], clouds[1])


@pytest.mark.slow
def test_trained_distances_are_nearer_than_any_constant(trained, bank):
    _, model = trained
    with torch.no_grad():
        code = model.sdf.encode(bank.clouds[:1, :128, :3].float())
        asked = bank.queries[0].float()
        distance = model.sdf(code, asked[None, :, :3])[0]
    truth = asked[:, 3]
    assert (distance - truth).abs().mean() < 0.8 * (truth - truth.median()).abs().mean()
    assert distance_grid(model.sdf, bank.clouds[0, :, :3].float(), 16).std() > 0


@pytest.mark.slow
def test_a_phase_goes_on_where_it_stopped(trained, bank):
    folder, model = trained
    before = (folder / "sdf" / "log.jsonl").read_text()
    trainer.train_phase("sdf", model, bank, ClipScorer(WEIGHTS / "clip"), folder, 0, steps=300, lr=4e-3, warmup=5)
    assert (folder / "sdf" / "log.jsonl").read_text() == before


@pytest.mark.slow
def test_saved_networks_are_the_trained_ones(trained):
    folder, model = trained
    from_folder, points = load_model(folder / "out"), torch.randn(1, 30, 6)
    assert from_folder.sizes == model.sizes
    told = torch.tensor([300.0]), torch.randn(1, 96), torch.randn(1, 4, 144)
    torch.testing.assert_close(from_folder.base(points, *told), model.base(points, *told), atol=0.02, rtol=0.02)


def test_phases_of_another_system_are_refused(tmp_path):
    args = SimpleNamespace(work=tmp_path, data=tmp_path, out=tmp_path, seed=0, phase="fit", export=False)
    with pytest.raises(SystemExit, match="points has no phase fit"):
        trainer.train_points(args)


def test_rows_are_told_words_pictures_both_or_nothing(bank):
    told = trainer.Told(bank, ClipScorer(WEIGHTS / "clip"))
    condition = told.condition(np.zeros(200, int), np.random.default_rng(0))
    silent = (condition.vector == 0).all(-1), (condition.grid == 0).all((-1, -2))
    shares = [float(part.float().mean()) for part in (*silent, silent[0] & silent[1])]
    truth = trainer.NO_WORDS, trainer.NO_PICTURE, trainer.NO_WORDS * trainer.NO_PICTURE
    assert all(abs(share - other) < 0.1 for share, other in zip(shares, truth, strict=True)) and shares[2] > 0
