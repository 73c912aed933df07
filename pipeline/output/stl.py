"""STL, binary: bare triangles with their normals, for printing; no colour."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from pipeline.output.files import write_whole
from pipeline.output.surface import GENERATOR
from stages.mesh.clean import check_mesh
from stages.mesh.mesh import Mesh


def stl_bytes(mesh: Mesh, up: str = "y") -> bytes:
    """Return the mesh as a binary STL file.

    Args:
        mesh: with faces.
        up: its axis that points up, written into the header where it is not y.
    """
    check_mesh(mesh)
    rows = np.zeros(len(mesh.faces), dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    rows["normal"], rows["corners"] = mesh.face_normals(), mesh.vertices[mesh.faces]
    title = GENERATOR if up == "y" else f"{GENERATOR} {up} up"
    return title.encode().ljust(80, b" ") + struct.pack("<I", len(rows)) + rows.tobytes()


def write_stl(mesh: Mesh, path: str | Path, up: str = "y") -> list[Path]:
    """Write a binary STL file; returns its path."""
    return [write_whole(path, stl_bytes(mesh, up))]
