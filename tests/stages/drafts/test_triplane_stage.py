"""The triplane stage: refused without networks, resumed to the bit, drawn, handed on to the fine stage and to files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import doctor, generate, load_config
from pipeline.runs.lineage import upstream_of
from stages.errors import UserError
from stages.fine import FineSettings, FineStage
from stages.triplane.model import load_model
from stages.triplane.stage import TriplaneSettings, TriplaneStage
from tests.stages.drafts.networks import networks_of
from tests.stages.drafts.triplane_cases import load_ball, tiny_networks
from tests.tiny_clip import guide_of, openai_like

CPU = torch.device("cpu")
networks = networks_of(tiny_networks)


@pytest.fixture
def balls(monkeypatch):
    monkeypatch.setattr("stages.triplane.stage.load_model", load_ball)


def make(networks, clip, prompt="a red ball", seed=0, **settings):
    chosen = TriplaneSettings(weights=str(networks), **({"steps": 4, "upsampling": 2, "resolution": 16} | settings))
    return TriplaneStage(chosen, guide_of(clip, prompt), CPU, seed)


def test_without_networks_the_stage_is_refused_in_three_lines(tmp_path):
    with pytest.raises(UserError) as refused:
        TriplaneStage(TriplaneSettings(weights=str(tmp_path)), None, CPU, 0)
    assert refused.value.what == "The triplane stage has no networks"
    assert "config.json" in refused.value.why and "stages.pocket.train triplane" in refused.value.fix


def test_damaged_networks_are_refused(networks, tmp_path):
    (tmp_path / "config.json").write_bytes((networks / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((networks / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="Cannot load the tri-plane networks"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"channels": 2}')
    with pytest.raises(UserError, match="Cannot load the tri-plane networks"):
        load_model(tmp_path)


def test_another_clip_and_a_prior_that_is_none_are_refused(networks, tmp_path):
    with pytest.raises(UserError, match="was not trained with this CLIP"):
        make(networks, openai_like(tmp_path / "openai"))

    class Diffusion:
        pass

    with pytest.raises(UserError, match="cannot read the prompt"):
        TriplaneStage(TriplaneSettings(weights=str(networks)), Diffusion(), CPU, 0)


def test_steps_must_leave_some_for_the_base():
    with pytest.raises(ValueError, match="wanted fewer than the 10 steps"):
        TriplaneSettings(steps=10, upsampling=10)


def test_sampling_is_the_seeds_and_the_words_and_resumes_to_the_bit(networks, clip):
    whole, halves = make(networks, clip), make(networks, clip)
    for _ in range(4):
        metrics = whole.step()
    assert whole.x0.shape[-1] == 48 and torch.isfinite(whole.x0).all() and whole.x0.std() > 0
    assert "noise" in whole.headline(metrics)
    for stop in (1, 3, 4):  # in the base, and in the upsampler
        while halves.step_index < stop:
            halves.step()
        resumed = make(networks, clip)
        resumed.load_state_dict({name: value.clone() for name, value in halves.state_dict().items()})
        halves = resumed
    assert torch.equal(halves.x0, whole.x0)
    for other in (make(networks, clip, seed=1), make(networks, clip, prompt="a blue mug")):
        while other.step_index < 4:
            other.step()
        assert not torch.equal(other.x0, whole.x0)


def test_without_upsampling_the_low_planes_are_the_result(networks, clip):
    stage = make(networks, clip, steps=2, upsampling=0)
    stage.step(), stage.step()
    assert stage.x0.shape[-1] == 24 and stage.x0 is stage.low


@pytest.mark.parametrize(
    ("logit", "what"), [(-90.0, "empty box"), (190.0, "filled its box"), (float("nan"), "broken field")]
)
def test_box_without_an_object_is_refused(networks, clip, balls, logit, what):
    stage = make(networks, clip)
    with torch.no_grad():
        stage.model.decoder.out.bias[0] = logit
    with pytest.raises(UserError, match=what):
        stage.finish()


def test_draft_has_previews_density_and_colours(networks, clip, balls):
    stage = make(networks, clip)
    picture = stage.preview()
    assert picture.shape == (32, 96, 3) and picture.dtype == np.uint8
    assert picture[8, 8, 0] > picture[8, 8, 1] + 50  # the ball is red
    asset = stage.finish()
    points = torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.7]])
    assert asset.density(points)[0] > 60 and asset.density(points)[1] < 1 and not asset.albedo(points).requires_grad


def test_fine_stage_takes_the_drafts_surface_and_its_colours(networks, clip, balls):
    settings = FineSettings(tets=24, field={"levels": 4, "log2_table": 10, "finest": 32})
    fine = FineStage(settings, None, CPU, 0, make(networks, clip).finish())
    mesh = fine.finish().mesh
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < 0.05
    assert fine.start["start_colour_error"] < 0.05
    assert (mesh.colours[:, 0] > mesh.colours[:, 1] + 0.3).all()


def test_draft_leaves_as_a_file_from_a_run_that_is_resumed(networks, clip, balls, tmp_path):
    small = {"texture_size": 64, "turntable_frames": 0, "unwrap": "boxes", "tets": 24}
    settings = {f"export.{name}": value for name, value in small.items()}
    settings |= {"prior.triplane": f"clip:{clip}", "triplane.weights": str(networks), "triplane.steps": 4}
    settings |= {"triplane.upsampling": 2, "triplane.resolution": 16}
    result = generate("a red ball", stages="triplane", settings=settings, out=tmp_path / "run", quiet=True)
    assert result.files["glb"].is_file() and len(result.metrics) == 4
    again = generate("a red ball", stages="triplane", settings=settings, out=tmp_path / "again", quiet=True)
    assert again.files["glb"].read_bytes() == result.files["glb"].read_bytes()


def test_fine_goes_on_from_the_draft_of_the_same_run():
    both = load_config(None, [], {"stages": "triplane,fine"})
    assert both.prior.triplane == "clip:pocket" and both.fine.steps == load_config("default").fine.steps
    assert upstream_of(both, "fine") == "triplane/checkpoint.safetensors" and upstream_of(both, "triplane") is None
    with pytest.raises(UserError, match="each stage once"):
        load_config(None, [], {"stages": "coarse,triplane"})


def test_doctor_has_a_row_for_the_networks():
    (row,) = [finding for finding in doctor.examine() if finding.name == "networks of triplane"]
    assert not row.required and row.state in ("ok", "missing")
