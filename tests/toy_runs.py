"""Settings and facts of the small toy runs that several test modules share."""

import json
from pathlib import Path

from pipeline.config.model import load_config

SMALL = ["coarse.steps=12", "fine.steps=9", "checkpoint_every=4", "preview_every=5", "export.turntable_frames=0"]


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_times(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(folder)]


def load(*overrides: str, **flags):
    return load_config(None, [*SMALL, *overrides], flags)
