"""Another project's `stages` or `pipeline` where Python is started: who notices, and what is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline.doctor as doctor
from pipeline.import_names import ROOT, check_stages, clashes


def python(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    """Python started in a folder, with this toolkit behind what lies there."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | more
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)


def package(folder: Path, name: str, text: str = "") -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    return folder / name


@pytest.mark.parametrize("kind", ["package", "module"])
def test_import_pipeline_beside_a_foreign_stages_says_what_why_and_what_to_do(tmp_path, kind):
    if kind == "package":
        place = package(tmp_path, "stages")
    else:
        place = tmp_path / "stages.py"
        place.touch()
    done = python(tmp_path, "-c", "import pipeline")
    lines = done.stderr.splitlines()[-3:]
    assert done.returncode == 1
    assert lines[0] == "ImportError: what: cannot import pipeline: `stages` is another project's"
    assert str(place) in lines[1] and str(ROOT / "stages") in lines[1]
    assert lines[2].startswith("fix:") and "`pipeline` command" in lines[2]


def test_the_module_run_as_a_command_answers_in_three_lines_and_no_traceback(tmp_path):
    package(tmp_path, "stages")
    done = python(tmp_path, "-m", "pipeline", "--version")
    assert done.returncode == 2 and done.stdout == ""
    assert [line[:5] for line in done.stderr.splitlines()] == ["what:", "why: ", "fix: "]


def test_a_stages_that_was_imported_before_is_noticed(tmp_path):
    code = "import sys, types; sys.modules['stages'] = types.ModuleType('stages'); import pipeline"
    done = python(tmp_path, "-c", code)
    assert done.returncode == 1 and "fix:" in done.stderr.splitlines()[-1]


def test_a_folder_without_a_package_does_not_disturb(tmp_path):
    """Python takes such a folder only where there is no package of the name."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "pipeline").mkdir()
    done = python(tmp_path, "-c", "import pipeline, stages; print(pipeline.__file__)")
    assert done.stdout.strip() == str(ROOT / "pipeline" / "__init__.py"), done.stderr


def test_stages_alone_can_be_used_beside_a_foreign_pipeline(tmp_path):
    package(tmp_path, "pipeline")
    done = python(tmp_path, "-c", "import stages; print(stages.UserError.__module__)")
    assert done.stdout.strip() == "stages.errors", done.stderr


def test_the_command_is_not_disturbed_by_the_folder_it_is_called_in(tmp_path):
    """As the installed script does, Python is given a file, whose folder it looks into before any other."""
    package(tmp_path, "stages")
    package(tmp_path, "pipeline")
    script = tmp_path / "bin" / "pipeline"
    script.parent.mkdir()
    script.write_text("import sys\nfrom pipeline.cli import main\nsys.exit(main())\n")
    done = python(tmp_path, str(script), "--version")
    assert done.returncode == 0 and done.stdout.strip()[0].isdigit(), done.stderr


def test_the_doctor_names_what_stands_in_the_way_in_the_folder_it_is_asked_in(tmp_path, monkeypatch):
    here = package(tmp_path, "stages")
    monkeypatch.chdir(tmp_path)
    assert clashes(tmp_path) == [f"from here `import stages` finds {here}"]
    state, detail = doctor._import_names()
    assert state == "broken" and str(here) in detail
    (row,) = [row for row in doctor._CHECKS if row[0] == "import names"]
    assert row[2] is doctor._import_names and not row[1]


def test_a_distribution_that_brings_the_same_names_is_named(tmp_path, monkeypatch):
    claims = {"pipeline": ["text3d-pipeline", "other-pipeline"], "stages": ["text3d-pipeline"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: claims)
    assert clashes(ROOT) == ["`pipeline` is also installed by other-pipeline"]
    monkeypatch.undo()
    check_stages()
