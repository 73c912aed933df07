"""The command that a GPU is checked with: each part by itself, its time kept, one file that the tables read."""

import json
import subprocess

import pytest

from benchmarks import device_check
from benchmarks.device_check import device_markdown, main
from benchmarks.speed.runs import Broken

SPLIT = {"coarse": {"render": 20.0, "guidance": 60.0}, "fine": {"surface": 10.0, "guidance": 40.0}}


@pytest.fixture
def machine(monkeypatch):
    """Every part answers at once; what it was asked is kept."""
    asked = {"words": [], "contents": [b"same", b"same"], "pytest": "3 passed, 1 skipped in 2.0s"}

    def run(folder, words, env, limit_s=None):
        asked["words"].append(words)
        for name in device_check.COMPARED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(asked["contents"][folder.name == "second"])
        (folder / "run.json").write_text(json.dumps({"stages": {"coarse": {"seconds": 9.0, "steps": 200}}}))
        return 12.5

    def full_size_run(words, size, threads, device, limit_s=None):
        asked["limit_s"] = limit_s
        return {"size": size, "wall_s": 14.0, "profile": {"step_phases_ms": SPLIT}}

    def output(command, **options):
        asked.setdefault("timeouts", []).append(options["timeout"])
        text = {"pytest": asked["pytest"], "pipeline": "{}", "benchmarks.kernels": '{"case": "mlp", "device": "x"}'}
        return subprocess.CompletedProcess(command, 0, text[command[2]], "")

    origin = {"date": "2026-01-01T00:00:00Z", "git": "0123456789", "device": "a GPU"}
    monkeypatch.setattr(device_check, "environment", lambda: origin)
    monkeypatch.setattr(device_check, "run", run)
    monkeypatch.setattr(device_check, "full_size_run", full_size_run)
    monkeypatch.setattr(device_check.subprocess, "run", output)
    return asked


def test_a_check_writes_one_file_that_the_table_is_made_of(machine, tmp_path):
    out = tmp_path / "check.json"
    assert main(["--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["job"]["same_bytes"] and result["tests"] | {"passed": 3, "failures": []} == result["tests"]
    assert result["full"]["step_s"] == {"coarse": 0.08, "fine": 0.05}
    steps, once = result["full"]["recipe_steps"], 14.0 - 30 * 0.13
    assert result["full"]["projected_s"] == pytest.approx(once + 0.08 * steps["coarse"] + 0.05 * steps["fine"], abs=0.1)
    assert result["peers"]["lines"] == [{"case": "mlp"}]
    table = device_markdown(out)
    assert "the same bytes" in table and "| a coarse step | 80 ms | guidance 60, render 20 |" in table
    assert "No GPU" in device_markdown(tmp_path / "none.json")


def test_parts_have_under_nine_minutes_and_what_others_left(machine, tmp_path):
    assert sum(seconds for _, seconds in device_check.PARTS.values()) == device_check.BUDGET_S < 9 * 60
    main(["--device", "cpu", "--out", str(tmp_path / "a.json")])
    assert machine["limit_s"] == pytest.approx(330, abs=3)  # doctor and job took none of their 180 s
    main(["--device", "cpu", "--budget", "53", "--out", str(tmp_path / "b.json")])
    assert machine["limit_s"] == pytest.approx(33, abs=3)


def test_other_bytes_a_broken_part_and_a_failed_test_are_told_and_leave_the_rest(
    machine, tmp_path, monkeypatch, capsys
):
    def broken(*args):
        raise Broken("it broke\nin two lines")

    machine["contents"], machine["pytest"] = [b"one", b"other"], "FAILED tests/test_a.py::test_b\n1 failed in 2.0s"
    monkeypatch.setattr(device_check, "full_size_run", broken)
    out = tmp_path / "check.json"
    assert main(["--device", "cpu", "--out", str(out)]) == 1
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert not result["job"]["same_bytes"] and "OTHER BYTES: mesh.glb" in text
    assert result["full"]["broken"].startswith("Broken: it broke") and result["tests"]["failures"]
    assert "lines" in result["peers"] and "BROKEN" in device_markdown(out)
    for part in ("job", "full", "tests"):
        assert main(["--device", "cpu", "--parts", part, "--out", str(out)]) == 1, part


def test_numbers_of_a_trial_do_not_take_the_place_of_a_gpus(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "--out" in capsys.readouterr().err
