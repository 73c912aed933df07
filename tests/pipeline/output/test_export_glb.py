"""GLB files are valid glTF, read back as they were written, and look the same from one run to the next."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from pipeline.output.glb import glb_bytes, write_glb
from stages.errors import UserError
from stages.mesh.mesh import Mesh
from tests.mesh.mesh_shapes import box, join, make, moved, torus
from tests.mesh.painted_shapes import bumpy_torus, coloured_box, textured_torus

VALIDATE = """
const validator = require('gltf-validator'); const fs = require('fs');
validator.validateBytes(new Uint8Array(fs.readFileSync(process.argv[1])), {maxIssues: 0, writeTimestamp: false})
  .then((report) => console.log(JSON.stringify(report)), (error) => { console.error(error); process.exit(1); });
"""


def chunks(data: bytes) -> tuple[dict, bytes]:
    magic, version, total = struct.unpack_from("<4sII", data)
    assert (magic, version, total) == (b"glTF", 2, len(data))
    length, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and length % 4 == 0
    size, kind = struct.unpack_from("<I4s", data, 20 + length)
    assert kind == b"BIN\0" and 28 + length + size == len(data)
    return json.loads(data[20 : 20 + length]), data[28 + length :]


@pytest.fixture(scope="session")
def node_modules() -> str:
    """A node_modules folder with gltf-validator: $GLTF_VALIDATOR_MODULES, an earlier install, or a fresh one."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    chosen_folder = os.environ.get("GLTF_VALIDATOR_MODULES")
    folder = Path(chosen_folder).parent if chosen_folder else Path(tempfile.gettempdir()) / "text3d-gltf-validator"
    modules = folder / "node_modules"
    if not (modules / "gltf-validator" / "index.js").exists():
        if chosen_folder or shutil.which("npm") is None:
            pytest.skip(f"gltf-validator is not in {modules} and npm cannot fetch it")
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder)]
        command.append("gltf-validator@2.0.0-dev.3.10")
        try:
            done = subprocess.run(command, capture_output=True, timeout=90, text=True)
        except subprocess.TimeoutExpired:
            pytest.skip("npm install gltf-validator took longer than 90 s (no network?)")
        if done.returncode != 0:
            pytest.skip(f"npm install gltf-validator failed: {done.stderr.strip().splitlines()[-1:]}")
    return str(modules)


def validate(path: Path, node_modules: str) -> dict:
    environment = os.environ | {"NODE_PATH": node_modules}
    done = subprocess.run(
        ["node", "-e", VALIDATE, str(path)], capture_output=True, timeout=60, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        textured_torus(),
        bumpy_torus(),
        coloured_box(),
        box(),
        join(box(), moved(torus(n=8, m=6), (2, 0, 0))),
        torus(n=300, m=250),
    ],
    ids=["textured", "normal_map", "coloured", "plain", "two_parts", "wide_indices"],
)
def test_khronos_validator_finds_nothing(mesh, tmp_path, node_modules):
    report = validate(write_glb(mesh, tmp_path / "mesh.glb")[0], node_modules)
    issues = report["issues"]
    assert (issues["numErrors"], issues["numWarnings"], issues["numInfos"]) == (0, 0, 0), issues["messages"]
    assert report["info"]["totalTriangleCount"] == len(mesh.faces)


def test_validator_would_have_complained(tmp_path, node_modules):
    data = bytearray(glb_bytes(textured_torus()))
    document, binary = chunks(bytes(data))
    normals = document["bufferViews"][document["accessors"][1]["bufferView"]]
    start = len(data) - len(binary) + normals["byteOffset"]
    data[start : start + 12] = np.array([3, 0, 0], dtype="<f4").tobytes()
    (tmp_path / "bad.glb").write_bytes(data)
    assert validate(tmp_path / "bad.glb", node_modules)["issues"]["numErrors"] > 0


def test_trimesh_reads_back_what_was_written(tmp_path):
    mesh = textured_torus()
    path = write_glb(mesh, tmp_path / "mesh.glb")[0]
    scene = trimesh.load(path, process=False)
    back = next(iter(scene.geometry.values()))
    seams = len(np.unique(np.stack([mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)], -1), axis=0))
    assert len(back.vertices) == seams > len(mesh.vertices)
    assert back.faces.shape == mesh.faces.shape
    np.testing.assert_array_equal(back.vertices[back.faces], mesh.vertices[mesh.faces])  # same faces, same order
    np.testing.assert_allclose(back.bounds, [mesh.vertices.min(0), mesh.vertices.max(0)])
    np.testing.assert_allclose(back.visual.uv[back.faces], mesh.uv[mesh.uv_faces], atol=1e-6)  # trimesh: v up
    material = back.visual.material
    np.testing.assert_array_equal(np.asarray(material.baseColorTexture)[..., :3], mesh.texture)
    assert material.metallicFactor == 0 and 0.5 < material.roughnessFactor <= 1
    np.testing.assert_allclose(
        np.einsum("ij,ij->i", back.vertex_normals, mesh.vertex_normals()[_source(mesh)]), 1, atol=1e-5
    )


def _source(mesh: Mesh) -> np.ndarray:
    return np.unique(np.stack([mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)], -1), axis=0)[:, 0]


def test_welding_the_seams_gives_the_closed_mesh_again(tmp_path):
    scene = trimesh.load(write_glb(textured_torus(), tmp_path / "mesh.glb")[0], process=False)
    back = next(iter(scene.geometry.values()))
    assert not back.is_watertight  # split at seams
    welded = trimesh.Trimesh(back.vertices, back.faces, process=False)
    welded.merge_vertices(merge_tex=True, merge_norm=True)
    assert welded.is_watertight and welded.volume > 0 and welded.euler_number == 0


def test_v_points_down_in_the_file():
    mesh = make([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    texture = np.zeros((2, 2, 3), dtype=np.uint8)
    mesh = replace(
        mesh, uv=np.array([[0.1, 0.2], [0.9, 0.2], [0.1, 0.8]], np.float32), uv_faces=mesh.faces, texture=texture
    )
    document, binary = chunks(glb_bytes(mesh))
    accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"]]
    view = document["bufferViews"][accessor["bufferView"]]
    stored = np.frombuffer(binary, "<f4", 6, view["byteOffset"]).reshape(3, 2)
    np.testing.assert_allclose(stored, [[0.1, 0.8], [0.9, 0.8], [0.1, 0.2]], atol=1e-6)


def test_texture_is_an_embedded_png_and_the_factor_white():
    mesh = textured_torus()
    document, binary = chunks(glb_bytes(mesh))
    view = document["bufferViews"][document["images"][0]["bufferView"]]
    picture = Image.open(io.BytesIO(binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]))
    assert picture.format == "PNG"
    np.testing.assert_array_equal(np.asarray(picture), mesh.texture)
    assert "COLOR_0" not in document["meshes"][0]["primitives"][0]["attributes"]  # it would multiply the texture
    assert "baseColorFactor" not in document["materials"][0]["pbrMetallicRoughness"]
    assert all(view["byteOffset"] % 4 == 0 for view in document["bufferViews"])


@pytest.mark.parametrize("mirror", [False, True])
def test_normal_map_comes_with_tangents_along_u_and_bitangents_up_the_picture(mirror):
    mesh = bumpy_torus(mirror)
    document, binary = chunks(glb_bytes(mesh))
    attributes = document["meshes"][0]["primitives"][0]["attributes"]

    def read(name: str, width: int) -> np.ndarray:
        accessor = document["accessors"][attributes[name]]
        start = document["bufferViews"][accessor["bufferView"]]["byteOffset"]
        return np.frombuffer(binary, "<f4", width * accessor["count"], start).reshape(-1, width).astype(np.float64)

    widths = {"POSITION": 3, "NORMAL": 3, "TEXCOORD_0": 2, "TANGENT": 4}
    points, normals, uv, actual = (read(name, width) for name, width in widths.items())
    tangent, sign = actual[:, :3], actual[:, 3:]
    np.testing.assert_allclose(np.linalg.norm(tangent, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.einsum("vk,vk->v", tangent, normals), 0, atol=1e-5)
    assert set(sign[:, 0]) == {-1.0 if mirror else 1.0}
    bitangent = np.cross(normals, tangent) * sign
    faces = np.unique(np.stack([mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)], -1), axis=0, return_inverse=True)[1]
    for face in faces.reshape(-1, 3)[::17]:
        edge, grow = points[face[1:]] - points[face[0]], uv[face[1:]] - uv[face[0]]
        along = np.linalg.lstsq(grow, edge, rcond=None)[0]  # dP/du and dP/dv, v down as the file has it
        assert along[0] @ tangent[face[0]] > 0.5 * np.linalg.norm(along[0])
        assert -along[1] @ bitangent[face[0]] > 0.5 * np.linalg.norm(along[1])  # green is up
    material = document["materials"][0]
    assert material["normalTexture"] == {"index": 1} and len(document["images"]) == 2
    view = document["bufferViews"][document["images"][1]["bufferView"]]
    picture = Image.open(io.BytesIO(binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]))
    np.testing.assert_array_equal(np.asarray(picture), mesh.normal_map)


def test_colours_are_linear_in_the_file():
    mesh = coloured_box()
    document, binary = chunks(glb_bytes(mesh))
    accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    view = document["bufferViews"][accessor["bufferView"]]
    stored = np.frombuffer(binary, "<u2", 4 * 8, view["byteOffset"]).reshape(8, 4) / 65535
    np.testing.assert_allclose(stored[:, :3], mesh.colours, atol=1e-5)


def test_a_back_that_can_be_seen_is_shown():
    """Viewers cull the backs of one-sided faces; a painted flag, or a mesh that winds inwards, would vanish."""
    closed = torus()
    inwards = replace(closed, faces=closed.faces[:, ::-1].copy())
    for mesh, double in ((closed, False), (inwards, True), (replace(closed, faces=closed.faces[:-1]), True)):
        assert chunks(glb_bytes(mesh))[0]["materials"][0]["doubleSided"] is double


def test_same_mesh_gives_the_same_bytes():
    assert glb_bytes(textured_torus()) == glb_bytes(textured_torus())


def test_empty_and_broken_meshes_are_refused_and_leave_the_old_file(tmp_path):
    path = write_glb(box(), tmp_path / "mesh.glb")[0]
    before = path.read_bytes()
    broken = box()
    broken.vertices[3] = np.nan
    for mesh in (make(np.zeros((0, 3)), np.zeros((0, 3))), broken, make(box().vertices, [[0, 1, 99]])):
        with pytest.raises(UserError):
            write_glb(mesh, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.glb"]
