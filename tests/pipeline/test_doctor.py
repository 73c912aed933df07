"""The doctor probes everything and survives what it finds."""

import json
import sys

import pytest

import pipeline.doctor as doctor


@pytest.mark.parametrize("error", ["OSError('libcuda.so: cannot open')", "SystemError('abi')", "Exception('stub')"])
def test_probe_keeps_the_reason_of_any_failure(tmp_path, monkeypatch, error):
    (tmp_path / "brokenpackage.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    state, detail = doctor.probe("brokenpackage")
    assert state == "broken" and detail.split(":")[0] == error.split("(")[0]


def test_probe_tells_missing_from_installed():
    assert doctor.probe("no_such_package_anywhere") == ("missing", "not installed")
    state, version = doctor.probe("yaml", "pyyaml")
    assert state == "ok" and version[0].isdigit()


def test_report_lists_every_check_as_json(monkeypatch, capsys):
    checks = [
        ("fine", True, lambda: ("ok", "1.0"), "all"),
        ("extra", False, lambda: ("missing", "not installed"), "speed"),
    ]
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    monkeypatch.setattr(doctor, "_prior_checks", list)
    monkeypatch.setattr(doctor, "_network_checks", list)
    doctor.print_report(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["fit"] and [f["name"] for f in report["findings"]] == ["fine", "extra"]
    assert report["findings"][1]["cost"] == "speed"


def test_something_required_that_is_broken_ends_with_code_2(monkeypatch, capsys):
    def explode():
        raise OSError("no driver")

    monkeypatch.setattr(doctor, "_CHECKS", [("core", True, explode, "nothing runs")])
    monkeypatch.setattr(doctor, "_prior_checks", list)
    with pytest.raises(SystemExit) as stopped:
        doctor.print_report(as_json=False)
    out = capsys.readouterr().out
    assert stopped.value.code == 2 and "no driver" in out and "nothing runs" in out


def test_checks_of_this_machine_name_every_package_the_project_requires():
    import tomllib
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    required = {line.split(">")[0].split("<")[0] for line in tomllib.loads(text)["project"]["dependencies"]}
    checked = {name for name, needed, _, _ in doctor._CHECKS if needed}
    assert required <= checked
    assert sys.version_info >= (3, 11)
