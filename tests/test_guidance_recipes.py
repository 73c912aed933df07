"""The recipes that benchmarks.quality.guidance compares: plain SDS, one for each rule, plain SDS with one cure each."""

import pytest
import torch

from benchmarks.quality.systems import CURES, cures, find_system
from pipeline.config.model import load_config
from pipeline.config.recipes import find_recipe
from pipeline.priors.sources import check_priors
from stages.guidance.diffusion.presets import find_preset
from stages.guidance.guidance import GuidanceSettings
from stages.guidance.prior import path_alphas_cumprod, scaled_linear_alphas_cumprod
from stages.guidance.residuals import RULES
from stages.prompts import PromptSettings
from tests import tiny_families, tiny_folders

RULE_RECIPES = {"csd": "csd", "nfsd": "nfsd", "ism": "ism", "sdi": "sdi", "vsd": "vsd", "hifa": "sds"}


def differences(a, b, path=""):
    """Dotted names of the settings in which two models differ."""
    found = []
    for name in type(a).model_fields:
        left, right = getattr(a, name), getattr(b, name)
        if hasattr(left, "model_fields"):
            found += differences(left, right, f"{path}{name}.")
        elif left != right:
            found.append(path + name)
    return found


def test_plain_sds_is_dreamfusions_whatever_the_default_recipe_says():
    sds = load_config("sds", [], {})
    published = {"rule": "sds", "scale": 101.0, "t_min": 0.02, "t_max": 0.98}
    assert sds.guidance.coarse == GuidanceSettings(**published)
    fine = {**published, "t_max": 0.5}
    assert sds.guidance.fine == GuidanceSettings(**fine)
    cured = PromptSettings()
    assert {k: getattr(sds.prompts, k) for k in ("blend", "debias", "per_view", "per_view_negative")} == {
        k: getattr(cured, k) for k in ("blend", "debias", "per_view", "per_view_negative")
    }
    default = load_config(None, [], {})
    assert differences(default.coarse, sds.coarse) == ["field.albedo", "start.source"]
    assert differences(default.fine, sds.fine) == ["field.albedo"]
    assert sds.coarse.field.albedo == sds.fine.field.albedo == "sigmoid"
    assert differences(default.prior, sds.prior) == ["diffusion.camera"]  # DreamFusion's prior knows no camera


@pytest.mark.parametrize("name", sorted(RULE_RECIPES))
def test_rule_recipe_changes_the_default_in_its_guidance_alone(name):
    recipe, default = load_config(name, [], {}), load_config(None, [], {})
    changed = differences(default, recipe)
    assert changed and all(key.startswith("guidance.") or key == "negative" for key in changed)
    for stage in (recipe.guidance.coarse, recipe.guidance.fine):
        assert stage.rule.name == RULE_RECIPES[name]


def test_there_is_a_recipe_for_every_rule_but_sjc():
    """sjc's variance-reduced form is sds."""
    assert {*RULE_RECIPES.values()} == set(RULES) - {"sjc"}


@pytest.mark.parametrize("name", cures())
def test_cure_changes_plain_sds_in_one_thing(name):
    assert find_system(name).meaning == "plain SDS with one rule or cure"
    path = CURES / f"{name.removeprefix('sds+')}.yaml"
    recipe = load_config(str(path), [], {})
    changed = {key.split(".")[-1] for key in differences(load_config("sds", [], {}), recipe)}
    if path.stem in RULE_RECIPES or path.stem == "sjc":  # a rule, with what its paper sets beside it
        assert recipe.guidance.coarse.rule.name == recipe.guidance.fine.rule.name == RULE_RECIPES.get(path.stem, "sjc")
        assert changed <= {
            "rule",
            "name",
            "scale",
            "negative",
            "inversion_steps",
            "rank",
            "lr",
            "timesteps",
            "t_min",
            "t_max",
            "image_term",
        }
    else:
        assert len(changed - {"threshold_range"}) == 1
        assert path.read_text().startswith("# Plain SDS with one cure.")


def test_plain_sds_is_measured_with_every_rule():
    assert {f"sds+{name}" for name in [*RULE_RECIPES, "sjc"]} < set(cures())


REAL = ("stable-diffusion", "deepfloyd-if", "sdxl", "flow")
TINY = {
    "stable-diffusion": {"coarse": tiny_folders.stable_diffusion, "fine": tiny_folders.stable_diffusion},
    "deepfloyd-if": {
        "coarse": lambda folder: tiny_folders.deepfloyd(folder, 77),
        "fine": tiny_folders.stable_diffusion,
    },
    "sdxl": {"coarse": tiny_folders.stable_diffusion, "fine": tiny_families.sdxl},
    "flow": {"coarse": tiny_families.sd3, "fine": tiny_families.sd3},
}


@pytest.mark.parametrize("name", REAL)
def test_recipe_for_real_weights_is_accepted_with_them_and_before_they_are_here(name, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    recipe = load_config(name, [], {})
    for source in (recipe.prior.coarse, recipe.prior.fine):
        assert find_preset(source).status != "withdrawn"
    check_priors(recipe)
    folders = {stage: build(tmp_path / stage) for stage, build in TINY[name].items()}
    words = [f"prior.{stage}={folder}" for stage, folder in folders.items()]
    words += ["prior.diffusion.resolution=64"] if name == "flow" else []
    check_priors(load_config(name, words, {"prompt": "a mug"}))
    assert "not run by us with real weights" in find_recipe(name).read_text().lower()


@pytest.mark.parametrize("name", REAL)
def test_recipe_for_real_weights_has_a_cure_for_each_known_fault_of_sds(name):
    recipe = load_config(name, [], {})
    assert recipe.prompts.blend == "perp_neg" and recipe.prompts.debias and recipe.negative
    for guidance in (recipe.guidance.coarse, recipe.guidance.fine):
        assert guidance.rescale > 0 or guidance.threshold != "none" or guidance.rule.name == "csd"


def test_published_scale_of_deepfloyd_is_its_own_stages_alone():
    recipe = load_config("deepfloyd-if", [], {})
    assert (recipe.guidance.coarse.scale, recipe.guidance.fine.scale) == (20, 100)


def test_fractions_of_the_flow_recipe_are_as_noisy_as_those_of_stable_diffusion():
    """Of a flow with Stable Diffusion 3's shift: sigma = 3 k / (1 + 2 k), alpha_bar by its ratio of signal to noise."""
    flow, ours = load_config("flow", [], {}).guidance, load_config("stable-diffusion", [], {}).guidance
    alphas_cumprod = scaled_linear_alphas_cumprod()
    for mine, theirs in ((flow.coarse, ours.coarse), (flow.fine, ours.fine)):
        ramps = (mine.t_min, theirs.t_min), (mine.t_max, theirs.t_max)
        for k, t in ((a.at(share), b.at(share)) for a, b in ramps for share in (0.0, 1.0)):
            sigma = torch.tensor(3 * k / (1 + 2 * k))
            wanted = alphas_cumprod[round(1000 * t)].item()
            assert path_alphas_cumprod(1 - sigma, sigma).item() == pytest.approx(wanted, rel=0.03, abs=1e-3)


def test_every_line_of_a_guidance_recipe_fits_and_says_why():
    for path in [*(find_recipe(name) for name in ("sds", *RULE_RECIPES, *REAL)), *CURES.glob("*.yaml")]:
        assert all(len(line) <= 120 for line in path.read_text().splitlines()), path
