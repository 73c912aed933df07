"""The points stage: refused without networks, resumed to the bit, by picture and words, handed on and to files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from pipeline import doctor, generate, load_config
from pipeline.runs.lineage import upstream_of
from stages.errors import UserError
from stages.fine import FineSettings, FineStage
from stages.picture import PictureSettings, read_picture
from stages.points.model import load_model
from stages.points.stage import PointSettings, PointStage
from stages.stage import Asset
from tests.stages.drafts.networks import networks_of
from tests.stages.drafts.points_cases import load_ball, tiny_networks
from tests.tiny_clip import guide_of, openai_like

CPU = torch.device("cpu")
networks = networks_of(tiny_networks)
SMALL = {"steps": 6, "upsampling": 2, "resolution": 16, "grid": 16}


@pytest.fixture
def balls(monkeypatch):
    monkeypatch.setattr("stages.points.stage.load_model", load_ball)


class Painter:
    """A guide whose prior draws a flat picture of a colour."""

    prompt = "a red ball"

    def __init__(self, colour: float = 0.8) -> None:
        self.colour, self.asked = colour, []

    def picture(self, views, *, steps, scale, generator):
        self.asked.append((len(views), steps, scale))
        return self.colour + 0.1 * torch.rand(1, 64, 64, 3, generator=generator)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


def make(networks, clip, guidance=None, seed=0, previous=None, **settings):
    chosen = PointSettings(weights=str(networks), clip=str(clip), **(SMALL | settings))
    return PointStage(chosen, guidance or Painter(), CPU, seed, previous)


def run(stage):
    while stage.step_index < stage.steps:
        metrics = stage.step()
    return metrics


def test_without_networks_the_stage_is_refused_in_three_lines(tmp_path):
    with pytest.raises(UserError) as refused:
        PointStage(PointSettings(weights=str(tmp_path)), None, CPU, 0)
    assert refused.value.what == "The points stage has no networks"
    assert "config.json" in refused.value.why and "stages.pocket.train points" in refused.value.fix


def test_damaged_networks_are_refused(networks, tmp_path):
    (tmp_path / "config.json").write_bytes((networks / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((networks / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="Cannot load the point networks"):
        load_model(tmp_path)


def test_another_clip_and_a_prior_that_cannot_draw_are_refused(networks, clip, tmp_path):
    with pytest.raises(UserError, match="was not trained with this CLIP"):
        make(networks, openai_like(tmp_path / "openai"))
    with pytest.raises(UserError, match="nothing to draw the picture with"):
        make(networks, clip, guide_of(clip))
    assert make(networks, clip, guide_of(clip), condition="words").scorer is not None


def test_steps_must_leave_some_for_the_base():
    with pytest.raises(ValueError, match="wanted fewer than steps - 1 = 9"):
        PointSettings(steps=10, upsampling=9)


def test_sampling_is_the_seeds_and_resumes_to_the_bit(networks, clip):
    whole, halves = make(networks, clip), make(networks, clip)
    metrics = run(whole)
    assert metrics["points"] == 4096 and np.isfinite(metrics["spread"]) and "4096 points" in whole.headline(metrics)
    assert whole.guidance.asked == [(1, 25, 1.0)]
    for stop in (1, 3, 5, 6):  # after the picture, in the base, in the upsampler, at the end
        while halves.step_index < stop:
            halves.step()
        resumed = make(networks, clip)
        resumed.load_state_dict({name: value.clone() for name, value in halves.state_dict().items()})
        halves = resumed
    assert torch.equal(halves.low, whole.low) and torch.equal(halves.high, whole.high)
    other = make(networks, clip, seed=1)
    run(other)
    assert not torch.equal(other.low, whole.low)


def test_words_and_picture_are_each_heard_where_they_are_asked_for(networks, clip):
    clouds = {}
    for condition in ("both", "picture", "words"):
        for name, guidance in (("plain", Painter()), ("darker", Painter(0.2)), ("blue", Painter())):
            guidance.prompt = "a blue mug" if name == "blue" else guidance.prompt
            stage = make(networks, clip, guidance, condition=condition, steps=3, upsampling=0)
            run(stage)
            clouds[condition, name] = stage.low
    heard = {key: not torch.equal(cloud, clouds[key[0], "plain"]) for key, cloud in clouds.items()}
    assert heard["both", "darker"] and heard["both", "blue"]
    assert heard["picture", "darker"] and not heard["picture", "blue"]
    assert not heard["words", "darker"] and heard["words", "blue"]


def test_a_given_picture_takes_the_place_of_one_that_is_drawn(networks, clip, tmp_path):
    image = np.zeros((96, 96, 4), np.uint8)
    image[16:80, 32:64] = (255, 0, 0, 255)
    Image.fromarray(image).save(tmp_path / "red.png")
    picture = read_picture(PictureSettings(fit=False), tmp_path / "red.png")
    stage = make(networks, clip, guide_of(clip), previous=Asset(picture=picture))
    stage.step()
    assert stage.picture.shape == (1, 64, 64, 3) and torch.equal(stage.picture, picture.colour_at(64))
    assert torch.allclose(stage.picture[0, 32, 32], torch.tensor([1.0, 0, 0]), atol=0.02)
    assert stage.condition.grid.abs().max() > 0 and stage.condition.vector.abs().max() > 0


@pytest.mark.parametrize(("distance", "what"), [(9.0, "empty box"), (-9.0, "filled its box")])
def test_box_without_an_object_is_refused(networks, clip, balls, monkeypatch, distance, what):
    monkeypatch.setattr("stages.points.stage.distance_grid", lambda *_: torch.full((16, 16, 16), distance))
    with pytest.raises(UserError, match=what):
        make(networks, clip).finish()


def test_draft_has_previews_points_density_and_colours(networks, clip, balls):
    stage = make(networks, clip, grid=32)
    run(stage)
    picture = stage.preview()
    assert picture.shape == (16, 96, 3) and picture[8, 24, 0] > picture[8, 24, 1] + 50  # the ball is red
    asset = stage.finish()
    points = torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.7]])
    assert asset.density(points)[0] > 60 and asset.density(points)[1] < 1 and len(asset.cloud) == 4096
    assert (asset.albedo(points)[:, 0] > 0.5).all() and (asset.albedo(points)[:, 1] < 0.1).all()


def test_fine_stage_takes_the_drafts_surface_and_its_colours(networks, clip, balls):
    stage = make(networks, clip, grid=32)
    run(stage)
    settings = FineSettings(tets=24, field={"levels": 4, "log2_table": 10, "finest": 32})
    fine = FineStage(settings, None, CPU, 0, stage.finish())
    mesh = fine.finish().mesh
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < 0.06
    assert fine.start["start_colour_error"] < 0.05


def test_draft_leaves_as_mesh_and_points_from_a_run(networks, clip, balls, tmp_path):
    small = {"texture_size": 64, "turntable_frames": 0, "unwrap": "boxes", "tets": 24}
    settings = {f"export.{name}": value for name, value in small.items()}
    settings |= {"prior.points": f"clip:{clip}", "points.weights": str(networks), "points.clip": str(clip)}
    settings |= {f"points.{name}": value for name, value in (SMALL | {"condition": "words"}).items()}
    result = generate("a red ball", stages="points", settings=settings, out=tmp_path / "run", quiet=True)
    assert result.files["glb"].is_file() and len(result.metrics) == 6
    cloud = trimesh.load(tmp_path / "run" / "points.ply")
    assert len(cloud.vertices) == 4096 and abs(np.linalg.norm(cloud.vertices, axis=1) - 0.5).max() < 1e-3
    mesh = trimesh.load(result.files["glb"], force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # where charts meet
    assert mesh.is_watertight


def test_fine_goes_on_from_the_draft_of_the_same_run():
    both = load_config(None, [], {"stages": "points,fine"})
    assert both.prior.points == "pocket" and both.fine.steps == load_config("default").fine.steps
    assert upstream_of(both, "fine") == "points/checkpoint.safetensors" and upstream_of(both, "points") is None


def test_doctor_has_a_row_for_the_networks():
    (row,) = [finding for finding in doctor.examine() if finding.name == "networks of points"]
    assert not row.required and row.state in ("ok", "missing")
