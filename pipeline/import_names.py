"""Whether `pipeline` and `stages` are this toolkit's: both names are plain words that other projects use, too.

A folder or file of such a name where Python is started, or in PYTHONPATH, stands before an installed package. The
`pipeline` command is safe from the former: its import path begins with the folder that it lies in, not with the
current one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # what `pipeline` and `stages` lie in, side by side
NAMES = ("pipeline", "stages")


def check_stages() -> None:
    """Refuse a `stages` that is not the one beside this package.

    Raises: ImportError of three lines; under `python -m pipeline` they are printed, and the process ends with code 2.
    """
    try:
        spec = importlib.util.find_spec("stages")
    except ValueError:  # a module put together by hand, which has no spec
        spec = None
    if is_ours("stages", spec):
        return
    place = place_of(spec)
    if place is None:
        lines = [
            "cannot import pipeline: its library `stages` is not there",
            f"{ROOT / 'stages'} is missing or has no __init__.py",
            "install text3d-pipeline again, in a virtual environment of its own",
        ]
    else:
        lines = [
            "cannot import pipeline: `stages` is another project's",
            f"Python finds {place}, which stands before {ROOT / 'stages'}",
            "rename it, start Python in another folder, or use the `pipeline` command, which is not affected",
        ]
    text = "\n".join(f"{label:<5} {line}" for label, line in zip(("what:", "why:", "fix:"), lines, strict=True))
    if sys.argv[:1] == ["-m"]:  # while runpy imports the package of `python -m pipeline`
        print(text, file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(text, name="stages")


def is_ours(name: str, spec: ModuleSpec | None) -> bool:
    """Return whether a name's spec is that of the package in ROOT."""
    return spec is not None and spec.origin is not None and _same(spec.origin, ROOT / name / "__init__.py")


def place_of(spec: ModuleSpec | None) -> str | None:
    """Return the folder or file that a spec names, None where there is none."""
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return str(next(iter(spec.submodule_search_locations)))
    return spec.origin


def clashes(folder: Path) -> list[str]:
    """Return what stands in the way of `import pipeline` for Python started in a folder, a sentence each.

    Args:
        folder: where Python or a notebook is started.
    """
    from importlib import metadata  # twenty milliseconds, which only the doctor has

    sentences = []
    for name in NAMES:
        spec = PathFinder.find_spec(name, [str(folder), *sys.path])
        if not is_ours(name, spec):
            sentences.append(f"from here `import {name}` finds {place_of(spec) or 'nothing'}")
    claims = metadata.packages_distributions()
    for name in NAMES:
        others = sorted(set(claims.get(name, [])) - {"text3d-pipeline"})
        if others:
            sentences.append(f"`{name}` is also installed by {', '.join(others)}")
    return sentences


def _same(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
