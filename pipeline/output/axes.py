"""Axes and size of a mesh in its files.

Inside y is up. A file of the format that the user's mesh came in has the user's axes again, and so has STL, whose
triangles go back to the bit; others have y up, as glTF demands and OBJ readers expect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.output.settings import ExportSettings
from stages.mesh.mesh import Mesh
from stages.mesh.place import Placement, laid


@dataclass(frozen=True)
class FileAxes:
    """The axes and the size that files hold a mesh in.

    Args:
        own_up, own_format: axis that points up in the user's mesh file, and its format; empty without one.
        stl_up: axis that points up in STL files, or auto: the user's own.
        stl_size: longest side of the mesh in STL files, None: as it is.
    """

    own_up: str = "y"
    own_format: str = ""
    stl_up: str = "auto"
    stl_size: float | None = None

    def up(self, name: str) -> str:
        """Return the axis that points up in files of a format."""
        if name == "stl":
            return self.own_up if self.stl_up == "auto" else self.stl_up
        source_format = "glb" if self.own_format == "gltf" else self.own_format
        return self.own_up if name == source_format else "y"

    def prepared(self, mesh: Mesh, name: str) -> Mesh:
        """Return a mesh, y up, as files of a format hold it."""
        mesh = laid(mesh, self.up(name))
        if name == "stl" and self.stl_size is not None:
            scale = self.stl_size / np.ptp(mesh.vertices[mesh.faces].reshape(-1, 3), axis=0).max()
            mesh = replace(mesh, vertices=(mesh.vertices * scale).astype(np.float32))
        return mesh

    def note(self, mesh: Mesh) -> str:
        """Return how an STL file holds a mesh, in words: its up axis and size."""
        points = self.prepared(mesh, "stl").vertices[mesh.faces].reshape(-1, 3)
        size = " x ".join(f"{side:.4g}" for side in np.ptp(points, axis=0))
        return f"{self.up('stl')} up, {size} (export.stl_up and export.stl_size set these)"


def file_axes(placement: Placement | None, settings: ExportSettings) -> FileAxes:
    """Return how files hold what a run made. placement: of the user's mesh, where it began with one."""
    stl = {"stl_up": settings.stl_up, "stl_size": settings.stl_size}
    return FileAxes(**stl) if placement is None else FileAxes(placement.up, placement.format, **stl)
