"""The table of stages: an entry is all that a stage needs to be set, run, resumed, continued and examined."""

import json
import re

import pytest
from pydantic import BaseModel, ConfigDict, Field

import pipeline.doctor as doctor
from pipeline import UserError, cli, generate, load_config, resume
from pipeline.config.layers import from_file
from pipeline.config.model import Config, config_model
from stages.kinds import STAGES, StageKind, beginners, chains
from tests.guidance.gaussian_prior import GaussianPrior
from tests.toy_pipeline import ToyStage

EXPORT = {"export": {"texture_size": 64, "turntable_frames": 0, "unwrap": "boxes"}, "checkpoint_every": 2}


class WalkSettings(BaseModel):
    """How an octahedron walks."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(5, ge=1, description="steps of the walk")
    views_per_step: int = Field(1, ge=1, description="not looked at")
    stride: float = Field(1.0, gt=0, description="not changed on the way")


def walker(name):
    def make(settings, guidance, device, seed, previous):
        assert guidance is None or guidance.prior.name == "gaussian"
        return ToyStage(name, settings.steps, seed, previous)

    return make


@pytest.fixture
def pocket_walk():
    """A stage under its default prior, put into the table and nowhere else."""

    def make(settings, guidance, device, seed, previous):
        assert guidance is None or guidance.prior.name == "pixel"
        return ToyStage("walk", settings.steps, seed, previous)

    STAGES["walk"] = StageKind(WalkSettings, make, defining=("walk.stride",))
    yield
    del STAGES["walk"]


@pytest.fixture
def walks():
    """Two more stages, the second behind the first, put into the table and nowhere else."""
    STAGES["walk"] = StageKind(WalkSettings, walker("walk"), defining=("walk.stride",))
    STAGES["stroll"] = StageKind(
        WalkSettings, walker("stroll"), follows="walk", begins_with=frozenset({"run"}), start="a walk"
    )
    yield
    del STAGES["walk"], STAGES["stroll"]


def test_the_table_is_in_the_order_in_which_stages_follow_each_other():
    names = list(STAGES)
    before = {name: [other for other in STAGES if kind.takes(other)] for name, kind in STAGES.items()}
    assert all(names.index(other) < names.index(name) for name, others in before.items() for other in others)
    assert before["fine"] == ["coarse", "points", "triplane", "gan"]
    firsts = [["coarse", "fine"], ["points", "fine"], ["triplane", "fine"], ["gan", "fine"], ["clipmesh"]]
    assert chains() == firsts
    assert beginners("mesh") == ["fine", "clipmesh"] and beginners("run") == ["coarse", "fine"]


def test_every_defining_setting_exists_and_every_stage_has_what_all_ask_for():
    values = Config().model_dump()
    for name, kind in STAGES.items():
        assert {"steps", "views_per_step", "resolution"} <= set(kind.settings.model_fields)
        for key in kind.defining:
            part = values
            for word in key.split("."):
                part = part[word]
        assert getattr(Config().prior, name) == kind.prior


def test_a_new_stage_runs_is_resumed_and_continued(walks, tmp_path):
    prior = GaussianPrior()
    both = ("walk", "stroll")

    def stop(stage, step, metrics):
        if (stage, step) == ("stroll", 3):
            raise ValueError

    with pytest.raises(ValueError):
        generate("a mug", stages=both, out=tmp_path / "run", settings=EXPORT, prior=prior, on_step=stop, quiet=True)
    result = resume(tmp_path / "run", prior=prior, quiet=True)
    assert [(row["stage"], row["step"]) for row in result.metrics] == [(s, k) for s in both for k in range(1, 6)]
    assert result.files["glb"].is_file() and set(result.record["stages"]) == set(both)
    options = {"out": tmp_path / "later", "prior": prior, "quiet": True}
    later = generate(stages="stroll", from_run=result.folder, **options)
    assert later.files["glb"].read_bytes() == result.files["glb"].read_bytes()
    (tmp_path / "run" / "mesh.glb").unlink()
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("  stride: 1.0", "  stride: 2.0", 1))
    with pytest.raises(UserError, match=r"walk\.stride differs"):
        resume(tmp_path / "run", prior=prior, quiet=True)


def command(*words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    return stopped.value.code or 0


@pytest.mark.slow
def test_a_new_stage_runs_from_the_command_under_its_default_prior_and_writes_its_own_settings(pocket_walk, tmp_path):
    words = [f"export.{key}={value}" for key, value in EXPORT["export"].items()]
    assert command("run", "--stages", "walk", "--out", str(tmp_path / "run"), "walk.stride=2", *words) == 0
    assert (tmp_path / "run" / "mesh.glb").is_file()
    values = from_file(tmp_path / "run" / "config.yaml").values
    assert values["walk"] == {"steps": 5, "views_per_step": 1, "stride": 2.0} and values["prior"]["walk"] == "pocket"
    assert not {"coarse", "fine", "clipmesh", "stroll"} & values.keys()
    assert command("run", "--config", str(tmp_path / "run"), "--out", str(tmp_path / "again")) == 0
    for name in ("config.yaml", "mesh.glb"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_new_stage_is_known_wherever_stages_are_named(walks, capsys):
    assert command("settings", "walk") == 0
    listing = capsys.readouterr().out
    assert "walk.steps = 5  # int, >= 1; steps of the walk" in listing
    names = [finding.name for finding in doctor.examine()]
    assert "pocket prior, walk" in names and "pocket prior, clipmesh" not in names
    assert command("models", "list") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("pocket ")]
    assert "walk" in {word for row in rows for word in row}
    orders = "; or ".join(",".join(chain) for chain in chains())
    assert "walk,stroll" in orders
    with pytest.raises(UserError, match=re.escape(orders)):
        load_config(None, [], {"stages": "fine,walk"})
    with pytest.raises(UserError) as unknown:
        load_config(None, ["walk.stpes=3"])
    assert "walk.steps" in unknown.value.fix
    assert json.loads(load_config().model_dump_json())["guidance"]["stroll"]["rule"] == {"name": "sds"}


def test_a_new_stage_is_refused_what_it_cannot_begin_with(walks, tmp_path):
    with pytest.raises(UserError, match="the run begins with walk, which starts from nothing"):
        generate("a mug", stages="walk", init_mesh=tmp_path / "a.glb", prior=GaussianPrior(), quiet=True)
    with pytest.raises(UserError, match="the run begins with stroll, which starts from a walk"):
        generate("a mug", stages="stroll", prior=GaussianPrior(), quiet=True)


def test_without_the_new_stages_the_configuration_is_the_old_one():
    assert config_model() is Config and "walk" not in Config.model_fields
