"""numba's njit with a cache that notices when code changes that a kernel is made of.

numba keeps a compiled function until the function's own file changes. What that file takes from others is compiled in
as well (the vector operations of cpu/vectors.py, the twins' constants), so after an update the old kernel would go on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba

ROOT = Path(__file__).resolve().parents[3]
# Modules of kernels and twins; the two that make and call kernels hold nothing that is compiled into them.
COMPILED_IN = re.compile(r"^from (stages(?:\.\w+)*\.(?:cpu\.(?!jit\b|threads\b)|reference\.)\w+) import", re.MULTILINE)


def njit(function: Callable | None = None, **options):
    """numba.njit; with `cache=True`, kernels compiled from other sources than today's are forgotten first."""
    if function is None:
        return lambda function: njit(function, **options)
    compiled = numba.njit(function, **options)
    if options.get("cache"):
        forget_stale(Path(function.__code__.co_filename), Path(compiled.stats.cache_path))
    return compiled


@cache
def forget_stale(source: Path, folder: Path) -> None:
    """Delete the kernels of `source` from numba's cache `folder` unless they are of its present imports.

    A folder that cannot be written to is left alone: numba does not write there either.
    """
    imported = _imported(source, set())
    if not imported:
        return
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(imported))).hexdigest()
    stamp = folder / f"{source.stem}.imports"
    try:
        if stamp.exists() and stamp.read_text() == digest:
            return
        for index in folder.glob(f"{source.stem}.*.nbi"):
            index.unlink(missing_ok=True)
        stamp.write_text(digest)
    except OSError:
        return


def _imported(source: Path, files: set[Path]) -> set[Path]:
    """The files whose code or constants a kernel of this file can hold, beside its own."""
    for module in COMPILED_IN.findall(source.read_text()):
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        if path not in files:
            files.add(path)
            _imported(path, files)
    return files
