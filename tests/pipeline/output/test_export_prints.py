"""Files for printers and headsets, read back by other programs' readers: STL, 3MF, USDZ; and materials kept apart."""

from __future__ import annotations

import io
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from pipeline.output.axes import FileAxes, file_axes
from pipeline.output.glb import glb_bytes, write_glb
from pipeline.output.obj import write_obj
from pipeline.output.settings import ExportSettings
from pipeline.output.surface import material_groups
from pipeline.output.threemf import threemf_bytes
from pipeline.output.write import check_formats, write_formats
from stages.errors import UserError
from stages.mesh.files.read import read_mesh
from stages.mesh.mesh import Material, Mesh
from tests.mesh.mesh_shapes import box, join, make, moved, noisy_blob, sphere
from tests.mesh.painted_shapes import bumpy_torus, coloured_box, textured_torus
from tests.pipeline.output.test_export_glb import chunks, node_modules, validate  # noqa: F401


def two_materials() -> Mesh:
    mesh = textured_torus()
    parts = np.zeros(len(mesh.faces), np.int32)
    parts[len(parts) // 3 :] = 1
    materials = (Material("shiny body", 0.8, 0.2), Material("rubber", 0.0, 0.7))
    return replace(mesh, materials=materials, face_materials=parts)


def mapped_torus() -> Mesh:
    light = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    return replace(bumpy_torus(), occlusion=light)


def with_a_void_and_a_crumb() -> Mesh:
    void = moved(sphere(n=16, m=8), (0, 0, 0), 0.3)
    void.faces = np.ascontiguousarray(void.faces[:, ::-1])
    return join(sphere(n=32, m=16), void, moved(box(), (2, 0, 0), 0.3))


def test_a_print_is_one_closed_outer_shell_without_voids(tmp_path):
    manifold3d = pytest.importorskip("manifold3d")
    axes = file_axes(None, ExportSettings(size_mm=50))
    (path,) = write_formats(with_a_void_and_a_crumb(), tmp_path, ["stl"], axes=axes)
    assert "without 2 separate parts" in axes.note(with_a_void_and_a_crumb())
    mesh = read_mesh(path)
    points, places = np.unique(mesh.vertices, axis=0, return_inverse=True)
    body = manifold3d.Manifold(manifold3d.Mesh(points.astype(np.float32), places.reshape(-1)[mesh.faces]))
    assert body.status() == manifold3d.Error.NoError and len(body.decompose()) == 1
    assert np.ptp(points, axis=0).max() == pytest.approx(50, rel=1e-5)
    ball = 4 / 3 * np.pi * 25**3
    assert 0.9 * ball < body.volume() < ball  # of the whole ball: nothing is hollow
    everything = FileAxes()  # of a user's mesh, whose parts are all wanted
    assert len(everything.prepared(with_a_void_and_a_crumb(), "stl").faces) > len(mesh.faces)


@pytest.mark.parametrize("mesh", [textured_torus(), coloured_box()], ids=["textured", "plain"])
def test_lib3mf_reads_millimetres_triangles_and_texture_coordinates(mesh, tmp_path):
    lib3mf = pytest.importorskip("lib3mf")
    (path,) = write_formats(mesh, tmp_path, ["3mf"], axes=FileAxes(size_mm=80))
    model = lib3mf.get_wrapper().CreateModel()
    reader = model.QueryReader("3mf")
    reader.SetStrictModeActive(True)
    reader.ReadFromFile(str(path))
    assert reader.GetWarningCount() == 0 and model.GetUnit() == lib3mf.ModelUnit.MilliMeter
    objects = model.GetMeshObjects()
    assert objects.MoveNext()
    found = objects.GetCurrentMeshObject()
    points = np.array([list(vertex.Coordinates) for vertex in found.GetVertices()])
    faces = np.array([list(triangle.Indices) for triangle in found.GetTriangleIndices()])
    np.testing.assert_array_equal(faces, mesh.faces)
    upright = np.stack([points[:, 0], points[:, 2], -points[:, 1]], -1)  # z was up
    scale = 80 / np.ptp(mesh.vertices, axis=0).max()
    np.testing.assert_allclose(upright, mesh.vertices * scale, atol=1e-4)
    assert found.IsManifoldAndOriented()
    textures = model.GetTexture2DGroups()
    if mesh.texture is None:
        assert textures.Count() == 0
        return
    assert textures.MoveNext()
    group = textures.GetCurrentTexture2DGroup()
    corner = found.GetTriangleProperties(5).PropertyIDs[2]
    at = group.GetTex2Coord(corner)
    np.testing.assert_allclose([at.U, at.V], mesh.uv[mesh.uv_faces[5, 2]], atol=1e-6)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        picture = archive.read("3D/Textures/texture.png")
    assert bytes(group.GetTexture2D().GetAttachment().WriteToBuffer()) == picture


@pytest.mark.parametrize("mesh", [textured_torus(), mapped_torus(), two_materials(), coloured_box(), box()])
def test_usd_finds_no_fault_and_reads_back_what_was_written(mesh, tmp_path):
    pytest.importorskip("pxr.UsdUtils")
    from pxr import Usd, UsdGeom, UsdShade, UsdUtils

    (path,) = write_formats(mesh, tmp_path, ["usdz"])
    stage = Usd.Stage.Open(str(path))
    assert _faults(stage, str(path)) == []
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1
    assert stage.GetDefaultPrim().GetPath() == "/Model"
    shape = UsdGeom.Mesh(stage.GetPrimAtPath("/Model/Mesh"))
    np.testing.assert_array_equal(np.array(shape.GetPointsAttr().Get()), mesh.vertices)
    np.testing.assert_array_equal(np.array(shape.GetFaceVertexIndicesAttr().Get()).reshape(-1, 3), mesh.faces)
    if mesh.texture is not None:
        coordinates = UsdGeom.PrimvarsAPI(shape).GetPrimvar("st")
        np.testing.assert_array_equal(np.array(coordinates.ComputeFlattened()), mesh.uv[mesh.uv_faces].reshape(-1, 2))
    layers, assets, missing = UsdUtils.ComputeAllDependencies(str(path))
    pictures = 0 if mesh.texture is None else 1 + (mesh.normal_map is not None) + (mesh.occlusion is not None)
    assert len(layers) == 1 and len(assets) == pictures and not missing
    groups = material_groups(mesh)
    parts = UsdGeom.Subset.GetGeomSubsets(shape, "face", "materialBind") or [shape]
    assert len(parts) == len(groups)
    for part, (material, faces) in zip(parts, groups, strict=True):
        bound, _ = UsdShade.MaterialBindingAPI(part).ComputeBoundMaterial()
        surface = bound.ComputeSurfaceSource()[0]
        assert surface.GetInput("roughness").Get() == pytest.approx(material.roughness)
        assert surface.GetInput("metallic").Get() == pytest.approx(material.metallic)
        if len(groups) > 1:
            np.testing.assert_array_equal(np.array(UsdGeom.Subset(part).GetIndicesAttr().Get()), faces)


@pytest.fixture
def in_zone(monkeypatch):
    """in_zone(name) puts the process into a time zone."""
    if not hasattr(time, "tzset"):
        pytest.skip("no time zones of a process")
    with monkeypatch.context() as patch:
        yield lambda name: (patch.setenv("TZ", name), time.tzset())
    time.tzset()


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
def test_a_usdz_does_not_depend_on_when_and_where_it_is_made(zone, in_zone, tmp_path):
    pytest.importorskip("pxr.UsdUtils")
    in_zone(zone)
    (path,) = write_formats(textured_torus(), tmp_path, ["usdz"])
    with zipfile.ZipFile(path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def _faults(stage, path: str) -> list[str]:
    """What USD's own checks, those of a USDZ package among them, complain of."""
    from pxr import UsdUtils

    if hasattr(UsdUtils, "ComplianceChecker"):  # usd-core before 26
        checker = UsdUtils.ComplianceChecker(arkit=True)
        checker.CheckCompliance(path)
        return [*checker.GetErrors(), *checker.GetFailedChecks()]
    from pxr import UsdValidation

    registry = UsdValidation.ValidationRegistry()
    context = UsdValidation.ValidationContext(registry.GetOrLoadAllValidators())
    return [error.GetErrorAsString() for error in context.Validate(stage)]


def test_usd_would_have_complained(tmp_path):
    pytest.importorskip("pxr.UsdUtils")
    from pxr import Usd

    (path,) = write_formats(textured_torus(), tmp_path, ["usdz"])
    with zipfile.ZipFile(path) as archive:
        (tmp_path / "mesh.usdc").write_bytes(archive.read(archive.namelist()[0]))
    stage = Usd.Stage.Open(str(tmp_path / "mesh.usdc"))
    stage.ClearDefaultPrim()
    assert _faults(stage, str(tmp_path / "mesh.usdc")) != []


def test_usdz_without_its_extra_is_a_user_error(monkeypatch):
    import builtins

    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("pxr"):
            raise ImportError("No module named 'pxr'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="Cannot write a USDZ file") as error:
        check_formats("glb,usdz")
    assert "text3d-pipeline[usd]" in error.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [mapped_torus(), two_materials()], ids=["maps", "materials"])
def test_khronos_validator_takes_maps_and_materials(mesh, tmp_path, node_modules):  # noqa: F811
    report = validate(write_glb(mesh, tmp_path / "mesh.glb")[0], node_modules)
    issues = report["issues"]
    assert (issues["numErrors"], issues["numWarnings"], issues["numInfos"]) == (0, 0, 0), issues["messages"]


def test_the_occlusion_map_is_the_materials_own_picture():
    document, _ = chunks(glb_bytes(mapped_torus()))
    (material,) = document["materials"]
    assert material["normalTexture"] == {"index": 1} and material["occlusionTexture"] == {"index": 2}
    assert [image["name"] for image in document["images"]] == ["mesh", "mesh_normal", "mesh_occlusion"]


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_materials_come_back_with_names_faces_and_finish(suffix, tmp_path):
    mesh = two_materials()
    path = {"glb": write_glb, "obj": write_obj}[suffix](mesh, tmp_path / f"mesh.{suffix}")[0]
    back = read_mesh(path)
    names = [material.name.replace("_", " ") for material in back.materials]
    assert names == ["shiny body", "rubber"]
    assert [(m.metallic, m.roughness) for m in back.materials] == [(0.8, 0.2), (0.0, 0.7)]
    np.testing.assert_array_equal(back.face_materials, mesh.face_materials)
    np.testing.assert_array_equal(back.vertices[back.faces], mesh.vertices[mesh.faces])


def test_one_material_on_all_parts_is_one(tmp_path):
    mesh = two_materials()
    same = replace(mesh, materials=(mesh.materials[0], replace(mesh.materials[0])))
    back = read_mesh(write_glb(same, tmp_path / "mesh.glb")[0])
    assert back.materials is None and back.face_materials is None and back.roughness == pytest.approx(0.2)


def test_same_mesh_gives_the_same_archive():
    mesh = textured_torus()
    assert threemf_bytes(mesh) == threemf_bytes(mesh)
    blob = noisy_blob(12)
    assert threemf_bytes(make(blob.vertices, blob.faces)) == threemf_bytes(blob)
