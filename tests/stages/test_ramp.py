"""Ramps: their shapes in closed form, bounds, what YAML and the command line say of them, refusals."""

from __future__ import annotations

import math

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.layers import describe, from_file, from_overrides, validate
from pipeline.config.yaml_dump import dump
from stages.errors import UserError
from stages.ramp import DECADES, FORM, SHAPES, Ramp, constant, read_ramp


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    weight: Ramp = Field(Ramp(10.0, 1000.0, 0.0, 0.5), ge=0, le=1000, description="weight of a term")
    lr: Ramp = Field(Ramp(0.01, 0.001, shape="cosine"), gt=0, lt=1, description="learning rate")
    clip: Ramp | None = Field(None, gt=0, description="clamp; none: no clamp")


CLOSED_FORMS = {
    "linear": lambda s: 8 - 6 * s,
    "cosine": lambda s: 5 + 3 * math.cos(math.pi * s),
    "exponential": lambda s: 8 / 4**s,
    "gaussian": lambda s: 2 + 6 * math.exp(-12.5 * math.log(10) * s * s),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ramp_is_its_closed_form_between_its_shares_and_stays_outside(shape):
    ramp = Ramp(8.0, 2.0, 0.2, 0.6, shape)
    assert [ramp.at(share) for share in (0.0, 0.1, 0.2)] == [8.0] * 3
    assert [ramp.at(share) for share in (0.6, 0.9, 1.0)] == [2.0] * 3
    for s in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert ramp.at(0.2 + 0.4 * s) == pytest.approx(CLOSED_FORMS[shape](s), rel=1e-9)


def test_every_shape_has_a_closed_form_here_and_falls_all_the_way():
    assert set(CLOSED_FORMS) == set(SHAPES)
    for shape in SHAPES:
        values = [Ramp(8.0, 2.0, shape=shape).at(k / 50) for k in range(51)]
        assert values == sorted(values, reverse=True) and values[0] == 8.0 and values[-1] == 2.0
        assert values[-2] == pytest.approx(2.0, abs=0.3)  # no jump at the end
    assert 10**-DECADES < 1e-12


def test_ramp_between_one_share_and_itself_is_a_jump():
    jump = Ramp(0.98, 0.5, 0.5, 0.5)
    assert [jump.at(share) for share in (0.0, 0.499, 0.5, 1.0)] == [0.98, 0.98, 0.5, 0.5]


@pytest.mark.parametrize(
    ("value", "ramp"),
    [
        (3, Ramp(3.0, 3.0)),
        (0.5, constant(0.5)),
        ([1, 100], Ramp(1.0, 100.0)),
        ((1, 100, 0.2, 0.5), Ramp(1.0, 100.0, 0.2, 0.5)),
        ([1, 2, 0, 1, "cosine"], Ramp(1.0, 2.0, shape="cosine")),
    ],
)
def test_ramp_is_written_as_a_number_or_a_short_list_and_read_back_equal(value, ramp):
    assert read_ramp(value) == ramp == read_ramp(ramp.written())
    assert ramp.written() == (list(value) if isinstance(value, list | tuple) else value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 0.5], "wanted a number, or .start, end."),
        ([], "wanted a number"),
        ("3", "wanted a number"),
        (True, "wanted a number"),
        ([1, False], "all numbers but the shape"),
        ([1, 2, 0, "cosine"], "all numbers but the shape"),
        ([1, 2, 0, 1, 3], "the shape one of linear, cosine"),
        ([1, 2, 0, 1, "cubic"], "the shapes are linear, cosine, exponential, gaussian, got 'cubic'"),
        ([1, 2, 0.6, 0.5], "0 <= from <= until <= 1, got 0.6 and 0.5"),
        ([1, 2, 0, 150], "0 <= from <= until <= 1, got 0 and 150"),
        ([1, 0, 0, 1, "exponential"], "between positive numbers, got 1 and 0"),
        ([1, math.inf], "finite"),
    ],
)
def test_what_is_no_ramp_is_refused_with_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=message):
        read_ramp(value)


@pytest.mark.parametrize("lr", [0, [0.1, 0], [0.1, 1], 1, [-1, 0.5, 0, 1, "cosine"]])
def test_both_ends_of_a_ramp_keep_the_fields_bounds(lr):
    with pytest.raises(ValidationError, match=r"greater than 0|less than 1"):
        Settings(lr=lr)
    assert Settings(weight=[0, 1000]).weight.at(1.0) == 1000


def test_mistake_in_a_ramp_is_answered_with_place_value_and_what_is_allowed(tmp_path):
    (tmp_path / "mine.yaml").write_text("weight: 3\nlr: [0.1, 2]\n")
    with pytest.raises(UserError) as error:
        validate(Settings, [from_file(tmp_path / "mine.yaml")])
    assert error.value.what == f"{tmp_path / 'mine.yaml'}:2: lr = [0.1, 2]"
    assert error.value.why == "wanted less than 1"
    assert error.value.fix.startswith(f"lr: {FORM}, > 0, < 1; learning rate; default [0.01, 0.001, 0.0, 1.0")
    with pytest.raises(UserError) as error:
        validate(Settings, [from_overrides(["weight=[1, 2, 3]"])])
    assert error.value.what == "command line: weight=[1, 2, 3]: weight = [1, 2, 3]"
    assert error.value.why == f"wanted {FORM}"
    assert f"clip: {FORM} or null" in describe(Settings, ("clip",))


def test_settings_with_ramps_survive_yaml(tmp_path):
    words = ["weight=[1, 100, 0.2, 0.5]", "lr=3e-4", "clip=[0.5, 2]"]
    settings = validate(Settings, [from_overrides(words)])
    text = dump(settings)
    assert text.splitlines() == [
        "weight: [1.0, 100.0, 0.2, 0.5]  # weight of a term",
        "lr: 0.0003  # learning rate",
        "clip: [0.5, 2.0]  # clamp; none: no clamp",
    ]
    (tmp_path / "config.yaml").write_text(text)
    assert validate(Settings, [from_file(tmp_path / "config.yaml")]) == settings
    assert "[0.01, 0.001, 0.0, 1.0, cosine]" in dump(Settings())
