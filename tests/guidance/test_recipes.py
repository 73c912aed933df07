"""The recipes that benchmarks.quality.guidance compares: plain SDS, one for each rule, plain SDS with one cure each."""

import pytest
import torch

from benchmarks.quality.systems import CURES, cures, find_system
from pipeline.config.model import load_config
from pipeline.config.recipes import find_recipe
from pipeline.priors.pocket import POCKET
from pipeline.priors.sources import check_priors
from stages.cameras import orbit_views
from stages.guidance import rules
from stages.guidance.diffusion.presets import find_preset
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import path_alphas_cumprod, scaled_linear_alphas_cumprod
from stages.guidance.residuals import RULES
from stages.prompts import PromptSettings, ViewPrompts
from stages.ramp import constant
from tests import tiny_families, tiny_folders

RULE_RECIPES = {"csd": "csd", "nfsd": "nfsd", "ism": "ism", "sdi": "sdi", "vsd": "vsd", "hifa": "sds"}


def differences(a, b, path=""):
    """Dotted names of the settings in which two models differ."""
    keys = []
    for name in type(a).model_fields:
        left, right = getattr(a, name), getattr(b, name)
        if hasattr(left, "model_fields"):
            keys += differences(left, right, f"{path}{name}.")
        elif left != right:
            keys.append(path + name)
    return keys


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
    assert differences(default.coarse, sds.coarse) == ["steps", "field.albedo", "start.source", "lr"]
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


@pytest.mark.parametrize("name", sorted(RULE_RECIPES))
def test_rule_is_laid_over_a_recipe_for_real_weights_without_the_pocket_priors_numbers(name):
    sd, laid, alone = (load_config(n, [], {}) for n in ("stable-diffusion", ["stable-diffusion", name], name))
    changed = differences(sd, laid)
    assert changed and all(key.startswith("guidance.") for key in changed)
    assert laid.negative == sd.negative and laid.prior == sd.prior and laid.coarse == sd.coarse
    for stage in (laid.guidance.coarse, laid.guidance.fine):
        assert stage.rule.name == RULE_RECIPES[name] and stage.strength == pytest.approx(
            rules.strength(stage.scale, stage.rescale) / 100
        )
    if name == "vsd":
        assert (laid.guidance.coarse.rule.lr, laid.guidance.coarse.rule.rank) == (1e-4, 4)  # published
        assert (alone.guidance.coarse.rule.lr, alone.guidance.coarse.rule.rank) == (1e-3, 8)
    if name == "hifa":
        assert (laid.guidance.coarse.scale, laid.guidance.coarse.timesteps) == (100, "sqrt")
        assert (alone.guidance.coarse.scale, alone.guidance.fine.scale) == (2, 4)


@pytest.fixture(scope="module")
def pixels():
    """A prior that reads prompts, in pixels, and two pictures of noise."""
    settings, texts = DiffusionSettings(camera=False), [*ViewPrompts("a red mug").all_texts(), ""]
    prior = load_prior(POCKET / "pixel", "cpu", settings=settings, prompts=texts)
    return prior, torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))


def push(pixels, guidance: GuidanceSettings, t: float | None = None) -> float:
    """Root mean square of a guidance's gradient on x, at one t or over the range."""
    prior, images = pixels
    at = {} if t is None else {"t_min": constant(t), "t_max": constant(t)}
    guide = Guidance(prior, guidance.model_copy(update=at), ViewPrompts("a red mug"), torch.Generator().manual_seed(0))
    return guide(images, orbit_views([0.0, 90.0], 20.0), 0.5).metrics["grad_rms"]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "scale", "rescale"), [("csd", 7.5, 0), ("csd", 100, 0), ("sds", 100, 0.5)])
def test_strength_foretells_what_a_rules_gradient_is_to_plain_guidance(pixels, rule, scale, rescale):
    """Regularisers that are weighed for scale 100 stand to this rule's gradient as they did, within a factor of two."""
    weighed = {"weighting": "uniform", "weighed_for": 100}
    plain, other = (
        GuidanceSettings(scale=100, **weighed),
        GuidanceSettings(rule=rule, scale=scale, rescale=rescale, **weighed),
    )
    for t in (0.2, 0.5, 0.8):
        assert 0.5 < push(pixels, other, t) / push(pixels, plain, t) / (other.strength / plain.strength) < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_high_noise_is_heard_beside_low_noise_wherever_x0_is_bounded(pixels, name):
    """A threshold on x0_hat leaves an eps residual of alpha / sigma at high noise: 0.09 of that at t 0.1."""
    guidance = load_config(name, [], {}).guidance.coarse
    if guidance.threshold == "none":
        pytest.skip("its x0_hat is free")
    assert push(pixels, guidance, 0.9) / push(pixels, guidance, 0.1) > 0.3
    eps = guidance.model_copy(update={"weighting": "uniform"})
    assert push(pixels, eps, 0.9) / push(pixels, eps, 0.1) < 0.3


@pytest.mark.parametrize("name", REAL)
def test_recipe_for_real_weights_is_of_their_size(name):
    recipe = load_config(name, [], {})
    assert recipe.coarse.shading.albedo_until == 0.2  # threestudio: ambient_only_steps 2001 of 10000
    assert (recipe.coarse.field.log2_table, recipe.coarse.field.hidden) == (19, 64)
    assert recipe.coarse.field.finest >= 1024 and recipe.coarse.samples >= 256
    assert recipe.fine.detail.log2_table == 19 and recipe.export.texture_size >= 2048
    assert recipe.fine.cameras.elevation_deg == (-10, 45) and recipe.fine.lr_sdf.start <= 0.001
    assert recipe.fine.cameras.fov_deg == (28, 34)  # the fine stage's own default stays


def test_prolificdreamers_schedules_are_as_published():
    recipe = load_config("prolificdreamer", [], {})
    coarse, guidance = recipe.coarse, recipe.guidance.coarse
    assert guidance.strength == 1 and guidance.rule.lr == 1e-4 and guidance.weighting == "sds"
    for step, side, t_max, opaque in (
        (0, 64, 0.98, 0),
        (4999, 64, 0.98, 0),
        (5000, 512, 0.5, 0),
        (10000, 512, 0.5, 1000),
    ):
        share = step / coarse.steps
        assert round(coarse.resolution * coarse.render_share.at(share)) == side
        assert guidance.t_max.at(share) == t_max and coarse.entropy.at(share) == opaque


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
            expected = alphas_cumprod[round(1000 * t)].item()
            assert path_alphas_cumprod(1 - sigma, sigma).item() == pytest.approx(expected, rel=0.03, abs=1e-3)


def test_every_line_of_a_guidance_recipe_fits_and_says_why():
    for path in [*(find_recipe(name) for name in ("sds", *RULE_RECIPES, *REAL)), *CURES.glob("*.yaml")]:
        assert all(len(line) <= 120 for line in path.read_text().splitlines()), path
