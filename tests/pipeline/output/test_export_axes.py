"""What comes back of a user's mesh is what was given: axes, normals, metalness, roughness; STL's size and up axis."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from pipeline.output.asset import finalise, in_own_place
from pipeline.output.axes import FileAxes, file_axes
from pipeline.output.result_mesh import ResultMesh
from pipeline.output.settings import ExportSettings
from pipeline.output.stl import write_stl
from pipeline.output.write import write_formats
from pipeline.runs.inputs import _up
from stages.mesh.clean import largest_shell
from stages.mesh.files.read import read_mesh
from stages.mesh.place import _TURNS, PlaceSettings, laid, place, upright
from stages.stage import Asset
from tests.mesh.mesh_shapes import box, join, moved

TOWER = join(box((0.2, 0.3, 0.5)), moved(box(), (0.01, 0.02, 0.8), 0.13))  # no side as long as another


def painted(folder, mesh, up, format, **settings):
    """A locked mesh as a run writes it, in every format: the folder, and how files hold it."""
    scene, placement = place(mesh, PlaceSettings(**settings), up, format)
    asset = Asset(mesh=scene, placement=placement, locked=True, albedo=lambda points: torch.full_like(points, 0.5))
    export = ExportSettings(texture_size=64, padding=2, unwrap="boxes")
    axes = file_axes(placement, export)
    write_formats(in_own_place(finalise(asset, export), asset), folder, ["glb", "obj", "ply", "stl"], axes=axes)
    return axes


def triangles(path):
    mesh = read_mesh(path)
    return mesh.vertices[mesh.faces]


@pytest.mark.parametrize("up", list(_TURNS))
def test_laying_a_mesh_down_undoes_setting_it_upright(up):
    mesh = replace(TOWER, normals=np.random.default_rng(0).normal(size=TOWER.vertices.shape).astype(np.float32))
    back = laid(upright(mesh, up), up)
    np.testing.assert_array_equal(back.vertices, mesh.vertices)
    np.testing.assert_array_equal(back.normals, mesh.normals)


def test_a_locked_stl_comes_back_with_z_up_to_the_bit(tmp_path):
    trimesh.Trimesh(TOWER.vertices, TOWER.faces, process=False).export(tmp_path / "given.stl")
    source = tmp_path / "given.stl"
    axes = painted(tmp_path, read_mesh(source), _up(source), "stl", yaw_deg=30)
    np.testing.assert_array_equal(triangles(tmp_path / "mesh.stl"), triangles(source))
    assert _up(tmp_path / "mesh.stl") == "z" and axes.note(TOWER).startswith("z up")
    for name in ("glb", "obj", "ply"):  # the others have y up
        np.testing.assert_allclose(
            np.ptp(triangles(tmp_path / f"mesh.{name}"), axis=(0, 1)), [0.2, 1.115, 0.3], atol=1e-6
        )


@pytest.mark.parametrize("format", ["obj", "ply", "glb", "gltf"])
def test_a_format_gets_back_the_axes_it_came_with(tmp_path, format):
    painted(tmp_path, TOWER, "z", format)
    container = "glb" if format == "gltf" else format
    for name in ("glb", "obj", "ply", "stl"):
        tall = np.ptp(triangles(tmp_path / f"mesh.{name}"), axis=(0, 1)).argmax()
        assert tall == (2 if name in (container, "stl") else 1)


def test_a_locked_mesh_keeps_normals_metalness_and_roughness(tmp_path):
    tilted = np.tile(np.float32([0.6, 0.0, 0.8]), (len(TOWER.vertices), 1))
    mesh = replace(TOWER, normals=tilted, metallic=0.75, roughness=0.25)
    painted(tmp_path, mesh, "y", "glb", yaw_deg=40)
    back = read_mesh(tmp_path / "mesh.glb")
    np.testing.assert_allclose(back.normals, np.tile([0.6, 0, 0.8], (len(back.vertices), 1)), atol=1e-6)
    for name in ("glb", "obj"):
        back = read_mesh(tmp_path / f"mesh.{name}")
        assert (back.metallic, back.roughness) == (0.75, 0.25)
    np.testing.assert_allclose(read_mesh(tmp_path / "mesh.obj").normals[0], [0.6, 0, 0.8], atol=1e-5)
    material = ResultMesh(
        replace(mesh, uv=np.zeros((1, 2), np.float32), uv_faces=mesh.faces * 0, texture=np.zeros((2, 2, 3), np.uint8))
    )
    assert material.trimesh().visual.material.metallicFactor == 0.75


def test_size_and_up_axis_of_stl_files_are_set_and_read_back(tmp_path):
    axes = FileAxes(stl_up="z", size_mm=120.0)
    tower = upright(TOWER, "z")
    (path,) = write_formats(tower, tmp_path, ["stl"], axes=axes)
    assert _up(path) == "z"
    np.testing.assert_allclose(
        np.ptp(triangles(path), axis=(0, 1)), np.array([0.2, 0.3, 1.115]) * 120 / 1.115, rtol=1e-5
    )
    assert axes.note(tower).startswith("z up, 21.52 x 32.29 x 120 mm")
    np.testing.assert_array_equal(
        ResultMesh(tower, axes=axes).save(tmp_path / "b.stl")[0].read_bytes(), path.read_bytes()
    )


def test_without_a_users_mesh_stl_has_y_up_as_ever(tmp_path):
    axes = file_axes(None, ExportSettings())
    assert axes == FileAxes(one_shell=True) and axes.note(TOWER).startswith("y up, 0.2 x 0.3 x 0.5 mm")
    write_stl(largest_shell(TOWER), tmp_path / "a.stl")
    (path,) = write_formats(TOWER, tmp_path, ["stl"], axes=axes)
    assert "without 1 separate part" in axes.note(TOWER)
    assert path.read_bytes() == (tmp_path / "a.stl").read_bytes() and _up(path) == "y"
