"""The result of a run, read from its folder on access."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.runs.folder import in_use, open_folder
from pipeline.runs.log import UNFINISHED, read_metrics, read_record
from stages.errors import UserError
from stages.paths import from_home

if TYPE_CHECKING:
    from pipeline.config.model import Config
    from pipeline.output.result_mesh import ResultMesh
    from stages.stage import Stage

_KINDS = {"turntable.webp": "turntable", "turntable.mp4": "video"}  # of other files it is the suffix
_ENDS = {"_normal.png": "normal_map", ".png": "texture"}


class Result:
    """A finished run.

    Args:
        folder: of the run.
        mesh: where it is at hand; else it is made again from the checkpoints, in some seconds, to the same bytes.
        paths: its files; None: those that the run's record names.
    Raises: UserError where the folder holds no run.

    Example:
        >>> result = Result("runs/a-red-mug-0")
        >>> result.files["glb"], result.seconds, result.metrics[-1]
    """

    def __init__(self, folder: str | Path, mesh: ResultMesh | None = None, paths: Sequence[Path] | None = None) -> None:
        self.folder = open_folder(from_home(folder))
        self._mesh, self._paths = mesh, paths

    def __repr__(self) -> str:
        return f"Result({str(self.folder)!r}: {', '.join(self.files)})"

    @property
    def record(self) -> dict[str, Any]:
        """run.json: machine, versions, times, the export's report."""
        return read_record(self.folder / "run.json")

    @property
    def status(self) -> str:
        """finished, interrupted, failed, running, or unfinished: its process is gone and left no word."""
        status = self.record.get("status", UNFINISHED)
        return "running" if status == UNFINISHED and in_use(self.folder) else status

    @property
    def config(self) -> Config:
        """Every setting of the run."""
        from pipeline.config.model import read_config

        return read_config(self.folder)

    @property
    def files(self) -> dict[str, Path]:
        """The files by kind: glb, obj, mtl, texture, normal_map, ply, stl, 3mf, usdz, turntable, video;
        with `_lod1` and so on behind it for coarser levels of detail."""
        paths = [self.folder / name for name in self.record.get("outputs", [])] if self._paths is None else self._paths
        return {_kind(path): path for path in paths}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row for every step: stage, step (from 1), seconds, and the stage's own numbers."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def seconds(self) -> float:
        """Wall time of all stages and of the export, over all sessions."""
        record = self.record
        export = record.get("export", {}).get("phases", {})
        return sum(facts["seconds"] for facts in record["stages"].values()) + sum(export.values())

    @property
    def mesh(self) -> ResultMesh:
        """The textured mesh, as its files hold it."""
        if self._mesh is None:
            from pipeline.runs.export import remake_mesh

            self._mesh = remake_mesh(self.folder)
        return self._mesh

    def stage(self, name: str) -> Stage:
        """Return the stage as its last checkpoint left it, without its prior: `CoarseStage.render` shows its field.

        Args:
            name: of the stage.
        Raises: UserError where the run has no checkpoint of it.

        Example:
            >>> from stages.cameras import orbit_views
            >>> images = result.stage("coarse").render(orbit_views([0.0, 90.0], 20.0), 256)
        """
        from pipeline.runs.run import restore_stage

        return restore_stage(self.folder, name)

    def preview(self, stage: str | None = None) -> np.ndarray:
        """Return the last preview of a stage, uint8 sRGB [H, W, 3].

        Args:
            stage: its name; None: the last that has one.
        Raises: UserError where there is none.
        """
        from PIL import Image

        stages = self.record["stages"] if stage is None else [stage]
        pictures = [path for name in stages for path in sorted((self.folder / name / "previews").glob("*.png"))]
        if not pictures:
            previews = ", ".join(path.parent.name for path in sorted(self.folder.glob("*/previews"))) or "none"
            what = f"{self.folder} has no preview" + (f" of {stage}" if stage else "")
            raise UserError(what, f"stages with previews: {previews}", "choose one of these")
        with Image.open(pictures[-1]) as picture:
            return np.asarray(picture.convert("RGB"))


def _kind(path: Path) -> str:
    by_end = next((kind for end, kind in _ENDS.items() if path.name.endswith(end)), path.suffix[1:])
    level = re.search(r"_lod\d+", path.stem)
    return _KINDS.get(path.name, by_end) + (level[0] if level else "")
