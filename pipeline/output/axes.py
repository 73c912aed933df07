"""Axes and size of a mesh in its files.

Inside y is up. A file of the format that the user's mesh came in has the user's axes again, and so has STL, whose
triangles go back to the bit; 3MF has z up, as its text demands; others have y up, as glTF demands and OBJ readers
expect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.output.settings import ExportSettings
from stages.mesh.clean import largest_shell
from stages.mesh.measure import face_components
from stages.mesh.mesh import Mesh
from stages.mesh.place import Placement, laid

PRINTS = ("stl", "3mf")  # formats for printers


@dataclass(frozen=True)
class FileAxes:
    """The axes and the size that files hold a mesh in.

    Args:
        own_up, own_format: axis that points up in the user's mesh file, and its format; empty without one.
        stl_up: axis that points up in STL files, or auto: the user's own.
        one_shell: whether STL and 3MF files hold the largest outer shell alone: a print is one piece.
        size_mm: longest side of the mesh in STL and 3MF files, millimetres; None: as it is.
    """

    own_up: str = "y"
    own_format: str = ""
    stl_up: str = "auto"
    size_mm: float | None = None
    one_shell: bool = False

    def up(self, name: str) -> str:
        """Return the axis that points up in files of a format."""
        if name == "stl":
            return self.own_up if self.stl_up == "auto" else self.stl_up
        if name == "3mf":  # 3MF core 1.3 sec. 3.3: the build plate is the plane of x and y
            return "z"
        source_format = "glb" if self.own_format == "gltf" else self.own_format
        return self.own_up if name == source_format else "y"

    def prepared(self, mesh: Mesh, name: str) -> Mesh:
        """Return a mesh, y up, as files of a format hold it."""
        if name in PRINTS and self.one_shell:
            mesh = largest_shell(mesh)
        mesh = laid(mesh, self.up(name))
        if name in PRINTS and self.size_mm is not None:
            scale = self.size_mm / np.ptp(mesh.vertices[mesh.faces].reshape(-1, 3), axis=0).max()
            mesh = replace(mesh, vertices=(mesh.vertices * scale).astype(np.float32))
        return mesh

    def note(self, mesh: Mesh, name: str = "stl") -> str:
        """Return how an STL or 3MF file holds a mesh, in words: its up axis and size, and what it leaves out."""
        prepared = self.prepared(mesh, name)
        points = prepared.vertices[prepared.faces].reshape(-1, 3)
        size = " x ".join(f"{side:.4g}" for side in np.ptp(points, axis=0))
        keys = "export.stl_up and export.size_mm set these" if name == "stl" else "export.size_mm sets it"
        others = int(face_components(mesh.faces, len(mesh.vertices)).max()) if self.one_shell else 0
        left_out = f", without {others} separate part{'s' * (others > 1)}: a print is one piece" if others else ""
        return f"{self.up(name)} up, {size} mm{left_out} ({keys})"


def file_axes(placement: Placement | None, settings: ExportSettings) -> FileAxes:
    """Return how files hold what a run made. placement: of the user's mesh, where it began with one."""
    stl = {"stl_up": settings.stl_up, "size_mm": settings.size_mm}
    return FileAxes(**stl, one_shell=True) if placement is None else FileAxes(placement.up, placement.format, **stl)
