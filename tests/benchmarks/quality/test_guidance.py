"""The guidance table: made of finished cells, resumable, by formula; and the classifier that counts fronts behind."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.quality import guidance, quality
from benchmarks.quality.cells import Cell, make_cell
from benchmarks.quality.guidance import COLUMNS, WHOLE, as_markdown, main, meets, paired, step_seconds
from benchmarks.quality.render import Subject
from benchmarks.quality.suite import load_suite
from benchmarks.quality.systems import cures, random_blob
from benchmarks.quality.view_classifier import ViewClassifier, away_from_front, janus_views, load_or_train
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build
from tests.tiny_clip import pocket_like


def test_the_prompts_are_twelve_kinds_with_a_true_front_four_of_them_held_out():
    suite = load_suite(str(guidance.PROMPTS))
    specs = [world.parse(prompt) for prompt in suite.prompts]
    assert len({spec.kind for spec in specs}) == 12
    assert all(spec.other is None and world.true_front(spec.kind) for spec in specs)
    assert sum(world.held_out(spec) for spec in specs) == 4
    assert len(suite.candidates("colour")) == 100


def test_default_systems_are_plain_sds_the_default_every_rule_and_every_cure(tmp_path):
    args = guidance._arguments(["--out", str(tmp_path)])
    assert args.systems.split(",") == [*WHOLE, *cures()] and {"sds+perp-neg", "sds+csd", "sds+sjc"} < set(cures())


def test_azimuths_are_measured_from_the_front_either_way():
    azimuths = torch.tensor([0.0, 44, 180, 226, 316, -30, 359])
    assert away_from_front(azimuths).tolist() == [0, 44, 180, 134, 44, 30, 1]


class Fixed:
    """A classifier that answers what it is told, first for the asset and then for the truth."""

    def __init__(self, asset, truth):
        self.answers = [torch.tensor(asset), torch.tensor(truth)]

    def fronts(self, images):
        assert images.shape[0] == 24
        return self.answers.pop(0)


@pytest.mark.slow
def test_janus_views_are_counted_behind_and_only_where_the_truth_shows_no_front():
    subject = Subject.of(build(world.Spec("cube", "red")))
    # azimuths 0, 15, ..., 345: behind are 105 ... 255, places 7 to 17, eleven of them
    asset, truth = [True] * 24, [False] * 24
    assert janus_views(Fixed(asset, truth), subject, subject) == {"fronts": 11, "views": 11, "share": 1.0}
    asset[7:12], truth[16], truth[0] = [False] * 5, True, True  # the truth's own front at place 16 counts for nobody
    assert janus_views(Fixed(asset, truth), subject, subject) == {"fronts": 5, "views": 10, "share": 0.5}
    assert janus_views(Fixed([True] * 24, [True] * 24), subject, subject)["share"] is None


@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    return load_or_train("robot", folder), folder


@pytest.mark.slow
def test_classifier_tells_fronts_of_unseen_meshes_and_sees_the_second_face(robots):
    classifier, _ = robots
    assert classifier.accuracy > 0.95 and classifier.false_fronts < 0.05
    mesh = build(world.Spec("robot", "red"))
    front = (mesh.vertices[:, 2] > 0)[mesh.faces].all(1)
    behind = (mesh.faces[front] + len(mesh.vertices))[:, ::-1]  # the front half again, mirrored to the back
    vertices = np.concatenate([mesh.vertices, mesh.vertices * [1, 1, -1]]).astype(np.float32)
    faces = np.concatenate([mesh.faces[front], behind]).astype(np.int32)
    janus = Mesh(vertices, faces, np.concatenate([mesh.colours, mesh.colours]))
    truth = Subject.of(mesh)
    assert janus_views(classifier, Subject.of(janus), truth)["share"] > 0.6
    other = build(world.Spec("robot", "blue"), np.random.default_rng(9))
    assert janus_views(classifier, Subject.of(other), truth)["share"] < 0.1
    blobs = [Subject.of(random_blob(np.random.default_rng(k))) for k in range(3)]
    assert max(janus_views(classifier, blob, truth)["share"] for blob in blobs) < 0.5  # no shape is no front


@pytest.mark.slow
def test_saved_classifier_answers_as_the_trained_one_and_is_not_trained_again(robots, monkeypatch):
    classifier, folder = robots
    monkeypatch.setattr("benchmarks.quality.view_classifier.train", lambda kind: pytest.fail("trained again"))
    again = load_or_train("robot", folder)
    pictures = torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    crops = pictures.permute(0, 3, 1, 2)[..., :48, :48]
    assert torch.equal(again.net(crops), classifier.net(crops))
    assert (again.accuracy, again.false_fronts) == (classifier.accuracy, classifier.false_fronts)


def test_step_seconds_are_medians_without_the_first_step(tmp_path):
    lines = [{"stage": s, "step": k, "seconds": v} for s, v in (("coarse", 1), ("fine", 3)) for k in range(1, 5)]
    lines[0]["seconds"], lines[2]["seconds"] = 99, 2
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert step_seconds(tmp_path) == {"coarse": 1, "fine": 3}
    assert step_seconds(tmp_path / "none") == {}


def numbers_of(janus, saturation, r_colour, r_textureless=50.0):
    return {"janus": janus, "saturation": saturation, "r_colour": r_colour, "r_textureless": r_textureless}


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ((20.0, 0.2, 50.0), True),  # halved
        ((4.9, 0.04, 50.0), True),  # under 5 %
        ((21.0, 0.1, 50.0), False),
        ((10.0, 0.21, 50.0), False),
        ((10.0, 0.1, 49.0), False),  # R-Precision lost
        ((10.0, 0.1, 60.0, 49.0), False),  # of clay renders
        ((math.nan, 0.1, 60.0), None),
    ],
)
def test_what_meets_the_goal(mine, expected):
    base = {("a mug", 0): numbers_of(40.0, 0.4, 50.0)}
    assert meets(paired({("a mug", 0): numbers_of(*mine)}, base)) is expected


def test_systems_are_compared_over_the_cells_where_both_ended_with_an_object():
    failure = numbers_of(math.nan, math.nan, 0.0, 0.0)
    mine = {("a", 0): numbers_of(10, 0.1, 100), ("b", 0): failure, ("c", 0): numbers_of(90, 0.9, 100)}
    base = {("a", 0): numbers_of(30, 0.3, 100), ("b", 0): numbers_of(50, 0.5, 100)}
    actual = paired(mine, base)
    assert actual["janus"] == {"mine": 10, "base": 30, "cells": 1}
    assert actual["r_colour"] == {"mine": 50, "base": 100, "cells": 2}  # what was lost counts here


@pytest.fixture()
def finished(tmp_path, monkeypatch):
    """A folder with two finished systems, made by the real assessment of known meshes, and a failed cell."""
    clip = pocket_like(tmp_path / "clip")
    monkeypatch.setattr("benchmarks.quality.pictures.SIDE", 64)  # of pictures that the table says nothing of
    (tmp_path / "prompts.txt").write_text("a red robot\n")
    out = tmp_path / "out"
    meshes = {"sds": ("robot", "green"), "default": ("robot", "red")}
    from benchmarks.quality import systems
    from benchmarks.quality.systems import write_ply

    for name, (kind, colour) in meshes.items():

        def make(job, kind=kind, colour=colour):
            mesh = build(world.Spec(kind, colour))
            if job.seed == 1:
                raise systems.Failed("no object")
            (job.folder / "run").mkdir(parents=True)
            write_ply(mesh, job.folder / "run" / "mesh.ply")
            (job.folder / "run" / "metrics.jsonl").write_text('{"stage": "coarse", "step": 2, "seconds": 0.5}\n')
            return mesh, {}

        monkeypatch.setitem(systems.SYSTEMS, name, systems.System(make, name))
        for seed in (0, 1) if name == "sds" else (0,):
            make_cell(Cell(name, "a red robot", seed), out, [clip], (), 1, False)
    import stages.mesh.files.read as read

    plain = read.read_mesh
    monkeypatch.setattr(read, "read_mesh", lambda path: plain(path.with_suffix(".ply")))  # cells here hold PLY files
    monkeypatch.setattr(
        "benchmarks.quality.view_classifier.train", lambda kind: ViewClassifier(kind, _mute(), 0.9, 0.0)
    )
    return tmp_path, out, clip


def _mute():
    from benchmarks.quality.view_classifier import _Net

    net = _Net()
    for parameter in net.parameters():
        parameter.data.zero_()
    net.last.bias.data[0] = -1.0  # sees no front anywhere
    return net


@pytest.mark.slow
def test_table_is_made_of_finished_cells_and_kept_views(finished, capsys, monkeypatch):
    folder, out, clip = finished
    words = ["--prompts", str(folder / "prompts.txt"), "--out", str(out), "--clip", str(clip), "--table"]
    assert main([*words, "--systems", "sds,default,csd"]) == 0
    lines = {line["system"]: line for line in map(json.loads, (out / "guidance.jsonl").read_text().splitlines())}
    assert list(lines) == ["sds", "default"]  # csd has no cell yet
    sds, default = lines["sds"], lines["default"]
    assert (sds["cells"], sds["failed"], sds["seeds"], default["cells"]) == (2, 1, 2, 1)
    assert sds["janus"]["mean"] == 0 and sds["coarse_step"]["mean"] == 0.5 and sds["fine_step"] is None
    assert default["saturation"]["mean"] < 1e-6 < sds["saturation"]["mean"]
    assert sds["r_colour"]["mean"] <= 50  # the failed seed hits nothing
    assert sds["meets"] is None and default["meets"] in (True, False)
    assert set(COLUMNS) <= set(sds) and {"git", "cpu", "versions", "options", "suite"} <= set(sds)
    table = capsys.readouterr().out
    assert table.strip() == (out / "guidance.md").read_text().strip() == as_markdown(list(lines.values()))
    assert "`sds` | 2 (1 failed)" in table
    monkeypatch.setattr("benchmarks.quality.view_classifier.janus_views", lambda *_: pytest.fail("looked at again"))
    assert main([*words, "--systems", "sds,default"]) == 0


def test_table_of_nothing_is_a_user_error(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--table", "--clip", str(pocket_like(tmp_path / "clip"))]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) >= 3


def test_cells_are_asked_of_the_quality_suite(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(quality, "main", lambda words: calls.append(words) or 130)
    words = ["--systems", "sds,sds+static", "--limit", "1", "--set", "coarse.steps=3", "--out", str(tmp_path)]
    assert main(words) == 130  # stopped: no table
    args = quality._arguments(calls[0])
    assert args.systems == "sds,sds+static" and args.limit == 1 and args.options == ["coarse.steps=3"]
    assert args.seeds == 2 and args.prompts == str(guidance.PROMPTS) and args.out == tmp_path
