"""glTF 2.0 binary (Khronos), one mesh with a PBR base colour, and normal and occlusion maps where it has them.

y is up and the front faces +z, as the format wants it.

Layout: 12 byte header, JSON chunk, BIN chunk, all 4-byte aligned; each bufferView holds one accessor or the PNG.
Texture coordinates have v down in glTF and v up in Mesh.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from pipeline.output.files import write_whole
from pipeline.output.surface import GENERATOR, encloses, material_groups, png_bytes, split_seams, textured
from stages.mesh.mesh import Mesh

FLOAT, USHORT, UINT = 5126, 5123, 5125
ARRAY_BUFFER, ELEMENT_BUFFER = 34962, 34963
LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP = 9729, 9987, 33071
NAME = "mesh"  # of node, mesh and pictures


class _Buffer:
    """The BIN chunk under construction, with the bufferViews and accessors that describe it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict] = []
        self.accessors: list[dict] = []

    def view(self, data: bytes, target: int | None = None) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        entry = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)}
        self.views.append(entry | ({"target": target} if target else {}))
        self.data += data
        return len(self.views) - 1

    def accessor(self, values: np.ndarray, kind: str, component: int, target: int, **extra: object) -> int:
        view = self.view(np.ascontiguousarray(values).tobytes(), target)
        entry = {"bufferView": view, "componentType": component, "count": len(values), "type": kind}
        self.accessors.append(entry | extra)
        return len(self.accessors) - 1


def glb_bytes(mesh: Mesh) -> bytes:
    """Return the mesh as a GLB file: base colour from the texture, else from vertex colours, else grey.

    Args:
        mesh: with faces; several materials give a primitive each, with vertices and textures in common.
    Raises: UserError if the mesh is empty or damaged.
    """
    surface = split_seams(mesh)
    buffer = _Buffer()
    positions = surface.positions.astype("<f4")
    bounds = {"min": positions.min(axis=0).tolist(), "max": positions.max(axis=0).tolist()}
    attributes = {
        "POSITION": buffer.accessor(positions, "VEC3", FLOAT, ARRAY_BUFFER, **bounds),
        "NORMAL": buffer.accessor(surface.normals.astype("<f4"), "VEC3", FLOAT, ARRAY_BUFFER),
    }
    document: dict[str, object] = {
        "asset": {"version": "2.0", "generator": GENERATOR},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": NAME}],
    }
    base: dict[str, object] = {}
    maps: dict[str, np.ndarray] = {}
    if textured(mesh):
        flipped = surface.uv * np.array([1, -1]) + np.array([0, 1])
        attributes["TEXCOORD_0"] = buffer.accessor(flipped.astype("<f4"), "VEC2", FLOAT, ARRAY_BUFFER)
        base["baseColorTexture"] = {"index": 0}
        maps = {"": mesh.texture, "normal": mesh.normal_map, "occlusion": mesh.occlusion}
        maps = {use: picture for use, picture in maps.items() if picture is not None}
        document["textures"] = [{"source": k, "sampler": 0} for k in range(len(maps))]
        if surface.tangents is not None:
            attributes["TANGENT"] = buffer.accessor(surface.tangents, "VEC4", FLOAT, ARRAY_BUFFER)
        document["samplers"] = [
            {"magFilter": LINEAR, "minFilter": LINEAR_MIPMAP_LINEAR, "wrapS": CLAMP, "wrapT": CLAMP}
        ]
    elif surface.colours is not None:
        shorts = np.full((len(surface.colours), 4), 65535, dtype="<u2")
        shorts[:, :3] = np.floor(np.clip(surface.colours, 0, 1) * 65535 + 0.5)
        attributes["COLOR_0"] = buffer.accessor(shorts, "VEC4", USHORT, ARRAY_BUFFER, normalized=True)
    else:
        base["baseColorFactor"] = [0.5, 0.5, 0.5, 1.0]
    small = len(positions) < 65535  # 65535 itself restarts primitives
    groups = material_groups(mesh)
    primitives = []
    for k, (_, faces) in enumerate(groups):
        indices = surface.faces[faces].reshape(-1).astype("<u2" if small else "<u4")
        primitives.append({
            "attributes": attributes,
            "indices": buffer.accessor(indices, "SCALAR", USHORT if small else UINT, ELEMENT_BUFFER),
            "material": k,
            "mode": 4,
        })  # fmt: skip
    document["meshes"] = [{"name": NAME, "primitives": primitives}]
    uses = {f"{use}Texture": {"index": k} for k, use in enumerate(maps) if use}  # occlusion is read from red
    document["materials"] = [
        {
            "name": material.name,
            "pbrMetallicRoughness": {"metallicFactor": material.metallic, "roughnessFactor": material.roughness} | base,
            "doubleSided": not encloses(mesh),
        }
        | uses
        for material, _ in groups
    ]
    if maps:
        views = {"_".join(filter(None, [NAME, use])): buffer.view(png_bytes(maps[use])) for use in maps}
        document["images"] = [{"bufferView": v, "mimeType": "image/png", "name": t} for t, v in views.items()]
    buffer.data += b"\0" * (-len(buffer.data) % 4)
    document["accessors"], document["bufferViews"] = buffer.accessors, buffer.views
    document["buffers"] = [{"byteLength": len(buffer.data)}]

    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(buffer.data), b"BIN\0") + bytes(buffer.data)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def write_glb(mesh: Mesh, path: str | Path) -> list[Path]:
    """Write a GLB file with the texture inside; returns its path."""
    return [write_whole(path, glb_bytes(mesh))]
