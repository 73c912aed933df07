"""USDZ by the package usd-core (extra `usd`): one mesh with a UsdPreviewSurface material, for phones and headsets.

y is up and a unit is a metre, as in glTF. Texture coordinates have v up in USD and in Mesh.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.output.files import write_whole
from pipeline.output.surface import encloses, material_groups, png_bytes, textured
from stages.errors import UserError
from stages.mesh.clean import check_mesh
from stages.mesh.mesh import Material, Mesh

GREY = 0.5  # linear colour of a mesh that has none
FLIP, SHIFT = (2.0, 2.0, 2.0, 1.0), (-1.0, -1.0, -1.0, 0.0)  # from a picture of normals to normals


def usdz_bytes(mesh: Mesh) -> bytes:
    """Return the mesh as a USDZ file.

    Args:
        mesh: with faces, y up.
    Raises: UserError if usd-core is missing, or the mesh is empty or damaged.
    """
    check_mesh(mesh)
    check_usd()
    from pxr import Sdf, UsdUtils

    with tempfile.TemporaryDirectory(prefix="usdz-") as folder:
        pictures = {"colour": mesh.texture, "normal": mesh.normal_map, "occlusion": mesh.occlusion}
        pictures = {name: picture for name, picture in pictures.items() if textured(mesh) and picture is not None}
        for name, picture in pictures.items():
            (Path(folder) / f"{name}.png").write_bytes(png_bytes(picture))
        source, target = Path(folder) / "mesh.usdc", Path(folder) / "mesh.usdz"
        _write_stage(mesh, str(source), set(pictures))
        start = time.mktime((1980, 1, 1, 0, 0, 0, 0, 1, -1))  # of a ZIP's local times, which are those of the files
        for path in Path(folder).iterdir():
            os.utime(path, (start, start))
        if not UsdUtils.CreateNewUsdzPackage(Sdf.AssetPath(str(source)), str(target)):
            raise UserError("Cannot write a USDZ file", "usd-core could not pack it", "choose another --format")
        return target.read_bytes()


def write_usdz(mesh: Mesh, path: str | Path) -> list[Path]:
    """Write a USDZ file with the textures inside; returns its path."""
    return [write_whole(path, usdz_bytes(mesh))]


def check_usd() -> None:
    """Raise UserError unless usd-core can be imported."""
    try:
        import pxr.UsdUtils  # noqa: F401
    except ImportError as error:
        fix = "pip install 'text3d-pipeline[usd]', or leave usdz out of the formats"
        raise UserError("Cannot write a USDZ file", f"usd-core is missing ({error})", fix) from None


def _write_stage(mesh: Mesh, path: str, pictures: set[str]) -> None:
    from pxr import Gf, Sdf, Usd, UsdGeom, UsdShade, Vt

    stage = Usd.Stage.CreateNew(path)
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    root = UsdGeom.Xform.Define(stage, "/Model")
    stage.SetDefaultPrim(root.GetPrim())
    shape = UsdGeom.Mesh.Define(stage, "/Model/Mesh")
    shape.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    shape.CreateDoubleSidedAttr(not encloses(mesh))
    points = np.ascontiguousarray(mesh.vertices, np.float32)
    shape.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(points))
    shape.CreateExtentAttr([Gf.Vec3f(*row.tolist()) for row in (points.min(0), points.max(0))])
    shape.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(mesh.faces), 3, np.int32)))
    shape.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(_flat(mesh.faces)))
    shape.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(mesh.vertex_normals(), np.float32)))
    shape.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    primvars = UsdGeom.PrimvarsAPI(shape)
    if pictures:
        kind = Sdf.ValueTypeNames.TexCoord2fArray
        coordinates = primvars.CreatePrimvar("st", kind, UsdGeom.Tokens.faceVarying)
        coordinates.Set(Vt.Vec2fArray.FromNumpy(np.ascontiguousarray(mesh.uv, np.float32)))
        coordinates.SetIndices(Vt.IntArray.FromNumpy(_flat(mesh.uv_faces)))
    elif mesh.colours is not None:
        colours = shape.CreateDisplayColorPrimvar(UsdGeom.Tokens.vertex)
        colours.Set(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(mesh.colours, np.float32)))
    groups = material_groups(mesh)
    for k, (material, faces) in enumerate(groups):
        part = shape.GetPrim()
        if len(groups) > 1:
            subset = UsdGeom.Subset.CreateGeomSubset(
                shape, f"part_{k}", UsdGeom.Tokens.face, Vt.IntArray.FromNumpy(_flat(faces)), "materialBind"
            )
            part = subset.GetPrim()
        surface = _material(stage, f"/Model/Materials/material_{k}", material, mesh, pictures)
        UsdShade.MaterialBindingAPI.Apply(part).Bind(surface)
    if len(groups) > 1:
        UsdShade.MaterialBindingAPI(shape).SetMaterialBindSubsetsFamilyType(UsdGeom.Tokens.partition)
    stage.GetRootLayer().Save()


def _material(stage: Any, path: str, material: Material, mesh: Mesh, pictures: set[str]) -> Any:
    """A UsdPreviewSurface with the textures that are there (UsdPreviewSurface specification 2.6)."""
    from pxr import Gf, Sdf, UsdShade

    kinds = Sdf.ValueTypeNames
    result = UsdShade.Material.Define(stage, path)
    result.GetPrim().SetDisplayName(material.name)
    surface = UsdShade.Shader.Define(stage, f"{path}/surface")
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("roughness", kinds.Float).Set(material.roughness)
    surface.CreateInput("metallic", kinds.Float).Set(material.metallic)
    result.CreateSurfaceOutput().ConnectToSource(surface.ConnectableAPI(), "surface")
    if not pictures:
        mean = np.full(3, GREY) if mesh.colours is None else mesh.colours.mean(0)
        surface.CreateInput("diffuseColor", kinds.Color3f).Set(Gf.Vec3f(*map(float, mean)))
        return result
    reader = UsdShade.Shader.Define(stage, f"{path}/coordinates")
    reader.CreateIdAttr("UsdPrimvarReader_float2")
    reader.CreateInput("varname", kinds.String).Set("st")
    reader.CreateOutput("result", kinds.Float2)
    uses = {"colour": ("diffuseColor", "rgb"), "normal": ("normal", "rgb"), "occlusion": ("occlusion", "r")}
    for name in sorted(pictures):
        use, channels = uses[name]
        kind = {"diffuseColor": kinds.Color3f, "normal": kinds.Normal3f, "occlusion": kinds.Float}[use]
        texture = UsdShade.Shader.Define(stage, f"{path}/{name}")
        texture.CreateIdAttr("UsdUVTexture")
        texture.CreateInput("file", kinds.Asset).Set(f"./{name}.png")
        texture.CreateInput("sourceColorSpace", kinds.Token).Set("sRGB" if name == "colour" else "raw")
        for wrap in ("wrapS", "wrapT"):
            texture.CreateInput(wrap, kinds.Token).Set("clamp")
        texture.CreateInput("st", kinds.Float2).ConnectToSource(reader.ConnectableAPI(), "result")
        if name == "normal":
            texture.CreateInput("scale", kinds.Float4).Set(Gf.Vec4f(*FLIP))
            texture.CreateInput("bias", kinds.Float4).Set(Gf.Vec4f(*SHIFT))
        texture.CreateOutput(channels, kinds.Float3 if channels == "rgb" else kinds.Float)
        surface.CreateInput(use, kind).ConnectToSource(texture.ConnectableAPI(), channels)
    return result


def _flat(indices: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(indices.reshape(-1), np.int32)
