"""The recipes that come with the toolkit, by name; loads neither torch nor the settings they are written for."""

from __future__ import annotations

import difflib
from pathlib import Path

from stages.errors import UserError
from stages.paths import from_home


def recipes() -> dict[str, Path]:
    """Return the recipes that come with the toolkit: configs/ of a checkout, or a package's copy of it."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "_configs"
    folder = installed if installed.is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Find a recipe by its name, or a YAML file by its path."""
    known = recipes()
    if name in known:
        return known[name]
    path = from_home(name)
    if path.is_file():
        return path
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    near = difflib.get_close_matches(name, known, 1)
    raise UserError(
        f"--config {name}: no such recipe or file",
        f"recipes: {', '.join(known) or 'none'}",
        f"did you mean {near[0]}?" if near else "give one of these names, or the path of a YAML file",
    )


def split_names(text: str | None) -> str | list[str] | None:
    """Return the recipes that a text of --config names, separated by commas; the text itself where it is one alone."""
    if text is None or "," not in text or from_home(text).exists():
        return text
    return [name.strip() for name in text.split(",")]


def print_recipes() -> None:
    """Print a line for each recipe: its name, the recipe it is laid over, and the first line of its comment."""
    from pipeline.config.layers import from_file

    for name, path in recipes().items():
        base = from_file(path).values.get("extends", "-")
        print(f"{name:<17} {base:<17} {heading_of(path.read_text(encoding='utf-8'))}")
    print("# name, the recipe it extends, what it is; take one with --config NAME")
    print("# its values: pipeline settings --config NAME")


def heading_of(text: str) -> str:
    """Return the first line of a recipe's comment, up to the end of a sentence where it has one."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first.startswith("#"):
        return ""
    line = first.lstrip("# ").rstrip()
    if line.endswith("."):
        return line
    whole, stop, _ = line.rpartition(". ")
    return f"{whole}." if stop else f"{line} ..."
