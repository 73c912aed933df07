"""Runs that start from a user's mesh or a sphere: real stages, tiny, under the reference prior."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.mesh.mesh_shapes import box, join, make, moved, sphere, tetrahedron

if os.name != "posix":
    pytest.skip("kills and forks", allow_module_level=True)

from pipeline.config.model import load_config, read_config
from pipeline.output.asset import finished_mesh, in_own_place
from pipeline.output.glb import write_glb
from pipeline.output.stl import write_stl
from pipeline.output.write import write_formats
from pipeline.runs.checkpoint import read_meta
from pipeline.runs.inputs import check_inputs, load_inputs
from stages.errors import UserError
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.files.read import read_mesh
from stages.mesh.mesh import Mesh
from stages.mesh.sample import painted_samples
from stages.mesh.texture.uv import unwrap
from tests.pipeline.output.test_export_prints import two_materials

TINY = """
prior: {fine: reference}
reference: {supersample: 1}
guidance: {fine: {scale: 1, t_min: 0.28, t_max: 0.28}}
stages: [fine]
checkpoint_every: 2
preview_every: 6
place: {radius: 0.6}
fine:
  steps: 6
  resolution: 48
  tets: 16
  lr_texture: 0.05
  field: {levels: 6, log2_table: 12, finest: 64, hidden: 16}
  detail: {levels: 1, log2_table: 12, finest: 128}
  fit: {steps: 20, points: 512}
  preview_size: 16
export: {texture_size: 64, faces: 1000, turntable_frames: 0, unwrap: boxes, formats: [glb]}
"""
PLACE, SIZE = (40, 50, 60), 25.0  # where the user's mesh lies, far from the scene


def block() -> Mesh:
    """A block of radius 0.6 about the origin."""
    mesh = box((0.8, 0.6, 0.66332))
    return replace(mesh, vertices=mesh.vertices * np.float32(0.6 / np.linalg.norm(mesh.vertices, axis=1).max()))


def in_charts(mesh: Mesh) -> Mesh:
    """With a layout of its own, vertices repeated along its seams."""
    atlas = unwrap(mesh, 64, method="boxes")
    pairs, corner = np.unique(
        np.stack([mesh.faces.reshape(-1), atlas.uv_faces.reshape(-1)], -1), axis=0, return_inverse=True
    )
    faces = corner.reshape(-1, 3).astype(np.int32)
    return replace(make(mesh.vertices[pairs[:, 0]], faces), uv=atlas.uv[pairs[:, 1]], uv_faces=faces)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """tiny.yaml; wanted.glb, a block half red, half blue; grey.glb, the block elsewhere, larger, plain, charted."""
    folder = tmp_path_factory.mktemp("files")
    expected = block()
    expected.colours = np.where(expected.vertices[:, :1] > 0, [[0.8, 0.1, 0.1]], [[0.1, 0.1, 0.8]]).astype(np.float32)
    write_glb(expected, folder / "wanted.glb")
    grey = in_charts(block())
    grey = replace(grey, vertices=(grey.vertices * SIZE + np.float32(PLACE)).astype(np.float32))
    grey.texture = np.full((4, 4, 3), 128, np.uint8)
    write_glb(grey, folder / "grey.glb")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def arguments(files: Path, *more: str) -> list[str]:
    recipe = ["--config", str(files / "tiny.yaml"), f"reference.mesh={files / 'wanted.glb'}"]
    return ["run", "--prompt", "a block", *recipe, "--out", "run", *more]


def locked(files: Path, mesh: Path) -> list[str]:
    return arguments(files, "--init-mesh", str(mesh), "fine.geometry=locked")


@pytest.fixture(scope="module")
def painted(pipeline, files, tmp_path_factory) -> Path:
    """A finished locked run."""
    folder = tmp_path_factory.mktemp("painted")
    code, _, err = pipeline(*locked(files, files / "grey.glb"), cwd=folder).finish()
    assert code == 0, err
    return folder / "run"


def metrics(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


@pytest.mark.slow
def test_a_locked_mesh_keeps_its_triangles_to_the_bit_and_its_layout(painted, files):
    source, back = read_mesh(files / "grey.glb"), read_mesh(painted / "mesh.glb")
    np.testing.assert_array_equal(back.vertices[back.faces], source.vertices[source.faces])
    np.testing.assert_allclose(back.uv[back.uv_faces], source.uv[source.uv_faces], atol=1e-6)
    record = json.loads((painted / "run.json").read_text())
    assert record["export"]["unwrap"] == "own" and record["status"] == "finished"


@pytest.mark.slow
def test_a_locked_mesh_takes_on_the_colours_that_the_prior_wants(painted):
    """Red and blue halves: in six steps from grey (128) the green goes, before the two part."""
    back = read_mesh(painted / "mesh.glb")
    colour = painted_samples(back, torch.Generator().manual_seed(0))(500)[1].mean(0)
    grey = float(srgb_to_linear(torch.tensor(128 / 255)))
    assert colour[0] > grey + 0.03 and colour[2] > grey + 0.03 and colour[1] < grey - 0.03


@pytest.mark.slow
def test_a_locked_run_killed_and_resumed_without_the_users_file_has_the_same_bytes(pipeline, painted, files, tmp_path):
    mesh = shutil.copy(files / "grey.glb", tmp_path / "mine.glb")
    process = pipeline(*locked(files, mesh), cwd=tmp_path)
    checkpoint = tmp_path / "run" / "fine" / "checkpoint.safetensors"
    process.wait_until(lambda: checkpoint.exists() and read_meta(checkpoint)["step"] >= 2)
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "mesh.glb").exists()
    mesh.unlink()
    code, _, err = pipeline("resume", "run", cwd=tmp_path).finish()
    assert code == 0, err
    assert (tmp_path / "run" / "mesh.glb").read_bytes() == (painted / "mesh.glb").read_bytes()
    assert metrics(tmp_path / "run") == metrics(painted)
    code, _, err = pipeline("export", "run", "--format", "obj,stl", cwd=tmp_path).finish()
    assert code == 0, err
    source, back = read_mesh(files / "grey.glb"), read_mesh(tmp_path / "run" / "mesh.stl")
    np.testing.assert_array_equal(back.vertices[back.faces], source.vertices[source.faces])


@pytest.mark.slow
def test_the_configuration_names_the_mesh_and_feeds_back(painted, files):
    config = read_config(painted)
    assert config.init_mesh == str(files / "grey.glb") and config.fine.geometry == "locked"
    assert load_config(str(painted), [], {}) == config


@pytest.mark.slow
def test_a_mesh_that_may_change_becomes_a_solid_and_lies_where_the_users_lay(pipeline, files, tmp_path):
    code, _, err = pipeline(
        *arguments(files, "--init-mesh", str(files / "grey.glb"), "fine.steps=2"), cwd=tmp_path
    ).finish()
    assert code == 0, err
    source, back = read_mesh(files / "grey.glb"), read_mesh(tmp_path / "run" / "mesh.glb")
    for side in (np.min, np.max):
        np.testing.assert_allclose(side(back.vertices, 0), side(source.vertices, 0), atol=0.12 * SIZE)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["export"]["report"]["solid"]
    first = metrics(tmp_path / "run")[0]
    assert first["start_missed"] == 0 and first["start_faces"] == 12 and first["start_colour_error"] < 0.02


def test_fine_alone_starts_from_a_sphere(pipeline, files, tmp_path):
    code, out, err = pipeline(*arguments(files, "fine.steps=2", "fine.sphere=0.5"), cwd=tmp_path).finish()
    assert code == 0, err
    assert "fine starts from a sphere of radius 0.5" in out
    assert metrics(tmp_path / "run")[0]["volume"] == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.05)
    assert (tmp_path / "run" / "mesh.glb").exists() and not (tmp_path / "run" / "coarse").exists()


def checked(mesh: Path, *overrides: str, **flags):
    return check_inputs(load_config(None, list(overrides), {"stages": "fine", "init_mesh": str(mesh), **flags}))


def test_the_recipe_is_that_of_what_the_run_starts_from(tmp_path):
    def fine(*overrides, **flags):
        return load_config(None, list(overrides), {"stages": "fine", **flags})

    default, mesh = load_config(None, [], {}), str(tmp_path / "a.glb")
    assert fine().fine.steps == load_config("sphere", [], {}).fine.steps
    assert fine(init_mesh=mesh).fine == default.fine
    assert fine(init_mesh=mesh).guidance == default.guidance
    assert fine("fine.geometry=locked", init_mesh=mesh).guidance == load_config("texture", [], {}).guidance
    assert fine("fine.steps=3", "fine.geometry=locked", init_mesh=mesh).fine.steps == 3
    assert (
        load_config("default", ["fine.geometry=locked"], {"stages": "fine", "init_mesh": mesh}).guidance
        == default.guidance
    )


def test_the_start_is_told(files):
    note = checked(files / "grey.glb").note
    assert note == "grey.glb, 12 faces, is refined, starting with its texture"
    assert "is painted and keeps its shape" in checked(files / "grey.glb", "fine.geometry=locked").note


@pytest.mark.parametrize("geometry", ["dmtet", "locked"])
def test_specks_far_away_are_left_out_of_what_is_refined(tmp_path, geometry):
    ball = sphere(1.0)
    write_glb(join(ball, moved(tetrahedron(), (100, 0, 0), 0.001)), tmp_path / "ball.glb")
    flags = {"stages": "fine", "init_mesh": str(tmp_path / "ball.glb")}
    config = load_config(None, [f"fine.geometry={geometry}"], flags)
    inputs = check_inputs(config)
    inputs.write(tmp_path)
    mesh = load_inputs(tmp_path, config, torch.device("cpu")).mesh
    assert len(mesh.faces) == len(ball.faces) + (4 if geometry == "locked" else 0)
    size = np.ptp(mesh.vertices[mesh.faces[: len(ball.faces)]].reshape(-1, 3), axis=0).max()
    assert size == pytest.approx(1.7 if geometry == "dmtet" else 0.034, rel=0.02)
    assert ("specks far away (1)" in inputs.note) == (geometry == "dmtet")


@pytest.mark.slow
def test_a_mesh_and_a_run_to_start_from_are_one_too_many(files, painted):
    with pytest.raises(UserError, match="both given"):
        check_inputs(
            load_config(None, [], {"stages": "fine", "init_mesh": str(files / "grey.glb"), "from_run": str(painted)})
        )


@pytest.mark.slow
def test_a_run_that_began_with_a_mesh_has_no_coarse_stage_to_give(painted):
    with pytest.raises(UserError, match="no finished coarse stage") as error:
        check_inputs(load_config(None, [], {"stages": "fine", "from_run": str(painted)}))
    assert error.value.fix == "another run"


@pytest.mark.parametrize("content", [b"", b"glTF\x02\x00", b"solid nothing"])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "mine.glb").write_bytes(content)
    with pytest.raises(UserError, match="Cannot read the mesh"):
        checked(tmp_path / "mine.glb")


def test_stl_files_have_z_up_but_for_our_own(tmp_path):
    import trimesh

    tall = join(box((0.2, 0.2, 1.0)), moved(box(), (0, 0, 0.1), 0.2))
    trimesh.Trimesh(tall.vertices, tall.faces).export(tmp_path / "cad.stl")
    write_stl(tall, tmp_path / "ours.stl")
    write_glb(tall, tmp_path / "mesh.glb")
    assert checked(tmp_path / "cad.stl").up == "z"
    assert checked(tmp_path / "ours.stl").up == "y"
    assert checked(tmp_path / "mesh.glb").up == "y"


@pytest.mark.slow
def test_a_start_that_was_damaged_later_is_named_with_a_way_out(painted, tmp_path):
    from pipeline.runs.inputs import load_inputs

    run = shutil.copytree(painted, tmp_path / "run")
    path = run / "start" / "mesh.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged") as error:
        load_inputs(run, read_config(run), "cpu")
    assert "pipeline run --config" in error.value.fix


def test_a_locked_mesh_keeps_its_materials_from_file_to_file(tmp_path):
    mesh = two_materials()
    write_formats(mesh, tmp_path, ["glb"], stem="given")
    overrides = ["fine.geometry=locked", "export.texture_size=64", "export.unwrap=boxes", "export.occlusion=true"]
    config = load_config(None, overrides, {"stages": "fine", "init_mesh": str(tmp_path / "given.glb")})
    inputs = check_inputs(config)
    inputs.write(tmp_path)
    asset = load_inputs(tmp_path, config, torch.device("cpu"))
    asset.albedo, asset.locked = (lambda points: torch.full_like(points, 0.5)), True
    done = in_own_place(finished_mesh(asset, config.export, config.fine.initialise, {}), asset)
    assert done.occlusion is not None
    for path in write_formats(done, tmp_path, ["glb", "obj"])[:2]:
        back = read_mesh(path)
        assert [(m.name.replace("_", " "), m.metallic, m.roughness) for m in back.materials] == [
            ("shiny body", 0.8, 0.2),
            ("rubber", 0.0, 0.7),
        ]
        np.testing.assert_array_equal(back.face_materials, mesh.face_materials)
        np.testing.assert_array_equal(back.vertices[back.faces], mesh.vertices[mesh.faces])
