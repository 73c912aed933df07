"""View classes and the words they add."""

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.prompts import PromptSettings, ViewPrompts, check_length, view_class


@pytest.mark.parametrize(
    ("azimuth", "elevation", "wanted"),
    [
        (0, 0, "front"),
        (44, 30, "front"),
        (316, 30, "front"),
        (46, 0, "side"),
        (270, 0, "side"),
        (134, -5, "side"),
        (136, 0, "back"),
        (180, 0, "back"),
        (224, 0, "back"),
        (0, 61, "overhead"),
        (180, 89, "overhead"),
        (0, 60, "front"),
        (360, 10, "front"),
        (-90, 10, "side"),
    ],
)
def test_view_classes_follow_dreamfusion(azimuth, elevation, wanted):
    assert view_class(azimuth, elevation) == wanted


def test_a_camera_on_plus_x_sees_the_left_side_of_an_object_facing_plus_z():
    settings = PromptSettings(sides=True)
    assert view_class(90, 0, settings) == "left side"
    assert view_class(270, 0, settings) == "right side"
    facing, up = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
    left = torch.linalg.cross(up, facing)  # a person's left hand: up x forward
    assert torch.dot(left, orbit_views([90.0], 0.0).position[0]) > 0


def test_thresholds_are_settings():
    settings = PromptSettings(front_deg=30, back_deg=150, overhead_deg=45)
    assert view_class(40, 0, settings) == "side"
    assert view_class(140, 0, settings) == "side"
    assert view_class(0, 50, settings) == "overhead"


def test_texts_carry_the_words_of_their_view():
    prompts = ViewPrompts("a red mug.", "blurry")
    views = orbit_views([0.0, 90.0, 180.0], 20.0)
    assert prompts.texts(views) == ["a red mug, front view", "a red mug, side view", "a red mug, back view"]
    assert ViewPrompts("a red mug").texts(orbit_views([0.0], 80.0)) == ["a red mug, overhead view"]


def test_prefix_hand_written_and_textureless_texts():
    settings = PromptSettings(position="prefix", textureless_suffix=", clay render", per_view={"back": "a mug's back"})
    prompts = ViewPrompts("a mug", settings=settings)
    assert prompts.text("front") == "front view of a mug"
    assert prompts.text("front", textureless=True) == "front view of a mug, clay render"
    assert prompts.text("back") == "a mug's back"
    assert ViewPrompts("a mug", settings=PromptSettings(view_words=False)).text("side") == "a mug"


def test_hand_written_side_serves_both_sides():
    prompts = ViewPrompts("a mug", settings=PromptSettings(sides=True, per_view={"side": "S", "left side": "L"}))
    assert prompts.text("left side") == "L"
    assert prompts.text("right side") == "S"


@pytest.mark.parametrize("sides", [False, True])
def test_all_texts_holds_every_text_a_view_can_ask_for_once(sides):
    prompts = ViewPrompts("a mug", "bad", PromptSettings(sides=sides, textureless_suffix=", clay"))
    texts = prompts.all_texts()
    assert texts[0] == "bad" and len(set(texts)) == len(texts)
    azimuths = torch.arange(0.0, 360.0, 15.0)
    for elevation in (-10.0, 70.0):
        for textureless in (False, True):
            assert set(prompts.texts(orbit_views(azimuths, elevation), textureless)) <= set(texts)


def test_empty_prompt_and_unknown_class_are_refused():
    with pytest.raises(UserError, match="empty"):
        ViewPrompts("  ")
    with pytest.raises(ValueError, match="unknown view class 'top'; allowed: front"):
        PromptSettings(per_view={"top": "x"})


def test_text_that_would_be_cut_is_refused_by_its_length():
    texts = ["a mug, front view", "a very long story of a mug, overhead view"]
    check_length(texts, lambda text: len(text.split()), 9)
    with pytest.raises(UserError, match="overhead view' is 9 tokens and the encoder reads 8.*shorten .* about 1 token"):
        check_length(texts, lambda text: len(text.split()), 8)
    check_length([], len, 0)
