"""PLY, binary little endian: positions, normals and sRGB vertex colours (from the texture where there are none)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.output.files import write_whole
from pipeline.output.surface import GENERATOR, srgb_bytes, vertex_colours
from stages.mesh.clean import check_mesh
from stages.mesh.mesh import Mesh


def ply_bytes(mesh: Mesh) -> bytes:
    """Return the mesh as a binary PLY file."""
    check_mesh(mesh)
    colours = vertex_colours(mesh)
    fields = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    if colours is not None:
        fields += [(name, "u1") for name in ("red", "green", "blue")]
    rows = np.zeros(len(mesh.vertices), dtype=fields)
    normals = mesh.vertex_normals()
    for k, name in enumerate("xyz"):
        rows[name], rows[f"n{name}"] = mesh.vertices[:, k], normals[:, k]
    if colours is not None:
        srgb = srgb_bytes(colours)
        for k, name in enumerate(("red", "green", "blue")):
            rows[name] = srgb[:, k]
    faces = np.zeros(len(mesh.faces), dtype=[("count", "u1"), ("index", "<i4", 3)])
    faces["count"], faces["index"] = 3, mesh.faces
    properties = [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in fields]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment {GENERATOR}",
        f"element vertex {len(rows)}",
        *properties,
        f"element face {len(faces)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    return "\n".join(header).encode() + b"\n" + rows.tobytes() + faces.tobytes()


def write_ply(mesh: Mesh, path: str | Path) -> list[Path]:
    """Write a binary PLY file; returns its path."""
    return [write_whole(path, ply_bytes(mesh))]
