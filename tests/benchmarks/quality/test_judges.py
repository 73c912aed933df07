"""A CLIP that guided a run does not judge it: known by its weights, left out, refused where nobody else is there."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.quality.judges import check_judges, fingerprint, guides_of, judges_among, judges_of_run
from pipeline.config.model import load_config
from pipeline.config.yaml_dump import dump
from pipeline.priors.clips import POCKET_CLIP
from stages.errors import UserError
from tests.tiny_clip import pocket_like
from tests.toy_pipeline import octahedron


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


def test_a_clip_that_tells_a_drafts_networks_of_the_prompt_is_no_judge_either(other):
    for stages in ("triplane", "points,fine", "gan"):
        assert guides_of(config(stages=stages)) == [POCKET_CLIP]
    assert guides_of(config(f"points.clip={other}", stages="points")) == [other]
    with pytest.raises(UserError, match="points is guided by the CLIP that would judge it"):
        check_judges({"points": "points"}, [POCKET_CLIP], {"points": ()})
    check_judges({"points": "points", "triplane+fine": "triplane"}, [other], {"points": (), "triplane+fine": ()})


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
    with pytest.raises(UserError, match=f"{recipe} is guided by the CLIP that would judge it") as error:
        check_judges(systems, [POCKET_CLIP], dict.fromkeys(systems, ()))
    assert "stages.pocket.train clip --seed 1" in error.value.fix
    check_judges(systems, [POCKET_CLIP, other], dict.fromkeys(systems, ()))
    stage = {"dreamfields": "coarse", "clip-mesh": "clipmesh"}[recipe]
    options = {"truth": (), "coarse": (), recipe: (f"prior.{stage}=clip:{other}",)}
    check_judges(systems, [POCKET_CLIP], options)
    with pytest.raises(UserError, match="guided by"):
        check_judges(systems, [other], options)


def test_an_option_that_makes_a_clip_the_guide_counts(other):
    with pytest.raises(UserError, match="coarse is guided"):
        check_judges({"coarse": "default"}, [POCKET_CLIP], {"coarse": ("prior.coarse=clip:pocket",)})


def test_two_clips_of_one_name_are_refused(tmp_path, other):
    shutil.copytree(other, tmp_path / "clip")
    with pytest.raises(UserError, match="two CLIPs are called clip"):
        check_judges({}, [POCKET_CLIP, tmp_path / "clip"], {})


@pytest.mark.slow
def test_a_cell_goes_without_the_scores_of_its_guide_and_says_so(tmp_path, monkeypatch, other):
    import benchmarks.quality.assess
    from benchmarks.quality import cells
    from benchmarks.quality.cells import Cell, load_result, make_cell
    from benchmarks.quality.systems import Failed, System

    def make(job):
        (job.folder / "run").mkdir()
        chosen = config(*job.options, stages="coarse")
        (job.folder / "run" / "config.yaml").write_text(dump(chosen))
        if job.seed == 3:
            raise Failed("no object")
        return octahedron(), {"wall_s": 1.0}

    monkeypatch.setattr(cells, "find_system", lambda name: System(make, name))
    monkeypatch.setattr(benchmarks.quality.assess, "draw_gallery", lambda mesh, path: None)
    monkeypatch.setattr(
        benchmarks.quality.assess, "assess", lambda mesh, prompt, scorers: {"clip": [s.name for s in scorers]}
    )
    clips, results = [POCKET_CLIP, other], []
    pocket = ("prior.coarse=clip:pocket",)
    for seed, options in enumerate([pocket, (f"prior.coarse=clip:{other}",), (), pocket]):
        cell = Cell("toy", "a red mug", seed)
        make_cell(cell, tmp_path, clips, options, 1, False)
        results.append(load_result(cell, tmp_path))
    assert [r.get("clip") for r in results] == [["second"], ["clip"], ["clip", "second"], None]
    assert [r.get("guided_by") for r in results] == [["clip"], ["second"], None, ["clip"]]
    assert "failed" in results[3]


def test_a_system_guided_by_the_first_judge_has_no_score_under_it_and_one_under_the_other(other):
    from benchmarks.quality.suite import Suite
    from benchmarks.quality.summary import as_text, summarise
    from stages.guidance.clip import ClipScorer

    prompts = ["a red mug", "a blue car"]
    texts = {scorer.name: scorer.embed_texts(prompts) for scorer in map(ClipScorer, (POCKET_CLIP, other))}
    facts = {"seed": 0, "cost": {}, "mesh": {}, "colour": {}}
    facts |= {"date": "2026-01-01", "git": "0", "cores": 1, "cpu": "", "device": ""}
    lines = [
        facts
        | {"system": system, "prompt": prompt, "options": [], "versions": {}}
        | {"clip": {name: dict.fromkeys(("colour", "textureless"), texts[name][k].tolist()) for name in judges}}
        for system, judges in (("dreamfields", ["second"]), ("coarse", ["clip", "second"]))
        for k, prompt in enumerate(prompts)
    ]
    lines.append(facts | {"system": "dreamfields", "prompt": "a red mug", "seed": 1, "options": [], "versions": {}})
    lines[-1] |= {"failed": "no object", "guided_by": ["clip"]}
    summary = summarise(lines, Suite("two", {"captions": prompts}, [], []), [POCKET_CLIP, other])
    assert "r_precision_colour" not in summary["systems"]["dreamfields"]["all"]
    assert summary["systems"]["coarse"]["all"]["r_precision_colour"]["mean"] == 100
    assert (
        summary["by_clip"]["second"]["dreamfields"]["r_precision_colour"]["mean"] == 75
    )  # one of the mug's two failed
    assert summary["by_clip"]["clip"]["dreamfields"]["r_precision_colour"] is None
    assert "dreamfields" in as_text(summary)
