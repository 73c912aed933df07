"""Mesh file formats by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.export.glb import write_glb
from pipeline.export.obj import write_obj
from pipeline.export.ply import write_ply
from pipeline.export.stl import write_stl
from stages.errors import UserError
from stages.mesh.mesh import Mesh

WRITERS = {"glb": write_glb, "obj": write_obj, "ply": write_ply, "stl": write_stl}


def export(mesh: Mesh, folder: str | Path, formats: Sequence[str], *, stem: str = "mesh") -> list[Path]:
    """Write the mesh as FOLDER/STEM.FORMAT in every format asked for.

    Returns: all files written, side files included.
    Raises: UserError for an unknown format (before anything is written), a damaged mesh, or a failed write.
    """
    for name in formats:
        if name not in WRITERS:
            raise UserError(f"Unknown format {name!r}", "there is no writer for it", f"choose from {', '.join(WRITERS)}")
    return [path for name in formats for path in WRITERS[name](mesh, Path(folder) / f"{stem}.{name}")]
