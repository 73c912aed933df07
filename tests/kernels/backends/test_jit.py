"""Kernels compiled from other sources than today's are not used (stages/kernels/cpu/jit.py)."""

from pathlib import Path

import pytest

import stages.kernels
from stages.kernels.cpu import jit

KERNELS = Path(stages.kernels.__file__).parent


@pytest.fixture
def tree(tmp_path, monkeypatch) -> tuple[Path, Path, Path]:
    """The folder of the sources, a kernel file, and the cache folder with one kernel of it and one of another file."""
    monkeypatch.setattr(jit, "ROOT", tmp_path)
    sources, cache = tmp_path / "stages" / "kernels", tmp_path / "cache"
    for folder in (sources / "cpu", sources / "reference", cache):
        folder.mkdir(parents=True)
    imports = (
        "from os import path\nfrom stages.kernels.cpu.jit import njit\nfrom stages.kernels.cpu.vectors import tile\n"
    )
    (sources / "cpu" / "part.py").write_text(imports)
    (sources / "cpu" / "jit.py").write_text("njit = None\n")
    (sources / "cpu" / "vectors.py").write_text("from stages.kernels.reference.part import (\n    LIMIT,\n)\n")
    (sources / "reference" / "part.py").write_text("LIMIT = 1\n")
    for name in ("part.f-1.py311.nbi", "other.f-1.py311.nbi"):
        (cache / name).write_bytes(b"compiled")
    return sources, sources / "cpu" / "part.py", cache


def forget(source: Path, cache: Path) -> None:
    jit.forget_stale.__wrapped__(source, cache)


@pytest.mark.parametrize("changed", ["cpu/vectors.py", "reference/part.py"])
def test_a_kernel_is_forgotten_when_what_it_takes_in_changes(tree, changed):
    sources, source, cache = tree
    forget(source, cache)
    assert not (cache / "part.f-1.py311.nbi").exists()  # of unknown origin
    (cache / "part.f-1.py311.nbi").write_bytes(b"compiled")
    forget(source, cache)
    assert (cache / "part.f-1.py311.nbi").exists()  # nothing has changed
    (sources / changed).write_text((sources / changed).read_text() + "# changed\n")
    forget(source, cache)
    assert not (cache / "part.f-1.py311.nbi").exists()
    assert (cache / "other.f-1.py311.nbi").exists()


def test_a_kernel_outlives_a_change_of_what_compiles_it(tree):
    sources, source, cache = tree
    forget(source, cache)
    (cache / "part.f-1.py311.nbi").write_bytes(b"compiled")
    (sources / "cpu" / "jit.py").write_text("njit = print\n")
    forget(source, cache)
    assert (cache / "part.f-1.py311.nbi").exists()


def test_a_file_that_takes_nothing_in_is_left_to_numba(tree):
    sources, _, cache = tree
    (sources / "cpu" / "other.py").write_text("import math\nfrom stages.kernels.cpu.jit import njit\n")
    forget(sources / "cpu" / "other.py", cache)
    assert sorted(path.name for path in cache.iterdir()) == ["other.f-1.py311.nbi", "part.f-1.py311.nbi"]


def test_the_rasteriser_and_what_takes_it_in_know_their_sources():
    vectors, twin = KERNELS / "cpu" / "vectors.py", KERNELS / "reference" / "raster.py"
    assert jit._imported(KERNELS / "cpu" / "raster.py", set()) == {vectors, twin}
    assert jit._imported(KERNELS / "cpu" / "antialias.py", set()) == {KERNELS / "cpu" / "raster.py", vectors, twin}


def test_every_name_that_a_kernel_takes_in_is_seen():
    """Only `from stages.kernels.cpu.MODULE import NAME` is: a module taken whole would go by unseen."""
    for path in (KERNELS / "cpu").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import stages", "from stages"))]
        modules = (*jit.COMPILED_IN.findall(path.read_text()), "stages.kernels.cpu.jit", "stages.kernels.cpu.threads")
        assert all(line.split()[1] in modules and line.startswith("from ") for line in lines), path.name


def test_every_cached_kernel_is_compiled_through_it():
    lines = [
        f"{path.name}: {line}"
        for path in KERNELS.parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("from numba import") and "njit" in line
    ]
    assert not lines


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A function of a file that lies where nothing can be written, for a user without a home folder."""
    monkeypatch.setattr(jit, "_lost", [])
    monkeypatch.setattr(jit.numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(jit.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(jit.os, "access", lambda path, mode: False)
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "package" / "kernel.py"
    source.parent.mkdir()
    source.write_text("def double(x):\n    return 2 * x\n")
    names: dict = {}
    exec(compile(source.read_text(), source, "exec"), names)
    return names["double"]


def test_without_a_place_for_the_cache_kernels_work_and_the_reason_is_kept(homeless, tmp_path):
    assert jit.njit(homeless, cache=True)(3) == 6
    assert "no home folder" in jit.cache_trouble() and "NUMBA_CACHE_DIR" in jit.cache_trouble()
    assert not (tmp_path / "~").exists() and not (tmp_path / "package" / "__pycache__").exists()


def test_numba_that_finds_no_place_itself_is_no_error_either(homeless, monkeypatch):
    def refuse(self):
        raise RuntimeError("cannot cache function 'double': no locator available")

    monkeypatch.setattr(jit, "_has_place", lambda source: True)
    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.enable_caching", refuse)
    assert jit.njit(homeless, cache=True)(3) == 6
    assert "can be written to" in jit.cache_trouble()


@pytest.mark.parametrize("damage", [b"", b"\x80\x04", b"no pickle"])
def test_a_damaged_cache_is_compiled_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(jit.numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "kernel.py"
    source.write_text("def double(x):\n    return 2 * x\n")

    def double():
        names: dict = {}
        exec(compile(source.read_text(), source, "exec"), names)
        return jit.njit(names["double"], cache=True)

    assert double()(3) == 6
    for end in ("nbi", "nbc"):
        files = list((tmp_path / "cache").rglob(f"*.{end}"))
        assert files
        for path in files:
            path.write_bytes(damage)
        assert double()(3) == 6
    fresh = double()
    assert fresh(3) == 6 and sum(fresh.stats.cache_hits.values()) == 1  # and is kept again


def test_numba_switched_off_is_refused_before_any_work(monkeypatch):
    from stages.errors import UserError
    from stages.kernels.backend import KernelSettings, resolve

    monkeypatch.setattr(jit.numba.config, "DISABLE_JIT", 1)
    with pytest.raises(UserError, match="NUMBA_DISABLE_JIT"):
        resolve(KernelSettings(), "cpu")
