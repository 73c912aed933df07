"""Which prior a name means, and what is refused before any work."""

import json

import numpy as np
import pytest

import pipeline.priors as priors
from pipeline.config import load_config
from stages.errors import UserError

WORDS = ["a", "red", "blue", "mug", "car", "on", "table", "and"]


@pytest.fixture
def pocket(tmp_path, monkeypatch):
    """Pocket folders that hold their words alone."""
    folder = tmp_path / "pocket"
    folder.mkdir()
    (folder / "pocket.json").write_text(json.dumps({"words": WORDS}))
    monkeypatch.setattr(priors, "POCKET_FOLDERS", {"coarse": folder, "fine": folder})
    return folder


def config(*overrides: str, **flags):
    return load_config(None, list(overrides), flags)


def test_known_words_pass(pocket):
    priors.check_priors(config(prompt="A red mug, on a blue table"))


def test_unknown_words_are_listed_with_the_known_ones_and_the_way_out(pocket):
    with pytest.raises(UserError) as caught:
        priors.check_priors(config(prompt="a rad mug and a zebra"))
    error = caught.value
    assert "'rad', 'zebra'" in error.why and all(word in error.why for word in WORDS)
    assert "rad -> red" in error.fix and "--force" in error.fix
    assert "--config stable-diffusion prior.coarse=" in error.fix


def test_force_runs_unknown_words(pocket):
    priors.check_priors(config(prompt="a zebra", force=True))


def test_words_are_not_checked_for_other_priors(pocket):
    priors.check_priors(config("prior.coarse=some/model", "prior.fine=some/model", prompt="a zebra"))


def test_only_the_priors_of_the_asked_stages_are_checked(pocket):
    priors.check_priors(config("prior.fine=reference", stages="coarse"))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_pocket_weights_that_are_not_there_are_explained(pocket, damage):
    path = pocket / "pocket.json"
    path.unlink() if damage == "missing" else path.write_text('{"words": ["a"' if damage == "cut" else "{}")
    with pytest.raises(UserError, match="pocket prior") as caught:
        priors.check_priors(config())
    assert "stages.pocket.train" in caught.value.fix


def test_reference_without_a_mesh_says_how_to_name_one():
    with pytest.raises(UserError, match="no mesh") as caught:
        priors.check_priors(config("prior.coarse=reference"))
    assert "reference.mesh=FILE.glb" in caught.value.fix


def test_reference_with_a_missing_mesh_names_it(tmp_path):
    with pytest.raises(UserError, match="Cannot read the mesh .*gone.glb"):
        priors.check_priors(config("prior.coarse=reference", f"reference.mesh={tmp_path / 'gone.glb'}"))


def test_reference_with_a_damaged_mesh_is_refused_before_any_work(tmp_path):
    (tmp_path / "cut.glb").write_bytes(b"glTF\x02\x00")
    with pytest.raises(UserError, match="Cannot read the mesh .*cut.glb"):
        priors.check_priors(config("prior.coarse=reference", f"reference.mesh={tmp_path / 'cut.glb'}"))


@pytest.mark.parametrize("source", ["pockte", "no/such/folder", "./folder"])
def test_name_that_is_no_prior_is_refused(source):
    with pytest.raises(UserError) as caught:
        priors.check_priors(config(f"prior.coarse={source}"))
    assert source in caught.value.what
    assert ("did you mean pocket?" in caught.value.fix) == (source == "pockte")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError):
        priors.check_priors(config(f"prior.coarse={tmp_path}"))


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("guidance.fine.rule=csd", "rule=csd does not fit the prior reference"),
        ("guidance.fine.rule=vsd", "rule=vsd does not fit the prior reference"),
        ("prompts.blend=perp_neg", "prompts.blend=perp_neg does not fit the prior reference"),
    ],
)
def test_rule_that_needs_words_is_refused_before_the_stage_before_it_is_made(tmp_path, pocket, setting, what):
    import trimesh

    trimesh.creation.box().export(tmp_path / "mesh.glb")
    words = ["prior.fine=reference", f"reference.mesh={tmp_path / 'mesh.glb'}", setting]
    with pytest.raises(UserError, match=what):
        priors.check_priors(config(*words, prompt="a red mug"))


def test_reference_prior_has_the_size_of_its_stage(tmp_path):
    from pipeline.export.glb import write_glb
    from stages.mesh.mesh import Mesh

    corners = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.int32)
    write_glb(Mesh(corners, faces), tmp_path / "mesh.glb")
    overrides = ["prior.coarse=reference", "prior.fine=reference", f"reference.mesh={tmp_path / 'mesh.glb'}"]
    chosen = config(*overrides, "fine.resolution=96")
    assert priors.build_prior(chosen, "coarse", "cpu").resolution == 64
    assert priors.build_prior(chosen, "fine", "cpu").resolution == 96
    assert priors.build_prior(config(*overrides, "reference.resolution=32"), "fine", "cpu").resolution == 32


def test_guidance_is_that_of_the_stage(tmp_path, monkeypatch):
    from stages.guidance.reference import ReferencePrior
    from tests.toy_pipeline import octahedron

    prior = ReferencePrior(octahedron(), config().reference)
    monkeypatch.setattr(priors, "build_prior", lambda config, stage, device: prior)
    chosen = config("guidance.fine.scale=3", "negative=ugly", prompt="a red mug")
    guidance = priors.build_guidance(chosen, "fine", "cpu")
    assert guidance.settings.scale == 3 and guidance.settings.t_range == (0.02, 0.75)
    assert guidance.prompts.prompt == "a red mug" and guidance.prompts.negative == "ugly"
