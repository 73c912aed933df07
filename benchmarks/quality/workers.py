"""The cells of a suite, made several at once by the workers of pipeline.batch."""

from __future__ import annotations

import argparse
import contextlib
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.cells import Cell, load_result, make_cell
from pipeline.batch.workers import make_engine


@dataclass(frozen=True)
class Group:
    """The cells of one prompt and seed, which one worker makes in turn: a two-stage system takes over its coarse cell's
    stage.

    words: of each cell's system, further ones for `pipeline run`.
    """

    cells: tuple[Cell, ...]
    out: Path
    clips: tuple[Path, ...]
    words: tuple[tuple[str, ...], ...]
    threads: int
    take_over: bool


def make_group(group: Group) -> None:
    """Make the cells of a group that have no result; one that raises leaves its traceback in its folder's error.txt."""
    for cell, words in zip(group.cells, group.words, strict=True):
        if load_result(cell, group.out) is not None:  # made before this worker took a dead one's place
            continue
        error = cell.folder(group.out) / "error.txt"
        error.unlink(missing_ok=True)
        try:
            make_cell(cell, group.out, list(group.clips), words, group.threads, group.take_over)
        except KeyboardInterrupt:
            return
        except Exception:  # reported with its traceback; the other cells go on
            cell.folder(group.out).mkdir(parents=True, exist_ok=True)
            error.write_text(traceback.format_exc())


def run_cells(cells: list[Cell], args: argparse.Namespace) -> list[Cell]:
    """Make what is missing, `args.workers` groups at a time; returns the cells that broke (a bug or a lost machine)."""
    waiting = [c for c in cells if load_result(c, args.out) is None]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} finished before", flush=True)
    groups = [
        Group(
            tuple(group),
            args.out,
            tuple(args.clip),
            tuple(tuple(args.words[cell.system]) for cell in group),
            args.threads,
            args.take_over,
        )
        for group in _groups(waiting)
    ]
    if not groups:
        return []
    engine = make_engine(args.engine, min(args.workers, len(groups)), args.threads, args.out, args.address)
    began, done = time.monotonic(), 0
    with contextlib.closing(engine.run(make_group, groups)) as outcomes:
        for group, outcome in outcomes:
            for cell in group.cells:
                done += 1
                left = (len(waiting) - done) * (time.monotonic() - began) / done
                progress = f"{_headline(cell, args.out)}; about {left / 60:.0f} min left"
                print(f"{cell.system:>10}  {cell.prompt} (seed {cell.seed}): {progress}", flush=True)
            if isinstance(outcome, BaseException):
                print(f"{'':>10}  {type(outcome).__name__}: {outcome}", flush=True)
    return [cell for cell in waiting if load_result(cell, args.out) is None]


def _groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells by prompt and seed, in their order."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.prompt, cell.seed), []).append(cell)
    return list(groups.values())


def _headline(cell: Cell, out: Path) -> str:
    result = load_result(cell, out)
    if result is None:
        return f"broke, see {cell.folder(out)}"
    if "failed" in result:
        return "no object: " + result["failed"].splitlines()[-1][:100]
    parts = [f"{result['cost']['wall_s']:.0f} s"] if result["cost"].get("wall_s") else []
    parts += [f"chamfer {result['geometry']['chamfer']}"] if "geometry" in result else []
    return ", ".join([*parts, f"{result['mesh']['faces']} faces"])
