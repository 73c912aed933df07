"""The gan stage: refused without networks and for other classes, resumed to the bit, chosen by the words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from pipeline import cli, doctor, generate, load_config
from pipeline.runs.lineage import upstream_of
from stages.errors import UserError
from stages.fine import FineSettings, FineStage
from stages.gan.model import Sizes, load_model
from stages.gan.stage import GanSettings, GanStage, class_of
from stages.mesh.measure import measure
from tests.stages.drafts.gan_cases import CLASSES, OTHERS, TINY, tiny_networks
from tests.stages.drafts.networks import networks_of
from tests.tiny_clip import guide_of

CPU = torch.device("cpu")
networks = networks_of(tiny_networks)
SMALL = {"steps": 4, "samples": 6, "resolution": 16}


class Redness:
    """A guide whose joint space has a picture's mean colour; the words' direction is from green to red."""

    def __init__(self, prompt: str = "a red mug") -> None:
        self.prompt, self.shown = prompt, []

    def embed(self, images):
        self.shown.append(images.mean((1, 2)))
        return self.shown[-1]

    def embed_words(self, texts):
        assert texts == [self.prompt, f"a {self.prompt.split()[-1]}"]
        return torch.tensor([[3.0, 1.0, 5.0], [2.0, 2.0, 5.0]])

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state


def make(networks, guidance=None, seed=0, **settings):
    chosen = GanSettings(weights=str(networks), **(SMALL | settings))
    return GanStage(chosen, guidance or Redness(), CPU, seed)


def run(stage):
    return [stage.step() for _ in range(stage.steps - stage.step_index)]


def test_without_networks_the_stage_is_refused_in_three_lines(tmp_path):
    with pytest.raises(UserError) as refused:
        GanStage(GanSettings(weights=str(tmp_path)), None, CPU, 0)
    assert refused.value.what == "The gan stage has no networks"
    assert "config.json" in refused.value.why and "stages.pocket.train gan" in refused.value.fix


def test_damaged_networks_are_refused(networks, tmp_path):
    (tmp_path / "config.json").write_bytes((networks / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((networks / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="Cannot load the gan networks"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [("a red robot", "robot"), ("a red mug on a blue car", "mug and car"), ("a red thing", "none of them")],
)
def test_prompts_of_no_class_or_of_two_are_refused_by_name(networks, prompt, named):
    with pytest.raises(UserError) as refused:
        make(networks, Redness(prompt))
    assert prompt in refused.value.what and f"it names {named}, " in refused.value.why
    assert "car, mug" in refused.value.why and "--classes" in refused.value.fix


def test_the_class_is_the_one_that_the_prompt_names():
    sizes = Sizes(TINY, CLASSES, OTHERS)
    assert class_of("A red striped MUG, side view", sizes) == "mug" and class_of("car", sizes) == "car"
    with pytest.raises(UserError, match="cannot draw 'a mug beside a robot'"):
        class_of("a mug beside a robot", sizes)


def test_a_run_for_another_class_is_refused_before_any_work(networks, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--stages", "gan", "--out", str(out), f"gan.weights={networks}"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "--prompt", "a red robot", *words])
    assert "cannot draw 'a red robot'" in capsys.readouterr().err and not out.exists()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "--prompt", "a red car", *words[:-1], f"gan.weights={tmp_path / 'none'}"])
    assert "The gan stage has no networks" in capsys.readouterr().err and not out.exists()


def test_a_prior_that_compares_no_pictures_is_refused(networks):
    class Diffusion:
        prompt = "a red mug"

    with pytest.raises(UserError, match="cannot choose by the prompt"):
        make(networks, Diffusion())


def test_the_latents_nearest_to_the_words_are_taken_and_their_colours_move_towards_them(networks):
    guide = Redness()
    stage = make(networks, guide, samples=20, lr=0.1, steps=12)
    chosen = stage.step()
    looks = [torch.cat(guide.shown[k::3]) for k in range(3)]  # two batches, three looks of each
    away = [colours - colours.mean(0) for colours in looks]  # StyleGAN-NADA eq. 3, from the mean picture of a look
    direction = torch.tensor([1.0, -1.0, 0.0]) / 2**0.5
    nearness = sum(part @ direction / part.norm(dim=1) for part in away) / 3
    assert len(nearness) == 20 and chosen["clip"] == pytest.approx(100 * float(nearness.max()), rel=1e-4)
    geometry, texture = stage.w_geo.clone(), stage.w_tex.clone()
    later = run(stage)
    assert later[-1]["clip"] > chosen["clip"] + 1 and "CLIP" in stage.headline(later[-1])
    assert torch.equal(stage.w_geo, geometry) and not torch.equal(stage.w_tex, texture)


def test_stage_is_the_seeds_the_words_and_the_classes_and_resumes_to_the_bit(networks, clip):
    guide = lambda prompt="a red mug": guide_of(clip, prompt)  # noqa: E731 - a fresh one for each stage
    whole, halves = make(networks, guide()), make(networks, guide())
    assert all(np.isfinite(metrics["clip"]) for metrics in run(whole))
    for stop in (1, 2, 4):  # after the choice, while colours move, at the end
        while halves.step_index < stop:
            halves.step()
        resumed = make(networks, guide())
        resumed.load_state_dict({name: value.clone() for name, value in halves.state_dict().items()})
        halves = resumed
    assert torch.equal(halves.w_tex, whole.w_tex) and torch.equal(halves.w_geo, whole.w_geo)
    for other in (make(networks, guide(), seed=1), make(networks, guide("a red car"))):
        run(other)
        assert not torch.equal(other.w_tex, whole.w_tex)
    finished = GanStage(whole.settings, None, CPU, 0)  # as export makes it
    finished.load_state_dict(other.state_dict())
    assert np.array_equal(finished.finish().mesh.vertices, other.finish().mesh.vertices)


def test_draft_has_previews_and_a_closed_mesh_with_colours(networks):
    stage = make(networks)
    assert stage.preview().shape == (32, 96, 3)
    run(stage)
    asset = stage.finish()
    report = measure(asset.mesh)
    assert report.solid and report.nonmanifold_edges == 0
    assert asset.mesh.colours.min() >= 0 and asset.mesh.colours.max() <= 1
    points = torch.from_numpy(asset.mesh.vertices[:5])
    torch.testing.assert_close(asset.albedo(points), torch.from_numpy(asset.mesh.colours[:5]))


def test_fine_stage_takes_the_drafts_surface_and_its_colours(networks):
    stage = make(networks)
    run(stage)
    asset = stage.finish()
    settings = FineSettings(tets=24, field={"levels": 4, "log2_table": 10, "finest": 32})
    fine = FineStage(settings, None, CPU, 0, asset)
    mesh = fine.finish().mesh
    assert np.allclose(mesh.vertices.min(0), asset.mesh.vertices.min(0), atol=0.05)
    assert np.allclose(mesh.vertices.max(0), asset.mesh.vertices.max(0), atol=0.05)
    assert fine.start["start_colour_error"] < 0.05


def test_draft_leaves_as_a_closed_mesh_from_a_run_that_is_the_same_again(networks, clip, tmp_path):
    small = {"texture_size": 64, "turntable_frames": 0, "unwrap": "boxes", "tets": 24}
    settings = {f"export.{name}": value for name, value in small.items()}
    settings |= {"prior.gan": f"clip:{clip}", "gan.weights": str(networks)}
    settings |= {f"gan.{name}": value for name, value in SMALL.items()}
    result = generate("a red mug", stages="gan", settings=settings, out=tmp_path / "run", quiet=True)
    assert len(result.metrics) == 4
    again = generate("a red mug", stages="gan", settings=settings, out=tmp_path / "again", quiet=True)
    assert again.files["glb"].read_bytes() == result.files["glb"].read_bytes()
    mesh = trimesh.load(result.files["glb"], force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # where charts meet
    assert mesh.is_watertight


def test_fine_goes_on_from_the_draft_of_the_same_run():
    both = load_config(None, [], {"stages": "gan,fine"})
    assert both.prior.gan == "clip:pocket" and both.fine.steps == load_config("default").fine.steps
    assert upstream_of(both, "fine") == "gan/checkpoint.safetensors" and upstream_of(both, "gan") is None


def test_doctor_has_a_row_for_the_networks():
    (row,) = [finding for finding in doctor.examine() if finding.name == "networks of gan"]
    assert not row.required and row.state in ("ok", "missing")
