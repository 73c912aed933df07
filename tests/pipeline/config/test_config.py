"""The root configuration: recipes, what `--from` inherits, the round trip."""

import pytest

from pipeline.config.model import Config, load_config, read_config
from pipeline.config.recipes import find_recipe, heading_of, recipes, split_names
from pipeline.config.yaml_dump import dump
from stages.errors import UserError
from stages.ramp import constant


def test_default_recipe_has_a_prompt_and_both_stages():
    config = load_config(None, [], {})
    assert config.prompt == "a red mug" and config.stages == ["coarse", "fine"]


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipe_is_short_valid_and_a_set_of_differences(name):
    path = find_recipe(name)
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert 1 <= len(lines) <= 40
    config = load_config(name, [], {})
    assert config != Config()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipes()))
def test_dumped_recipe_reads_back_to_the_same_config(tmp_path, name):
    config = load_config(name, ["coarse.lr=3e-4", "guidance.fine.grad_clip=[1, 0.5]"], {"seed": 11})
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read_config(tmp_path) == config
    assert dump(read_config(tmp_path)) == dump(config)
    assert load_config(str(tmp_path), [], {}) == config  # a run folder may be named where a file may


def test_recipe_does_not_lie_over_the_default_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert load_config(str(tmp_path / "mine.yaml"), [], {}) == Config(seed=3)
    assert load_config(None, [], {}).guidance != Config().guidance


def test_every_setting_says_what_it_means():
    silent = [line for line in dump(Config()).splitlines() if "  # " not in line and not line.endswith(":")]
    assert silent == []


def test_stages_may_be_a_list_or_text():
    assert load_config(None, ["stages=[coarse]"], {}) == load_config(None, [], {"stages": "coarse"})


@pytest.mark.parametrize("stages", ["fine,coarse", "coarse,coarse", "coarse,", "", "spheres", "fine,points"])
def test_unknown_repeated_or_misordered_stages_are_refused(stages):
    with pytest.raises(UserError):
        load_config(None, [], {"stages": stages})


def test_prompt_is_trimmed_and_never_empty():
    assert load_config(None, [], {"prompt": "  a  red mug \n"}).prompt == "a red mug"
    with pytest.raises(UserError, match="the prompt is empty"):
        load_config(None, [], {"prompt": " \t"})


def test_from_inherits_the_settings_of_that_run_under_the_new_ones(tmp_path):
    (tmp_path / "config.yaml").write_text(
        dump(load_config(None, ["coarse.lr=0.02"], {"prompt": "a blue car", "seed": 4}))
    )
    config = load_config(None, ["fine.steps=7"], {"from_run": str(tmp_path), "stages": "fine", "seed": 5})
    assert (config.prompt, config.seed, config.coarse.lr, config.fine.steps) == ("a blue car", 5, constant(0.02), 7)
    assert config.stages == ["fine"] and config.from_run == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "heading"),
    [
        ("# Whole (sec. 5): a line.\n# more\nseed: 1\n", "Whole (sec. 5): a line."),
        ("# A sentence. And half of one\n", "A sentence."),
        ("# half of one\n# and the rest\n", "half of one ..."),
        ("seed: 1  # not about the recipe\n", ""),
    ],
)
def test_heading_of_a_recipe_is_the_first_line_of_its_comment(text, heading):
    assert heading_of(text) == heading


def test_recipes_are_listed_with_what_they_extend(capsys):
    from pipeline.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["recipes"])
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert not stopped.value.code and [words[0] for words in rows] == sorted(recipes())
    actual = {name: (base, what) for name, base, what in rows}
    assert actual["csd"] == ("default", heading_of(find_recipe("csd").read_text())) and actual["default"][0] == "-"
    assert all(what for _, what in actual.values())


def test_an_autoencoders_folder_is_found_from_anywhere_and_a_hub_id_stays_one(tmp_path, monkeypatch):
    (tmp_path / "models" / "taesd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    word = "prior.diffusion.autoencoder=models/taesd"
    folder = load_config(None, [word], {})
    assert folder.prior.diffusion.autoencoder == str(tmp_path / "models" / "taesd")
    monkeypatch.chdir(tmp_path / "models")
    assert load_config(None, [word], {}).prior.diffusion.autoencoder == "models/taesd"  # no folder from here: an id
    assert load_config(None, [], {}).prior.diffusion.autoencoder is None
    (tmp_path / "config.yaml").write_text(dump(folder))
    assert read_config(tmp_path) == folder


def test_error_in_a_recipe_names_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\nfine:\n  lr_sfd: 1e-3\n")
    with pytest.raises(UserError) as error:
        load_config(str(path), [], {})
    assert error.value.what == f"{path}:3: unknown key fine.lr_sfd" and "fine.lr_sdf" in error.value.fix


def test_lines_for_the_base_stay_away_where_another_recipe_lies_below(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\nguidance: {coarse: {scale: 3}}\n")
    (tmp_path / "rule.yaml").write_text(
        f"extends: {tmp_path / 'base.yaml'}\nguidance: {{coarse: {{rule: vsd, rescale: 0}}}}\n"
        "on_base:\n  negative: bad\n  guidance: {coarse: {rule: {lr: 0.5}}}\n"
    )
    (tmp_path / "other.yaml").write_text("seed: 2\nguidance: {coarse: {scale: 7, rescale: 0.5}}\n")
    base, rule, other = (str(tmp_path / f"{name}.yaml") for name in ("base", "rule", "other"))
    config = load_config(rule, [], {})
    assert (config.seed, config.negative, config.guidance.coarse.scale, config.guidance.coarse.rule.lr) == (
        1,
        "bad",
        3,
        0.5,
    )
    laid = load_config([other, rule], [], {})
    assert (laid.seed, laid.negative, laid.guidance.coarse.scale, laid.guidance.coarse.rescale) == (2, "", 7, 0)
    assert laid.guidance.coarse.rule.name == "vsd" and laid.guidance.coarse.rule.lr != 0.5
    assert load_config([base, rule], [], {}) == config == load_config([rule, base], [], {})
    (tmp_path / "rule.yaml").write_text("on_base: 3\n")
    with pytest.raises(UserError, match=r"rule.yaml:1: on_base = 3"):
        load_config(rule, [], {})
    (tmp_path / "rule.yaml").write_text("seed: 1\non_base:\n  seeds: 3\n")
    with pytest.raises(UserError, match=r"rule.yaml:3: unknown key seeds"):
        load_config(rule, [], {})


def test_config_takes_several_recipes_by_commas(tmp_path):
    assert split_names("stable-diffusion, vsd") == ["stable-diffusion", "vsd"] and split_names("vsd") == "vsd"
    (tmp_path / "a,b.yaml").write_text("seed: 3\n")
    assert split_names(str(tmp_path / "a,b.yaml")) == str(tmp_path / "a,b.yaml") and split_names(None) is None


@pytest.mark.parametrize("name", ["{a: b}", "[1]", "7", "true"])
def test_a_choice_by_something_that_is_no_name_is_refused_beside_an_unknown_key(tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_text(f"guidance:\n  coarse:\n    rule: {{name: {name}, stps: 1}}\n")
    with pytest.raises(UserError, match="mine.yaml:3"):
        load_config(str(path), [], {})
    path.write_text(f"prior: {{name: {name}, fin: 1}}\n")
    with pytest.raises(UserError, match="unknown key prior"):
        load_config(str(path), [], {})
