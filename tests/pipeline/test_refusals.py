"""Runs that cannot be started or gone on with: they are refused in three lines, and nothing is lost."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.skip("kills and forks", allow_module_level=True)

from pipeline.cli import main
from pipeline.config.model import load_config
from pipeline.runs.checkpoint import load_checkpoint, save_checkpoint
from pipeline.runs.export import export_run
from stages.errors import UserError
from tests.toy_runs import contents, lines, load


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["--init-mesh", "gone.glb"], "--init-mesh", "--stages fine"),
        (["--init-mesh", "gone.glb", "--stages", "fine"], "Cannot read the mesh", "GLB, glTF, OBJ, PLY and STL"),
        (["--stages", "fine", "place.up=w"], "place.up", "'auto', 'x', '-x'"),
        (["--stages", "fine,coarse"], "stages", "order"),
        (["--stages", "coarse,coarse"], "stages", "once"),
        (["--stages", "cores"], "stages", "stages: coarse, points, triplane, gan, fine, clipmesh"),
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
    with pytest.raises(UserError, match="already holds a run") as error:
        in_process.start_run(load(), tmp_path / "run")
    assert "pipeline resume" in error.value.fix
    assert contents(tmp_path / "run") == before


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
    with pytest.raises(UserError, match="damaged checkpoint") as error:
        in_process.resume_run(folder)
    assert str(path) in error.value.what and "remove it" in error.value.fix
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
    with pytest.raises(UserError, match="is not a run") as error:
        in_process.resume_run(Path("runs/a-red-mug"))
    assert "a-red-mug-0" in error.value.fix


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
    with pytest.raises(UserError, match="coarse broke down at step 6") as error:
        in_process.start_run(load(), tmp_path / "run")
    assert "checkpoint of step 4" in error.value.fix
    assert load_checkpoint(tmp_path / "run" / "coarse" / "checkpoint.safetensors")[1]["step"] == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_stage_without_an_object_points_at_its_previews(in_process, monkeypatch, tmp_path):
    monkeypatch.setenv("TOY_EMPTY", "coarse")
    with pytest.raises(UserError, match="coarse made no object") as error:
        in_process.start_run(load(), tmp_path / "run")
    assert str(tmp_path / "run" / "coarse" / "previews") in error.value.fix
    assert (tmp_path / "run" / "coarse" / "previews" / "000012.png").exists()


def test_a_stage_that_made_nothing_is_not_sent_round_in_a_circle(in_process, monkeypatch, tmp_path, capsys):
    """Its checkpoint has its last step, so resuming ends there again: what helps is a new run, or more steps."""
    monkeypatch.setenv("TOY_EMPTY", "coarse")
    again = "pipeline run --config run/config.yaml KEY=VALUE --out FOLDER"
    for go in (lambda: in_process.start_run(load(), Path("run")), lambda: in_process.resume_run(Path("run"))):
        with pytest.raises(UserError, match="coarse made no object") as error:
            go()
        assert again in error.value.fix and "run/coarse/previews" in error.value.fix
        assert "raise coarse.steps in run/config.yaml, then pipeline resume run" in error.value.fix
        assert "to go on after mending" not in capsys.readouterr().out
    monkeypatch.delenv("TOY_EMPTY")  # as if more steps helped
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("  steps: 12", "  steps: 14"))
    in_process.resume_run(Path("run"))
    assert [line["step"] for line in lines(tmp_path / "run") if line["stage"] == "coarse"] == list(range(1, 15))


def test_a_fine_stage_that_made_nothing_is_done_again_from_its_coarse_stage(in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TOY_EMPTY", "fine")
    with pytest.raises(UserError, match="fine made no object") as error:
        in_process.start_run(load(), Path("run"))
    assert "pipeline run --stages fine --from run KEY=VALUE --out FOLDER" in error.value.fix
    assert "coarse.steps" not in error.value.fix and "to go on after mending" not in capsys.readouterr().out
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
    for go in (in_process.resume_run, lambda folder: export_run(folder, "glb")):
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
    with pytest.raises(UserError) as error:
        in_process.resume_run(folder)
    assert f"start again with --from {source}: pipeline run --config {folder}/config.yaml" in error.value.fix
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
