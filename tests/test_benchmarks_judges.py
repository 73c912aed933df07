"""A CLIP that guided a run does not judge it: known by its weights, left out, refused where nobody else is there."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.judges import check_judges, fingerprint, guides_of, judges_among, judges_of_run
from pipeline.clips import POCKET_CLIP
from pipeline.config import load_config
from pipeline.layers import dump
from stages.errors import UserError
from tests.tiny_clip import pocket_like


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return pocket_like(tmp_path_factory.mktemp("other") / "second")


def config(*overrides: str, **flags):
    return load_config(None, list(overrides), flags)


def test_guides_are_the_clips_of_the_stages_that_run():
    assert guides_of(config()) == []
    assert guides_of(config("prior.coarse=clip:pocket", "prior.fine=clip:pocket")) == [POCKET_CLIP]
    assert guides_of(config("prior.coarse=clip:pocket", stages="fine", from_run=None)) == []
    assert guides_of(config(stages="clipmesh")) == [POCKET_CLIP]


def test_a_copy_under_another_name_is_recognised(tmp_path, other):
    copy = tmp_path / "impartial"
    shutil.copytree(POCKET_CLIP, copy)
    assert fingerprint(copy) == fingerprint(POCKET_CLIP) != fingerprint(other)
    assert judges_among([copy, other], [POCKET_CLIP]) == [other]
    assert judges_among([copy, other], []) == [copy, other]


def test_a_run_is_judged_by_the_clips_its_folder_does_not_name(tmp_path, other):
    (tmp_path / "config.yaml").write_text(dump(config(f"prior.coarse=clip:{other}", stages="coarse")))
    assert judges_of_run([POCKET_CLIP, other], tmp_path) == [POCKET_CLIP]
    assert judges_of_run([POCKET_CLIP, other], tmp_path / "none") == [POCKET_CLIP, other]


@pytest.mark.parametrize("recipe", ["dreamfields", "clip-mesh"])
def test_systems_without_an_impartial_judge_are_refused_before_any_work(recipe, other):
    systems = {"truth": None, "coarse": "default", recipe: recipe}
    with pytest.raises(UserError, match=f"{recipe} is guided by the CLIP that would judge it") as caught:
        check_judges(systems, [POCKET_CLIP], [])
    assert "stages.pocket.train clip --seed 1" in caught.value.fix
    check_judges(systems, [POCKET_CLIP, other], [])
    stage = {"dreamfields": "coarse", "clip-mesh": "clipmesh"}[recipe]
    check_judges(systems, [POCKET_CLIP], [f"prior.{stage}=clip:{other}"])
    with pytest.raises(UserError, match="guided by"):
        check_judges(systems, [other], [f"prior.{stage}=clip:{other}"])


def test_an_option_that_makes_a_clip_the_guide_counts(other):
    with pytest.raises(UserError, match="coarse is guided"):
        check_judges({"coarse": "default"}, [POCKET_CLIP], ["prior.coarse=clip:pocket"])


def test_two_clips_of_one_name_are_refused(tmp_path, other):
    shutil.copytree(other, tmp_path / "clip")
    with pytest.raises(UserError, match="two CLIPs are called clip"):
        check_judges({}, [POCKET_CLIP, tmp_path / "clip"], [])
