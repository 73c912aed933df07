"""The scale that systems are measured on: ground truth at its top under the pocket CLIP, a random blob at chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality import metrics, pictures
from benchmarks.quality.assess import assess, clip_facts
from benchmarks.quality.quality import POCKET_CLIP
from benchmarks.quality.render import Subject
from benchmarks.quality.suite import Suite, pocket_suite
from benchmarks.quality.summary import METRICS, summarise
from benchmarks.quality.systems import Job, find_system, random_blob
from stages.guidance.clip import ClipScorer
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build

pytestmark = pytest.mark.slow

PROMPTS = ["a red car", "a blue duck", "a yellow house"]
BASE = {"seed": 0, "date": "2026-01-01", "git": None, "cores": 2, "cpu": "", "device": "cpu", "versions": {}}
SIMILARITY = (
    "r_precision_colour",
    "r_precision_textureless",
    "clip_colour",
    "clip_textureless",
    "janus",
    "saturation_error",
    "brightness_error",
    "colour_difference",
    "chamfer",
    "normal_consistency",
    "f_score",
    "volume_iou",
)  # not the mesh facts: the world's meshes are parts pushed into each other, which a marched surface is not


def recoloured(mesh: Mesh) -> Mesh:
    """Red for green and green for blue, duller and darker."""
    return Mesh(mesh.vertices, mesh.faces, 0.6 * mesh.colours[:, [1, 2, 0]] + 0.05)


def melted(mesh: Mesh) -> Mesh:
    """Every vertex pushed along a smooth random field of a tenth of the object's size."""
    rng = np.random.default_rng(5)
    waves, phases = rng.normal(0, 5, (3, 3, 6)), rng.uniform(0, 6, (3, 6))
    push = np.stack([np.sin(mesh.vertices @ waves[k] + phases[k]).sum(1) for k in range(3)], 1)
    return Mesh((mesh.vertices + 0.05 * push).astype(np.float32), mesh.faces, mesh.colours)


def two_fronts(mesh: Mesh) -> Mesh:
    """The front half, and its mirror image in place of the back."""
    front = mesh.faces[mesh.vertices[mesh.faces][..., 2].mean(1) >= 0]
    vertices = np.concatenate([mesh.vertices, mesh.vertices * np.array([1, 1, -1], np.float32)])
    faces = np.concatenate([front, front[:, ::-1] + len(mesh.vertices)]).astype(np.int32)
    return Mesh(vertices, faces, np.concatenate([mesh.colours] * 2))


def blob(mesh: Mesh) -> Mesh:
    return random_blob(np.random.default_rng(len(mesh.faces)))


@pytest.fixture(scope="module")
def summary():
    """The truth, and what was made of it, under the pocket CLIP and the pocket suite's candidates.

    PSNR, edges and angles of normals are not among the metrics below (test_benchmarks_pictures has them); on pictures
    of full size they would be four fifths of the time.
    """
    scorer, suite = ClipScorer(POCKET_CLIP), pocket_suite()
    looks = Suite("ends", {"captions": PROMPTS}, suite.prompts + suite.distractors, suite.distractors_textureless)
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "SIDE", 64)
        for prompt in PROMPTS:
            truth = build(world.parse(prompt))
            for change in (None, recoloured, melted, two_fronts, blob):
                mesh, name = (truth, "truth") if change is None else (change(truth), change.__name__)
                facts = assess(mesh, prompt, [scorer])
                lines.append({**BASE, "options": [], "system": name, "prompt": prompt, **facts})
    return summarise(lines, looks, [POCKET_CLIP])


@pytest.mark.parametrize("name", SIMILARITY)
def test_ground_truth_scores_above_whatever_was_made_worse(summary, name):
    score = {system: METRICS[name].better * facts["all"][name]["mean"] for system, facts in summary["systems"].items()}
    assert score["truth"] == max(score.values()), score
    assert score["truth"] > min(score.values()), score


def test_each_fault_is_seen_by_the_metric_that_is_for_it(summary):
    of = {system: {k: v["mean"] for k, v in facts["all"].items()} for system, facts in summary["systems"].items()}
    assert of["recoloured"]["colour_difference"] > of["truth"]["colour_difference"] + 20
    assert of["recoloured"]["chamfer"] == pytest.approx(of["truth"]["chamfer"], abs=0.05)
    assert of["recoloured"]["clip_colour"] < of["truth"]["clip_colour"] - 5
    assert of["melted"]["chamfer"] > of["truth"]["chamfer"] + 1
    assert of["melted"]["normal_consistency"] < of["truth"]["normal_consistency"] - 0.05
    assert of["two_fronts"]["janus"] == 100 and of["truth"]["janus"] == 0
    assert of["blob"]["r_precision_colour"] == 0 and of["blob"]["volume_iou"] < 0.6


def test_the_floor_is_at_chance_among_a_hundred_captions(tmp_path):
    """Twenty-four blobs that never saw their prompts: more than three hits has a chance of 1 in 5,000."""
    scorer, suite = ClipScorer(POCKET_CLIP), pocket_suite()
    texts = suite.candidates("colour")
    embedded, images = scorer.embed_texts(texts).cpu(), []
    for prompt in suite.prompts:
        mesh, _ = find_system("floor").make(Job(prompt, 0, tmp_path, 1))
        images.append(torch.tensor(clip_facts(Subject.of(mesh), [scorer])[scorer.name]["colour"]))
    hits = metrics.hits(torch.stack(images) @ embedded.T, metrics.truth_of(suite.prompts, texts, textureless=False))
    assert hits.sum() <= 3
