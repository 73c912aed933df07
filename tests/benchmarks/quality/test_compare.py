"""A suite before and after a change (benchmarks/quality/compare.py)."""

import json

import pytest

from benchmarks.quality import compare
from benchmarks.report.tables import markdown_blocks


def line(prompt: str, seed: int, score: float, seconds: float, system: str = "magic3d", suite: str = "s") -> dict:
    return {
        "system": system, "prompt": prompt, "seed": seed, "suite": suite, "date": "2026-01-01T00:00:00Z", "git": "abc",
        "scores": {"clip": {"colour": {"score": score, "hit": 100.0}}}, "cost": {"wall_s": seconds},
    }  # fmt: skip


BEFORE = [line("a", 0, 80.0, 100.0), line("a", 1, 82.0, 100.0), line("b", 0, 70.0, 90.0), line("c", 0, 1.0, 1.0)]
AFTER = [line("a", 0, 84.0, 60.0), line("a", 1, 82.0, 60.0), line("b", 0, 71.0, 50.0), line("d", 0, 99.0, 999.0)]


def test_only_cells_of_both_sides_count_and_prompts_weigh_alike():
    actual = compare.compare_cells(BEFORE, AFTER)
    facts = actual["systems"]["magic3d"]
    assert facts["cells"] == 3
    score, seconds = facts["metrics"]["clip_colour"], facts["metrics"]["wall_s"]
    assert score["before"]["mean"] == pytest.approx((81 + 70) / 2)
    assert score["difference"]["mean"] == pytest.approx((2 + 1) / 2)
    assert seconds["difference"]["mean"] == pytest.approx(-40)
    assert "chamfer" not in facts["metrics"]  # which neither side measured


def test_a_side_is_a_file_a_folder_or_a_revision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    file, folder = tmp_path / "before.jsonl", tmp_path / "after"
    file.write_text("".join(json.dumps(cell) + "\n" for cell in [*BEFORE, line("a", 0, 0.0, 0.0, suite="other")]))
    folder.mkdir()
    bare = [{k: v for k, v in cell.items() if k != "scores"} for cell in AFTER]
    (folder / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in bare))
    scores = {compare.key_of(cell): cell["scores"] for cell in AFTER}
    (folder / "summary.json").write_text(json.dumps({"scores": scores}))
    assert compare.main([str(file), str(folder), "--suite", "s", "--publish", "change"]) == 0
    output = capsys.readouterr().out
    assert "| magic3d | CLIP score, colour | 75.5" in output
    assert markdown_blocks(tmp_path)["compare_change"] == output.strip()


def test_a_run_without_an_object_has_no_score_and_hides_no_other(tmp_path):
    failure = {k: v for k, v in line("b", 0, 0.0, 1.0).items()} | {"failed": "no object", "scores": {}}
    metrics = compare.compare_cells([*BEFORE[:2], failure], AFTER[:3])["systems"]["magic3d"]["metrics"]
    assert metrics["r_precision_colour"]["before"]["mean"] == pytest.approx(50)  # it is no hit
    assert metrics["clip_colour"]["before"]["mean"] == pytest.approx(81)
    only = compare.compare_cells([failure], [failure])["systems"]["magic3d"]["metrics"]
    assert "r_precision_colour" not in only and "clip_colour" not in only


def test_a_seed_that_failed_on_one_side_is_left_out_on_both():
    """Seed 0 is hard; a side that fails on it is not to be compared by seed 1 alone with the other's mean of both."""
    before, after = [], []
    for prompt in "abcdef":
        for seed, wall in ((0, 10.0), (1, 2.0)):
            before.append(line(prompt, seed, 50.0 - wall, 1.0))
            after.append(line(prompt, seed, 50.0 - wall, 1.0))
        after[-2] |= {"failed": "no object", "scores": {}}
    actual = compare.compare_cells(before, after)["systems"]["magic3d"]["metrics"]["clip_colour"]
    assert actual["difference"]["mean"] == 0 and actual["p_value"] == 1
    assert actual["before"]["mean"] == actual["after"]["mean"] == 48


def test_mistakes_are_told(tmp_path, capsys):
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("")
    other.write_text(json.dumps(line("z", 0, 1.0, 1.0)) + "\n")
    assert compare.main([str(empty), str(empty)]) == 2
    assert "no results in" in capsys.readouterr().err
    assert compare.main(["git:no-such-revision", str(other)]) == 2
    assert "cannot read no-such-revision" in capsys.readouterr().err
    file = tmp_path / "file.jsonl"
    file.write_text(json.dumps(BEFORE[0]) + "\n")
    assert compare.main([str(file), str(other)]) == 2
    assert "no cell is in both" in capsys.readouterr().err


def test_two_suites_are_not_mixed_nor_two_clips(tmp_path, capsys):
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(line("a", 0, 1.0, 1.0, suite=suite)) + "\n" for suite in ("s", "t")))
    assert compare.main([str(both), str(both)]) == 2
    assert "both sides have s, t" in capsys.readouterr().err
    assert compare.main([str(both), str(both), "--suite", "t"]) == 0
    other = line("a", 0, 50.0, 1.0) | {"scores": {"another": {"colour": {"score": 50.0, "hit": 0.0}}}}
    metrics = compare.compare_cells([BEFORE[0]], [other])["systems"]["magic3d"]["metrics"]
    assert "clip_colour" not in metrics and "wall_s" in metrics
