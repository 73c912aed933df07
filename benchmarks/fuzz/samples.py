"""Small meshes in every format that is read, which use much of what each format has, and the files beside them."""

from __future__ import annotations

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

_OBJ = b"""mtllib painted.mtl
o block
v -1 -1 -1 1 0 0
v 1 -1 -1 0 1 0
v 1 1 -1 0 0 1
v -1 1 -1 1 1 0
v -1 -1 1 1 0 1
v 1 -1 1 0 1 1
v 1 1 1 1 1 1
v -1 1 1 .5 .5 .5
vt 0 0
vt 1.5 0
vt 1.5 1
vt 0 1
vn 0 0 -1
vn 0 0 1
usemtl skin
f 4/4/1 3/3/1 2/2/1 1/1/1
f -4/-4/-1 -3/-3/-1 -2/-2/-1 -1/-1/-1
f 1/1 2/2 6/3 5/4
usemtl "bare one"
f 2 3 7 6
f 3// 4// 8// 7//
f 4 1 5 8 # the last
l 1 2
"""
_MTL = b"""newmtl skin
Kd 0.8 0.2 0.2
map_Kd -s 2 1 1 -o 0.5 0 0 -clamp off skin.png
Pm 0.3
Pr 0.6
newmtl bare one
Kd 0.1 0.9 0.3
d 0.5
"""
_POLYGONS = b"""ply
format ascii 1.0
comment TextureFile skin.png
comment TextureFile skin.png
element vertex 8
property float x
property float y
property float z
property float nx
property float ny
property float nz
element face 6
property list uchar int vertex_indices
property list uchar float texcoord
property uchar red
property uchar green
property uchar blue
property int texnumber
element edge 1
property int vertex1
property int vertex2
end_header
"""
_STRIPS = b"""ply
format binary_big_endian 1.0
comment TextureFile skin.png
element vertex 8
property double x
property double y
property double z
property float s
property float t
element tristrips 1
property list int int vertex_indices
end_header
"""
_QUADS = ((3, 2, 1, 0), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7))
_STRIP = (3, 2, 0, 1, 5, 2, 6, 3, 7, 0, 4, 5, -1, 4, 7, 5, 6)


def mesh_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return meshes by file name, each as its own file and those beside it; written in an empty `folder`."""
    import trimesh

    from pipeline.output.write import write_mesh
    from stages.mesh.mesh import Mesh

    folder.mkdir()
    ball = trimesh.creation.icosphere(subdivisions=0)
    vertices, faces = ball.vertices.astype(np.float32), ball.faces.astype(np.int32)
    uv, texture = np.abs(vertices[:, :2]), np.full((8, 8, 3), 99, np.uint8)
    write_mesh(Mesh(vertices, faces, uv=uv, uv_faces=faces, texture=texture), folder / "textured.glb")
    write_mesh(Mesh(vertices, faces, np.abs(vertices)), folder / "coloured.ply")
    ball.export(folder / "plain.stl")
    (folder / "text.stl").write_text(trimesh.exchange.stl.export_stl_ascii(ball))
    (folder / "text.ply").write_bytes(trimesh.exchange.ply.export_ply(ball, encoding="ascii"))
    samples = {path.name: {path.name: path.read_bytes()} for path in sorted(folder.iterdir())}
    picture = {"skin.png": _picture()}
    samples["painted.obj"] = {"painted.obj": _OBJ, "painted.mtl": _MTL} | picture
    samples["polygons.ply"] = {"polygons.ply": _POLYGONS + _rows()} | picture
    samples["strips.ply"] = {"strips.ply": _STRIPS + _strip_body()} | picture
    document, numbers = _scene()
    buffer = {"byteLength": len(numbers)}
    samples["scene.glb"] = {"scene.glb": _glb(document | {"buffers": [buffer]}, numbers)}
    buffer = buffer | {"uri": f"data:application/octet-stream;base64,{base64.b64encode(numbers).decode()}"}
    samples["scene.gltf"] = {"scene.gltf": json.dumps(document | {"buffers": [buffer]}).encode()}
    return samples


def _corners() -> np.ndarray:
    """Of a block, [8, 3]: around its bottom, then around its top."""
    return np.array([[x, y, z] for z in (-1, 1) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))], np.float32)


def _picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "PNG")
    return file.getvalue()


def _rows() -> bytes:
    lines = [" ".join(f"{value:g}" for value in (*corner, *corner / 3**0.5)) for corner in _corners()]
    for number, quad in enumerate(_QUADS):
        lines.append(f"4 {' '.join(map(str, quad))} 8 0 0 1 0 1 1.5 0 1 200 {40 * number} 9 {number % 2}")
    return ("\n".join([*lines, "0 1"]) + "\n").encode()


def _strip_body() -> bytes:
    corners = b"".join(struct.pack(">3d2f", *corner, *((corner[:2] + 1) / 2)) for corner in _corners())
    return corners + struct.pack(f">{len(_STRIP) + 1}i", len(_STRIP), *_STRIP)


def _glb(document: dict[str, Any], numbers: bytes) -> bytes:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(numbers), b"BIN\0") + numbers
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


class _Numbers:
    """Accessors and their bytes under construction."""

    def __init__(self) -> None:
        self.data = b""
        self.accessors: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []

    def view(self, values: Any, kind: str) -> int:
        data = np.asarray(values, kind).tobytes()
        self.views.append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)})
        self.data += data + b"\0" * (-len(data) % 4)
        return len(self.views) - 1

    def accessor(self, values: Any, kind: str = "f4", **more: Any) -> int:
        values = np.asarray(values, kind)
        codes = {"f4": 5126, "u1": 5121, "u2": 5123, "u4": 5125}
        shape = {1: "SCALAR", 2: "VEC2", 3: "VEC3"}[1 if values.ndim == 1 else values.shape[1]]
        facts = {"bufferView": self.view(values, kind), "componentType": codes[kind], "count": len(values)}
        self.accessors.append(facts | {"type": shape} | more)
        return len(self.accessors) - 1


def _scene() -> tuple[dict[str, Any], bytes]:
    """A glTF without its buffers, and the bytes of its only one: a tree of nodes, a strip, a fan, sparse and normalised
    numbers, morph targets, a moved texture, a hidden node."""
    numbers = _Numbers()
    corners = _corners()
    position = numbers.accessor(corners, min=[-1, -1, -1], max=[1, 1, 1])
    triangles = numbers.accessor([c for a, b, *rest in _QUADS for c in (a, b, rest[0], a, *rest)], "u2")
    sparse = {"count": 2, "indices": {"bufferView": numbers.view([0, 7], "u2"), "componentType": 5123}}
    sparse["values"] = {"bufferView": numbers.view([[-2, -1, -1], [1, 2, 1]], "f4")}
    moved = numbers.accessor(corners, sparse=sparse)
    uv = numbers.accessor((corners[:, :2] > 0) * 255, "u1", normalized=True)
    normals = numbers.accessor(corners / 3**0.5)
    colours = numbers.accessor(np.abs(corners) / 2)
    target = numbers.accessor(corners * 0.1)
    fan = numbers.accessor([0, 3, 2, 1], "u4")
    strip = numbers.accessor([0, 1, 4, 5, 7, 6], "u1")
    image = numbers.view(np.frombuffer(_picture(), np.uint8), "u1")
    move = {"KHR_texture_transform": {"offset": [0.1, 0], "rotation": 0.2, "scale": [2, 1]}}
    texture = {"index": 0, "texCoord": 1, "extensions": move}
    factors = {"baseColorFactor": [1, 0.5, 0.5, 1], "metallicFactor": 0.2, "roughnessFactor": 0.7}
    skin = {"name": "skin", "pbrMetallicRoughness": factors | {"baseColorTexture": texture}, "alphaMode": "MASK"}
    bare = {"pbrMetallicRoughness": {"baseColorFactor": [0.2, 0.4, 0.9, 1], "metallicRoughnessTexture": {"index": 0}}}
    body = {"POSITION": position, "NORMAL": normals, "TEXCOORD_0": uv, "TEXCOORD_1": uv}
    first = {"attributes": body, "indices": triangles, "material": 0, "targets": [{"POSITION": target}]}
    rest = [
        {"attributes": {"POSITION": moved, "COLOR_0": colours}, "indices": strip, "mode": 5, "material": 1},
        {"attributes": {"POSITION": moved}, "indices": fan, "mode": 6},
        {"attributes": {"POSITION": position}, "mode": 1},
    ]
    hidden = {"mesh": 1, "extensions": {"KHR_node_visibility": {"visible": False}}}
    matrix = [1, 0, 0, 0, 0, 0, -1, 0, 0, 1, 0, 0, 3, 0, 0, 1]
    nodes: list[dict[str, Any]] = [{"children": [1, 2, 3]}, {"mesh": 0, "translation": [1, 0, 0]}, hidden]
    nodes.append({"mesh": 1, "matrix": matrix, "children": [4]})
    nodes.append({"mesh": 0, "rotation": [0, 0.6, 0, 0.8], "scale": [1, 2, 1], "weights": [0.5]})
    document = {
        "asset": {"version": "2.0"},
        "extensionsUsed": ["KHR_texture_transform", "KHR_node_visibility", "EXT_something"],
        "scene": 0,
        "scenes": [{"nodes": [0]}, {"nodes": [1]}],
        "nodes": nodes,
        "meshes": [{"primitives": [first], "weights": [0]}, {"primitives": rest}],
        "materials": [skin, bare],
        "textures": [{"source": 0, "sampler": 0}],
        "samplers": [{"wrapS": 33071}],
        "images": [{"bufferView": image, "mimeType": "image/png"}],
        "accessors": numbers.accessors,
        "bufferViews": numbers.views,
        "animations": [{"channels": [], "samplers": []}],
    }
    return document, numbers.data
