"""PLY, binary little endian: positions, normals and sRGB vertex colours (from the texture where there are none).

Or the points and colours of a cloud, without faces.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.output.files import write_whole
from pipeline.output.surface import GENERATOR, srgb_bytes, vertex_colours
from stages.mesh.clean import check_mesh
from stages.mesh.cloud import Cloud
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
    end = [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    return _header(rows, end) + rows.tobytes() + faces.tobytes()


def cloud_bytes(cloud: Cloud) -> bytes:
    """Return the points and their colours as a binary PLY file."""
    fields = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    rows = np.zeros(len(cloud), dtype=fields)
    points, colours = cloud.points.cpu().numpy(), (255 * cloud.colours.cpu().numpy()).round().clip(0, 255)
    for k, (place, colour) in enumerate(zip("xyz", ("red", "green", "blue"), strict=True)):
        rows[place], rows[colour] = points[:, k], colours[:, k]
    return _header(rows, []) + rows.tobytes()


def _header(rows: np.ndarray, more: list[str]) -> bytes:
    """The header of a file with these vertices; `more` stands behind them."""
    kinds = {name: "uchar" if rows.dtype[name] == np.uint8 else "float" for name in rows.dtype.names}
    properties = [f"property {kind} {name}" for name, kind in kinds.items()]
    first = ["ply", "format binary_little_endian 1.0", f"comment {GENERATOR}", f"element vertex {len(rows)}"]
    return "\n".join([*first, *properties, *more, "end_header"]).encode() + b"\n"


def write_cloud(cloud: Cloud, path: str | Path) -> list[Path]:
    """Write a cloud as a binary PLY file; returns its path."""
    return [write_whole(path, cloud_bytes(cloud))]


def write_ply(mesh: Mesh, path: str | Path) -> list[Path]:
    """Write a binary PLY file; returns its path."""
    return [write_whole(path, ply_bytes(mesh))]
