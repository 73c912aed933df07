"""Runs with toy stages: what lies in the folder, stopping and resuming, refusals that lose nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

if os.name != "posix":
    pytest.skip("kills and forks", allow_module_level=True)

from pipeline.cli import main
from pipeline.config.model import load_config, read_config
from pipeline.config.written import read_part
from pipeline.runs.checkpoint import load_checkpoint, read_meta, save_checkpoint
from stages.errors import UserError
from tests import toy_pipeline
from tests.fork_server import ROOT, forking

SMALL = ["coarse.steps=12", "fine.steps=9", "checkpoint_every=4", "preview_every=5", "export.turntable_frames=0"]


@pytest.fixture(scope="module")
def toy():
    """toy(*arguments, cwd=..., **environment) starts a `pipeline` process with toy stages."""
    with forking(toy=True) as start:
        yield start


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_times(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(folder)]


def reached(path: Path, step: int) -> bool:
    """Whether the checkpoint at `path` has come to `step`; it is whole whenever it exists."""
    return path.exists() and read_meta(path)["step"] >= step


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = toy("run", "--out", "run", "--seed", 3, *SMALL, cwd=folder).finish()
    assert code == 0, err
    assert "done: run/mesh.glb" in out
    return folder / "run"


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """pipeline.runs.run with the toys installed, in this process, standing in tmp_path."""
    import pipeline.runs.loop
    import pipeline.runs.run

    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    return pipeline.runs.run


def load(*overrides: str, **flags):
    return load_config(None, [*SMALL, *overrides], flags)


def test_run_folder_holds_everything_a_run_leaves(uninterrupted):
    names = {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "run.json", "metrics.jsonl", "mesh.glb"}
    wanted |= {f"coarse/previews/{step:06d}.png" for step in (5, 10, 12)} | {"coarse/checkpoint.safetensors"}
    wanted |= {f"fine/previews/{step:06d}.png" for step in (5, 9)} | {"fine/checkpoint.safetensors"}
    assert wanted <= names
    assert not [name for name in names if ".part" in name]


def test_run_json_tells_machine_times_and_status(uninterrupted):
    run = json.loads((uninterrupted / "run.json").read_text())
    assert run["status"] == "finished" and run["seed"] == 3 and run["prompt"] == "a red mug"
    assert run["peak_memory_mb"] > 50 and run["peak_gpu_memory_mb"] is None
    session = run["sessions"][0]
    assert session["versions"]["torch"] and session["device"]["type"] == "cpu" and session["device"]["threads"] >= 1
    assert list(run["stages"]) == ["coarse", "fine"]
    coarse = run["stages"]["coarse"]
    assert coarse["step"] == coarse["steps"] == 12 and coarse["seconds"] > 0
    assert {"render", "preview", "checkpoint", "load_prior", "finish"} <= set(coarse["phases"])


def test_metrics_have_one_line_per_step_in_order(uninterrupted):
    expected = [("coarse", k) for k in range(1, 13)] + [("fine", k) for k in range(1, 10)]
    assert [(line["stage"], line["step"]) for line in lines(uninterrupted)] == expected


def test_config_yaml_feeds_back_to_the_same_bytes(in_process, uninterrupted, tmp_path):
    in_process.start_run(load_config(str(uninterrupted / "config.yaml"), [], {}), Path("again"))
    for name in ("config.yaml", "mesh.glb"):
        assert (tmp_path / "again" / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.parametrize(("stage", "step"), [("coarse", 0), ("coarse", 4), ("coarse", 12), ("fine", 4), ("fine", 9)])
def test_killed_and_resumed_equals_uninterrupted(toy, in_process, uninterrupted, tmp_path, stage, step):
    process = toy("run", "--out", "run", "--seed", 3, *SMALL, cwd=tmp_path, TOY_STEP_S="0.02")
    folder = tmp_path / "run"
    checkpoint = folder / stage / "checkpoint.safetensors"
    process.wait_until(lambda: reached(checkpoint, step) if step else (folder / stage / "previews").exists())
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    in_process.resume_run(folder)
    assert (folder / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    assert without_times(folder) == without_times(uninterrupted)
    assert not list(folder.rglob("*.part*"))
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupt_saves_the_step_it_stops_at_and_says_how_to_go_on(
    toy, in_process, uninterrupted, tmp_path, number, code
):
    process = toy("run", "--out", "run", "--seed", 3, *SMALL, "checkpoint_every=1000", cwd=tmp_path, TOY_STEP_S="0.2")
    folder = tmp_path / "run"
    process.wait_until((folder / "coarse" / "previews" / "000005.png").exists)
    process.send_signal(number)
    got, _, err = process.finish()
    assert got == code
    assert "pipeline resume run" in err and "Traceback" not in err
    saved = load_checkpoint(folder / "coarse" / "checkpoint.safetensors")[1]["step"]
    assert 1 <= saved < 12 and f"coarse step {saved} of 12" in err
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    in_process.resume_run(folder)
    assert (folder / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    assert without_times(folder) == without_times(uninterrupted)


def test_a_killed_run_is_not_called_running(toy, tmp_path):
    from pipeline import Result

    process = toy("run", "--out", "run", *SMALL, cwd=tmp_path, TOY_STEP_S="0.5")
    folder = tmp_path / "run"
    process.wait_until((folder / "coarse" / "checkpoint.safetensors").exists)
    assert Result(folder).status == "running"
    process.send_signal(signal.SIGKILL)
    process.finish()
    assert json.loads((folder / "run.json").read_text())["status"] == Result(folder).status == "unfinished"


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(uninterrupted, tmp_path):
    """As `pipeline run ... | head -1` has it: the pipe is closed after a line, and the run ends with the same bytes."""
    script = "import sys; from tests import toy_pipeline; toy_pipeline.install(); from pipeline.cli import main; main()"
    words = [sys.executable, "-c", script, "run", "--out", "run", "--seed", "3", *SMALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOY_STEP_S": "0.05"}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert (tmp_path / "run" / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()


def test_second_interrupt_stops_at_once(toy, tmp_path):
    process = toy("run", "--out", "run", *SMALL, "preview_every=1", cwd=tmp_path, TOY_STEP_S="1")
    process.wait_until((tmp_path / "run" / "coarse" / "previews" / "000001.png").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, _, err = process.finish()
    assert code == 130 and "pipeline resume run" in err and "Traceback" not in err
    assert not (tmp_path / "run" / "coarse" / "checkpoint.safetensors").exists()


def test_resuming_a_finished_run_says_so_and_changes_nothing(in_process, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = contents(tmp_path / "run")
    in_process.resume_run(Path("run"))
    assert "run is finished: mesh.glb" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_a_new_prompt_for_a_finished_run_is_refused(in_process, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("prompt: a red mug", "prompt: a blue mug"))
    before = contents(folder)
    with pytest.raises(UserError, match='asks for "a blue mug": every step of this run was taken for "a red mug"'):
        in_process.resume_run(folder)
    (folder / "mesh.glb").unlink()  # nor are its files made again under the new name
    with pytest.raises(UserError, match="a blue mug"):
        in_process.resume_run(folder)
    assert contents(folder) == {path: data for path, data in before.items() if path.name != "mesh.glb"}


def test_a_finished_run_whose_settings_were_edited_goes_on_with_them(in_process, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    made = (folder / "config.yaml").read_text()
    before = (folder / "mesh.glb").read_bytes()

    def resume(**changes):
        config = yaml.safe_load(made)
        for group, values in changes.items():
            config[group] |= values
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        in_process.resume_run(folder)
        return json.loads((folder / "run.json").read_text())

    steps = yaml.safe_load(made)["fine"]["steps"]
    assert resume(export={"formats": ["glb", "stl"]})["outputs"] == ["mesh.glb", "mesh.stl"]
    assert (folder / "mesh.stl").is_file() and (folder / "mesh.glb").read_bytes() == before
    assert resume(fine={"steps": steps + 2})["stages"]["fine"]["step"] == steps + 2
    with pytest.raises(UserError, match=r"coarse\.field\.levels.*was made with|coarse\.field\.levels.*differs"):
        resume(coarse={"field": yaml.safe_load(made)["coarse"]["field"] | {"levels": 3}})


def test_export_elsewhere_reads_only_and_never_writes_over_what_is_there(in_process, uninterrupted, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(uninterrupted, folder)
    (folder / ".lock").unlink(missing_ok=True)
    before = contents(folder)
    in_process.export_run(folder, "stl,ply", out)
    assert contents(folder) == before and not (folder / ".lock").exists()
    with pytest.raises(UserError, match="already holds mesh.ply"):
        in_process.export_run(folder, "obj,ply", out)
    assert not (out / "mesh.obj").exists()
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "mesh.png").write_bytes(b"someone's picture")
    with pytest.raises(UserError, match="already holds mesh.png"):  # which an OBJ's texture would have replaced
        in_process.export_run(folder, "obj", beside)
    in_process.export_run(folder, "glb", folder)  # its own are its own


def test_fine_from_a_finished_coarse_run_equals_the_chain(in_process, uninterrupted, tmp_path):
    in_process.start_run(load(seed=3, stages="coarse"), Path("coarse"))
    folder = in_process.start_run(load(stages="fine", from_run="coarse"), Path("fine"))
    shutil.rmtree(tmp_path / "coarse")  # the new run stands on its own
    assert (folder / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    in_process.export_run(folder, "stl,ply")
    assert (folder / "mesh.stl").stat().st_size > 0


def test_export_writes_the_same_mesh_again(in_process, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    in_process.export_run(Path("run"), "glb,ply", Path("files"))
    assert (tmp_path / "files" / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    assert "files/mesh.ply" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot write fbx"):
        in_process.export_run(Path("run"), "glb,fbx")
    (tmp_path / "run" / "fine" / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="fine is not finished"):
        in_process.export_run(Path("run"), "glb")


def test_resume_after_more_steps_were_asked_for_goes_on_to_them(in_process, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  steps: 9", "  steps: 11"))
    (folder / "mesh.glb").unlink()
    in_process.resume_run(folder)
    assert [line["step"] for line in lines(folder) if line["stage"] == "fine"] == list(range(1, 12))


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["--init-mesh", "gone.glb"], "--init-mesh", "--stages fine"),
        (["--init-mesh", "gone.glb", "--stages", "fine"], "Cannot read the mesh", "GLB, glTF, OBJ, PLY and STL"),
        (["--stages", "fine", "place.up=w"], "place.up", "'auto', 'x', '-x'"),
        (["--stages", "fine,coarse"], "stages", "order"),
        (["--stages", "coarse,coarse"], "stages", "once"),
        (["--stages", "cores"], "stages", "stages: coarse, fine, clipmesh"),
        (["--stages", ""], "stages", "stages"),
        (["--prompt", "  "], "prompt", "empty"),
        (["--seed", "-1"], "seed = -1", ">= 0"),
        (["--seed", "many"], "cannot read the command line", "--help"),
        (["--device", "gpu"], "device", "'auto', 'cpu' or 'cuda'"),
        (["--config", "defualt"], "no such recipe", "did you mean default?"),
        (["coarse.stepz=3"], "unknown key coarse.stepz", "coarse.steps"),
        (["coarse.steps=0"], "coarse.steps = 0", ">= 1"),
        (["--from", "nowhere", "--stages", "fine"], "--from nowhere is not a run", "folder of a run"),
    ],
)
def test_bad_command_lines_end_in_three_lines_before_any_work(in_process, capsys, tmp_path, arguments, what, fix):
    with pytest.raises(SystemExit) as stopped:
        main(["run", *arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and "Traceback" not in err
    assert err.startswith("what: ") and "\nwhy:  " in err and "\nfix:  " in err
    assert what in err and fix in err
    assert not list(tmp_path.iterdir())


def test_folder_with_another_run_is_refused_and_untouched(in_process, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run") as caught:
        in_process.start_run(load(), tmp_path / "run")
    assert "pipeline resume" in caught.value.fix
    assert contents(tmp_path / "run") == before


def test_default_folders_are_named_after_prompt_and_seed_and_never_shared(in_process):
    first = in_process.start_run(load(prompt="A Red  Mug, très chic!", seed=7))
    second = in_process.start_run(load(prompt="A Red  Mug, très chic!", seed=7))
    assert (str(first), str(second)) == ("runs/a-red-mug-tres-chic-7", "runs/a-red-mug-tres-chic-7-2")


def test_run_in_use_is_refused(in_process, tmp_path):
    from pipeline.runs.folder import Lock

    folder = in_process.start_run(load(), tmp_path / "run")
    with Lock(folder), pytest.raises(UserError, match="in use"):
        in_process.resume_run(folder)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_checkpoint_is_named_with_a_way_out(in_process, uninterrupted, tmp_path, damage):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    (folder / "mesh.glb").unlink()
    path = folder / "fine" / "checkpoint.safetensors"
    data = path.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    path.write_bytes({"cut": data[:-20], "flip": flipped, "empty": b""}[damage])
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        in_process.resume_run(folder)
    assert str(path) in caught.value.what and "remove it" in caught.value.fix
    path.unlink()  # what the message says
    in_process.resume_run(folder)
    assert (folder / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()


@pytest.mark.parametrize(("name", "what"), [("run.json", "damaged file"), ("config.yaml", "not valid YAML")])
def test_damaged_text_files_are_named(in_process, uninterrupted, tmp_path, name, what):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    (folder / name).write_text((folder / name).read_text()[:40] + "\n{[")
    with pytest.raises(UserError, match=what):
        in_process.resume_run(folder)


def test_a_resumed_run_is_checked_for_the_stages_that_are_left(in_process, uninterrupted, tmp_path, monkeypatch):
    checked, check = [], in_process.check_priors

    def listen(config, stages, priors):
        checked.append(stages)
        return check(config, stages, priors)

    monkeypatch.setattr(in_process, "check_priors", listen)
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  steps: 9", "  steps: 11"))
    (folder / "mesh.glb").unlink()
    in_process.resume_run(folder)
    assert checked == [["fine"]]


def test_resume_of_something_else_lists_the_runs(in_process, tmp_path):
    in_process.start_run(load())
    with pytest.raises(UserError, match="is not a run") as caught:
        in_process.resume_run(Path("runs/a-red-mug"))
    assert "a-red-mug-0" in caught.value.fix


def test_from_needs_a_finished_stage_with_the_same_settings(in_process, tmp_path):
    source = in_process.start_run(load(stages="coarse"), tmp_path / "source")
    with pytest.raises(UserError, match=r"coarse.\* differs"):
        in_process.start_run(load("coarse.steps=13", stages="fine", from_run=str(source)))
    (source / "coarse" / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="no finished coarse stage"):
        in_process.start_run(load(stages="fine", from_run=str(source)))
    assert not (tmp_path / "runs").exists()


def test_number_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(in_process, monkeypatch, tmp_path):
    monkeypatch.setenv("TOY_NAN_AT", "6")
    with pytest.raises(UserError, match="coarse broke down at step 6") as caught:
        in_process.start_run(load(), tmp_path / "run")
    assert "checkpoint of step 4" in caught.value.fix
    assert load_checkpoint(tmp_path / "run" / "coarse" / "checkpoint.safetensors")[1]["step"] == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_stage_without_an_object_points_at_its_previews(in_process, monkeypatch, tmp_path):
    monkeypatch.setenv("TOY_EMPTY", "coarse")
    with pytest.raises(UserError, match="coarse made no object") as caught:
        in_process.start_run(load(), tmp_path / "run")
    assert str(tmp_path / "run" / "coarse" / "previews") in caught.value.fix
    assert (tmp_path / "run" / "coarse" / "previews" / "000012.png").exists()


def test_a_stage_that_made_nothing_is_not_sent_round_in_a_circle(in_process, monkeypatch, tmp_path, capsys):
    """Its checkpoint has its last step, so resuming ends there again: what helps is a new run, or more steps."""
    monkeypatch.setenv("TOY_EMPTY", "coarse")
    again = "pipeline run --config run/config.yaml KEY=VALUE --out FOLDER"
    for go in (lambda: in_process.start_run(load(), Path("run")), lambda: in_process.resume_run(Path("run"))):
        with pytest.raises(UserError, match="coarse made no object") as caught:
            go()
        assert again in caught.value.fix and "run/coarse/previews" in caught.value.fix
        assert "raise coarse.steps in run/config.yaml, then pipeline resume run" in caught.value.fix
        assert "to go on after mending" not in capsys.readouterr().out
    monkeypatch.delenv("TOY_EMPTY")  # as if more steps helped
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("  steps: 12", "  steps: 14"))
    in_process.resume_run(Path("run"))
    assert [line["step"] for line in lines(tmp_path / "run") if line["stage"] == "coarse"] == list(range(1, 15))


def test_a_fine_stage_that_made_nothing_is_done_again_from_its_coarse_stage(in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TOY_EMPTY", "fine")
    with pytest.raises(UserError, match="fine made no object") as caught:
        in_process.start_run(load(), Path("run"))
    assert "pipeline run --stages fine --from run KEY=VALUE --out FOLDER" in caught.value.fix
    assert "coarse.steps" not in caught.value.fix and "to go on after mending" not in capsys.readouterr().out
    monkeypatch.delenv("TOY_EMPTY")  # what the message says
    words = ["run", "--stages", "fine", "--from", "run", "fine.keep=0.1", "--out", "new"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code and (tmp_path / "new" / "mesh.glb").exists()


def test_a_failure_that_can_be_mended_still_says_how_to_go_on(in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TOY_NAN_AT", "6")
    with pytest.raises(UserError):
        in_process.start_run(load(), tmp_path / "run")
    assert f"to go on after mending: pipeline resume {tmp_path / 'run'}" in capsys.readouterr().out


def test_a_setting_that_a_checkpoint_was_made_with_cannot_be_edited(in_process, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    (folder / "mesh.glb").unlink()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  tets: 64", "  tets: 96", 1))
    before = contents(folder)
    for go in (in_process.resume_run, lambda folder: in_process.export_run(folder, "glb")):
        with pytest.raises(UserError, match="fine.tets differs from what"):
            go(folder)
    assert contents(folder) == before  # refused before any work
    (folder / "config.yaml").write_text(text)  # what the message says
    in_process.resume_run(folder)
    assert (folder / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()


def test_a_checkpoint_that_does_not_say_what_it_was_made_with_is_not_gone_on_with(in_process, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    (folder / "mesh.glb").unlink()
    path = folder / "coarse" / "checkpoint.safetensors"
    state, meta = load_checkpoint(path)
    assert meta.pop("settings") and {"upstream", "step", "steps", "seconds", "phases"} <= set(meta)
    save_checkpoint(path, state, meta)
    with pytest.raises(UserError, match="coarse/checkpoint.safetensors does not say what it was made with"):
        in_process.resume_run(folder)
    with pytest.raises(UserError, match="does not say what it was made with"):
        in_process.start_run(load(stages="fine", from_run=str(folder)))


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_damaged_copy_of_another_runs_coarse_stage_sends_back_to_it(in_process, tmp_path, uninterrupted, damage):
    source = shutil.copytree(uninterrupted, tmp_path / "source")
    folder = in_process.start_run(load(stages="fine", from_run=str(source)), tmp_path / "run")
    (folder / "mesh.glb").unlink()
    path = folder / "coarse" / "checkpoint.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError) as caught:
        in_process.resume_run(folder)
    assert f"start again with --from {source}: pipeline run --config {folder}/config.yaml" in caught.value.fix
    again = load_config(str(folder / "config.yaml"), [], {})  # what the message says
    assert (in_process.start_run(again, tmp_path / "again") / "mesh.glb").exists()


def test_full_disk_during_a_run_keeps_the_last_checkpoint(in_process, monkeypatch, tmp_path):
    import pipeline.runs.checkpoint

    real, calls = pipeline.runs.checkpoint.write_whole, []

    def full(path, data):
        calls.append(path)
        if len(calls) < 2:
            return real(path, data)

        def refuse(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            return real(path, data)

    monkeypatch.setattr(pipeline.runs.checkpoint, "write_whole", full)
    with pytest.raises(UserError, match="No space left on device"):
        in_process.start_run(load(), tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "coarse" / "checkpoint.safetensors")[1]["step"] == 4
    assert not list((tmp_path / "run").rglob("*.part"))


def test_full_disk_before_a_run_is_refused(in_process, monkeypatch, tmp_path):
    import pipeline.runs.folder

    monkeypatch.setattr(pipeline.runs.folder, "MIN_FREE_MB", 10**12)
    with pytest.raises(UserError, match="not enough room"):
        in_process.start_run(load(), tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_resolved_config_of_a_run_is_the_config(in_process, tmp_path):
    config = load("prior.fine=reference", "reference.mesh=some/mesh.glb", seed=5)
    folder = in_process.start_run(config, tmp_path / "run")
    assert read_config(folder) == read_part(config) and read_config(folder).reference == config.reference
    assert config.reference.mesh == str(tmp_path / "some/mesh.glb")
