"""A rule is one entry of a table: a toy one is added here, and everything that asks for rules knows it."""

from __future__ import annotations

import pytest
import torch
from pydantic import Field

from pipeline.cli import main
from pipeline.config.listing import print_settings
from pipeline.config.model import load_config, read_config
from pipeline.output.glb import write_glb
from pipeline.priors.sources import check_priors
from pipeline.runs.run import start_run
from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance.guidance import GuidanceSettings
from stages.guidance.residuals import RULES, Residual, Rule, RuleSettings, max_predictions
from stages.prompts import ViewPrompts
from stages.ramp import Ramp
from tests.guidance.gaussian_prior import images, make
from tests.mesh.mesh_shapes import sphere

TINY = """
prior: {fine: reference}
reference: {supersample: 1}
guidance: {fine: {scale: 1, t_min: 0.28, t_max: 0.28}}
stages: [fine]
fine: {steps: 3, resolution: 48, tets: 16, preview_size: 16}
export: {texture_size: 64, faces: 1000, turntable_frames: 0, unwrap: boxes, formats: [glb]}
"""


class PullSettings(RuleSettings):
    strength: Ramp = Field(Ramp(2.0, 1.0), gt=0, description="factor on the pull")
    floor: float = Field(0.0, ge=0, description="least pull")


def pull(inputs, settings):
    """SDS with a factor of its own."""
    z_t = inputs.add_noise(inputs.eps)
    eps_hat, eps_y = inputs.guide(z_t, inputs.t, settings)
    return Residual(settings.rule.strength.at(inputs.progress) * (eps_hat - inputs.eps), eps_hat, eps_y, z_t)


def command(*words):
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code or 0


@pytest.fixture
def toy():
    RULES["pull"] = Rule(pull, PullSettings, predictions=lambda settings, prompts: 7)
    yield
    del RULES["pull"]


def test_rule_of_the_table_has_its_settings_its_errors_and_its_count(toy, capsys):
    settings = GuidanceSettings(rule={"name": "pull", "floor": 0.5}, scale=1.0)
    assert settings.rule == PullSettings(name="pull", floor=0.5)
    assert max_predictions(settings, ViewPrompts("a mug")) == 7
    config = load_config(None, ["guidance.fine.rule=pull", "guidance.fine.rule.strength=3"], {})
    assert config.guidance.fine.rule.strength.at(0.5) == 3 and config.guidance.coarse.rule.name == "sds"
    with pytest.raises(UserError) as error:
        load_config(None, ["guidance.fine.rule=pull", "guidance.fine.rule.strenght=3"], {})
    assert error.value.why == "guidance.fine.rule knows: floor, name, strength"
    with pytest.raises(UserError, match="the rules are sds, .*, vsd, pull, got 'push'"):
        load_config(None, ["guidance.fine.rule=push"], {})
    print_settings("guidance.fine.rule", None)
    names = "sds, sjc, csd, nfsd, ism, sdi, vsd, pull"
    assert capsys.readouterr().out == f'guidance.fine.rule.name = "sds"  # one of {names}; distillation rule\n'


def test_rule_of_the_table_runs_from_the_command_to_the_files_and_is_listed(toy, tmp_path, capsys):
    write_glb(sphere(), tmp_path / "ball.glb")
    (tmp_path / "tiny.yaml").write_text(TINY)
    words = [f"reference.mesh={tmp_path / 'ball.glb'}", "guidance.fine.rule=pull", "guidance.fine.rule.strength=[4, 1]"]
    config = load_config(str(tmp_path / "tiny.yaml"), words, {"prompt": "a ball"})
    check_priors(config)
    folder = start_run(config, tmp_path / "run")
    assert (folder / "mesh.glb").is_file() and read_config(folder).guidance.fine == config.guidance.fine
    assert "strength: [4.0, 1.0]  # factor on the pull" in (folder / "config.yaml").read_text()
    capsys.readouterr()
    print_settings("guidance.fine.rule", str(folder))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" = ")[0].rpartition(".")[2] for line in lines] == ["name", "strength", "floor"]
    assert lines[2] == "guidance.fine.rule.floor = 0.0  # float, >= 0; least pull"


@pytest.mark.slow
def test_rule_of_the_table_is_taken_by_the_command_from_a_recipe_of_its_own(toy, tmp_path, capsys):
    write_glb(sphere(), tmp_path / "ball.glb")
    rule = "guidance: {fine: {scale: 1, t_min: 0.28, t_max: 0.28, rule: {name: pull, floor: 0.25}}}"
    lines = [rule if line.startswith("guidance") else line for line in TINY.splitlines()]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    mesh = f"reference.mesh={tmp_path / 'ball.glb'}"
    run, again = str(tmp_path / "run"), str(tmp_path / "again")
    assert command("run", "--config", str(tmp_path / "mine.yaml"), "--prompt", "a ball", "--out", run, mesh) == 0
    assert command("run", "--config", run, "--out", again) == 0
    for name in ("config.yaml", "mesh.glb"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    capsys.readouterr()
    assert command("settings", "guidance.fine.rule", "--config", run) == 0
    assert "guidance.fine.rule.floor = 0.25" in capsys.readouterr().out


def test_strength_of_the_toy_rule_reaches_the_gradient(toy):
    def gradient(**lines):
        picture = images(batch=4)
        guidance = make(rule={"name": "pull", **lines}, scale=1.0)
        guidance(picture, orbit_views([0.0, 90.0, 180.0, 270.0]), 1.0).loss.backward()
        return picture.grad

    torch.testing.assert_close(gradient(strength=3.0), 3 * gradient())


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_reads_back_from_what_it_writes(name):
    settings = GuidanceSettings(rule=name)
    assert type(settings.rule) is RULES[name].settings and settings.rule.name == name
    assert GuidanceSettings.model_validate_json(settings.model_dump_json(), strict=True) == settings


def test_rule_and_its_settings_come_from_any_layer_in_any_order(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: vsd\nguidance: {coarse: {rule: ism}, fine: {rule: {lr: 0.01}}}\n")
    guidance = load_config(str(tmp_path / "mine.yaml"), ["guidance.coarse.rule.delta=0.2"], {}).guidance
    assert (guidance.coarse.rule.name, guidance.coarse.rule.delta.start) == ("ism", 0.2)  # nothing of vsd's is left
    assert (guidance.fine.rule.name, guidance.fine.rule.rank, guidance.fine.rule.lr) == ("vsd", 8, 0.01)
    words = ["guidance.fine.rule.delta=0.2", "guidance.fine.rule=ism"]
    assert load_config(None, words, {}) == load_config(None, words[::-1], {})
    assert load_config("ism", ["guidance.fine.rule=sds"], {}).guidance.fine.rule == RuleSettings()
