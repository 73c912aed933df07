"""Settings from files and the command line: what is read, what is refused and how it is said."""

import time
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config.layers import from_file, from_flags, from_overrides, from_recipe, merge, validate
from pipeline.config.yaml_dump import dump
from stages.errors import UserError


class Optimiser(BaseModel):
    model_config = ConfigDict(extra="forbid")

    learning_rate: float = Field(0.01, gt=0, le=1, description="step size of Adam")
    betas: tuple[float, float] = Field((0.9, 0.99), description="moment decay")


class Special(BaseModel):
    model_config = ConfigDict(extra="forbid")

    optimiser: Optimiser = Field(default_factory=lambda: Optimiser(learning_rate=0.5))


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str = "a cat"
    steps: int = Field(10, ge=1, description="steps to take")
    rule: Literal["sds", "csd"] = Field("sds", description="distillation rule")
    limit: float | None = Field(None, description="none: no limit")
    words: dict[str, str] = Field({}, description="text by class")
    fast: bool = False
    optimiser: Optimiser = Field(default_factory=Optimiser)


def read(tmp_path: Path, text: str, *overrides: str) -> Settings:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return validate(Settings, [from_file(path), from_overrides(list(overrides))])


def refusal(tmp_path: Path, text: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as error:
        read(tmp_path, text, *overrides)
    return error.value


def test_file_overrides_and_flags_lie_over_the_defaults_in_that_order(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 20\nrule: csd\noptimiser:\n  learning_rate: 1e-3\n")
    layers = [from_file(path), from_overrides(["steps=30", "optimiser.betas=[0.5, 0.9]"]), from_flags({"steps": 40})]
    settings = validate(Settings, layers)
    assert (settings.steps, settings.rule, settings.prompt) == (40, "csd", "a cat")
    assert settings.optimiser == Optimiser(learning_rate=0.001, betas=(0.5, 0.9))


def test_group_keeps_the_rest_of_its_own_default_when_one_key_is_set():
    settings = validate(Special, [from_overrides(["optimiser.betas=[0, 0.5]"])])
    assert settings.optimiser == Optimiser(learning_rate=0.5, betas=(0.0, 0.5))


def test_unknown_key_names_file_line_and_nearest_name(tmp_path):
    error = refusal(tmp_path, "steps: 20\noptimiser:\n  # a comment\n  lerning_rate: 0.1\n")
    assert error.what == f"{tmp_path / 'recipe.yaml'}:4: unknown key optimiser.lerning_rate"
    assert "betas, learning_rate" in error.why
    assert error.fix == "did you mean optimiser.learning_rate?"


def test_key_at_the_wrong_level_is_found_where_it_belongs(tmp_path):
    assert refusal(tmp_path, "learning_rate: 0.1\n").fix == "did you mean optimiser.learning_rate?"


def test_unknown_key_of_an_override_names_the_word(tmp_path):
    error = refusal(tmp_path, "", "stepz=3")
    assert error.what == "command line: stepz=3: unknown key stepz" and error.fix == "did you mean steps?"


@pytest.mark.parametrize(
    ("text", "what", "why"),
    [
        ("steps: 0\n", ":1: steps = 0", "wanted greater than or equal to 1"),
        ("\nsteps: many\n", ':2: steps = "many"', "wanted a valid integer"),
        ("steps: 1.5\n", ":1: steps = 1.5", "wanted a valid integer"),
        ("steps: true\n", ":1: steps = true", "wanted a valid integer"),
        ('steps: "3"\n', ':1: steps = "3"', "wanted a valid integer"),
        ("fast: 1\n", ":1: fast = 1", "wanted a valid boolean"),
        ("rule: sdz\n", ':1: rule = "sdz"', "wanted 'sds' or 'csd'"),
        ("optimiser: 3\n", ":1: optimiser = 3", "wanted an object"),
        ("optimiser:\n  betas: [0.9]\n", ":2: optimiser.betas.1", "Field required"),
        ("limit: .nan\n", ":1: limit = nan", "it must be finite"),
    ],
)
def test_wrong_values_name_place_value_and_what_is_wanted(tmp_path, text, what, why):
    error = refusal(tmp_path, text)
    assert what in error.what and why in error.why


def test_refusal_says_what_the_setting_means_and_its_bounds(tmp_path):
    fix = refusal(tmp_path, "optimiser:\n  learning_rate: 7\n").fix
    assert fix == "optimiser.learning_rate: float, > 0, <= 1; step size of Adam; default 0.01"


def test_several_mistakes_are_all_listed(tmp_path):
    error = refusal(tmp_path, "steps: 0\nrule: x\n")
    assert error.what.startswith("2 settings") and ":1: steps" in error.why and ":2: rule" in error.why


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("steps: [1\nrule: sds\n", ":2: not valid YAML"),
        ("steps: 1\nsteps: 2\n", ":2: steps is set twice"),
        ("- 1\n", "cannot read"),
        ("steps: !!python/name:os.system\n", ":1: not valid YAML"),
    ],
)
def test_damaged_files_are_refused_with_their_line(tmp_path, text, what):
    assert what in refusal(tmp_path, text).what


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not text"):
        from_file(path)


@pytest.mark.parametrize("word", ["steps", "=3", "a..b=1", "steps=[1", "st eps=1"])
def test_malformed_override_is_refused(tmp_path, word):
    assert word in refusal(tmp_path, "", word).what


@pytest.mark.parametrize("text", ["no", "on", "1e3x", "2026-01-01", "12:30"])
def test_words_that_yaml_1_1_would_convert_stay_text(tmp_path, text):
    assert read(tmp_path, f"prompt: {text}\n").prompt == text


def test_number_as_text_override_is_taken_as_text(tmp_path):
    assert read(tmp_path, "", "prompt=2026").prompt == "2026"


def test_null_clears_an_optional_value(tmp_path):
    assert read(tmp_path, "limit: 3\n", "limit=null").limit is None


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(prompt="no", limit=1e-7, words={"side": "a: b # c"}),
        Settings(prompt='1e-3 "quoted"', limit=3.0, fast=True),
        Settings(prompt="zwölf Bäume\n", optimiser=Optimiser(learning_rate=0.1 + 0.2)),
    ],
)
def test_dump_reads_back_to_the_same_settings_and_text(tmp_path, settings):
    text = dump(settings)
    again = read(tmp_path, text)
    assert again == settings and dump(again) == text


def test_dump_carries_each_meaning(tmp_path):
    assert "  learning_rate: 0.01  # step size of Adam\n" in dump(Settings())


def test_recipe_lies_over_the_one_it_extends(tmp_path):
    (tmp_path / "low.yaml").write_text("steps: 5\noptimiser:\n  lr: 0.5\n")
    (tmp_path / "middle.yaml").write_text("extends: low\nsteps: 6\n")
    (tmp_path / "high.yaml").write_text("# over middle\nextends: middle\noptimiser:\n  lr: 7\n")
    layers = from_recipe(tmp_path / "high.yaml", lambda name: tmp_path / f"{name}.yaml")
    assert [layer.values for layer in layers] == [
        {"steps": 5, "optimiser": {"lr": 0.5}},
        {"steps": 6},
        {"optimiser": {"lr": 7}},
    ]
    assert merge(layers).values == {"steps": 6, "optimiser": {"lr": 7}}


def test_recipe_that_extends_itself_or_no_name_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    (tmp_path / "c.yaml").write_text("steps: 1\nextends: [a, b]\n")
    with pytest.raises(UserError, match=r"extends itself: a.yaml -> b.yaml -> a.yaml"):
        from_recipe(tmp_path / "a.yaml", lambda name: tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match=r"c.yaml:2: extends"):
        from_recipe(tmp_path / "c.yaml", lambda name: tmp_path / f"{name}.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("prompt: a red\x00mug\n", 1, "U+0000"),
        ("seed: 1\nprompt: a\x07\n", 2, "U+0007"),
        ("seed: 1\nstages: &a [*a]\n", 2, "contains itself"),
        ("a: &a {b: {c: *a}}\n", 1, "contains itself"),
        (BOMB, 5, "aliases"),
        ("? [a, b]\n: 1\n", 1, "a key is one word"),
        ("seed: !!int x\n", 1, "'x' is no int"),
        ("seed: !!timestamp x\n", 1, "timestamp"),
        ("seed: !!python/object:os.system x\n", 1, "python"),
        (f"seed: {'9' * 5000}\n", 1, "is no int"),
        (f"seed: {'[' * 60}{']' * 60}\n", 1, "deep"),
    ],
)
def test_yaml_that_harms_its_reader_is_refused_at_once(tmp_path, text, line, why):
    (tmp_path / "x.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        from_file(tmp_path / "x.yaml")
    assert time.perf_counter() - began < 1
    assert error.value.what.startswith(f"{tmp_path / 'x.yaml'}:{line}: ") and why in error.value.why


@pytest.mark.parametrize("text", ["x" * 200_000, "[" * 90_000, "- " * 49_000, "{a: " * 20_000])
def test_a_file_too_long_or_too_deep_for_settings_is_refused_at_once(tmp_path, text):
    (tmp_path / "x.yaml").write_text(f"prompt: {text}\n")
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"x\.yaml"):
        from_file(tmp_path / "x.yaml")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "word", ["x=&a [*a]", "prompt=a\x00b", "seed=!!int x", f"seed={'9' * 5000}", "x=" + "[" * 2000]
)
def test_an_override_that_harms_its_reader_is_refused(word):
    with pytest.raises(UserError, match="cannot read"):
        from_overrides([word])


@pytest.mark.parametrize(
    ("text", "why"), [("a caf\udce9", "0xe9 is no UTF-8"), ("a\x1b[2J", "U[+]001B"), ("\ud800", "U[+]D800")]
)
def test_a_prompt_that_is_no_text_is_refused_where_it_was_given(text, why):
    with pytest.raises(UserError, match=f"--prompt: prompt is not text: .*{why}"):
        validate(Settings, [from_flags({"prompt": text})])
