"""Which changes of config.yaml a checkpoint goes on with, and which it refuses by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config.model import load_config
from pipeline.config.yaml_dump import dump
from pipeline.runs.checkpoint import CHECKPOINT, load_checkpoint, read_meta, save_checkpoint
from pipeline.runs.inputs import check_inputs
from pipeline.runs.lineage import (
    EDITED,
    GIVEN,
    check_run,
    check_upstream,
    checkpoint_of,
    lineage,
    made_with,
    upstream_of,
)
from stages.errors import UserError
from stages.kinds import STAGES

COARSE = checkpoint_of("coarse")
STEPS = ["coarse.steps=12", "fine.steps=9"]


def config_of(*overrides, **flags):
    return load_config(None, [*STEPS, *overrides], flags)


def save(folder: Path, config, stage: str, step: int, value: float = 0.0, **changes) -> None:
    """A checkpoint as the loop writes it, of a state of one number."""
    meta = {"stage": stage, "step": step, "steps": getattr(config, stage).steps, "seconds": 1.0, "phases": {}}
    (folder / stage).mkdir(exist_ok=True)
    meta |= lineage(folder, config, stage) | changes
    save_checkpoint(folder / stage / CHECKPOINT, {"x": torch.full((1,), value)}, meta)


@pytest.fixture(scope="module")
def stage_run(tmp_path_factory) -> Path:
    """A run with a finished coarse stage and a fine stage at step 4, to be looked at only."""
    folder, config = tmp_path_factory.mktemp("made"), config_of()
    (folder / "config.yaml").write_text(dump(config))
    save(folder, config, "coarse", 12)
    save(folder, config, "fine", 4)
    return folder


@pytest.fixture
def run(stage_run, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(stage_run, tmp_path / "run")


def refused(folder: Path, *overrides, **flags) -> UserError:
    with pytest.raises(UserError) as error:
        check_run(folder, config_of(*overrides, **flags))
    return error.value


@pytest.mark.parametrize(
    ("change", "back"),
    [
        ("fine.tets=96", "fine.tets=64"),
        ("fine.deformation=0.1", "fine.deformation=0.24"),
        ("fine.geometry=locked", 'fine.geometry="dmtet"'),
        ("fine.detail.levels=3", "fine.detail.levels=2"),
        ("fine.initialise.level=3.5", "fine.initialise.level=null"),
        ("guidance.fine.rule=vsd", 'guidance.fine.rule="sds"'),
        ("coarse.field.levels=12", "coarse.field.levels=8"),
        ("coarse.field.blob_scale=1", "coarse.field.blob_scale=10.0"),
        ("coarse.particles=2", "coarse.particles=1"),
        ("coarse.background.hidden=8", "coarse.background.hidden=16"),
        ("coarse.occupancy.resolution=32", "coarse.occupancy.resolution=64"),
    ],
)
def test_a_setting_that_says_what_a_state_means_is_refused_by_name_with_the_way_back(stage_run, change, back):
    error = refused(stage_run, change)
    name, _, value = change.partition("=")
    assert error.what.startswith(
        f"{name} differs from what {stage_run / name.split('.')[name.startswith('guid')] / CHECKPOINT}"
    )
    assert f"{name} is" in error.why and value in error.why
    assert f"set {back} in {stage_run / 'config.yaml'}, or start again: pipeline run --config" in error.fix


def test_several_changes_are_all_named(stage_run):
    error = refused(stage_run, "fine.tets=32", "fine.detail.finest=512")
    assert error.what.startswith("fine.tets and 1 more differ") and "fine.tets=64, fine.detail.finest=1024" in error.fix


@pytest.mark.parametrize(
    "change",
    [
        *(
            "coarse.views_per_step=2",
            "coarse.accumulate=2",
            "fine.resolution=256",
            "coarse.samples=40",
            "fine.lr_sdf=0.1",
        ),
        *(
            "prior.diffusion.offload=blocks",
            "prior.diffusion.vae_slicing=true",
            "preview_every=7",
            "checkpoint_every=7",
        ),
        *("fine.steps=20", "fine.keep=0.5", "guidance.fine.rule=csd", "guidance.fine.scale=9", "export.faces=500"),
    ],
)
def test_what_acts_from_the_next_step_on_may_change(stage_run, change):
    check_run(stage_run, config_of(change, "guidance.fine.rescale=0"))


def test_learning_of_a_rule_with_a_state_may_change_and_its_shape_may_not(run):
    vsd = ["guidance.fine.rule=vsd", "guidance.fine.rescale=0"]
    save(run, config_of(*vsd), "fine", 4)
    check_run(run, config_of(*vsd, "guidance.fine.rule.lr=0.01"))
    assert "guidance.fine.rule.rank differs" in refused(run, *vsd, "guidance.fine.rule.rank=8").what
    assert "prior.fine differs" in refused(run, *vsd, "prior.fine=some/model").what


@pytest.mark.parametrize("key", ["settings", "upstream"])
def test_a_checkpoint_that_does_not_say_what_it_was_made_with_is_refused(run, key):
    path = run / "fine" / CHECKPOINT
    state, meta = load_checkpoint(path)
    save_checkpoint(path, state, {k: v for k, v in meta.items() if k != key})
    error = refused(run)
    assert error.what == f"{path} does not say what it was made with" and "another version" in error.why


def test_a_setting_that_one_side_does_not_know_is_named(run):
    settings = made_with(config_of(), "fine")
    save(run, config_of(), "fine", 4, settings=settings | {"fine.gone": 1})
    assert "the checkpoint has the setting fine.gone, of which this version" in refused(run).why
    save(run, config_of(), "fine", 4, settings={k: v for k, v in settings.items() if k != "fine.tets"})
    assert "this version has the setting fine.tets, of which the checkpoint" in refused(run).why


@pytest.mark.parametrize("rules", [("vsd", "sds"), ("sds", "vsd"), ("gone", "sds")])
def test_a_rule_with_a_state_or_unknown_does_not_give_way_to_another(run, rules):
    was, now = rules
    rest = ["guidance.fine.rescale=0"]
    settings = made_with(config_of(f"guidance.fine.rule={'sds' if was == 'gone' else was}", *rest), "fine")
    save(run, config_of(), "fine", 4, settings=settings | {"guidance.fine.rule": was})
    error = refused(run, f"guidance.fine.rule={now}", *rest)
    assert error.what.startswith("guidance.fine.rule differs") and f'is "{now}", was "{was}"' in error.why


def test_more_coarse_steps_are_refused_once_fine_has_begun(run):
    error = refused(run, "coarse.steps=20")
    assert error.what.startswith("coarse.steps = 20") and "object of 12 steps" in error.what
    assert "set coarse.steps=12 again" in error.fix and f"remove {run / 'fine' / CHECKPOINT}" in error.fix
    (run / "fine" / CHECKPOINT).unlink()  # what the message says
    check_run(run, config_of("coarse.steps=20"))


def test_a_coarse_stage_made_again_must_be_the_same(run):
    config, meta = config_of(), read_meta(run / "fine" / CHECKPOINT)
    (run / COARSE).unlink()
    check_run(run, config)  # it is made again first
    save(run, config, "coarse", 5, 1.0)
    check_run(run, config)
    save(run, config, "coarse", 12)
    check_run(run, config)
    check_upstream(run, config, "fine", meta)
    save(run, config, "coarse", 12, 1.0)
    assert "was started from another coarse/checkpoint" in refused(run).what
    with pytest.raises(UserError, match="has been made again") as error:
        check_upstream(run, config, "fine", meta)
    assert f"remove {run / 'fine' / CHECKPOINT}" in error.value.fix


def test_another_start_than_the_checkpoints_is_refused(stage_run):
    error = refused(stage_run, "fine.detail.levels=2", stages="fine")  # the sphere's recipe has other finer levels
    assert "was started from coarse/checkpoint.safetensors, not from nothing" in error.what and "stages" in error.why


def test_upstreams_of_every_way_to_begin(tmp_path):
    def file(stage, **flags):
        return upstream_of(load_config("default", [], flags), stage)

    (tmp_path / "config.yaml").write_text(dump(config_of()))
    source, mesh = str(tmp_path), str(tmp_path / "a.glb")
    assert (file("coarse"), file("fine"), file("fine", stages="fine")) == (None, COARSE, None)
    assert file("fine", stages="fine", from_run=source) == COARSE
    assert file("coarse", from_run=source) == EDITED and file("fine", from_run=source) == COARSE
    assert file("fine", stages="fine", init_mesh=mesh) == GIVEN == file("clipmesh", stages="clipmesh", init_mesh=mesh)


def test_every_defining_setting_exists():
    for stage in STAGES:
        values = made_with(config_of(), stage)
        assert values == json.loads(json.dumps(values)) and len(values) >= len(STAGES[stage].defining)


@pytest.mark.slow
def test_a_new_run_from_a_run_whose_config_was_edited_is_held_to_its_checkpoint(run):
    text = (run / "config.yaml").read_text()
    config = config_of(from_run=str(run), stages="fine")
    assert list(check_inputs(config).copies) == [COARSE]
    (run / "config.yaml").write_text(text.replace("    levels: 8", "    levels: 12", 1))
    for stages in (["fine"], ["coarse", "fine"]):
        edited = load_config(None, [], {"from_run": str(run), "stages": stages})
        with pytest.raises(UserError, match=r"coarse\.field\.levels differs from what") as error:
            check_inputs(edited)
        assert "coarse.field.levels=8" in error.value.fix
    (run / "config.yaml").write_text(text.replace("  steps: 12", "  steps: 20"))
    with pytest.raises(UserError, match="has not taken all its coarse steps") as error:
        check_inputs(load_config(None, [], {"from_run": str(run), "stages": "fine"}))
    assert f"pipeline resume {run}" in error.value.fix
