"""The turntable shows the front first, then goes round; its files open in Pillow and are the same every time."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.output.settings import ExportSettings
from pipeline.output.video import render_frames, turntable
from pipeline.output.write import write_results
from stages.cameras import orbit_views
from stages.errors import UserError
from stages.kernels.srgb import linear_to_srgb
from stages.mesh.texture.charts import unwrap_by_boxes
from stages.render.shade import ALBEDO
from tests.mesh.mesh_shapes import box, make, moved, torus


def painted(points: torch.Tensor) -> torch.Tensor:
    """Front (z > 0.5 - eps) red, right side (x) green, back blue, everything else white."""
    colour = torch.ones_like(points)
    for axis, sign, rgb in ((2, 1, (1, 0, 0)), (0, 1, (0, 1, 0)), (2, -1, (0, 0, 1))):
        colour[sign * points[:, axis] > 0.4999] = torch.tensor(rgb, dtype=points.dtype)
    return colour


def frames_of(mesh, azimuths, albedo=None, size: int = 48, **options):
    return list(render_frames(mesh, orbit_views(azimuths, 0.0, 4.0), size, albedo=albedo, shading=ALBEDO, **options))


def middle(picture: np.ndarray) -> list[int]:
    return picture[picture.shape[0] // 2, picture.shape[1] // 2].tolist()


def test_front_first_then_the_right_side_then_the_back():
    pictures = frames_of(box(), [0, 90, 180, 270], painted)
    assert [middle(p) for p in pictures] == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert pictures[0].shape == (48, 48, 3) and pictures[0].dtype == np.uint8


def test_texture_and_field_look_the_same():
    from stages.mesh.texture.bake import bake

    def smooth(p):
        return 0.5 + 0.4 * torch.sin(3 * p)

    mesh = box()
    uv, uv_faces, _ = unwrap_by_boxes(mesh, 256, 4)
    mesh = replace(mesh, uv=uv, uv_faces=uv_faces)
    mesh = replace(mesh, texture=bake(mesh, smooth, 256))
    for one, other in zip(frames_of(mesh, [20, 200]), frames_of(mesh, [20, 200], smooth)):
        assert np.abs(one.astype(int) - other).max() <= 3


def test_vertex_colours_and_plain_meshes_are_shown():
    red = replace(box(), colours=np.tile(np.array([[1, 0, 0]], np.float32), (8, 1)))
    assert middle(frames_of(red, [10])[0]) == [255, 0, 0]
    assert middle(frames_of(box(), [10])[0]) == [188, 188, 188]


def test_background_is_where_the_mesh_is_not():
    grey = int(np.floor(float(linear_to_srgb(torch.tensor(0.8))) * 255 + 0.5))
    assert frames_of(box(), [0])[0][0, 0].tolist() == [grey] * 3
    away = frames_of(moved(box(), (50, 0, 0)), [0])[0]
    assert (away == grey).all()


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animation_opens_with_all_frames_and_is_deterministic(suffix, tmp_path):
    one, other = (turntable(box(), tmp_path / f"{k}{suffix}", frames=5, size=32, albedo=painted) for k in "ab")
    assert one.read_bytes() == other.read_bytes()
    with Image.open(one) as animation:
        assert (animation.n_frames, animation.size) == (5, (32, 32))
        assert animation.info["loop"] == 0
        pictures = []
        for k in range(5):
            animation.seek(k)
            pictures.append(np.asarray(animation.convert("RGB")).astype(int))
    assert all(np.abs(a - b).max() > 60 for a, b in itertools.pairwise(pictures))
    red, green, blue = middle(pictures[0])
    assert red > 120 and green < 90 and blue < 90


def test_large_and_small_meshes_fit_the_picture(tmp_path):
    for scale in (0.05, 1, 30):
        path = turntable(moved(box(), (0, 0, 0), scale), tmp_path / f"{scale}.gif", frames=2, size=48)
        with Image.open(path) as animation:
            picture = np.asarray(animation.convert("RGB")).astype(int)
        rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert np.ptp(rim, axis=0).max() <= 3  # background all round
        assert (np.abs(picture - rim[0]).max(-1) > 10).mean() > 0.2


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="imageio-ffmpeg is not installed")
def test_mp4_has_all_frames(tmp_path):
    import imageio_ffmpeg

    one, other = (turntable(box(), tmp_path / f"{k}.mp4", frames=6, size=64, albedo=painted) for k in "ab")
    assert one.read_bytes() == other.read_bytes()
    reader = imageio_ffmpeg.read_frames(str(one))
    assert next(reader)["size"] == (64, 64)
    assert len(list(reader)) == 6


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is not None, reason="imageio-ffmpeg is installed")
def test_mp4_without_its_extra_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="imageio-ffmpeg"):
        turntable(box(), tmp_path / "a.mp4", frames=2, size=32)


def test_a_mesh_with_normals_of_its_own_is_lit_by_them():
    """A locked mesh keeps faces that wind inwards; its normals have been turned."""
    mesh = torus()
    turned = replace(mesh, faces=mesh.faces[:, ::-1].copy(), normals=mesh.vertex_normals())
    views = orbit_views(torch.tensor([0.0, 120.0]), 20.0, 4.0, 30.0)
    for expected, got in zip(render_frames(mesh, views, 48), render_frames(turned, views, 48), strict=True):
        assert np.abs(expected.astype(int) - got).mean() < 1


def test_a_run_does_without_a_film_that_cannot_be_made(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(write_frames=fail, __spec__=SimpleNamespace()))
    settings = ExportSettings(formats=["glb"], turntable_frames=2, turntable_size=16, mp4=True)
    names = [path.name for path in write_results(torus(), tmp_path, settings)]
    assert names == ["mesh.glb", "turntable.webp"] and "export.mp4=false" in caplog.text


def test_unknown_suffix_and_broken_meshes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.webp"):
        turntable(box(), tmp_path / "a.avi")
    with pytest.raises(UserError, match="empty"):
        turntable(make(np.zeros((0, 3)), np.zeros((0, 3))), tmp_path / "a.webp")
    assert list(tmp_path.iterdir()) == []
