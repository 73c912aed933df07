"""What the picture errors say of worsened truths."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import pictures
from benchmarks.quality.pictures import gradient_similarity, picture_facts, psnr
from benchmarks.quality.render import Subject
from stages.pocket import world
from stages.pocket.build import build


def truth_of(caption: str) -> Subject:
    return Subject.of(build(world.parse(caption)))


@pytest.mark.slow
def test_an_asset_that_is_its_truth_has_no_error() -> None:
    robot = truth_of("a blue robot")
    facts = picture_facts(robot, robot)
    assert facts["psnr"] == pytest.approx(90) and facts["edges"] == pytest.approx(1)
    assert facts["normal_deg"] < 0.1


def test_psnr_of_a_constant_error_is_its_own() -> None:
    picture = torch.full((1, 8, 8, 3), 0.4)
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    assert psnr(picture + 0.1, picture, mask) == pytest.approx(20, abs=1e-3)
    assert math.isnan(psnr(picture, picture, ~mask))


@pytest.mark.slow
def test_each_error_is_seen_by_its_own_measure(monkeypatch) -> None:
    monkeypatch.setattr(pictures, "SIDE", 256)  # a quarter of the time; the one above has the full size
    robot = truth_of("a blue robot")
    plain = replace(robot, colours=robot.colours.mean(0).expand_as(robot.colours).contiguous())
    small = replace(robot, vertices=robot.vertices * 0.9)
    bent = replace(robot, normals=torch.nn.functional.normalize(robot.normals + 0.3, dim=-1))
    facts = {name: picture_facts(s, robot) for name, s in {"plain": plain, "small": small, "bent": bent}.items()}
    assert facts["plain"]["normal_deg"] < 0.1 and facts["plain"]["psnr"] < 25 and facts["plain"]["edges"] < 0.95
    assert facts["small"]["psnr"] < 22
    assert 5 < facts["bent"]["normal_deg"] < 30


def test_a_missing_edge_costs_as_much_as_one_too_much() -> None:
    flat = torch.full((1, 16, 16, 3), 0.5)
    edge = flat.clone()
    edge[:, :, 8:] = 0.9
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    first, second = gradient_similarity(flat, edge, mask), gradient_similarity(edge, flat, mask)
    assert first == pytest.approx(second) and first < 0.8  # two of eight columns see it
