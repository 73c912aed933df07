"""The result of a finished run written again: other formats, other settings of the export, coarser levels of detail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.model import load_config
from pipeline.output.settings import ExportSettings
from pipeline.runs.caller import Caller
from pipeline.runs.folder import Lock, check_disk
from pipeline.runs.lineage import check_run
from pipeline.runs.progress import Progress
from pipeline.runs.run import read_run, reopened
from stages.errors import UserError

if TYPE_CHECKING:
    from pipeline.output.result_mesh import ResultMesh

MOST_LODS = 8
GROUP = "export"


@dataclass(frozen=True)
class ExportRequest:
    """The files to write of a run.

    Args:
        formats: names of mesh formats, comma separated.
        settings: over those of the run: `faces=5000` or `export.faces=5000` words, or values by such keys.
        lods: how many levels of detail, each with half the faces of the one before; 1 writes the mesh alone.
    """

    formats: str = "glb,obj"
    settings: Sequence[str] | Mapping[str, Any] = ()
    lods: int = 1


def export_run(
    folder: Path,
    request: ExportRequest | str,
    out: Path | None = None,
    progress: Progress | None = None,
    caller: Caller | None = None,
) -> list[Path]:
    """Write the result of a finished run; returns the files. The run's own settings and record stay as they are.

    Args:
        request: what to write; a text stands for its formats.
        out: folder to write to; None: the run's own.
    Raises: UserError for an unknown format or setting, a run that is not finished, or files that would be written over.
    """
    from pipeline.output.axes import PRINTS
    from pipeline.output.write import check_formats, existing_files, write_formats

    progress = progress or Progress()
    request = ExportRequest(request) if isinstance(request, str) else request
    names, stems = check_formats(request.formats), _stems(request.lods)
    config = read_run(folder)
    settings = load_config(config, _of_export(request.settings)).export
    check_run(folder, config)
    in_place = out is None or out.resolve() == folder.resolve()
    target = folder if in_place else out
    taken = [name for stem in stems for name in existing_files(target, names, stem=stem)]
    if taken and in_place and settings != config.export:
        why = "it was made with other settings, which the run's config.yaml holds"
        raise UserError(f"{target} already holds {taken[0]}", why, "choose another folder with --out")
    if taken and not in_place:
        raise UserError(f"{target} already holds {taken[0]}", "it may be another run's", "choose another --out")
    check_disk(target)
    target.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    first = None
    with Lock(folder) if in_place else contextlib.nullcontext():  # a run that is only read may lie on a read-only disk
        for stem, mesh in zip(stems, _levels(folder, settings, request.lods, progress), strict=True):
            first = first or mesh
            for path in write_formats(mesh.data, target, names, stem=stem, axes=mesh.axes):
                kind = path.suffix[1:]
                size = f", {mesh.axes.note(mesh.data, kind)}" if kind in PRINTS else ""
                faces = f", {len(mesh.data.faces)} faces" if request.lods > 1 and kind in names else ""
                progress.note(f"wrote {path}{faces}{size}")
                paths.append(path)
    if caller is not None:
        caller.mesh = first
    return paths


def remake_mesh(folder: Path, progress: Progress | None = None) -> ResultMesh:
    """Make the mesh of a finished run again from its checkpoints, to the same bytes, without any prior.

    progress: None says nothing. Raises: UserError for a run that is not finished.
    """
    (mesh,) = _levels(folder, read_run(folder).export, 1, progress)
    return mesh


def _levels(folder: Path, settings: ExportSettings, lods: int, progress: Progress | None) -> Iterator[ResultMesh]:
    """The mesh of a run, then ones with half the faces of the one before."""
    from pipeline.output.asset import finished_mesh, in_own_place
    from pipeline.output.axes import file_axes
    from pipeline.output.result_mesh import ResultMesh

    with reopened(folder, progress) as run:
        asset = run.restore(run.config.stages[-1])
        if lods > 1 and asset.locked:
            why = "fine.geometry=locked keeps the triangles of the user's mesh"
            raise UserError(f"--lods {lods} has no use here", why, "leave it out")
        axes = file_axes(asset.placement, settings)
        for _ in range(lods):
            mesh = finished_mesh(asset, settings, run.config.fine.initialise, {})
            yield ResultMesh(in_own_place(mesh, asset), mesh, axes)
            settings = settings.model_copy(update={"faces": max(4, len(mesh.faces) // 2)})


def _stems(lods: int) -> list[str]:
    if not 1 <= lods <= MOST_LODS:
        raise UserError(f"--lods {lods}", f"a mesh has 1 to {MOST_LODS} levels of detail", "choose one of these")
    return ["mesh", *(f"mesh_lod{k}" for k in range(1, lods))]


def _of_export(settings: Sequence[str] | Mapping[str, Any]) -> list[str] | dict[str, Any]:
    """The settings with their group before their names. Raises: UserError for those of another group."""
    if isinstance(settings, Mapping):
        return {_with_group(name): value for name, value in settings.items()}
    return [_with_group(word.partition("=")[0]) + "".join(word.partition("=")[1:]) for word in settings]


def _with_group(name: str) -> str:
    group, dot, _ = name.partition(".")
    if dot and group != GROUP:
        why = "an export changes what is written of a finished object, not the object"
        raise UserError(f"{name} has no use here", why, f"`pipeline settings {GROUP}` lists what has")
    return name if dot else f"{GROUP}.{name}"
