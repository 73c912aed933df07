"""What people expect of a command: -q, --dry-run, --log, completion, a last line that says where to look."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.runs import tracking
from pipeline.runs.log import read_metrics
from tests import toy_pipeline

SMALL = ["coarse.steps=3", "fine.steps=2", "preview_every=2", "export.turntable_frames=0"]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run the command line with toy stages in tmp_path; returns code, stdout, stderr."""
    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)

    def go(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        return (stop.value.code, *capsys.readouterr())

    return go


def test_the_last_line_of_a_finished_run_says_where_to_look(command):
    code, out, _ = command("run", *SMALL, "--out", "run")
    last = out.strip().splitlines()[-1]
    assert code == 0 and "open run/mesh.glb" in last and "pipeline export run" in last
    assert Path("run/mesh.glb").is_file()


def test_quiet_prints_nothing_but_mistakes(command):
    assert command("run", "-q", *SMALL, "--out", "run") == (0, "", "")
    assert command("export", "-q", "run", "--format", "ply") == (0, "", "")
    assert command("resume", "--quiet", "run") == (0, "", "")
    code, out, err = command("run", "-q", *SMALL, "--out", "run")
    assert code == 2 and out == "" and "already holds a run" in err and len(err.strip().splitlines()) == 3


def test_a_dry_run_checks_tells_and_makes_nothing(command, tmp_path):
    code, out, _ = command("run", "--dry-run", *SMALL)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert "coarse: 3 steps of 4 views of 64 pixels" in out and "time unknown" in out and "memory" in out
    assert out.strip().endswith("nothing was started")
    for words, what in ((["coarse.step=3"], "coarse.step"), (["--init-mesh", "none.glb"], "none.glb")):
        code, _, err = command("run", "--dry-run", *words)
        assert code == 2 and what in err and list(tmp_path.iterdir()) == []


def test_a_dry_run_knows_the_time_that_a_run_beside_it_took(command, monkeypatch):
    monkeypatch.setenv("TOY_STEP_S", "0.2")
    assert command("run", "-q", *SMALL, "--out", "runs/one")[0] == 0
    _, out, _ = command("run", "--dry-run", "coarse.steps=300", "fine.steps=2", "--out", "runs/two")
    line = next(line for line in out.splitlines() if line.startswith("coarse: 300"))
    assert "about 1 min" in line and not Path("runs/two").exists()
    _, out, _ = command("run", "--dry-run", "coarse.steps=300", "coarse.resolution=32", "--out", "runs/two")
    assert "time unknown" in next(line for line in out.splitlines() if line.startswith("coarse: 300"))


def test_tensorboard_hears_every_step_and_preview(command):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command("run", "-q", "--log", "tensorboard", *SMALL, "--out", "run")[0] == 0
    events = EventAccumulator("run/tensorboard").Reload()
    rows = [row for row in read_metrics(Path("run/metrics.jsonl")) if row["stage"] == "coarse"]
    scalars = events.Scalars("coarse/size")
    assert [event.step for event in scalars] == [row["step"] for row in rows] == [1, 2, 3]
    np.testing.assert_allclose([event.value for event in scalars], [row["size"] for row in rows], rtol=1e-5)
    assert [event.step for event in events.Images("coarse/preview")] == [2, 3]


def test_a_tracker_that_is_missing_or_unknown_is_refused_before_the_run(command, monkeypatch):
    code, _, err = command("run", "--log", "wandb", *SMALL, "--out", "run")
    assert code == 2 and "cannot log to wandb" in err and not Path("run").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = command("run", "--log", "tensorboard", *SMALL, "--out", "run")
    assert code == 2 and "text3d-pipeline[tensorboard]" in err and not Path("run").exists()
    assert len(err.strip().splitlines()) == 3 and tracking.TRACKERS.keys() == {"tensorboard"}


def test_the_shell_completes_commands():
    command = [sys.executable, "-m", "pipeline"]
    words = {"_PIPELINE_COMPLETE": "complete_bash", "COMP_WORDS": "pipeline ex", "COMP_CWORD": "1"}
    done = subprocess.run(command, env=os.environ | words, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["export"], done.stderr
