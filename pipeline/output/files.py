"""Whole files or none: bytes go under a temporary name, are flushed to the disk, and take their name at the end."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from stages.errors import UserError


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` atomically: on any failure the old file, if there was one, is untouched.

    Raises: UserError if the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"Could not write {path}", error.strerror or str(error), "free some space, or choose another folder"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path
