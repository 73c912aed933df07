"""A finished mesh as a Python program meets it: saved in any format, seen by trimesh, shown in a notebook."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.output.axes import FileAxes
from pipeline.output.surface import png_bytes, split_seams, srgb_bytes, textured
from pipeline.output.write import write_mesh
from stages.mesh.mesh import Mesh

if TYPE_CHECKING:
    import trimesh

PICTURE = 384  # pixels a side of what a notebook shows


class ResultMesh:
    """The mesh of a run.

    Args:
        data: vertices, faces, texture coordinates and texture as files hold them, at the place of the user's own mesh
            where the run started from one.
        scene: the same mesh about the origin, of which pictures are taken; None: `data`.
        axes: which axis points up in its files, and how large it is in STL.
    """

    def __init__(self, data: Mesh, scene: Mesh | None = None, axes: FileAxes | None = None) -> None:
        self.data, self._scene = data, data if scene is None else scene
        self.axes = FileAxes() if axes is None else axes

    def __repr__(self) -> str:
        return f"ResultMesh({self._facts()})"

    @property
    def vertices(self) -> np.ndarray:
        """Positions [V, 3] float32, y up, front towards +z."""
        return self.data.vertices

    @property
    def faces(self) -> np.ndarray:
        """Vertex indices [F, 3] int32, counter-clockwise from outside."""
        return self.data.faces

    def save(self, path: str | Path) -> list[Path]:
        """Write the mesh to a file whose suffix names the format: .glb, .obj, .ply, .stl,
        .3mf or .usdz.

        Returns: all files written; an .obj has its material and textures beside it.
        Raises: UserError for another suffix, or a failed write.

        Example:
            >>> result.mesh.save("mug.glb")
        """
        return write_mesh(self.data, path, self.axes)

    def trimesh(self) -> trimesh.Trimesh:
        """Return the mesh as a trimesh.Trimesh, with its texture or vertex colours; seams repeat vertices."""
        import trimesh
        from PIL import Image

        surface = split_seams(self.data)
        arrays = {"vertices": surface.positions, "faces": surface.faces, "vertex_normals": surface.normals}
        if textured(self.data):
            factors = {"metallicFactor": (self.data.metallic, 0.0), "roughnessFactor": (self.data.roughness, 0.9)}
            finish = {name: other if value is None else value for name, (value, other) in factors.items()}
            material = trimesh.visual.material.PBRMaterial(
                baseColorTexture=Image.fromarray(self.data.texture), **finish
            )
            visual = trimesh.visual.TextureVisuals(uv=surface.uv, material=material)
            return trimesh.Trimesh(**arrays, visual=visual, process=False)
        colours = None if surface.colours is None else srgb_bytes(surface.colours)
        return trimesh.Trimesh(**arrays, vertex_colors=colours, process=False)

    def picture(self, size: int = PICTURE, azimuth_deg: float = 20.0) -> np.ndarray:
        """Render a shaded picture of the mesh, uint8 sRGB [size, size, 3].

        Args:
            size: pixels a side.
            azimuth_deg: where the camera stands, 0 in front, growing to the object's left.
        """
        from pipeline.output.video import portrait

        return portrait(self._scene, size, azimuth_deg)

    def _facts(self) -> str:
        texture = self.data.texture
        texture_text = "no texture" if texture is None else f"texture {texture.shape[1]} x {texture.shape[0]}"
        return f"{len(self.data.vertices):,} vertices, {len(self.data.faces):,} faces, {texture_text}"

    def _repr_png_(self) -> bytes:
        return png_bytes(self.picture())

    def _repr_html_(self) -> str:
        data = base64.b64encode(self._repr_png_()).decode()
        picture = f'<img width="{PICTURE}" height="{PICTURE}" alt="the mesh" src="data:image/png;base64,{data}">'
        return f"<figure>{picture}<figcaption>{self._facts()}</figcaption></figure>"
