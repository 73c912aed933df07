"""The report: sentences and tables from hand-made summaries, plots, packed meshes, and the page in a real browser."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import struct
import xml.etree.ElementTree

import numpy as np
import pytest
import trimesh

from benchmarks.plots import Point, scatter, ticks
from benchmarks.quality.cells import Cell
from benchmarks.quality.suite import Suite
from benchmarks.quality.summary import summarise
from benchmarks.quality.systems import random_blob
from benchmarks.report import picture, report, tables
from benchmarks.report.browser import find_browser, look, take_picture
from benchmarks.report.listings import first_sentence, models_markdown, recipes_markdown
from stages.errors import UserError
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build
from tests.tiny_clip import pocket_like

PROMPTS = ["a red ball", "a blue cube", "a green cone"]


def line(system: str, prompt: str, clip: str, seconds: float | None = None, **more) -> dict:
    """A cell's result with an embedding that is a function of its names."""
    rng = np.random.default_rng([len(system), len(prompt)])
    unit = rng.normal(size=96)
    unit = (unit / np.linalg.norm(unit)).tolist()
    origin = {"date": "2026-01-02T03:04:05Z", "git": "0123456789abcdef", "cores": 2, "cpu": "a <fast> one"}
    origin |= {"device": "cpu", "versions": {"torch": "2.13"}, "options": ["coarse.steps=5"]}
    facts = {"clip": {clip: {"colour": unit, "textureless": unit}}, "mesh": {"faces": 1280, "solid": True}}
    cost = {"cost": {"wall_s": seconds}} if seconds else {"cost": {}}
    return {"system": system, "prompt": prompt, "seed": 0, **origin, **facts, **cost, **more}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A suite's folder as benchmarks.quality leaves it: floor cells with meshes, one failure, times made up."""
    out = tmp_path_factory.mktemp("suite")
    clip = pocket_like(out / "tiny")
    lines = []
    for prompt in PROMPTS:
        for k, system in enumerate(("floor", "truth")):
            folder = Cell(system, prompt, 0).folder(out)
            folder.mkdir(parents=True)
            lines.append(line(system, prompt, "tiny", 10.0 * (k + 1)))
            (folder / "result.json").write_text(json.dumps(lines[-1]))
            from PIL import Image

            Image.new("RGB", (64, 16), "grey").save(folder / "gallery.jpg")
    failure = line("magic3d", PROMPTS[0], "tiny") | {"failed": "The field is empty\nno <object>"}
    lines.append({k: v for k, v in failure.items() if k not in ("clip", "mesh", "cost")})
    summary = summarise(lines, Suite("three", {"captions": PROMPTS}, ["a red mug"], []), [clip])
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def made_up_summary() -> dict:
    """coarse and magic3d on four prompts, every number chosen."""

    def interval(mean, low, high):
        return {"mean": mean, "low": low, "high": high, "prompts": 4}

    def facts(score, seconds):
        return {
            "cells": 4,
            "seeds": 1,
            "failed": 0,
            "all": {
                "r_precision_colour": interval(score, score - 5, score + 5),
                "wall_s": interval(seconds, seconds, seconds),
            },
        }

    compared = {"p_value": 0.03, "p_sign": 0.2, "prompts": 4, "ties": 1}
    return {
        "suite": "made-up",
        "prompts": {"captions": 4},
        "candidates": {"colour": 100, "textureless": 85},
        "clips": ["c"],
        "dates": ["2026-01-02"],
        "revisions": ["0123456789abcdef"],
        "machines": ["2 cores"],
        "versions": {},
        "options": [],
        "systems": {"coarse": facts(50, 100), "magic3d": facts(75, 160), "truth": facts(98, 0)},
        "by_clip": {},
        "scores": {},
        "comparisons": [
            {
                "a": "coarse",
                "b": "magic3d",
                "metric": "r_precision_colour",
                "wins": 0,
                "losses": 3,
                "difference": {"mean": -25.0, "low": -40.0, "high": -10.0},
                **compared,
            },
            {
                "a": "coarse",
                "b": "magic3d",
                "metric": "wall_s",
                "wins": 4,
                "losses": 0,
                "difference": {"mean": -60.0, "low": -70.0, "high": -50.0},
                **compared,
            },
            {
                "a": "magic3d",
                "b": "truth",
                "metric": "r_precision_colour",
                "wins": 0,
                "losses": 4,
                "difference": {"mean": -23.0, "low": -30.0, "high": -16.0},
                **compared,
            },
        ],
    }


def test_the_answers_turn_comparisons_the_right_way_round():
    text = tables.answers(made_up_summary())
    assert text[0] == (
        "R-Precision, colour, %: coarse + fine against coarse alone +25.0 [+10.0, +40.0], better on 3 and "
        "worse on 0 of 4 prompts (p = 0.030)."
    )
    assert text[1] == "The price of the fine stage: 60 s more [50, 70]."
    assert "Coarse + fine against the ground truth: R-Precision, colour, % -23.0 [-30.0, -16.0]." in text


def test_a_draft_and_its_refined_mesh_are_compared_too():
    summary = made_up_summary()
    names = {"coarse": "points", "magic3d": "points+fine", "truth": "truth"}
    for comparison in summary["comparisons"]:
        comparison |= {side: names[comparison[side]] for side in ("a", "b")}
    text = tables.answers(summary)
    assert text[0].startswith("R-Precision, colour, %: points + fine against points +25.0 [+10.0, +40.0]")
    assert text[1] == "The price of the fine stage after points: 60 s more [50, 70]."
    assert not any("coarse" in sentence for sentence in text[:2])


def test_the_distance_of_all_objects_together_is_told_once(finished):
    summary = json.loads((finished / "summary.json").read_text())
    (floor,) = summary["distribution"]
    assert floor == "floor" and set(summary["distribution"]["floor"]) == {"colour", "textureless"}
    (sentence,) = (text for text in tables.answers(summary) if "kernel distance" in text)
    assert sentence.count("random blob") == 1 and "ground truth " not in sentence


def test_quality_markdown_has_a_row_a_system_and_says_where_it_comes_from():
    text = tables.quality_markdown(made_up_summary())
    assert "| coarse + fine (Magic3D) | 75.0 [70.0, 80.0] | 160 |" in text
    assert "4 prompts, 1 seed, pocket world" in text
    assert "2026-01-02, revision 0123456789, 2 cores" in text


def test_pocket_markdown_shows_each_measurement():
    look = {"one_view": 91.0, "8_views": 97.5, "candidates": 100, "missed": []}
    facts = {
        "benchmark": "pocket",
        "date": "2026-01-02T00:00:00Z",
        "git": None,
        "cores": 2,
        "settings": {"captions": 76, "candidates": 100, "scale": 4.0, "steps": 50},
        "truth": {"colour": look},
        "pixel": {"r_precision": 86.8},
    }
    text = tables.pocket_markdown(facts)
    assert "| renders of held-out captions, colour | 97.5 % | 91.0 % | 100 |" in text
    assert "| pixel prior, DDIM samples | - | 86.8 % | 100 |" in text


def test_kills_of_one_revision_are_told_together():
    facts = {"date": "2026-12-01T00:00:00Z", "cores": 2, "cpu": "a CPU"}
    run, again, export, worker = ({"killed": name} for name in ("run", "run and resume", "export", "worker"))
    lines = [
        facts | {"git": "a" * 40, "same_bytes": 9, "kills": 9, "begun_anew": 7, "each": [run] * 9},
        facts | {"git": "b" * 40, "same_bytes": 3, "kills": 4, "begun_anew": 1, "each": [run, again, export, worker]},
        facts | {"git": "b" * 40, "same_bytes": 1, "kills": 2, "begun_anew": 0, "each": [run, export]},
    ]
    text = tables.kills_markdown(lines)
    assert text.startswith("4 of 6 processes") and "2 runs, 1 runs killed once more" in text and "2 exports" in text
    assert "1 batches, of which 1 lost their worker, 0 their parent and 0 both" in text
    assert " 1 more kills came before" in text and "revision bbbbbbbbbb" in text and "aaaa" not in text


def test_what_a_page_costs_is_told():
    facts = {"date": "2026-12-01T00:00:00Z", "cores": 2, "cpu": "a CPU", "git": "a" * 40, "settings": ["a=1", "b=2"]}
    shares = {"answers_cpu_share": 0.071, "answers_share": 0.062, "idle_page_share": 0.013, "look_s": 2.2e-6}
    line = facts | shares | {"watched_cpu_ratio": 1.09, "each": [{"same_bytes": True}]}
    text = tables.view_markdown(line)
    assert "7.1 % of the run's processor time and 6.2 % of its stages' time" in text and "1.09 times" in text
    assert "in 2 µs" in text and "1.3 % of a core" in text and "`a=1 b=2`" in text and "same bytes" in text
    assert "differ" in tables.view_markdown(line | {"each": [{"same_bytes": False}]})


def test_a_recipe_is_described_by_the_first_sentence_of_its_comment():
    text = "# Edit a run (Magic3D sec. 5): laid over\n# its settings. More words.\nsteps: 3  # no\n"
    assert first_sentence(text) == "Edit a run (Magic3D sec. 5): laid over its settings."
    assert first_sentence("# A flow, not run by us\nsteps: 3\n") == "A flow, not run by us."
    row = next(row for row in recipes_markdown().splitlines() if "csd.yaml" in row)
    assert row.startswith("| [`csd`](csd.yaml) | `default` | coarse, fine | pocket | Classifier score distillation:")


def test_models_that_were_withdrawn_are_not_offered():
    table = models_markdown()
    assert (
        "runwayml/" not in table and "| `stable-diffusion-v1-5/stable-diffusion-v1-5` | coarse, fine | 512 |" in table
    )


def test_tables_go_between_the_marks_of_a_file_and_nowhere_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(
        "a\n<!-- benchmarks:one -->\nold\n<!-- /benchmarks -->\nb\n<!-- benchmarks:two --><!-- /benchmarks -->\n"
    )
    assert tables.put_into(page, {"one": "| new |"}) == ["one"]
    assert page.read_text() == (
        "a\n<!-- benchmarks:one -->\n| new |\n<!-- /benchmarks -->\nb\n<!-- benchmarks:two --><!-- /benchmarks -->\n"
    )


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(30, 700, log=True) == [50, 100, 200, 500]


def test_a_plot_is_valid_svg_with_every_finite_point_named():
    points = [Point("a & b", 10, 50, (8, 12), (40, 60)), Point("c", 100, 70, colour=1), Point("gone", float("nan"), 1)]
    root = xml.etree.ElementTree.fromstring(scatter(points, "t < 1", "x", "y", log_x=True))
    words = [node.text for node in root.iter("text")]
    assert "a & b" in words
    assert "gone" not in words
    assert scatter([], "t", "x", "y") == ""


def test_plots_against_time_stand_alone(finished, tmp_path, capsys):
    assert report.main([str(finished), "--plots", str(tmp_path)]) == 0
    path = tmp_path / "quality_three_r_precision_colour.svg"
    assert str(path) in capsys.readouterr().out
    root = xml.etree.ElementTree.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "random blob" in [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_picture_of_a_suite_has_a_column_a_system_and_a_row_a_prompt(tmp_path):
    from PIL import Image

    for k, system in enumerate(("points", "truth")):
        folder = Cell(system, "a red ball", 0).folder(tmp_path)
        folder.mkdir(parents=True)
        strip = Image.new("RGB", (4 * 48, 48))
        for view in range(4):
            strip.paste((60 * view, 100 * k, 0), (48 * view, 0, 48 * view + 48, 48))
        strip.save(folder / "gallery.jpg", quality=100, subsampling=0)
    sheet = picture.compose(tmp_path, ["points", "truth"], ["a red ball", "a blue cube"], views=("clay", "side"))
    side, step = picture.STRIP_HEIGHT, 2 * picture.STRIP_HEIGHT + picture.GAP
    assert sheet.size == (2 * step - picture.GAP, picture.LABEL + 2 * (side + picture.LABEL))
    row = 2 * picture.LABEL + side // 2
    colours = [sheet.getpixel((step * column + side * view + side // 2, row)) for column in (0, 1) for view in (0, 1)]
    expected = [(180, 0, 0), (60, 0, 0), (180, 100, 0), (60, 100, 0)]
    assert np.abs(np.array(colours) - expected).max() < 6
    assert sheet.getpixel((step + 10, row + side + picture.LABEL)) == (200, 200, 200)  # a cell that is not there


def test_a_packed_mesh_unpacks_to_itself():
    mesh = build(world.parse("a red ball"))
    data = base64.b64decode(report.pack(mesh))
    vertices, faces, scale = struct.unpack_from("<IIf", data)
    positions = np.frombuffer(data, "<i2", 3 * vertices, 12).reshape(-1, 3) * scale
    assert (vertices, faces) == (len(mesh.vertices), len(mesh.faces))
    assert np.abs(positions - mesh.vertices).max() < 1e-4
    start = -(-(12 + 9 * vertices) // 4) * 4
    assert np.array_equal(np.frombuffer(data, "<u2", 3 * faces, start).reshape(-1, 3), mesh.faces)


def test_a_large_textured_mesh_is_simplified_and_keeps_its_colours():
    ball = trimesh.creation.icosphere(5, 0.8)
    vertices = ball.vertices.astype(np.float32)
    uv = np.stack([0.5 + 0.4 * vertices[:, 0], 0.5 + 0.4 * vertices[:, 1]], -1).astype(np.float32)
    texture = np.zeros((64, 64, 3), np.uint8)
    texture[:, 32:, 0] = texture[:, :32, 2] = 255  # red where x > 0, blue where x < 0
    faces = ball.faces.astype(np.int32)
    small = report.simplified(Mesh(vertices, faces, uv=uv, uv_faces=faces, texture=texture), 2000)
    assert 1000 < len(small.faces) <= 2100
    right, left = small.vertices[:, 0] > 0.1, small.vertices[:, 0] < -0.1
    assert (small.colours[right, 0] > 0.9).all()
    assert (small.colours[left, 2] > 0.9).all()


class Links(html.parser.HTMLParser):
    """Everything a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("data:")]


def test_the_page_is_one_file_that_fetches_nothing_and_escapes_what_it_shows(finished):
    text = report.write_report(finished).read_text()
    links = Links()
    links.feed(text)
    assert links.found == []
    assert not re.search(r"url\(|@import|https?://", text)
    assert "no &lt;object&gt;" in text
    assert "a &lt;fast&gt; one" in text
    assert text.count('<script type="text/plain"') == 6
    assert "<svg" in text


def test_the_page_says_where_the_time_went(tmp_path):
    clip = pocket_like(tmp_path / "tiny")
    stage = {"seconds": 60.0, "steps": 30, "steps_per_s": 0.5, "phases": {"render": 20.0, "prior": 40.0, "load": 0.01}}
    quick = stage | {"seconds": 30.0, "steps_per_s": 1.0}
    costs = [{"stages": {"fine": facts}, "export": {"unwrap": 2.0, "bake": 1.0}} for facts in (stage, quick)]
    lines = [line("magic3d", p, "tiny") | {"cost": cost} for p, cost in zip(PROMPTS[:2], costs, strict=True)]
    summary = summarise(lines, Suite("two", {"captions": PROMPTS}, [], []), [clip])
    times = summary["systems"]["magic3d"]["times"]
    assert (times["fine"]["seconds"], times["fine"]["steps_per_s"]) == (45, 0.75)
    assert times["export"]["seconds"] == 3
    table = report.times_table(summary)
    assert "prior 40.0, render 20.0" in table and "load" not in table and ">0.75<" in table
    assert "1 of 3 without an object" in tables.quality_markdown(
        summary | {"systems": {"magic3d": summary["systems"]["magic3d"] | {"failed": 1, "cells": 3}}}
    )


def test_a_folder_without_a_suite_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no summary.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_and_turns_a_mesh(finished, tmp_path):
    page = report.write_report(finished)
    probe = tmp_path / "probe.html"
    # the page as it is, then a click on its first mesh and what the canvas shows, written where --dump-dom sees it
    probe.write_text(
        page.read_text().replace(
            "</body>",
            """<script>addEventListener("load", () => {
      window.errors = []; addEventListener("error", (e) => errors.push(e.message));
      document.querySelector("[data-mesh]").click();
      const first = Viewer.covered(); Viewer.set(2); Viewer.turn(2, 0.2);
      document.body.dataset.probe = JSON.stringify({ first, second: Viewer.covered(), errors,
        note: document.getElementById("viewer-note").textContent });
    });</script></body>""",
        )
    )
    dumped = look(probe, "--dump-dom", size=(1280, 1400))
    actual = re.search(r'data-probe="([^"]*)"', dumped)
    assert actual, dumped[-2000:]
    facts = json.loads(actual[1].replace("&quot;", '"'))
    assert facts["errors"] == []
    assert "faces here" in facts["note"], facts["note"]
    assert 0.05 < facts["first"] < 0.9
    assert 0.05 < facts["second"] < 0.9
    from PIL import Image

    shot = tmp_path / "page.png"
    assert report.main([str(finished), "--picture", str(shot)]) == 0
    page = np.asarray(Image.open(shot).convert("L"))
    assert page.shape == (1800, 1400)
    assert page.std() > 5


def test_without_a_browser_the_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.report.browser.shutil.which", lambda name: None)
    with pytest.raises(UserError, match="no Chromium"):
        take_picture(tmp_path / "page.html", tmp_path / "page.png")
    monkeypatch.setattr("benchmarks.report.browser.shutil.which", lambda name: "/bin/false")
    with pytest.raises(UserError, match="cannot show"):
        take_picture(tmp_path / "page.html", tmp_path / "page.png")


def test_the_blob_of_the_floor_fits_the_page():
    assert len(report.simplified(random_blob(np.random.default_rng(0)), 3000).faces) <= 3200
