"""The public names: `from pipeline import ...`, `from stages import ...`, and the loop that stages/README.md prints."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

import pipeline
import stages
from pipeline import Interrupted, Result, ResultMesh, UserError, export, generate, load_config, load_prior, resume
from pipeline.output.glb import write_glb
from pipeline.runs.checkpoint import CHECKPOINT, load_checkpoint, read_meta
from stages.cameras import orbit_views
from stages.mesh.mesh import Mesh
from tests import toy_pipeline
from tests.readme_cases import fenced

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "checkpoint_every": 2,
    "preview_every": 2,
    "reference.supersample": 1,
    "coarse.steps": 5,
    "coarse.resolution": 24,
    "coarse.views_per_step": 1,
    "coarse.samples": 64,
    "coarse.field": {"levels": 8, "log2_table": 12, "finest": 64, "hidden": 16, "blob_scale": 10, "density_scale": 5},
    "coarse.occupancy.resolution": 32,
    "coarse.preview_size": 16,
    "fine.steps": 3,
    "fine.resolution": np.int64(32),
    "fine.views_per_step": 1,
    "fine.tets": 16,
    "fine.detail": {"levels": 1, "log2_table": 12, "finest": 128},
    "fine.initialise.samples": 32,
    "fine.preview_size": 16,
    "export": {"texture_size": 64, "faces": 500, "turntable_frames": 0, "unwrap": "boxes"},
}
TOY = {"coarse.steps": 6, "fine.steps": 4, "checkpoint_every": 4, "preview_every": 5, "export.turntable_frames": 0}


class FlatPrior:
    """Wants every picture to be of one colour; knows its name and counts what it is asked."""

    name, resolution, data_range = "flat", 16, (-1.0, 1.0)
    prediction, reads_prompts, reads_t_anywhere = "epsilon", True, False
    alphas_cumprod = torch.linspace(0.99, 0.01, 100)

    def __init__(self):
        self.questions = 0

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1)

    def encode(self, images, generator):
        return torch.nn.functional.interpolate(images.permute(0, 3, 1, 2) * 2 - 1, (16, 16), mode="area")

    def decode(self, x):
        return x.permute(0, 2, 3, 1) / 2 + 0.5

    def predict_noise(self, z_t, t, embedding, context):
        self.questions += 1
        alpha_bar = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (z_t - alpha_bar.sqrt() * 0.3) / (1 - alpha_bar).sqrt()


@pytest.fixture(scope="module")
def block(tmp_path_factory) -> Path:
    """The file of a red and blue block."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * [0.5, 0.3, 0.3]
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], np.int32)
    colours = np.where(corners[:, :1] > 0, [[0.8, 0.1, 0.1]], [[0.1, 0.1, 0.8]]).astype(np.float32)
    path = tmp_path_factory.mktemp("block") / "block.glb"
    write_glb(Mesh(corners.astype(np.float32), faces, colours), path)
    return path


@pytest.fixture(scope="module")
def calls() -> list:
    return []


@pytest.fixture(scope="module")
def rebuilt(block, calls, tmp_path_factory) -> Result:
    """A tiny run of both stages under the exact prior of the block."""
    settings = TINY | {"reference.mesh": block}
    out = tmp_path_factory.mktemp("rebuilt") / "run"

    def on_step(stage, step, metrics):
        calls.append((stage, step, metrics))

    return generate(
        "a block", seed=3, out=out, config="reference", settings=settings, device="cpu", on_step=on_step, quiet=True
    )


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Toy stages, standing in tmp_path."""
    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("package", [pipeline, stages])
def test_every_public_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = package.generat


def test_public_names_are_free_until_they_are_used():
    code = "import sys, pipeline, stages; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["generate", "resume", "export", "load_prior", "load_config", "write_mesh"])
def test_entry_points_say_what_they_take_and_give(name):
    text = getattr(pipeline, name).__doc__
    first = text.splitlines()[0]
    assert first.endswith(".") and first.split()[0] in ("Make", "Continue", "Write", "Load", "Compose")
    for part in ("Args:", "Returns:", "Raises:", "Example:"):
        assert part in text, part


def test_a_result_holds_mesh_files_metrics_and_previews(rebuilt):
    assert set(rebuilt.files) == {"glb", "obj", "mtl", "texture"}
    assert all(path.is_file() and path.parent == rebuilt.folder for path in rebuilt.files.values())
    assert [(row["stage"], row["step"]) for row in rebuilt.metrics] == [
        *(("coarse", step) for step in range(1, 6)),
        *(("fine", step) for step in range(1, 4)),
    ]
    assert rebuilt.preview("coarse").shape == (32, 96, 3) and rebuilt.preview().dtype == np.uint8
    assert 0 < rebuilt.seconds < 3600
    assert rebuilt.config.seed == 3 and rebuilt.config.fine.resolution == 32
    with pytest.raises(UserError, match="no preview of clipmesh"):
        rebuilt.preview("clipmesh")


def test_a_stage_of_a_result_is_as_its_last_step_left_it(rebuilt):
    coarse = rebuilt.stage("coarse")
    state, _ = load_checkpoint(rebuilt.folder / "coarse" / CHECKPOINT)
    assert coarse.step_index == 5 and torch.equal(coarse.field.table, state["field.table"])
    assert coarse.render(orbit_views([0.0], 20.0), 16).colour.shape == (1, 16, 16, 3)
    assert len(rebuilt.stage("fine").surface().faces) > 0
    with pytest.raises(UserError, match="no checkpoint of clipmesh") as error:
        rebuilt.stage("clipmesh")
    assert "coarse, fine" in error.value.why


def test_on_step_hears_every_step_with_its_metrics(rebuilt, calls):
    assert [(stage, step) for stage, step, _ in calls] == [(row["stage"], row["step"]) for row in rebuilt.metrics]
    assert calls[0][2]["cover"] == pytest.approx(rebuilt.metrics[0]["cover"], rel=1e-5)


def test_a_mesh_is_saved_in_every_format(rebuilt, tmp_path):
    for suffix in ("glb", "obj", "ply", "stl"):
        assert (tmp_path / f"a.{suffix}") in rebuilt.mesh.save(tmp_path / f"a.{suffix}")
    assert (tmp_path / "a.glb").read_bytes() == rebuilt.files["glb"].read_bytes()
    with pytest.raises(UserError, match=r"\.fbx"):
        rebuilt.mesh.save(tmp_path / "a.fbx")


def test_trimesh_sees_the_same_surface(rebuilt):
    view, mesh = rebuilt.mesh.trimesh(), rebuilt.mesh.data
    assert len(view.faces) == len(mesh.faces)
    assert view.volume == pytest.approx(mesh.signed_volume(), rel=1e-4)
    assert np.array_equal(np.asarray(view.visual.material.baseColorTexture), mesh.texture)
    coloured = ResultMesh(toy_pipeline.octahedron()).trimesh()
    assert len(coloured.vertices) == 6 and coloured.visual.vertex_colors[0].tolist() == [188, 188, 188, 255]


def test_a_notebook_is_shown_a_picture(rebuilt):
    picture = rebuilt.mesh.picture(64)
    assert picture.shape == (64, 64, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert rebuilt.mesh._repr_png_().startswith(b"\x89PNG")
    html = rebuilt.mesh._repr_html_()
    assert "data:image/png;base64," in html and f"{len(rebuilt.mesh.faces):,} faces" in html


def test_a_mesh_made_again_from_its_folder_is_the_same(rebuilt, tmp_path):
    again = Result(rebuilt.folder)
    (path,) = again.mesh.save(tmp_path / "again.glb")
    assert path.read_bytes() == rebuilt.files["glb"].read_bytes()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(rebuilt, tmp_path):
    second = generate(config=rebuilt.config, out=tmp_path / "again", quiet=True)
    assert second.files["glb"].read_bytes() == rebuilt.files["glb"].read_bytes()


def test_export_writes_other_formats_and_names_them(rebuilt, tmp_path):
    result = export(rebuilt.folder, ["stl", "ply"], tmp_path / "files", quiet=True)
    assert set(result.files) == {"stl", "ply"} and result.files["stl"].parent == tmp_path / "files"
    assert result.folder == rebuilt.folder and np.array_equal(result.mesh.faces, rebuilt.mesh.faces)


def test_resume_of_a_finished_run_gives_its_result(rebuilt, capsys):
    assert resume(rebuilt.folder, quiet=True).files == rebuilt.files
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_prior_of_the_caller_guides_counts_and_is_asked_for_again(tmp_path):
    prior = FlatPrior()

    def stop(stage, step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    options = {"stages": "coarse", "settings": TINY, "config": "sphere", "quiet": True}
    with pytest.raises(Interrupted, match="pipeline resume"):
        generate("a mug", out=tmp_path / "run", prior=prior, on_step=stop, **options)
    assert prior.questions == 3
    assert "coarse: python:flat" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError) as missing:
        resume(tmp_path / "run", quiet=True)
    error = missing.value
    assert error.what == "prior.coarse = python:flat is missing" and "resume(FOLDER, prior=" in error.fix
    other = FlatPrior()
    other.name = "other"
    with pytest.raises(UserError, match="called 'flat'"):
        resume(tmp_path / "run", prior={"coarse": other}, quiet=True)
    steps = []
    result = resume(tmp_path / "run", prior=prior, on_step=lambda stage, step, metrics: steps.append(step), quiet=True)
    assert steps == [3, 4, 5]  # the checkpoint was of step 2
    whole = generate("a mug", out=tmp_path / "whole", prior={"coarse": FlatPrior()}, **options)
    assert result.files["glb"].read_bytes() == whole.files["glb"].read_bytes()
    assert read_meta(tmp_path / "whole" / "coarse" / "checkpoint.safetensors")["step"] == 5


@pytest.mark.slow
def test_a_prior_of_the_caller_keeps_its_text_encoder_and_its_network(tmp_path):
    """Used by two runs, the second with a rule that changes the network while it runs."""
    prior = load_prior("pocket")
    options = {"stages": "coarse", "quiet": True, "prior": prior, "device": "cpu"}
    settings = TINY | {"coarse.steps": 1, "coarse.start.steps": 60}  # of 900, two thirds of the time
    generate("a red mug", out=tmp_path / "first", settings=settings, **options)
    hooks = [len(module._forward_hooks) for module in prior.unet.modules()]
    weights = {name: p.clone() for name, p in prior.unet.state_dict().items()}
    vsd = settings | {"guidance.coarse.rule": "vsd", "coarse.steps": 1}
    generate("a blue mug", out=tmp_path / "second", settings=vsd, **options)
    assert [len(module._forward_hooks) for module in prior.unet.modules()] == hooks
    assert all(torch.equal(p, weights[name]) for name, p in prior.unet.state_dict().items())
    assert not any(p.requires_grad for p in prior.unet.parameters())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"prior": object()}, "the prior for coarse cannot be used"),
        ({"prior": {"carse": "pocket"}}, "no stage is called carse"),
        ({"settings": {"coarse.stpes": 3}}, "settings\\['coarse.stpes'\\]: unknown key"),
        ({"settings": {"coarse.steps": object()}}, "settings\\['coarse.steps'\\]"),
        ({"seed": -1}, "seed=: seed = -1"),
        ({"prior": "python:gone"}, "python:gone is missing"),
        ({"config": "no-such-recipe"}, "no such recipe"),
    ],
)
def test_mistakes_are_answered_before_any_work(arguments, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=what):
        generate("a red mug", quiet=True, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_prior_without_use_is_refused(rebuilt, tmp_path):
    with pytest.raises(UserError, match="listens to none"):
        resume(rebuilt.folder, prior=FlatPrior())
    folder = shutil.copytree(rebuilt.folder, tmp_path / "copy")
    (folder / "fine" / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="handed in for fine and has no use"):
        resume(folder, prior={"fine": FlatPrior()}, quiet=True)


def test_recipes_lie_over_each_other(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 9\ncoarse: {steps: 7}\n")
    sphere, both = load_config("sphere"), load_config(["sphere", tmp_path / "mine.yaml"], {"fine.steps": 3})
    assert (both.seed, both.coarse.steps, both.fine.steps) == (9, 7, 3)
    assert both.guidance == sphere.guidance and both.stages == ["fine"]
    assert load_config(["sphere", "default"]).guidance == sphere.guidance  # which sphere extends: it stays below
    assert load_config(both) == both and load_config(both, {"seed": 4}).coarse.steps == 7


def surroundings() -> dict:
    """What a caller's process has that a run could change."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    numba_settings = {name: value for name, value in vars(numba.config).items() if name.isupper()}
    return {
        "torch's stream": torch.get_rng_state().tolist(),
        "numpy's stream": repr(np.random.get_state()),
        "Python's stream": random.getstate(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "filling": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": (numba.get_num_threads(), torch.get_num_threads()),  # asking numba first sets OpenMP's
        "gradients": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
        "handlers": handlers,
        "numba": numba_settings,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
    }


@pytest.mark.slow
def test_nothing_of_the_calling_process_is_changed(rebuilt, tmp_path):
    """`rebuilt` has imported everything: what libraries set at their import is not a run's."""
    before_mode = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    for mode in (before_mode, "error"):
        torch.set_deterministic_debug_mode(mode)
        torch.manual_seed(17)
        torch.rand(3)
        before = surroundings()
        try:
            generate(config=rebuilt.config, out=tmp_path / f"run-{mode}", quiet=True)
            export(rebuilt.folder, "ply", tmp_path / f"files-{mode}", quiet=True)
            assert Result(rebuilt.folder).mesh is not None
            after = surroundings()
        finally:
            torch.set_deterministic_debug_mode(before_mode)
        assert {key for key in before if before[key] != after[key]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("of the caller"), KeyboardInterrupt()])
def test_nothing_is_changed_after_an_exception_either(toys, error):
    def fail(stage, step, metrics):
        assert torch.get_deterministic_debug_mode() == 1  # inside it is another world
        if step == 3:
            raise error

    before = surroundings()
    with pytest.raises((ValueError, Interrupted)):
        generate("a mug", out="run", settings=TOY, on_step=fail, quiet=True)
    after = surroundings()
    assert {key for key in before if before[key] != after[key]} == set()
    assert resume("run", quiet=True).metrics[-1]["step"] == 4


@pytest.mark.slow
def test_kernels_of_the_caller_stay_in_numbas_cache(rebuilt, tmp_path, monkeypatch):
    """Those of ours that are stale are forgotten as a kernel's module loads; a program's own are none of them."""
    (tmp_path / "mine.py").write_text("import numba\n\n@numba.njit(cache=True)\ndef double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    assert mine.double(3) == 6
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert before
    generate(config=rebuilt.config, out=tmp_path / "run", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")} == before


@pytest.mark.slow
def test_the_loop_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    text = (ROOT / "stages" / "README.md").read_text(encoding="utf-8")
    block = next(code for code in fenced(text, "python") if "coarse_steps" in code)
    assert len(block.splitlines()) < 40
    few, count = re.subn(
        r"^coarse_steps, fine_steps = .*$", "coarse_steps, fine_steps = 2, 1", block, flags=re.MULTILINE
    )
    assert count == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(few, "stages/README.md", "exec"), {})
    assert (tmp_path / "mug.glb").stat().st_size > 10_000
