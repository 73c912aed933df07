"""What a field begins from: a shape that a prior knows in 3D."""

import pytest
import torch

from stages.coarse import CoarseSettings, CoarseStage
from stages.fields.hashfield import FieldSettings, HashField
from stages.fields.start import StartSettings, fit_start
from stages.guidance.guidance import GuidanceOutput

SMALL = FieldSettings(levels=4, log2_table=12, finest=64, hidden=16, blob_scale=0, density_scale=6, albedo="clamped")
STEP = 0.04


def cup(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A wall of radius 0.5 around an open inside, with a floor; red, its upper half blue."""
    x, y, z = points.unbind(-1)
    radius = (x**2 + z**2).sqrt()
    wall = (radius > 0.35) & (radius < 0.5) & (y.abs() < 0.5)
    floor = (radius < 0.5) & (y > -0.5) & (y < -0.35)
    colour = torch.where((y > 0)[:, None], torch.tensor([0.05, 0.1, 0.8]), torch.tensor([0.8, 0.05, 0.05]))
    return 60.0 * (wall | floor), colour


@pytest.fixture(scope="module")
def field() -> HashField:
    generator = torch.Generator().manual_seed(0)
    hash_field = HashField(SMALL, generator)
    hash_field.set_progress(1.0)
    fit_start(hash_field, cup, StartSettings(source="prior", steps=120, points=4096), generator, STEP)
    return hash_field


def opacity_at(field: HashField, *points: tuple[float, float, float]) -> list[float]:
    with torch.no_grad():
        return (1 - torch.exp(-STEP * field.density(torch.tensor(points, dtype=torch.float32)))).tolist()


def test_what_is_solid_is_solid_and_an_open_inside_is_empty(field: HashField) -> None:
    wall, wall_behind, ground = opacity_at(field, (0.42, 0.1, 0), (0, -0.1, -0.42), (0, -0.42, 0))
    inside, rim, outside = opacity_at(field, (0, 0.2, 0), (0, 0.45, 0.1), (0.8, 0.8, 0.8))
    assert min(wall, wall_behind, ground) > 0.6 and max(inside, rim, outside) < 0.1


def test_its_colours_are_the_shapes(field: HashField) -> None:
    with torch.no_grad():
        upper, lower = field.albedo(torch.tensor([[0.42, 0.3, 0], [0, -0.3, 0.42]]))
    assert upper[2] > 0.6 and upper[0] < 0.2 and lower[0] > 0.6 and lower[2] < 0.2


def stage_under(guide, **settings) -> CoarseStage:
    coarse = CoarseSettings(steps=4, resolution=16, views_per_step=1, samples=32, field=SMALL_BALL, **settings)
    return CoarseStage(coarse, guide, torch.device("cpu"), 0)


class Guide:
    """A guidance that asks for nothing and may know a shape."""

    def __init__(self, radiance):
        self.radiance = radiance

    def __call__(self, images, views, progress, textureless=False, *, backdrop=None, shading=None, part=None):
        return GuidanceOutput(0 * images.sum(), {})

    def shape(self):
        return self.radiance

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


SMALL_BALL = SMALL.model_copy(update={"blob_scale": 10.0})
BEGIN = StartSettings(source="prior", steps=60, points=2048)


@pytest.mark.slow
def test_a_stage_begins_from_the_shape_and_its_checkpoint_has_no_ball_in_it() -> None:
    stage = stage_under(Guide(cup), start=BEGIN)
    metrics = stage.step()
    assert metrics["start_rms"] < 0.3
    assert opacity_at(stage.field, (0, 0.2, 0))[0] < 0.1 < 0.5 < opacity_at(stage.field, (0.42, 0.1, 0))[0]
    again = stage_under(Guide(cup), start=BEGIN)
    again.load_state_dict(stage.state_dict())
    points = torch.rand(64, 3) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again.field.density(points), stage.field.density(points))
    assert "start_rms" not in again.step()


@pytest.mark.parametrize("settings, known", [({"start": BEGIN}, None), ({}, cup)])
def test_a_prior_that_knows_no_shape_and_a_recipe_that_asks_for_none_begin_with_the_ball(settings, known) -> None:
    stage = stage_under(Guide(known), **settings)
    assert "start_rms" not in stage.step()
    assert opacity_at(stage.field, (0, 0, 0))[0] > 0.9
