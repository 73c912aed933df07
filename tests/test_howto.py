"""How to add a rule, a prior, a stage, a kernel, as stages/README.md shows it: diffs that apply, examples that run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme_cases import ROOT, fenced

TEXT = (ROOT / "stages" / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (?:A|An) (\w+)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what diffs change and examples import, compiled kernels included, with the weights where they are."""
    copy = tmp_path / "tree"
    for top in ("pipeline", "stages"):
        shutil.copytree(ROOT / top, copy / top, ignore=shutil.ignore_patterns("weights"))
    shutil.copytree(ROOT / "configs", copy / "configs")
    (copy / "stages" / "pocket" / "weights").symlink_to(ROOT / "stages" / "pocket" / "weights")
    return copy


def apply(section: str, tree: Path) -> None:
    diffs = fenced(SECTIONS[section], "diff")
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}  # not part of a repository around it
    for diff in diffs:
        done = subprocess.run(["git", "apply", "-"], cwd=tree, env=env, input=diff, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_there_is_a_section_for_each_thing_that_is_added():
    assert list(SECTIONS) == ["rule", "prior", "stage", "kernel"]
    assert all(fenced(text, "python") for text in SECTIONS.values())
    assert all(len(diff.splitlines()) < 120 for text in SECTIONS.values() for diff in fenced(text, "diff"))


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("section", SECTIONS)
def test_the_diff_applies_and_what_it_adds_compiles(section, tree):
    apply(section, tree)
    for path in [*tree.glob("stages/*.py"), *tree.glob("stages/kernels/**/*.py"), *tree.glob("stages/guidance/*.py")]:
        compile(path.read_text(encoding="utf-8"), path, "exec")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_runs(section, tree, tmp_path):
    apply(section, tree)
    (example,) = fenced(SECTIONS[section], "python")
    (tmp_path / "here").mkdir()
    env = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path / "here", env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if section == "stage":
        assert (tmp_path / "here" / "runs" / "a-red-ball-0" / "mesh.glb").is_file()
