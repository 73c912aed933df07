"""OBJ, PLY and STL read back by trimesh as they were written; files appear whole or not at all."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from pydantic import ValidationError

from pipeline.output import files
from pipeline.output.asset import finalise, finished_mesh
from pipeline.output.files import write_whole
from pipeline.output.obj import write_obj
from pipeline.output.ply import write_ply
from pipeline.output.settings import ExportSettings
from pipeline.output.stl import write_stl
from pipeline.output.surface import srgb_bytes, vertex_colours
from pipeline.output.write import FORMATS, write_formats, write_results
from stages.errors import UserError
from stages.fields.hashfield import FieldSettings, HashField
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.files.read import read_mesh
from stages.mesh.tets.initialise import InitialiseSettings
from stages.stage import Asset
from tests.mesh.mesh_shapes import box, make, torus
from tests.mesh.painted_shapes import bumpy_torus, coloured_box, textured_torus


def test_obj_reads_back_with_its_texture(tmp_path):
    mesh = textured_torus()
    paths = write_obj(mesh, tmp_path / "mesh.obj")
    assert [p.name for p in paths] == ["mesh.obj", "mesh.mtl", "mesh.png"]
    back = trimesh.load(paths[0], process=False)
    np.testing.assert_array_equal(back.vertices[back.faces].astype(np.float32), mesh.vertices[mesh.faces])
    np.testing.assert_allclose(back.visual.uv[back.faces], mesh.uv[mesh.uv_faces], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back.visual.material.image.convert("RGB")), mesh.texture)


def test_obj_lines_are_the_formats_own(tmp_path):
    mesh = textured_torus()
    lines = write_obj(mesh, tmp_path / "mesh.obj")[0].read_text().splitlines()
    count = {key: sum(line.startswith(key + " ") for line in lines) for key in ("v", "vt", "vn", "f")}
    assert count == {"v": len(mesh.vertices), "vt": len(mesh.uv), "vn": len(mesh.vertices), "f": len(mesh.faces)}
    assert "mtllib mesh.mtl" in lines and "usemtl material" in lines
    face = next(line for line in lines if line.startswith("f ")).split()[1:]
    v, t = mesh.faces[0] + 1, mesh.uv_faces[0] + 1
    assert face == [f"{v[k]}/{t[k]}/{v[k]}" for k in range(3)]
    numbers = np.array([line.split()[1:] for line in lines if line.startswith("v ")], dtype=np.float32)
    np.testing.assert_array_equal(numbers, mesh.vertices)  # to the last bit
    assert "map_Kd mesh.png" in (tmp_path / "mesh.mtl").read_text().splitlines()


def test_obj_names_the_normal_map_beside_it(tmp_path):
    mesh = bumpy_torus()
    paths = write_obj(mesh, tmp_path / "mesh.obj")
    assert [p.name for p in paths] == ["mesh.obj", "mesh.mtl", "mesh.png", "mesh_normal.png"]
    assert "norm mesh_normal.png" in (tmp_path / "mesh.mtl").read_text().splitlines()
    np.testing.assert_array_equal(np.asarray(Image.open(paths[3])), mesh.normal_map)


def test_obj_side_files_have_no_blanks_in_their_names(tmp_path):
    paths = write_obj(textured_torus(), tmp_path / "a red mug.obj")
    assert [p.name for p in paths] == ["a red mug.obj", "a_red_mug.mtl", "a_red_mug.png"]
    assert np.asarray(trimesh.load(paths[0], process=False).visual.material.image).shape == (64, 64, 3)


def test_obj_without_texture_carries_vertex_colours(tmp_path):
    mesh = coloured_box()
    (path,) = write_obj(mesh, tmp_path / "mesh.obj")
    back = trimesh.load(path, process=False)
    np.testing.assert_allclose(back.visual.vertex_colors[:, :3], srgb_bytes(mesh.colours), atol=1)


def test_ply_reads_back_with_colours(tmp_path):
    mesh = coloured_box()
    back = trimesh.load(write_ply(mesh, tmp_path / "mesh.ply")[0], process=False)
    np.testing.assert_array_equal(back.vertices.astype(np.float32), mesh.vertices)
    np.testing.assert_array_equal(back.faces, mesh.faces)
    np.testing.assert_array_equal(back.visual.vertex_colors[:, :3], srgb_bytes(mesh.colours))
    np.testing.assert_allclose(back.vertex_normals, mesh.vertex_normals(), atol=1e-6)


def test_ply_takes_colours_from_the_texture(tmp_path):
    mesh = textured_torus()
    back = trimesh.load(write_ply(mesh, tmp_path / "mesh.ply")[0], process=False)
    inner = np.bincount(np.unique(np.stack([mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)], -1), axis=0)[:, 0]) == 1
    corner = np.zeros(len(mesh.vertices), int)
    corner[mesh.faces.reshape(-1)] = mesh.uv_faces.reshape(-1)
    u, v = mesh.uv[corner[inner]].T
    expected = mesh.texture[((1 - v) * 64).astype(int), (u * 64).astype(int)]
    np.testing.assert_allclose(back.visual.vertex_colors[inner, :3], expected, atol=1)
    assert vertex_colours(box()) is None


def test_plain_mesh_gives_a_ply_without_colours(tmp_path):
    back = trimesh.load(write_ply(torus(n=8, m=6), tmp_path / "mesh.ply")[0], process=False)
    assert back.visual.kind is None and back.is_watertight


def test_stl_reads_back(tmp_path):
    mesh = torus(n=24, m=12)
    path = write_stl(mesh, tmp_path / "mesh.stl")[0]
    assert path.stat().st_size == 84 + 50 * len(mesh.faces)
    assert not path.read_bytes().startswith(b"solid")  # the mark of the text format
    back = trimesh.load(path)
    assert back.is_watertight and back.volume == pytest.approx(mesh.signed_volume(), rel=1e-5)
    np.testing.assert_allclose(back.bounds, [mesh.vertices.min(0), mesh.vertices.max(0)])
    np.testing.assert_allclose(back.face_normals, mesh.face_normals(), atol=1e-4)


@pytest.mark.parametrize("name", ["glb", "obj", "ply"])
def test_our_own_reader_gets_the_colours_back(name, tmp_path):
    mesh = textured_torus()
    back = read_mesh(write_formats(mesh, tmp_path, [name])[0])
    for end in (np.min, np.max):
        np.testing.assert_allclose(end(back.vertices, axis=0), end(mesh.vertices, axis=0), atol=1e-6)
    mean = srgb_to_linear(_texture_at_corners(mesh)).mean(0).numpy()
    if back.colours is not None:
        np.testing.assert_allclose(back.colours[back.faces.reshape(-1)].mean(0), mean, atol=0.03)
    else:
        np.testing.assert_array_equal(back.texture, mesh.texture)


def _texture_at_corners(mesh):
    u, v = mesh.uv[mesh.uv_faces.reshape(-1)].T
    return torch.from_numpy(mesh.texture[((1 - v) * 64).astype(int), (u * 64).astype(int)] / 255.0).float()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_deterministic_and_refuses_broken_meshes(name, tmp_path):
    if name == "usdz":
        pytest.importorskip("pxr.UsdUtils")
    mesh = textured_torus()
    one, other = (write_formats(mesh, tmp_path / k, [name]) for k in "ab")
    assert len(one) == len(other) and all(p.read_bytes() == q.read_bytes() for p, q in zip(one, other))
    broken = replace(mesh, vertices=np.full_like(mesh.vertices, np.nan))
    for bad in (broken, make(np.zeros((0, 3)), np.zeros((0, 3)))):
        with pytest.raises(UserError):
            write_formats(bad, tmp_path / "c", [name])
    assert not (tmp_path / "c").exists()


def test_unknown_format_stops_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="glb, obj, ply, stl"):
        write_formats(box(), tmp_path, ["glb", "fbx"])
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "mesh.glb", b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["mesh.glb"]


def test_files_get_the_usual_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        assert write_whole(tmp_path / "sub" / "x", b"1").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match="Could not write"):
        write_whole(tmp_path / "x" / "mesh.glb", b"1")


def test_results_of_a_run(tmp_path):
    settings = ExportSettings(formats="glb,stl", turntable_frames=3, turntable_size=32, mp4=False, texture_size=64)
    mesh = finalise(Asset(mesh=box(), albedo=lambda p: p * 0 + 0.5), settings)
    paths = write_results(mesh, tmp_path, settings)
    assert [p.name for p in paths] == ["mesh.glb", "mesh.stl", "turntable.webp"] and all(p.exists() for p in paths)


def test_settings_refuse_what_they_do_not_know():
    for bad in ({"formats": ["fbx"]}, {"faces": 1}, {"texture_size": 0}, {"turntable_size": 33}, {"colour": 1}):
        with pytest.raises(ValidationError):
            ExportSettings(**bad)


@pytest.mark.slow
def test_density_becomes_a_mesh_where_no_mesh_stage_ran():
    asset = Asset(density=lambda p: 40 * torch.sigmoid(200 * (0.5 - p.norm(dim=-1))), albedo=lambda p: p * 0 + 0.2)
    settings = ExportSettings(tets=24, faces=1200, texture_size=64, unwrap="boxes")
    notes: dict = {}
    mesh = finalise(asset, settings, notes=notes)
    report = notes["report"]
    assert report.solid and report.euler_number == 2 and report.faces <= 1200
    assert report.volume == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.15)
    assert (mesh.texture == 124).all()  # linear 0.2


def cone(points):
    """Density 40 in the middle, falling to 0 at radius 1: the surface at level v has radius 1 - v / 40."""
    return 40 * (1 - points.norm(dim=-1)).clamp_min(0)


@pytest.mark.slow
def test_a_run_without_a_mesh_stage_heeds_lattice_and_level():
    """Through the run's own door: export.tets cells a side, and fine.initialise as the fine stage would."""
    field = HashField(FieldSettings(levels=1, log2_table=10), torch.Generator())
    asset, count, radius = Asset(density=cone, albedo=field.albedo, field=field), [], []
    for tets, level in ((16, 10.0), (32, 10.0), (32, 30.0)):
        settings = ExportSettings(tets=tets, faces=100_000, texture_size=16, padding=2, unwrap="boxes")
        facts: dict = {}
        mesh = finished_mesh(asset, settings, InitialiseSettings(samples=32, level=level), facts)
        count.append(len(mesh.faces))
        radius.append(float(np.linalg.norm(mesh.vertices, axis=1).mean()))
        assert list(facts["phases"])[:2] == ["extract", "clean"] and facts["report"]["solid"]
    assert count[1] > 3 * count[0]
    np.testing.assert_allclose(radius, [0.75, 0.75, 0.25], atol=0.02)
    assert ExportSettings().tets == 64  # what the published coarse results were made with


def test_advice_on_the_lattice_names_the_exports_own():
    speck = Asset(density=lambda p: 1e4 * (p - 0.031).norm(dim=-1).lt(0.05))
    settings = InitialiseSettings(samples=64, level=1.0, volume=(1e-6, 0.6))
    with pytest.raises(UserError, match="first surface is empty") as error:
        finalise(speck, ExportSettings(tets=16), initialise=settings)
    assert "raise export.tets" in error.value.fix and "fine.tets" not in error.value.fix


def test_asset_without_a_surface_is_refused_with_advice():
    with pytest.raises(UserError, match="no mesh") as error:
        finalise(Asset(), ExportSettings())
    assert "fine" in error.value.fix
