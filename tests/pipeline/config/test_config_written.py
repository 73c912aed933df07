"""What a run writes of its configuration: all that it can read, little else, and it feeds back."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.layers import from_file
from pipeline.config.listing import leaves
from pipeline.config.model import load_config, read_config
from pipeline.config.recipes import recipes
from pipeline.config.written import dump_read, read_part, stages_read, unread
from stages.coarse import CoarseStage
from stages.fields.hashfield import FieldSettings, HashField
from stages.fields.occupancy import OccupancySettings
from stages.fine import FineSettings, FineStage
from stages.guidance.guide import GuidanceOutput
from stages.kinds import STAGES
from stages.mesh.tets.initialise import InitialiseSettings
from stages.particles import ParticleSettings
from stages.stage import Asset
from tests.mesh.mesh_shapes import sphere

LINES, BYTES = 220, 14_000  # of the default recipe; a file of all settings has 324 and 22,400
FIELD = {"levels": 2, "log2_table": 10, "base": 4, "finest": 16, "hidden": 8}


def written(folder, config):
    text = dump_read(config)
    (folder / "config.yaml").write_text(text)
    return text


def outside(config) -> dict:
    """The settings that a run reads, by dotted key."""
    left = unread(config)
    return {key: value for key, value in leaves(config) if not any(f"{key}.".startswith(f"{k}.") for k in left)}


def test_the_default_recipe_is_short():
    text = dump_read(load_config())
    assert len(text.splitlines()) <= LINES and len(text.encode()) <= BYTES
    silent = [line for line in text.splitlines() if "  # " not in line and not line.endswith(":")]
    assert silent == []


@pytest.mark.parametrize("name", sorted(recipes()))
def test_what_a_run_of_a_recipe_writes_feeds_back_unchanged(name, tmp_path):
    config = load_config(name, ["guidance.fine.grad_clip=[1, 0.5]"], {"seed": 11})
    text = written(tmp_path, config)
    fed = load_config(str(tmp_path / "config.yaml"), [], {})
    assert fed == read_config(tmp_path) == read_part(config) == read_part(fed)
    assert outside(fed) == outside(config) and unread(fed) == unread(config)
    assert written(tmp_path, fed) == text
    assert set(from_file(tmp_path / "config.yaml").values) & set(STAGES) == set(stages_read(config))


@pytest.mark.parametrize(
    ("words", "flags", "stays", "goes"),
    [
        (
            [],
            {},
            ["coarse", "fine", "prior.fine"],
            ["clipmesh", "prior.clipmesh", "guidance.clip", "reference", "place"],
        ),
        ([], {"stages": "coarse"}, ["fine", "guidance.fine"], ["clipmesh"]),  # --from this run finds them
        ([], {"stages": "fine"}, ["fine.sphere", "fine.field"], ["coarse", "fine.initialise", "fine.solidify"]),
        ([], {"stages": "fine", "init_mesh": "a.glb"}, ["place", "fine.solidify"], ["coarse", "fine.sphere"]),
        ([], {"stages": "clipmesh"}, ["clipmesh.backdrops", "guidance.clip"], ["prior.diffusion", "guidance.clipmesh"]),
        (["prior.coarse=clip:pocket"], {}, ["guidance.clip", "guidance.fine", "prior.diffusion"], ["guidance.coarse"]),
        (["prior.fine=some/model"], {}, ["prior.diffusion.revision"], ["prior.lora_scale", "guidance.clip"]),
        (["prior.fine=reference"], {}, ["reference.mesh"], ["prior.diffusion.revision"]),
        (["prior.lora=a.safetensors"], {}, ["prior.lora_scale", "prior.lora_stages"], []),
        (["coarse.particles=2", "coarse.backdrops.copies=1"], {}, ["coarse.particle", "coarse.backdrops.noise"], []),
        ([], {"stages": "coarse"}, ["coarse.start.steps"], []),
        (["coarse.start.source=blob"], {}, ["coarse.start.source"], ["coarse.start.steps", "coarse.start.lr"]),
        (["guidance.fine.rule=csd"], {}, ["guidance.fine.rule.negative_share"], []),
        (["prompts.blend=perp_neg"], {}, ["prompts.perp_neg"], ["prompts.contradictions"]),
    ],
)
def test_what_is_written_is_what_can_be_read(tmp_path, words, flags, stays, goes):
    config = load_config(None, words, flags)
    written(tmp_path, config)
    values = from_file(tmp_path / "config.yaml").values

    def has(key):
        group = values
        for part in key.split("."):
            if part not in group:
                return False
            group = group[part]
        return True

    assert [key for key in stays if not has(key)] == [] and [key for key in goes if has(key)] == []


def test_a_run_from_another_finds_the_settings_of_both_stages(tmp_path):
    (tmp_path / "first").mkdir()
    written(tmp_path / "first", load_config(None, ["fine.lr_sdf=0.002"], {"stages": "coarse"}))
    config = load_config(None, [], {"from_run": str(tmp_path / "first"), "stages": "fine"})
    assert stages_read(config) == ["coarse", "fine"] and config.fine.lr_sdf.start == 0.002
    assert config.coarse == load_config().coarse == read_part(config).coarse


class Unread:
    """A setting that breaks whoever looks at it, but for the switches in it that are off."""

    def __init__(self, **switches):
        self.__dict__.update(switches)

    def __getattr__(self, name):
        raise AssertionError(f"{name} was read")

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = __index__ = __bool__ = __iter__ = __getattr__
    __hash__ = None


SWITCHES = defaultdict(dict, backdrops={"copies": 0}, transmittance={"weight": 0.0})


def poisoned(kind, settings, start):
    names = STAGES[kind].unread(settings, start)
    assert names
    for name in names:
        group, _, inner = name.partition(".")
        value = getattr(settings, group).model_copy(update={inner: Unread()}) if inner else Unread(**SWITCHES[group])
        settings = settings.model_copy(update={group: value})
    return settings


class Guide:
    """A guidance that wants everything black and keeps nothing."""

    def __call__(self, images, views, progress, textureless=False, *, backdrop=None, shading=None, part=None):
        return GuidanceOutput(images.square().sum(), {"agreement_db": 0.0})

    def state_dict(self):
        return {}


def take_two(stage):
    for _ in range(2):
        stage.step()
    stage.preview()
    return stage.state_dict()


def coarse_settings():
    small = {"steps": 2, "resolution": 16, "samples": 16, "preview_size": 16, "views_per_step": 2}
    return ParticleSettings(field=FieldSettings(**FIELD), occupancy=OccupancySettings(resolution=8), **small)


@pytest.mark.parametrize("start", ["nothing", "run"])
def test_the_coarse_stage_does_not_read_what_is_left_out(start):
    def stage(settings):
        return CoarseStage(settings, Guide(), torch.device("cpu"), 0, previous)

    field = HashField(FieldSettings(**FIELD), torch.Generator().manual_seed(0))
    previous = Asset(field=field) if start == "run" else None
    read = take_two(stage(poisoned("coarse", coarse_settings(), start)))
    assert read.keys() == take_two(stage(coarse_settings())).keys()


@pytest.mark.parametrize("start", ["nothing", "mesh", "coarse"])
def test_the_fine_stage_does_not_read_what_is_left_out(start):
    field = HashField(FieldSettings(**FIELD), torch.Generator().manual_seed(0))
    previous = {
        "nothing": None,
        "mesh": Asset(mesh=sphere()),
        "coarse": Asset(density=lambda p: 200 * torch.sigmoid(-60 * (p.norm(dim=1) - 0.5)), field=field),
    }[start]
    initialise, detail = InitialiseSettings(samples=32, candidates=8), {"levels": 1, "log2_table": 10, "finest": 32}
    small = {"steps": 2, "resolution": 32, "tets": 12, "preview_size": 16, "fit": {"steps": 2, "points": 64}}
    settings = FineSettings(field=FieldSettings(**FIELD), initialise=initialise, detail=detail, **small)
    take_two(FineStage(poisoned("fine", settings, start), Guide(), torch.device("cpu"), 0, previous))


def test_the_poison_works():
    settings = SimpleNamespace(sphere=Unread())
    with pytest.raises(AssertionError, match="was read"):
        _ = 1.0 - settings.sphere.radius
    with pytest.raises((AssertionError, TypeError)):
        _ = 1.0 - settings.sphere
