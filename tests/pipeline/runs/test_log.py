"""What run.json says of memory, of its clock, on the CPU and with a stand-in for a GPU, and of the revision."""

import errno
import json
import os
import subprocess

import pytest
import torch

from pipeline.runs.folder import Lock, new_folder
from pipeline.runs.log import Metrics, Record, read_metrics
from pipeline.runs.process import git_revision, peak_gpu_memory_mb
from pipeline.runs.progress import Progress
from stages.errors import UserError


@pytest.fixture
def gpu(monkeypatch):
    """torch's counters as a process that works on a GPU sees them."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)


def session(folder, device: str) -> tuple[dict, dict]:
    record = Record(folder)
    record.open_session({"type": device}, {})
    record.save(status="finished")
    data = json.loads((folder / "run.json").read_text())
    return data, data["sessions"][-1]


def test_a_gpus_peak_is_recorded_beside_the_hosts_and_kept_over_sessions(gpu, tmp_path, monkeypatch):
    data, last = session(tmp_path, "cuda")
    assert data["peak_gpu_memory_mb"] == last["peak_gpu_memory_mb"] == 3072 and data["peak_memory_mb"] > 50
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    data, last = session(tmp_path, "cuda")
    assert data["peak_gpu_memory_mb"] == 3072 and last["peak_gpu_memory_mb"] == 1024


def test_a_run_without_a_gpu_has_no_peak_of_one(tmp_path):
    data, last = session(tmp_path, "cpu")
    assert peak_gpu_memory_mb() is None
    assert data["peak_gpu_memory_mb"] is None and last["peak_gpu_memory_mb"] is None


def test_a_session_says_what_its_phases_seconds_are(tmp_path):
    assert session(tmp_path, "cpu")[1]["phase_clock"] == "the host's"
    assert "launches" in session(tmp_path, "cuda")[1]["phase_clock"]


def test_the_bar_shows_the_gpus_peak(gpu, capsys):
    with Progress().stage("coarse", 2, 0) as stage_progress:
        stage_progress.update(1, "cover 3 %")
    assert "GB, GPU peak 3.0 GB  cover 3 %" in capsys.readouterr().out


def test_a_revision_is_dirty_where_what_makes_results_differs_and_only_there(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    assert git_revision(tmp_path) is None
    files = {name: tmp_path / name for name in ("README.md", "stages/fine.py", "benchmarks/results/speed.jsonl")}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    clean = git_revision(tmp_path)
    assert len(clean) == 40
    files["README.md"].write_text("after")
    files["benchmarks/results/speed.jsonl"].write_text("after")
    assert git_revision(tmp_path) == clean
    files["stages/fine.py"].write_text("after")
    assert git_revision(tmp_path) == f"{clean}-dirty"


def test_a_disk_without_locks_is_worked_on_and_a_lock_that_is_held_is_not(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def fail(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    fail(errno.ENOSYS)
    with Lock(tmp_path):
        assert "cannot lock files" in caplog.text
    assert new_folder(tmp_path, "a mug", 0) == tmp_path  # what a refused run has left is no reason to refuse the next
    fail(errno.EWOULDBLOCK)
    with pytest.raises(UserError, match="is in use"), Lock(tmp_path):
        pass


@pytest.mark.parametrize(
    "data",
    [
        {"stages": []},
        {"stages": {"coarse": []}},
        {"stages": {"coarse": {}}},
        {"stages": {"coarse": 1.5}},
        {"outputs": 0},
        {"outputs": [1]},
        {"sessions": [None]},
        {"prompt": 3},
        {"export": {"phases": 1}},
        {"export": {"phases": {"write": "x"}}},
    ],
)
def test_a_record_with_something_of_the_wrong_kind_is_damaged(tmp_path, data):
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"damaged file .*run\.json"):
        Record(tmp_path)


ROW = '{"stage": "coarse", "step": 1, "seconds": 0.5}'


@pytest.mark.parametrize("last", ["", '{"stage": "coa', "\x00\x00", '{"stage": "coarse", "step": 2'])
def test_a_last_line_that_is_cut_short_is_no_row(tmp_path, last):
    (tmp_path / "metrics.jsonl").write_text(f"{ROW}\n{ROW}\n{last}")
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(ROW)] * 2


@pytest.mark.parametrize(
    "line", ["7", "[]", "{}", '{"stage": 1, "step": 1}', '{"stage": "coarse", "step": "1"}', "\udcff"]
)
def test_a_line_that_is_no_step_is_told_and_dropped_by_a_resumed_run(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{ROW}\n{line}\n{ROW}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="its line 2 is no step of a stage"):
        read_metrics(path)
    Metrics(tmp_path).rewind("coarse", 1, ("fine",))
    assert path.read_text() == f"{ROW}\n{ROW}\n"


def test_a_run_may_begin_where_one_was_killed_before_its_first_file(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.x1y2.part").touch()
    assert new_folder(tmp_path, "a red mug", 0) == tmp_path
    (tmp_path / ".mesh.glb.x1y2.part").touch()
    with pytest.raises(UserError, match="already holds files"):
        new_folder(tmp_path, "a red mug", 0)
