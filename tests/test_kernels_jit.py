"""Kernels compiled from other sources than today's are not used (stages/kernels/jit.py)."""

from pathlib import Path

import pytest

from stages.kernels import jit


@pytest.fixture
def tree(tmp_path, monkeypatch) -> tuple[Path, Path, Path]:
    """The folder of the sources, a kernel file, and the cache folder with one kernel of it and one of another file."""
    monkeypatch.setattr(jit, "ROOT", tmp_path)
    sources, cache = tmp_path / "stages" / "kernels", tmp_path / "cache"
    sources.mkdir(parents=True)
    cache.mkdir()
    (sources / "cpu_part.py").write_text("from stages.kernels.cpu_vectors import tile\nfrom os import path\n")
    (sources / "cpu_vectors.py").write_text("from stages.kernels.reference_part import (\n    LIMIT,\n)\n")
    (sources / "reference_part.py").write_text("LIMIT = 1\n")
    for name in ("cpu_part.f-1.py311.nbi", "cpu_other.f-1.py311.nbi"):
        (cache / name).write_bytes(b"compiled")
    return sources, sources / "cpu_part.py", cache


def forget(source: Path, cache: Path) -> None:
    jit.forget_stale.__wrapped__(source, cache)


@pytest.mark.parametrize("changed", ["cpu_vectors.py", "reference_part.py"])
def test_a_kernel_is_forgotten_when_what_it_takes_in_changes(tree, changed):
    sources, source, cache = tree
    forget(source, cache)
    assert not (cache / "cpu_part.f-1.py311.nbi").exists()  # of unknown origin
    (cache / "cpu_part.f-1.py311.nbi").write_bytes(b"compiled")
    forget(source, cache)
    assert (cache / "cpu_part.f-1.py311.nbi").exists()  # nothing has changed
    (sources / changed).write_text((sources / changed).read_text() + "# changed\n")
    forget(source, cache)
    assert not (cache / "cpu_part.f-1.py311.nbi").exists()
    assert (cache / "cpu_other.f-1.py311.nbi").exists()


def test_a_file_that_takes_nothing_in_is_left_to_numba(tree):
    sources, _, cache = tree
    (sources / "cpu_other.py").write_text("import math\n")
    forget(sources / "cpu_other.py", cache)
    assert sorted(path.name for path in cache.iterdir()) == ["cpu_other.f-1.py311.nbi", "cpu_part.f-1.py311.nbi"]


def test_the_rasteriser_knows_its_sources():
    source = Path(jit.__file__).with_name("cpu_raster.py")
    assert {path.name for path in jit._imported(source, set())} == {"cpu_vectors.py", "reference_raster.py"}


def test_every_cached_kernel_is_compiled_through_it():
    root = Path(jit.__file__).parents[1]
    lines = [
        f"{path.name}: {line}"
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("from numba import") and "njit" in line
    ]
    assert not lines
