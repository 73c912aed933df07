"""Paths as people type them: a leading ~ is a home folder, also where the shell leaves it alone, as in --out=~/mug."""

from __future__ import annotations

import os
from pathlib import Path

from stages.errors import UserError


def from_home(path: str | Path) -> Path:
    """Return the path with its leading ~ or ~NAME as the home folder that it stands for.

    Args:
        path: of a file or a folder, which need not be there.
    Raises: UserError where nobody's home folder is known by that name and nothing of the name is here.
    """
    text = os.fspath(path)
    full = os.path.expanduser(text)
    if text.startswith("~") and full == text and not os.path.lexists(text):
        whose = text.partition("/")[0]
        why = "HOME is not set" if whose == "~" else "there is no such user"
        raise UserError(f"no home folder is known for {whose}", why, f"write the whole path, or ./{text} for that name")
    return Path(full)


def cache_folder() -> Path:
    """Return where what can be made again is kept between runs: $PIPELINE_CACHE, else below the user's cache folder."""
    folder = os.environ.get("PIPELINE_CACHE")
    if folder:
        return from_home(folder)
    return from_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "text3d-pipeline"
