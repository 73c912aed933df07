"""numba's njit with a cache that fails no run and that notices when code changes that a kernel is made of.

numba keeps a compiled function until the function's own file changes. What that file takes from others is compiled in
as well (the vector operations of cpu/vectors.py, the twins' constants), so after an update the old kernel would go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numba

ROOT = Path(__file__).resolve().parents[3]
# Modules of kernels and twins; the two that make and call kernels hold nothing that is compiled into them.
COMPILED_IN = re.compile(r"^from (stages(?:\.\w+)*\.(?:cpu\.(?!jit\b|threads\b)|reference\.)\w+) import", re.MULTILINE)
_lost: list[str] = []  # why kernels that this process compiles are not kept


def njit(function: Callable | None = None, **options):
    """Compile as numba.njit; with `cache=True`, kernels compiled from other sources than today's are forgotten first.

    Where there is no place for numba's cache the kernels are compiled all the same, and :func:`cache_trouble` says why
    they are not kept. Raises: UserError where numba's compiler is switched off.
    """
    if function is None:
        return lambda function: njit(function, **options)
    check_compiler()
    caching = options.pop("cache", False)
    compiled = numba.njit(function, **options)
    source = Path(function.__code__.co_filename)
    if caching and _has_place(source):
        try:
            compiled.enable_caching()
        except RuntimeError:  # numba has tried every place that it knows
            _lost.append(f"neither {source.parent / '__pycache__'} nor the home folder can be written to")
        else:
            forget_stale(source, Path(compiled.stats.cache_path))
            compiled._cache = _Cache(compiled._cache)
    return compiled


def check_compiler() -> None:
    """Refuse to work with kernels that numba leaves to Python's interpreter. Raises: UserError."""
    if numba.config.DISABLE_JIT:
        from stages.errors import UserError

        raise UserError(
            "numba compiles nothing here",
            "NUMBA_DISABLE_JIT is set, and in Python's interpreter the kernels would take hours for a step",
            "unset NUMBA_DISABLE_JIT",
        )


def cache_trouble() -> str:
    """Return why compiled kernels are not kept for later runs, and what helps; empty where they are."""
    if not _lost:
        return ""
    return f"{_lost[0]}; set NUMBA_CACHE_DIR to a folder that can be written to, and later runs load them"


def cache_folder(module: ModuleType) -> Path | None:
    """Return the folder that the compiled kernels of a module are kept in; None where they are not."""
    paths = (kernel.stats.cache_path for kernel in vars(module).values() if hasattr(kernel, "stats"))
    return next((Path(path) for path in paths if path), None)


class _Cache:
    """A function's cache in numba: what cannot be read there is compiled anew, what cannot be written is not kept."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return self._cache.load_overload(signature, context)
        except Exception:  # of pickle, for a file that a crash or a full disk cut short, whatever its bytes lead to
            with contextlib.suppress(OSError):
                self._cache.flush()
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        try:
            self._cache.save_overload(signature, compiled)
        except OSError as error:
            _lost.append(f"numba's cache {self._cache.cache_path} cannot be written: {error.strerror or error}")


def _has_place(source: Path) -> bool:
    """Whether numba may look for a place. Without a home folder its last resort is a folder named `~` wherever the
    process stands."""
    if numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~") != "~":
        return True
    beside = source.parent / "__pycache__"
    if os.access(beside if beside.exists() else source.parent, os.W_OK):
        return True
    _lost.append(f"{source.parent} cannot be written to and this user has no home folder")
    return False


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
