"""One cell of a comparison: a system's mesh of one prompt and seed, made and measured in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, quiet_libraries
from benchmarks.quality.judges import judges_of_run
from benchmarks.quality.suite import Suite
from benchmarks.quality.systems import Failed, Job, find_system
from pipeline.output.files import write_whole


@dataclass(frozen=True)
class Cell:
    """One system's mesh of one prompt and seed."""

    system: str
    prompt: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / "cells" / _slug(self.system) / f"{_slug(self.prompt)}-s{self.seed}"


def _slug(text: str) -> str:
    """A folder's name for any text; two texts never share one."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if slug == text.replace(" ", "-") and len(slug) <= 80:
        return slug
    return f"{slug[:70]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"  # something was lost


def cells_of(suite: Suite, systems: list[str], seeds: int) -> list[Cell]:
    """All cells, systems innermost, so that an unfinished suite has whole prompts; a system goes before those that take
    over its stage."""
    known = {name: find_system(name) for name in systems}
    firsts = {name: [system.begins_as] for name, system in known.items() if system.begins_as in systems}
    ordered = dict.fromkeys(each for name in systems for each in [*firsts.get(name, []), name])
    return [
        Cell(system, prompt, seed)
        for seed in range(seeds)
        for prompt in suite.prompts
        for system in ordered
        if seed == 0 or known[system].seeded
    ]


def load_result(cell: Cell, out: Path) -> dict[str, Any] | None:
    """Return a finished cell's result, None for one that is not."""
    path = cell.folder(out) / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def make_cell(cell: Cell, out: Path, clips: list[Path], options: tuple[str, ...], threads: int, coarse: bool) -> None:
    """Make and measure one cell; result.json is its last act.

    A run that ends without an object is a result (`failed`: it scores nothing); anything else unexpected is raised.
    A CLIP that guided the run does not judge it: the cell goes without its scores and says so (`guided_by`).
    """
    import torch

    from benchmarks.quality.assess import assess, draw_gallery
    from stages.guidance.clip import ClipScorer

    quiet_libraries()
    torch.set_num_threads(max(1, threads or torch.get_num_threads()))
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    first = find_system(cell.system).begins_as if coarse else None
    coarse_run = None if first is None else Cell(first, cell.prompt, cell.seed).folder(out) / "run"
    if coarse_run is not None and not (coarse_run / "mesh.glb").is_file():
        coarse_run = None
    line: dict[str, Any] = {"system": cell.system, "prompt": cell.prompt, "seed": cell.seed, **environment()}
    line["options"] = list(options)
    try:
        mesh, line["cost"] = find_system(cell.system).make(
            Job(cell.prompt, cell.seed, folder, threads, options, coarse_run)
        )
    except Failed as error:
        line["failed"], mesh = str(error), None
    judges = judges_of_run(clips, folder / "run")
    if len(judges) < len(clips):
        line["guided_by"] = [clip.name for clip in clips if clip not in judges]  # and so without their scores
    if mesh is not None:
        began = time.perf_counter()
        line |= assess(mesh, cell.prompt, [ClipScorer(clip) for clip in judges])
        draw_gallery(mesh, folder / "gallery.jpg")
        line["assess_s"] = round(time.perf_counter() - began, 1)
    write_whole(folder / "result.json", (json.dumps(line, allow_nan=False) + "\n").encode())
