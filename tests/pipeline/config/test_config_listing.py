"""`pipeline settings`: every key is listed with what it means, and a recipe's values beside the defaults."""

import pytest
import yaml

from pipeline.cli import main
from pipeline.config.layers import describe
from pipeline.config.listing import leaves, meaning
from pipeline.config.model import Config, load_config


def shown(capsys, *words: str) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        main(["settings", *words])
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    return [line for line in out.splitlines() if not line.startswith("#")]


def test_every_setting_is_listed_once_with_value_type_and_meaning(capsys):
    lines = shown(capsys)
    keys = [line.partition(" = ")[0] for line in lines]
    assert len(set(keys)) == len(keys) > 200
    assert "coarse.steps = 800  # int, >= 1; optimisation steps" in lines
    for line in lines:
        value, _, note = line.partition(" = ")[2].partition("  # ")
        yaml.safe_load(value)
        kind, _, text = note.partition("; ")
        assert kind and text and text != "see the code", line


def test_defaults_are_those_of_the_group_and_not_of_its_class(capsys):
    """The fine stage's cameras are not CameraSettings' own; a value shown must be the one a run would take."""
    assert any(line.startswith("fine.cameras.fov_deg = [28.0, 34.0]  # ") for line in shown(capsys, "fine.cameras"))
    assert "default" not in meaning("fine.cameras.fov_deg")


def test_a_recipes_values_stand_beside_the_defaults_they_differ_from(capsys):
    (line,) = shown(capsys, "fine.steps", "--config", "default")
    assert line == "fine.steps = 100 (default 300)  # int, >= 1; optimisation steps"
    (line,) = shown(capsys, "fine.tets", "--config", "default")
    assert line.startswith("fine.tets = 64  # int, >= 8, <= 512")


def test_a_default_is_that_of_the_group_it_stands_in():
    """The fine stage sees a narrower field of view than the class of camera settings has."""
    default = Config().fine.cameras.fov_deg
    assert default != type(Config().fine.cameras)().fov_deg
    assert describe(Config, ("fine", "cameras", "fov_deg")).endswith(f"; default [{default[0]}, {default[1]}]")


def test_values_listed_are_the_ones_that_a_run_takes():
    config = load_config("sphere", [], {})
    listed = dict(leaves(config))
    assert listed["fine.steps"] == config.fine.steps and listed["stages"] == ["fine"]
    assert len(listed) == len(dict(leaves(Config())))


@pytest.mark.parametrize(("prefix", "near"), [("coarse.step", "coarse.steps"), ("tets", "fine.tets or export.tets")])
def test_an_unknown_name_is_answered_with_the_nearest(capsys, prefix, near):
    with pytest.raises(SystemExit) as stopped:
        main(["settings", prefix])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and f"no setting is called {prefix}" in err and f"did you mean {near}?" in err
