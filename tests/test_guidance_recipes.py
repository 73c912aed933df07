"""The recipes that benchmarks.guidance compares: plain SDS, one for each rule, plain SDS with one cure each."""

import pytest

from benchmarks.systems import CURES, cures, find_system
from pipeline.config import find_recipe, load_config
from stages.guidance.guidance import GuidanceSettings
from stages.guidance.residuals import RULES
from stages.prompts import PromptSettings

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
    published = {"rule": "sds", "scale": 101.0, "t_max_end": None, "t_anneal": sds.guidance.coarse.t_anneal}
    assert sds.guidance.coarse == GuidanceSettings(**published)
    fine = {**published, "t_range": (0.02, 0.5), "t_anneal": sds.guidance.fine.t_anneal}
    assert sds.guidance.fine == GuidanceSettings(**fine)
    cured = PromptSettings()
    assert {k: getattr(sds.prompts, k) for k in ("blend", "debias", "per_view", "per_view_negative")} == {
        k: getattr(cured, k) for k in ("blend", "debias", "per_view", "per_view_negative")
    }
    default = load_config(None, [], {})
    assert (sds.coarse, sds.fine) == (default.coarse, default.fine)
    assert differences(default.prior, sds.prior) == ["diffusion.camera"]  # DreamFusion's prior knows no camera


@pytest.mark.parametrize("name", sorted(RULE_RECIPES))
def test_rule_recipe_changes_the_default_in_its_guidance_alone(name):
    recipe, default = load_config(name, [], {}), load_config(None, [], {})
    changed = differences(default, recipe)
    assert changed and all(key.startswith("guidance.") or key == "negative" for key in changed)
    for stage in (recipe.guidance.coarse, recipe.guidance.fine):
        assert stage.rule == RULE_RECIPES[name]


def test_there_is_a_recipe_for_every_rule_but_sjc():
    """sjc's variance-reduced form is sds."""
    assert {*RULE_RECIPES.values()} == set(RULES) - {"sjc"}


@pytest.mark.parametrize("name", cures())
def test_cure_changes_plain_sds_in_one_thing(name):
    assert find_system(name).meaning == "plain SDS with one cure"
    path = CURES / f"{name.removeprefix('sds+')}.yaml"
    changed = differences(load_config("sds", [], {}), load_config(str(path), [], {}))
    assert len({key.split(".")[-1] for key in changed} - {"threshold_range"}) == 1
    assert path.read_text().startswith("# Plain SDS with one cure.")


def test_every_line_of_a_guidance_recipe_fits_and_says_why():
    for path in [*(find_recipe(name) for name in ("sds", *RULE_RECIPES)), *CURES.glob("*.yaml")]:
        assert all(len(line) <= 120 for line in path.read_text().splitlines()), path
