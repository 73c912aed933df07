"""Schedules are shares of a stage: twice the steps of any recipe is the same run, looked at twice as often."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.systems import CURES
from pipeline.config.listing import leaves
from pipeline.config.model import STAGES, Config, load_config
from pipeline.config.recipes import recipes
from stages.coarse import CoarseStage
from stages.errors import UserError
from stages.guidance.guidance import Guidance
from stages.guidance.guide import WHOLE, GuidanceOutput
from stages.guidance.residuals import RuleSettings
from stages.prompts import ViewPrompts
from stages.ramp import Ramp
from stages.render.shade import ALBEDO, sample_shading
from tests.guidance.gaussian_prior import GaussianPrior

NAMES = [*recipes(), *(str(path) for path in sorted(CURES.glob("*.yaml")))]
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
TINY = ["coarse.resolution=16", "coarse.views_per_step=2", "coarse.samples=16", "coarse.occupancy.resolution=16"]
TINY += ["coarse.accumulate=1", "coarse.particles=1", "coarse.field.log2_table=11", "coarse.background.hidden=4"]


def twice(name: str, words: tuple[str, ...] = ()) -> tuple[Config, Config]:
    """A recipe, and the same with twice the steps of every stage."""
    once = load_config(name, [*words], {})
    steps = [f"{stage}.steps={2 * getattr(once, stage).steps}" for stage in STAGES]
    return once, load_config(name, [*words, *steps], {})


def ramps(settings) -> dict[str, Ramp]:
    by_key = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Ramp):
            by_key[name] = value
        elif hasattr(type(value), "model_fields"):
            by_key |= {f"{name}.{key}": ramp for key, ramp in ramps(value).items()}
    return by_key


def albedo_share(settings, steps: int) -> float:
    """Share of the steps before the first that may be shaded, as the stage draws them."""
    always = settings.shading.model_copy(update={"diffuse_probability": 1.0})
    generator = torch.Generator().manual_seed(0)
    return sum(sample_shading(always, step / steps, generator) == ALBEDO for step in range(steps)) / steps


def t_ranges(settings, shares: list[float]) -> list[tuple[float, float]]:
    """Range of timesteps of a stage's own guidance at shares of the stage."""
    settings = settings.model_copy(update={"rule": RuleSettings(), "threshold": "none"})
    guidance = Guidance(GaussianPrior(), settings, ViewPrompts("a mug"), torch.Generator().manual_seed(0))
    return [guidance._timesteps(4, share, WHOLE, torch.Generator().manual_seed(0))[1] for share in shares]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_setting_but_the_steps_differs_in_a_run_of_twice_the_steps(name):
    once, again = twice(name)
    a, b = dict(leaves(once)), dict(leaves(again))
    assert {key for key in a if a[key] != b[key]} == {f"{stage}.steps" for stage in STAGES}
    ours, theirs = ramps(once), ramps(again)
    assert len(ours) >= 20
    for key, ramp in ours.items():
        assert [ramp.at(share) for share in SHARES] == [theirs[key].at(share) for share in SHARES], key


@pytest.mark.parametrize("name", NAMES)
def test_shading_and_timesteps_of_twice_the_steps_are_the_same_at_every_share(name):
    once, again = twice(name)
    for stage in STAGES:
        few, many = getattr(once, stage), getattr(again, stage)
        if "shading" in type(few).model_fields:  # a stage that draws at once renders nothing
            assert albedo_share(few, few.steps) == pytest.approx(albedo_share(many, many.steps), abs=1 / few.steps)
        guidance = getattr(once.guidance, stage), getattr(again.guidance, stage)
        steps = [round(share * few.steps) for share in SHARES]
        ours, theirs = [k / few.steps for k in steps], [2 * k / many.steps for k in steps]
        assert t_ranges(guidance[0], ours) == t_ranges(guidance[1], theirs)


class Nothing:
    """A guidance that pulls at nothing and keeps what it is told."""

    def __call__(self, images, views, progress, textureless, *, backdrop, shading, part):
        self.arguments = progress, textureless, shading
        return GuidanceOutput(0 * images.sum(), {})


def looked_at(config: Config, share: float):
    """What a coarse stage does in the step at a share of its steps."""
    guidance = Nothing()
    stage = CoarseStage(config.coarse, guidance, torch.device("cpu"), 0)
    stage.step_index = round(share * stage.steps)
    stage.step()
    rates = [group["lr"] for group in stage.adam.optimiser.param_groups]
    state = stage.generator.get_state()  # what the occupancy grid looked at, too
    return guidance.arguments, rates, stage.field.bands, state


@pytest.mark.parametrize("name", ["default", "stable-diffusion", "dreamfields", "reference"])
def test_step_of_the_coarse_stage_at_a_share_is_the_same_whatever_the_steps(name):
    once, again = twice(name, (*TINY, "coarse.field.bands=[0.25, 1, 0, 0.5]", "coarse.occupancy.every=1"))
    for share in SHARES:
        a, b = looked_at(once, share), looked_at(again, share)
        assert a[:2] == b[:2] and torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])


@pytest.mark.parametrize(
    ("name", "share"),
    [("default", 0.75), *((name, 0.2) for name in ("stable-diffusion", "deepfloyd-if", "sdxl", "flow"))],
)
def test_recipe_shows_plain_albedo_for_the_share_that_its_source_does(name, share):
    """threestudio's magic3d-coarse-sd: ambient_only_steps 2001 of 10000."""
    coarse = load_config(name, [], {}).coarse
    assert albedo_share(coarse, coarse.steps) == pytest.approx(share, abs=1 / coarse.steps)


@pytest.mark.parametrize(
    "word",
    ["coarse.shading.albedo_steps=150", "coarse.lr_end=0.1", "guidance.coarse.t_range=[0.1, 0.9]",
     "coarse.field.bands_start=4", "coarse.transmittance.until=0.1", "clipmesh.laplacian_decades=3"],
)  # fmt: skip
def test_schedules_in_steps_and_in_other_notations_are_unknown(word):
    with pytest.raises(UserError, match="unknown key"):
        load_config(None, [word], {})
