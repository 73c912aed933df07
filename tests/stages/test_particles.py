"""Several coarse fields under one guidance: turns, resume, which one is handed on."""

import pytest
import torch
from pydantic import ValidationError

from pipeline.config.model import load_config
from pipeline.runs.stages import make_stage
from stages.coarse import CoarseSettings, CoarseStage
from stages.errors import UserError
from stages.guidance.guidance import GuidanceOutput
from stages.particles import ParticleSettings, ParticleStage, make_coarse
from stages.stage import Asset

SMALL = dict(resolution=16, views_per_step=1, samples=16, field={"log2_table": 10, "levels": 3})


class Pull:
    """A guidance with a state: pulls renders towards a grey that its own generator draws."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, images, views, progress, textureless=False, **_):
        target = float(torch.rand((), generator=self.generator))
        return GuidanceOutput(10 * (images - target).square().sum(), {"agreement_db": 20 * target})

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def stage(**settings):
    return make_coarse(
        ParticleSettings(**{"steps": 8, "particles": 2} | SMALL | settings), Pull(), torch.device("cpu"), 3
    )


def test_one_particle_is_the_coarse_stage_itself():
    assert type(stage(particles=1)) is CoarseStage
    assert type(stage()) is ParticleStage
    result = make_stage(
        "coarse", ParticleSettings(**{"steps": 8, "particles": 2} | SMALL), Pull(), torch.device("cpu"), 3, None
    )
    assert type(result) is ParticleStage


def test_a_stage_of_one_field_has_no_settings_of_particles():
    with pytest.raises(ValidationError, match="particles"):
        CoarseSettings(particles=2)
    config = load_config(None, ["coarse.particles=2", "coarse.particle=1"], {})
    assert isinstance(config.coarse, ParticleSettings) and (config.coarse.particles, config.coarse.particle) == (2, 1)


@pytest.mark.slow
def test_particles_take_turns_from_different_seeds_and_share_the_steps():
    particles = stage()
    assert [particles.step()["particle"] for _ in range(4)] == [0, 1, 0, 1]
    first, second = particles.members
    assert (first.step_index, second.step_index, first.steps, particles.step_index) == (2, 2, 4, 4)
    assert not torch.equal(first.field.state_dict()["table"], second.field.state_dict()["table"])
    assert particles.preview().shape[0] == 2 * first.preview().shape[0]
    assert particles.headline({"particle": 1.0, "cover": 0.5}) == "particle 1: cover 50 %"
    assert particles.times["render"] > 0


def test_an_edit_by_particles_begins_with_the_object_it_is_given():
    source = stage(particles=1)
    source.step()
    asset = Asset(density=source.field.density, field=source.field, background=source.background)
    settings = ParticleSettings(**{"steps": 8, "particles": 2} | SMALL)
    edit = make_coarse(settings, Pull(), torch.device("cpu"), 4, asset)
    assert all(torch.equal(member.field.table, source.field.table) for member in edit.members)


def test_resumed_particles_go_on_to_the_same_bytes():
    whole = stage()
    for _ in range(3):
        whole.step()
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    assert sum(key.startswith("guidance.") for key in state) == 1
    resumed = stage()
    resumed.load_state_dict(state)
    for _ in range(3):
        assert resumed.step() == whole.step()
    expected, got = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(value, got[key]) for key, value in expected.items())


def finishing(particles, outcomes):
    for member, outcome in zip(particles.members, outcomes, strict=True):

        def finish(outcome=outcome):
            if outcome is None:
                raise UserError("empty", "no volume", "another seed")
            return outcome

        member.finish = finish
    return particles


def test_the_particle_the_prior_agrees_with_best_is_handed_on():
    a, b = Asset(), Asset()
    particles = finishing(stage(), [a, b])
    particles.agreement = torch.tensor([12.0, 15.0], dtype=torch.float64)
    assert particles.finish() is b
    particles = finishing(stage(), [a, None])  # ... among those that are objects
    particles.agreement = torch.tensor([12.0, 15.0], dtype=torch.float64)
    assert particles.finish() is a
    with pytest.raises(UserError, match="No particle is an object; the best: empty"):
        finishing(stage(), [None, None]).finish()
    assert finishing(stage(particle=0), [a, b]).finish() is a


def test_agreement_is_a_running_mean_of_its_own_particle():
    particles = stage()
    agreement = [particles.step()["agreement_db"] for _ in range(4)]
    assert particles.agreement.tolist() == pytest.approx(
        [0.9 * agreement[0] + 0.1 * agreement[2], 0.9 * agreement[1] + 0.1 * agreement[3]]
    )


@pytest.mark.parametrize(
    ("settings", "what"),
    [(dict(steps=7), "coarse.particles does not divide coarse.steps"), (dict(particle=2), "coarse.particle=2 is not")],
)
def test_settings_that_cannot_be_shared_are_refused(settings, what):
    with pytest.raises(UserError, match=what):
        stage(**settings)
