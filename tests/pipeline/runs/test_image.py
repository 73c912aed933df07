"""Runs that are held to a picture: real stages, tiny, under the reference prior of another object."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import generate, resume
from pipeline.output.glb import write_glb
from stages.mesh.mesh import Mesh
from tests.mesh.mesh_shapes import box
from tests.pipeline.runs.test_edit import TINY

pytestmark = pytest.mark.slow


class Enough(Exception):
    """Raised in the midst of a run."""


def stop_at(stage: str, step: int):
    def on_step(name: str, k: int, metrics: dict[str, float]) -> None:
        if (name, k) == (stage, step):
            raise Enough

    return on_step


def test_a_run_held_to_a_picture_takes_its_silhouette_and_resumes_to_the_same_bytes(tmp_path):
    block = box((1.0, 0.8, 0.8))
    write_glb(Mesh(block.vertices, block.faces, np.tile(np.float32([0.8, 0.05, 0.05]), (8, 1))), tmp_path / "red.glb")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"checkpoint_every": 3}))
    pixels = np.zeros((96, 96, 4), np.uint8)
    pixels[16:80, 32:64] = (30, 30, 200, 255)  # a blue post: taller than wide
    Image.fromarray(pixels).save(tmp_path / "post.png")
    settings = {"reference.mesh": tmp_path / "red.glb", "coarse.steps": 24, "fine.steps": 3, "image.fit": False}
    options = {"config": tmp_path / "tiny.yaml", "settings": settings, "quiet": True}

    result = generate("a blue post", image=tmp_path / "post.png", out=tmp_path / "held", **options)
    rows = [row for row in result.metrics if row["stage"] == "coarse"]
    assert rows[-1]["picture_iou"] > max(0.7, rows[0]["picture_iou"])
    assert "picture_iou" in result.metrics[-1] and result.metrics[-1]["stage"] == "fine"
    width, height, _ = np.ptp(result.mesh.vertices, axis=0)
    assert height > 1.4 * width
    free = generate("a blue post", out=tmp_path / "free", **options)
    width, height, _ = np.ptp(free.mesh.vertices, axis=0)
    assert height < 1.2 * width  # the prior's own object lies down

    (tmp_path / "again").mkdir()
    for stage, step in (("coarse", 10), ("fine", 2)):
        with pytest.raises(Enough):
            if stage == "coarse":
                generate(
                    "a blue post",
                    image=tmp_path / "post.png",
                    out=tmp_path / "again",
                    on_step=stop_at(stage, step),
                    **options,
                )
            else:
                (tmp_path / "post.png").unlink(missing_ok=True)  # the run has a copy of its own
                resume(tmp_path / "again", on_step=stop_at(stage, step), quiet=True)
    again = resume(tmp_path / "again", quiet=True)
    assert again.files["glb"].read_bytes() == result.files["glb"].read_bytes()
