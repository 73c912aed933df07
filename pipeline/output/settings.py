"""Settings of an export: those of the mesh, the file formats and the turntable."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stages.mesh.place import Axis
from stages.mesh.texture.finalise import ExportSettings as MeshSettings
from stages.mesh.texture.repaint import OwnLayout


def split_commas(value: Any) -> Any:
    """Split words between commas into a list; return anything else as it is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class ExportSettings(MeshSettings):
    """Settings of the files at the end of a run."""

    formats: Annotated[list[Literal["glb", "obj", "ply", "stl", "3mf", "usdz"]], BeforeValidator(split_commas)] = Field(
        ["glb", "obj"], description="mesh files to write at the end of a run"
    )
    tets: int = Field(
        64, ge=16, le=256, description="lattice cells a side for a mesh straight from a density field, without fine"
    )
    own_uv: OwnLayout = Field(
        "auto", description="keep a locked mesh's texture coordinates: where they can carry a texture, always, never"
    )
    stl_up: Literal["auto", Axis] = Field(
        "auto", description="axis that points up in STL files; auto: as in the user's own mesh, y without one"
    )
    size_mm: float | None = Field(
        None, gt=0, le=1e6, description="longest side in STL and 3MF files, millimetres; none: as in the other files"
    )
    turntable_frames: int = Field(36, ge=0, le=720, description="pictures in a turn; 0 writes no turntable")
    turntable_size: int = Field(384, ge=16, le=2048, multiple_of=2, description="side of the turntable in pixels")
    mp4: bool = Field(True, description="write the turntable as .mp4 as well, where imageio-ffmpeg is installed")

    def unread(self) -> set[str]:
        """Return the settings that are switched off or have no file to act on."""
        names = {name for name in ("normal_map", "occlusion") if not getattr(self, name)}
        names |= {name for name in ("metallic", "roughness", "size_mm") if getattr(self, name) is None}
        return names | ({"stl_up"} if self.stl_up == "auto" else set())
