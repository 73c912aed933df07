"""View classes and the words they add."""

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.prompts import (
    PromptSettings,
    ViewPrompts,
    azimuth_blend,
    check_length,
    perp_neg_weights,
    view_class,
    without_contradictions,
)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "expected"),
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
def test_view_classes_follow_dreamfusion(azimuth, elevation, expected):
    assert view_class(azimuth, elevation) == expected


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


def test_words_for_a_side_that_is_never_asked_for_are_refused():
    for name in ("per_view", "per_view_negative", "contradictions"):
        entry = {"left side": ["arm"] if name == "contradictions" else "an arm"}
        with pytest.raises(ValueError, match="'left side' needs sides: true"):
            PromptSettings(**{name: entry})
        PromptSettings(sides=True, **{name: entry})


def test_text_that_would_be_cut_is_refused_by_its_length():
    texts = ["a mug, front view", "a very long story of a mug, overhead view"]
    check_length(texts, lambda text: len(text.split()), 9)
    with pytest.raises(UserError, match="overhead view' is 9 tokens and the encoder reads 8.*shorten .* about 1 token"):
        check_length(texts, lambda text: len(text.split()), 8)
    check_length([], len, 0)


@pytest.mark.parametrize(
    ("prompt", "view", "expected"),
    [
        ("a smiling cat with big eyes", "back", "a cat"),
        ("a cat with big blue eyes and a red hat", "back", "a cat and a red hat"),
        ("a robot with a sword and blue eyes, highly detailed", "back", "a robot with a sword, highly detailed"),
        ("A smiling, orange bear", "back", "An orange bear"),
        ("two cats, smiling and with tongue out, on a mat", "back", "two cats, on a mat"),
        ("portrait of a clown", "left side", "a clown"),
        ("a photo of a corgi looking at the camera, front view", "overhead", "a photo of a corgi"),
        ("side view of a car", "front", "a car"),
        ("a smiling cat", "front", "a smiling cat"),  # a front shows its face
        ("a one-eyed pirate with an eyeglass", "back", "a one-eyed pirate with an eyeglass"),  # whole words only
        ("a face", "back", "a face"),  # nothing would be left
        ("a knight and a smiling princess", "back", "a knight and a princess"),
        ("a wizard with a crying baby on his arm", "back", "a wizard with a baby on his arm"),
        ("a cat, black and smiling", "back", "a cat, black"),
    ],
)
def test_words_that_contradict_the_view_are_dropped(prompt, view, expected):
    assert without_contradictions(prompt, view) == expected


def test_debias_drops_words_before_the_view_words_and_leaves_prompts_by_hand_alone():
    settings = PromptSettings(
        debias=True, contradictions={"side": ["badge"]}, per_view={"overhead": "a smiling cat from above"}
    )
    prompts = ViewPrompts("a smiling cat with a round badge", settings=settings)
    assert prompts.text("front") == "a smiling cat with a round badge, front view"
    assert prompts.text("side") == "a smiling cat, side view"
    assert prompts.text("back") == "a cat with a round badge, back view"
    assert prompts.text("overhead") == "a smiling cat from above"
    assert ViewPrompts("a smiling cat").text("back") == "a smiling cat, back view"  # off unless asked for


def test_negative_prompt_by_view_class_replaces_the_common_one():
    settings = PromptSettings(sides=True, per_view_negative={"back": "a face", "side": "front"})
    prompts = ViewPrompts("a cat", "blurry", settings)
    texts = prompts.view_texts(orbit_views([0.0, 90.0, 180.0, 270.0], 10.0))
    assert [a.negative for a in texts] == ["blurry", "front", "a face", "front"]
    assert {"blurry", "a face", "front"} <= set(prompts.all_texts())


@pytest.mark.parametrize(
    ("azimuth", "expected"),
    [
        (0.0, ("front", "side", 1.0)),
        (30.0, ("front", "side", 2 / 3)),
        (-30.0, ("front", "side", 2 / 3)),
        (90.0, ("side", "back", 1.0)),
        (225.0, ("side", "back", 0.5)),
        (180.0, ("side", "back", 0.0)),
    ],
)
def test_azimuth_lies_between_two_classes(azimuth, expected):
    first, second, share = azimuth_blend(azimuth)
    assert (first, second) == expected[:2] and share == pytest.approx(expected[2])


def test_blend_passes_through_the_left_side_at_positive_azimuths():
    assert azimuth_blend(60.0, sides=True)[1] == "left side" and azimuth_blend(-60.0, sides=True)[1] == "right side"


def test_perp_neg_weights_are_threestudios():
    assert perp_neg_weights(0.0) == pytest.approx((0.0, -1.574), abs=1e-3)  # from the front: away from the side
    assert perp_neg_weights(90.0) == pytest.approx((0.0, -1.5735), abs=1e-3)  # from the side: away from the front
    assert perp_neg_weights(180.0) == pytest.approx((-0.394, -1.967), abs=1e-3)
    assert perp_neg_weights(-45.0) == perp_neg_weights(45.0) == pytest.approx((-0.6892, -0.6892), abs=1e-3)
    assert all(w <= 0 for az in range(0, 360, 5) for w in perp_neg_weights(az))


def test_perp_neg_pushes_away_from_side_and_front_and_never_from_above():
    prompts = ViewPrompts("a cat", settings=PromptSettings(blend="perp_neg", perp_neg=2.0))
    front, behind = prompts.view_texts(orbit_views([45.0, 180.0], 10.0))
    assert (front.text, front.other, front.share) == ("a cat, front view", "a cat, side view", 0.5)
    assert [text for text, _ in front.perp_neg] == ["a cat, front view", "a cat, side view"]
    assert (behind.text, behind.other, behind.share) == ("a cat, side view", "a cat, back view", 0.0)
    assert [text for text, _ in behind.perp_neg] == ["a cat, side view", "a cat, front view"]
    assert [w for _, w in behind.perp_neg] == pytest.approx([2 * w for w in perp_neg_weights(180.0)])
    (above,) = prompts.view_texts(orbit_views([45.0], 80.0))
    assert above.text == "a cat, overhead view" and above.share == 1 and above.perp_neg == ()


@pytest.mark.parametrize("blend", ["classes", "interpolated", "perp_neg"])
def test_all_texts_holds_everything_that_is_asked_for(blend):
    settings = PromptSettings(sides=True, blend=blend, per_view_negative={"back": "n"}, textureless_suffix=", clay")
    prompts = ViewPrompts("a smiling mug", "bad", settings)
    texts = set(prompts.all_texts())
    for elevation in (-10.0, 70.0):
        for textureless in (False, True):
            for ask in prompts.view_texts(orbit_views(torch.arange(0.0, 360.0, 15.0), elevation), textureless):
                assert {ask.text, ask.other, ask.negative, *(text for text, _ in ask.perp_neg)} <= texts
                assert 0 <= ask.share <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(per_view_negative={"back": " "}), "the text of view class 'back' is empty"),
        (dict(contradictions={"rear": ["x"]}), "unknown view class 'rear'"),
        (dict(blend="interpolated", view_words=False), "nothing to mix"),
        (dict(blend="perpneg"), "perp_neg"),
    ],
)
def test_prompt_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptSettings(**settings)
