"""Facts about this process: the memory it takes, the revision of its source, versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path


def memory_mb() -> float | None:
    """Resident memory of this process now, in MB; None where the system does not tell cheaply."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return None


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process in MB. ru_maxrss is not used on Linux: it survives fork and exec."""
    try:
        text = Path("/proc/self/status").read_text()
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) / 1024, 1)
    except (OSError, TypeError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 1024), 1)


def peak_gpu_memory_mb() -> float | None:
    """Highest memory of this process's tensors on the GPU in MB, as torch's allocator counts it; None without a GPU.

    The driver's own share and what kernels take beside torch are not in it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


MAKES_RESULTS = ("pipeline", "stages", "configs", "benchmarks", "pyproject.toml", ":(exclude)benchmarks/results")

ROOT = Path(__file__).resolve().parents[2]


def git_revision(root: Path = ROOT) -> str | None:
    """Return the source's revision, with -dirty where files that make results differ; None for an installed package.

    Texts, tests and published results are none of these: a second benchmark may run after the first has published.
    """
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *MAKES_RESULTS)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changed else revision


def _git(root: Path, *words: str) -> str:
    process = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    return process.stdout.strip()


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
