"""Batches: one run folder a prompt and seed, each run once, no run ended by another's fault."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.batch import batch
from pipeline.batch.gallery import write_gallery
from pipeline.batch.listing import rows_of
from pipeline.batch.plan import plan_runs, read_prompts, state_of
from pipeline.errors import Interrupted
from pipeline.runs.folder import Lock
from stages.errors import UserError
from tests.pipeline.batch import toy_workers
from tests.toy_pipeline import install

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = ["coarse.steps=4", "fine.steps=3", "checkpoint_every=2", "preview_every=2", "export.turntable_frames=0"]


def prompts_file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class InPlace:
    """An engine of this process, that notes what it was asked for."""

    asked: list[str]

    def __init__(self):
        self.asked = []

    def run(self, call, tasks):
        for task in tasks:
            self.asked.append(task.run.name)
            yield task, call(task)


@pytest.fixture
def in_place(monkeypatch):
    install(monkeypatch.setattr)
    monkeypatch.setenv("TOY_EMPTY", "")  # which a toy worker sets for its process
    engine = InPlace()
    monkeypatch.setattr(batch, "make_engine", lambda *_: engine)
    return engine


@pytest.fixture
def slow_toys(monkeypatch):
    """Toy stages in real worker processes, slow enough to be hit in the middle of a run."""
    monkeypatch.setattr(batch, "make_run", toy_workers.make_toy_run)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOY_STEP_S", "0.2")


def kill_once(path: Path, checkpoint: Path) -> threading.Thread:
    """Kill the worker whose pid is in `path`, as soon as its run has a checkpoint."""

    def watch():
        end = time.monotonic() + 1200
        while time.monotonic() < end:
            if checkpoint.is_file() and path.is_file():
                os.kill(int(path.read_text().split()[0]), signal.SIGKILL)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def same_bytes(one: Path, other: Path) -> bool:
    def told(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    same = (one / "mesh.glb").read_bytes() == (other / "mesh.glb").read_bytes()
    return same and told(one) == told(other)


def test_prompts_are_lines_each_once_without_comments(tmp_path):
    path = prompts_file(tmp_path, "\ufeffa red  mug", "", "# no", "a cat", "a red mug")
    assert read_prompts(path) == ["a red mug", "a cat"]


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (b"\xff\xfe\x00", "no UTF-8"), (b"a\x00b", "no text"), (b"# nothing\n\n", "every line")],
)
def test_a_file_without_readable_prompts_is_refused_in_three_lines(tmp_path, content, why, capsys):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["batch", str(path), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and len(told.strip().splitlines()) == 3 and why in told
    assert not (tmp_path / "out").exists()


def test_each_prompt_and_seed_has_a_folder_of_its_own():
    runs = plan_runs(["a red mug", "A red mug!", "ein Krug für Öl", "x" * 300], 2)
    assert len({run.name for run in runs}) == 8
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,70}", run.name) for run in runs)
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4


def test_one_bad_prompt_ends_neither_the_batch_nor_is_it_forgotten(in_place, tmp_path, capsys):
    out, path = tmp_path / "out", prompts_file(tmp_path, "a mug", "an empty box", "a <b>cat</b>")

    def call(task):
        return toy_workers.make_toy_run(task)

    batch_make, batch.make_run = batch.make_run, call
    try:
        rows = batch.run_batch(path, out, seeds=1, overrides=SETTINGS)
        assert [row.state for row in rows] == ["done", "failed", "done"]
        again = batch.run_batch(path, out, seeds=1, overrides=SETTINGS)
    finally:
        batch.make_run = batch_make
    assert "made no object" in rows[1].error and "try another seed" in again[1].error
    assert in_place.asked[3:] == ["an-empty-box-0"], "only what is not done is asked for again"
    page = (out / "index.html").read_text()
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page and "<b>" not in page and "made no object" in page
    links = [link for link in re.findall(r'(?:href|src)="([^"]+)"', page)]
    assert links and all((out / link).is_file() for link in links), "every link of the page leads to a file"
    assert "2 done, 1 failed" in capsys.readouterr().out


def test_another_batch_in_the_same_folder_is_refused(in_place, tmp_path):
    path = prompts_file(tmp_path, "a mug")
    batch.run_batch(path, tmp_path / "out", overrides=SETTINGS)
    with pytest.raises(UserError, match="another batch"):
        batch.run_batch(path, tmp_path / "out", overrides=[*SETTINGS, "coarse.steps=5"])
    with pytest.raises(UserError, match="already holds files"):
        batch.run_batch(path, tmp_path, overrides=SETTINGS)
    rows = batch.run_batch(path, tmp_path / "out", seeds=2, overrides=SETTINGS)
    assert [row.state for row in rows] == ["done", "done"], "more seeds are the same batch"
    with pytest.raises(UserError, match="seed= has no use"):
        batch.run_batch(path, tmp_path / "new", overrides=["seed=3"])


def test_runs_lists_state_time_and_prompt(in_place, tmp_path, capsys):
    batch.run_batch(prompts_file(tmp_path, "a mug"), tmp_path / "out", overrides=SETTINGS)
    record = tmp_path / "out" / "a-mug-0" / "run.json"
    cli_runs(tmp_path / "out")
    assert re.search(r"done\s+.*0\s+a mug\s+a-mug-0", capsys.readouterr().out)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "unfinished"}))
    assert state_of(record.parent).state == "waiting"
    record.write_text("{")
    assert rows_of(tmp_path / "out")[0].state == "failed"
    assert "failed" in write_gallery(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="flock")
def test_a_run_that_a_killed_batch_left_working_is_waited_for(in_place, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "make_run", toy_workers.make_toy_run)
    path, out = prompts_file(tmp_path, "a mug"), tmp_path / "out"
    batch.run_batch(path, out, overrides=SETTINGS)
    record = out / "a-mug-0" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "unfinished"}))
    lock = Lock(out / "a-mug-0")
    lock.__enter__()
    release = threading.Timer(1.0, lock.__exit__)
    release.start()
    assert rows_of(out)[0].state == "running"
    assert [row.state for row in batch.run_batch(path, out, overrides=SETTINGS)] == ["done"]
    release.join()


def cli_runs(folder: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["runs", str(folder)])
    assert stop.value.code in (0, None)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_a_killed_worker_is_started_again_and_its_run_resumed_to_the_same_bytes(tmp_path, monkeypatch, slow_toys):
    path = prompts_file(tmp_path, "a mug", "a bug", "die", "a cat")
    killer = kill_once(tmp_path / "out/a-mug-0.pids", tmp_path / "out/a-mug-0/coarse/checkpoint.safetensors")
    rows = batch.run_batch(path, tmp_path / "out", overrides=SETTINGS, workers=2)
    killer.join()
    assert [row.state for row in rows] == ["done", "failed", "failed", "done"]
    assert "ValueError: a bug" in rows[1].error and "died 3 times" in rows[2].error
    assert len((tmp_path / "out/a-mug-0.pids").read_text().split()) == 2
    assert len(json.loads((tmp_path / "out/a-mug-0/run.json").read_text())["sessions"]) == 2, "it was resumed"
    monkeypatch.setenv("TOY_STEP_S", "0")
    engine = InPlace()
    monkeypatch.setattr(batch, "make_engine", lambda *_: engine)
    with monkeypatch.context() as patch:
        install(patch.setattr)
        batch.run_batch(prompts_file(tmp_path, "a mug", "a cat"), tmp_path / "alone", overrides=SETTINGS)
    for name in ("a-mug-0", "a-cat-0"):
        assert same_bytes(tmp_path / "out" / name, tmp_path / "alone" / name)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_saves_every_run_and_the_same_call_goes_on(tmp_path, monkeypatch, slow_toys):
    path, out = prompts_file(tmp_path, "a mug"), tmp_path / "out"
    settings = ["coarse.steps=200", "fine.steps=3", "export.turntable_frames=0"]

    def interrupt():
        end = time.monotonic() + 1200
        while time.monotonic() < end and not (out / "a-mug-0/metrics.jsonl").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        batch.run_batch(path, out, overrides=settings, workers=1)
    thread.join()
    pid = int((out / "a-mug-0.pids").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(1200):  # until its end is noted
            os.kill(pid, 0)
            time.sleep(0.1)
    record = json.loads((out / "a-mug-0/run.json").read_text())
    assert record["status"] == "interrupted" and 0 < record["stages"]["coarse"]["step"] < 200
    assert [row.state for row in rows_of(out)] == ["waiting"]
    assert (out / "index.html").is_file()
