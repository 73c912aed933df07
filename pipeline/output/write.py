"""Mesh file formats by name, and everything a run leaves behind."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.output.axes import FileAxes
from pipeline.output.glb import write_glb
from pipeline.output.obj import write_obj
from pipeline.output.ply import write_cloud, write_ply
from pipeline.output.settings import ExportSettings
from pipeline.output.stl import write_stl
from pipeline.output.threemf import write_threemf
from pipeline.output.usdz import check_usd, write_usdz
from stages.errors import UserError
from stages.mesh.cloud import Cloud
from stages.mesh.mesh import Mesh

log = logging.getLogger(__name__)

FORMATS = {
    "glb": write_glb,
    "obj": write_obj,
    "ply": write_ply,
    "stl": write_stl,
    "3mf": write_threemf,
    "usdz": write_usdz,
}
BESIDE = {"obj": (".mtl", ".png", "_normal.png")}  # what a format may write beside its file, by the end of the name


def check_formats(text: str) -> list[str]:
    """Split a comma-separated list into names of mesh formats. Raises UserError for one without a writer."""
    names = [name.strip().lower().removeprefix(".") for name in text.split(",")]
    unknown = [name or "nothing" for name in names if name not in FORMATS]
    if unknown:
        raise UserError(
            f"cannot write {', '.join(unknown)}", f"known formats: {', '.join(FORMATS)}", "choose from these"
        )
    if "usdz" in names:
        check_usd()
    return list(dict.fromkeys(names))


def write_formats(
    mesh: Mesh, folder: str | Path, names: Sequence[str], *, stem: str = "mesh", axes: FileAxes | None = None
) -> list[Path]:
    """Write the mesh as FOLDER/STEM.FORMAT in every format named.

    Args:
        mesh: y up.
        axes: which axis points up in the files; None: y.
    Returns: all files written, side files included.
    Raises: UserError for an unknown format (before anything is written), a damaged mesh, or a failed write.
    """
    for name in names:
        if name not in FORMATS:
            raise UserError(f"Cannot write {name!r}", "there is no such format", f"choose among {', '.join(FORMATS)}")
    return [path for name in names for path in _write(mesh, Path(folder) / f"{stem}.{name}", name, axes)]


def _write(mesh: Mesh, path: Path, name: str, axes: FileAxes | None) -> list[Path]:
    axes = FileAxes() if axes is None else axes
    turned = axes.prepared(mesh, name)
    return write_stl(turned, path, axes.up(name)) if name == "stl" else FORMATS[name](turned, path)


def write_mesh(mesh: Mesh, path: str | Path, axes: FileAxes | None = None) -> list[Path]:
    """Write a mesh to one file whose suffix names the format.

    Args:
        mesh: with faces, y up.
        path: ends in .glb, .obj, .ply, .stl, .3mf or .usdz.
        axes: which axis points up in it; None: y.
    Returns: all files written, side files included.
    Raises: UserError for another suffix, a damaged mesh, or a failed write.

    Example:
        >>> write_mesh(mesh, "mug.glb")
    """
    path = Path(path)
    name = path.suffix.lower().removeprefix(".")
    if name not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise UserError(f"cannot write {path}", f"its suffix names no format: {known} do", "choose one of these")
    return _write(mesh, path, name, axes)


def existing_files(folder: Path, names: Sequence[str], *, stem: str = "mesh") -> list[str]:
    """Return the files already in the folder that writing these formats might replace, by name."""
    ends = [end for name in names for end in (f".{name}", *BESIDE.get(name, ()))]
    return [f"{stem}{end}" for end in ends if (folder / f"{stem}{end}").exists()]


def write_results(
    mesh: Mesh,
    folder: str | Path,
    settings: ExportSettings,
    placed: Mesh | None = None,
    axes: FileAxes | None = None,
    cloud: Cloud | None = None,
) -> list[Path]:
    """Write a run's results: its mesh files, the turntable, and the points that it was made from.

    Args:
        mesh: in the scene, where the turntable is taken.
        placed: as the files hold it, where that is elsewhere.
        axes: see write_formats.
        cloud: of a run that ends with one, for points.ply; y up.
    Returns: all files written; an .mp4 among them only where imageio-ffmpeg is installed and works.
    """
    paths = write_formats(mesh if placed is None else placed, folder, settings.formats, axes=axes)
    paths += [] if cloud is None else write_cloud(cloud, Path(folder) / "points.ply")
    if settings.turntable_frames:
        from pipeline.output.video import turntable

        shape = {"frames": settings.turntable_frames, "size": settings.turntable_size}
        paths.append(turntable(mesh, Path(folder) / "turntable.webp", **shape))
        if settings.mp4 and importlib.util.find_spec("imageio_ffmpeg") is not None:
            try:
                paths.append(turntable(mesh, Path(folder) / "turntable.mp4", **shape))
            except UserError as error:  # of an encoder that cannot; the run has all that it must have
                log.warning("%s: %s (%s)", error.what, error.why, error.fix)
    return paths
