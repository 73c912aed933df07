"""Runs with toy stages: what lies in the folder, stopping and resuming, refusals that lose nothing."""

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

from pipeline.config.model import load_config, read_config
from pipeline.config.written import read_part
from pipeline.runs.checkpoint import load_checkpoint, read_meta
from pipeline.runs.export import export_run
from stages.errors import UserError
from tests.fork_server import ROOT
from tests.toy_runs import SMALL, contents, lines, load, without_times


def reached(path: Path, step: int) -> bool:
    """Whether the checkpoint at `path` has come to `step`; it is whole whenever it exists."""
    return path.exists() and read_meta(path)["step"] >= step


def test_run_folder_holds_everything_a_run_leaves(uninterrupted):
    names = {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob("*") if path.is_file()}
    expected = {"config.yaml", "run.json", "metrics.jsonl", "mesh.glb"}
    expected |= {f"coarse/previews/{step:06d}.png" for step in (5, 10, 12)} | {"coarse/checkpoint.safetensors"}
    expected |= {f"fine/previews/{step:06d}.png" for step in (5, 9)} | {"fine/checkpoint.safetensors"}
    assert expected <= names
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
    text = (folder / "config.yaml").read_text()
    before = (folder / "mesh.glb").read_bytes()

    def resume(**changes):
        config = yaml.safe_load(text)
        for group, values in changes.items():
            config[group] |= values
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        in_process.resume_run(folder)
        return json.loads((folder / "run.json").read_text())

    steps = yaml.safe_load(text)["fine"]["steps"]
    assert resume(export={"formats": ["glb", "stl"]})["outputs"] == ["mesh.glb", "mesh.stl"]
    assert (folder / "mesh.stl").is_file() and (folder / "mesh.glb").read_bytes() == before
    assert resume(fine={"steps": steps + 2})["stages"]["fine"]["step"] == steps + 2
    with pytest.raises(UserError, match=r"coarse\.field\.levels.*was made with|coarse\.field\.levels.*differs"):
        resume(coarse={"field": yaml.safe_load(text)["coarse"]["field"] | {"levels": 3}})


def test_export_elsewhere_reads_only_and_never_writes_over_what_is_there(in_process, uninterrupted, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(uninterrupted, folder)
    (folder / ".lock").unlink(missing_ok=True)
    before = contents(folder)
    export_run(folder, "stl,ply", out)
    assert contents(folder) == before and not (folder / ".lock").exists()
    with pytest.raises(UserError, match="already holds mesh.ply"):
        export_run(folder, "obj,ply", out)
    assert not (out / "mesh.obj").exists()
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "mesh.png").write_bytes(b"someone's picture")
    with pytest.raises(UserError, match="already holds mesh.png"):  # which an OBJ's texture would have replaced
        export_run(folder, "obj", beside)
    export_run(folder, "glb", folder)  # its own are its own


def test_fine_from_a_finished_coarse_run_equals_the_chain(in_process, uninterrupted, tmp_path):
    in_process.start_run(load(seed=3, stages="coarse"), Path("coarse"))
    folder = in_process.start_run(load(stages="fine", from_run="coarse"), Path("fine"))
    shutil.rmtree(tmp_path / "coarse")  # the new run stands on its own
    assert (folder / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    export_run(folder, "stl,ply")
    assert (folder / "mesh.stl").stat().st_size > 0


def test_export_writes_the_same_mesh_again(in_process, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    export_run(Path("run"), "glb,ply", Path("files"))
    assert (tmp_path / "files" / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    assert "files/mesh.ply" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot write fbx"):
        export_run(Path("run"), "glb,fbx")
    (tmp_path / "run" / "fine" / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="fine is not finished"):
        export_run(Path("run"), "glb")


def test_resume_after_more_steps_were_asked_for_goes_on_to_them(in_process, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  steps: 9", "  steps: 11"))
    (folder / "mesh.glb").unlink()
    in_process.resume_run(folder)
    assert [line["step"] for line in lines(folder) if line["stage"] == "fine"] == list(range(1, 12))


def test_default_folders_are_named_after_prompt_and_seed_and_never_shared(in_process):
    first = in_process.start_run(load(prompt="A Red  Mug, très chic!", seed=7))
    second = in_process.start_run(load(prompt="A Red  Mug, très chic!", seed=7))
    assert (str(first), str(second)) == ("runs/a-red-mug-tres-chic-7", "runs/a-red-mug-tres-chic-7-2")


@pytest.mark.slow
def test_resolved_config_of_a_run_is_the_config(in_process, tmp_path):
    config = load("prior.fine=reference", "reference.mesh=some/mesh.glb", seed=5)
    folder = in_process.start_run(config, tmp_path / "run")
    assert read_config(folder) == read_part(config) and read_config(folder).reference == config.reference
    assert config.reference.mesh == str(tmp_path / "some/mesh.glb")
