"""Runs of every recipe on a pretended CUDA device, with tiny folders; and what that device refuses and counts."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.api import generate
from pipeline.config.model import load_config
from pipeline.config.recipes import recipes
from pipeline.output.glb import write_glb
from pipeline.runs.machine import choose_device
from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance.diffusion import prior as diffusion_prior
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.guide import check_predictions
from stages.guidance.prior import resized
from stages.guidance.residuals import RULES
from stages.prompts import PromptSettings, ViewPrompts
from tests import tiny_families, tiny_folders
from tests.mesh.mesh_shapes import sphere
from tests.pretend_cuda import pretended
from tests.stages.drafts.gan_cases import tiny_networks as tiny_gan
from tests.stages.drafts.points_cases import load_ball as load_cloud_ball
from tests.stages.drafts.points_cases import tiny_networks as tiny_points
from tests.stages.drafts.triplane_cases import load_ball, tiny_networks
from tests.tiny_clip import pocket_like

pytest.importorskip("warp", reason="warp-lang is not installed (extra: cuda)")

TINY = [
    *("coarse.steps=2", "coarse.resolution=16", "coarse.views_per_step=2", "coarse.samples=16"),
    *(
        "coarse.field.levels=2",
        "coarse.field.log2_table=10",
        "coarse.field.finest=32",
        "coarse.occupancy.resolution=16",
    ),
    *("coarse.start.steps=2", "coarse.start.points=64", "coarse.preview_size=16"),
    *("fine.steps=2", "fine.resolution=32", "fine.tets=12", "fine.preview_size=16", "fine.initialise.samples=24"),
    *("fine.field.levels=2", "fine.field.log2_table=10", "fine.detail.log2_table=10", "fine.fit.steps=2"),
    *("clipmesh.steps=2", "clipmesh.resolution=64", "clipmesh.texture_size=32", "clipmesh.preview_size=16"),
    *("points.steps=4", "points.upsampling=1", "points.resolution=16", "points.grid=16", "points.picture_steps=2"),
    *("triplane.steps=3", "triplane.upsampling=1", "triplane.resolution=16"),
    *("gan.steps=2", "gan.samples=2", "gan.resolution=16"),
    *("export.turntable_frames=0", "export.texture_size=64", "export.unwrap=boxes", "export.faces=500"),
]
OURS = {"coarse": tiny_folders.pocket_pixel, "fine": tiny_folders.pocket_latent}
_SD = {"coarse": tiny_folders.stable_diffusion, "fine": tiny_folders.stable_diffusion}
REAL = {
    "stable-diffusion": _SD,
    "prolificdreamer": _SD,
    "deepfloyd-if": {
        "coarse": lambda folder: tiny_folders.deepfloyd(folder, 77),
        "fine": tiny_folders.stable_diffusion,
    },
    "sdxl": {"coarse": tiny_folders.stable_diffusion, "fine": tiny_families.sdxl},
    "flow": {"coarse": tiny_families.sd3, "fine": tiny_families.sd3},
}
# beyond the prompt alone, by recipe
MORE = {
    "reference": ["reference.mesh={mesh}", "coarse.field.blob_scale=10", "coarse.field.density_scale=2"],
    "texture": ["init_mesh={mesh}"],
    "edit": ["from_run={edited}"],
    "flow": ["prior.diffusion.resolution=64"],
    "clip-mesh": ["prior.clipmesh=clip:{clip}", "clipmesh.control=1"],
    "dreamfields": ["prior.coarse=clip:{clip}"],
    "points": ["points.clip={clip}", "points.weights={networks}", "prior.points={pixel}"],
    "triplane": ["prior.triplane=clip:{clip}", "triplane.weights={networks}", "export.texture_size=256"],
    "gan": ["prior.gan=clip:{clip}", "gan.weights={networks}"],
}
CLIPPED = ("clip-mesh", "dreamfields", "points", "triplane", "gan")  # recipes with a CLIP
QUICK = {"stable-diffusion"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[Callable], Path]:
    """A tiny model's folder by what makes it, made when it is first asked for."""
    folders: dict[Callable, Path] = {}

    def make(build: Callable) -> Path:
        if build not in folders:
            folders[build] = build(tmp_path_factory.mktemp("tiny") / "model")
        return folders[build]

    return make


@pytest.fixture(scope="module")
def mesh(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mesh") / "ball.glb"
    write_glb(sphere(0.6, 12, 8), path)
    return path


def on_cuda(recipe: str, words: list[str], out: Path, **more) -> list[dict]:
    """Run a recipe on the pretended device; returns its metrics, a row a step."""
    config = load_config(recipe, [*TINY, *words], {"prompt": "a red mug", "device": "cuda"})
    generate(config=config, out=out, quiet=True, **more)
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished" and set(run["sessions"][-1]["kernels"].values()) == {"warp"}
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in recipes()])
def test_recipe_runs_on_cuda_from_prompt_to_mesh(name, folder, mesh, tmp_path, monkeypatch):
    loads, load = [], diffusion_prior.load_prior

    def spy(*args, **kwargs):
        loads.append(args[0])
        return load(*args, **kwargs)

    monkeypatch.setattr(diffusion_prior, "load_prior", spy)
    base = [f"prior.{stage}={folder(build)}" for stage, build in REAL.get(name, OURS).items()]
    places = {"mesh": mesh, "edited": tmp_path / "edited"}
    places |= {"clip": folder(pocket_like)} if name in CLIPPED else {}
    if name == "points":
        places |= {"networks": folder(tiny_points), "pixel": folder(tiny_folders.pocket_pixel)}
        monkeypatch.setattr("stages.points.stage.load_model", load_cloud_ball)
    if name == "gan":
        places["networks"] = folder(tiny_gan)
    if name == "triplane":  # random networks make no object
        places["networks"] = folder(tiny_networks)
        monkeypatch.setattr("stages.triplane.stage.load_model", load_ball)
    words = [*base, *(word.format(**places) for word in MORE.get(name, []))]
    if name == "reference":
        words = words[len(base) :]
    with pretended() as counts:
        if name == "edit":
            on_cuda("default", [*base, "stages=[coarse]"], places["edited"])
        rows = on_cuda(name, words, tmp_path / "out")
    assert (tmp_path / "out" / "mesh.glb").stat().st_size > 1000
    assert {row["stage"] for row in rows} == set(load_config(name, words, {}).stages)
    assert counts.launches > 1000
    if name in ("stable-diffusion", "flow"):  # both stages listen to one folder, loaded in one way
        assert len(loads) == 1


def test_pretended_device_refuses_what_cuda_refuses():
    with pretended():
        assert torch.cuda.is_available()
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == torch.device("cuda:0") and there.is_cuda and not there.is_meta
        for call in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here.index_select(0, torch.tensor([0]).to("cuda")),
            lambda: there.index_select(0, torch.tensor([0])),
            lambda: here[torch.tensor([0]).to("cuda")],
            lambda: here.add_(there),
        ):
            with pytest.raises(RuntimeError, match="tensors on two devices"):
                call()
        with pytest.raises(TypeError, match="use Tensor.cpu"):
            there.numpy()
        with pytest.raises(RuntimeError, match="only CPU tensors can be pinned"):
            there.pin_memory()
        assert (there + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a number on the CPU is let pass, as CUDA does
        assert there[torch.tensor([0, 2])].shape == (2,)  # and so are indices there
        there.copy_(here)
        weight = torch.nn.Linear(3, 1).to("cuda")
        weight(there).sum().backward()
        assert weight.weight.grad.device == there.device and weight.weight.grad.cpu().tolist() == [[1, 1, 1]]
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="cuda")


def test_pretended_device_counts_launches_waits_and_copies_by_line():
    with pretended() as counts:
        there = torch.ones(3).to("cuda")
        assert (counts.copies.total(), counts.waits.total(), counts.launches) == (1, 0, 1)
        two = there * 2 + 1
        assert counts.launches == 3 and counts.waits.total() == 0
        assert float(two[0]) == 3 and two.cpu().tolist() == [3, 3, 3]
        assert counts.waits.total() == 2
        counts.reset()
        there[torch.tensor([0, 2])]
        assert counts.copies == {"elsewhere": 1}
        there[there > 0]
        assert counts.waits == {"elsewhere": 1}  # how many there are shapes the result
        counts.reset()
        orbit_views([0.0, 90.0], 20.0).to("cuda")
        assert {line.partition(":")[0] for line in counts.copies} == {"stages/cameras.py"}


@pytest.mark.slow
def test_a_step_waits_for_the_device_and_copies_to_it_a_few_times_only(folder, tmp_path):
    """A copy from unpinned memory waits, too: between two of these the host cannot run ahead of the device.

    Two steps of each stage, after the first, which brings tables to the device, and but for refreshes of the occupancy
    grid, one step in sixteen.
    """
    words = [f"prior.{stage}={folder(build)}" for stage, build in REAL["stable-diffusion"].items()]
    words += ["coarse.steps=4", "fine.steps=4", "preview_every=100", "checkpoint_every=100"]
    most = {"coarse": (4, 6), "fine": (6, 8)}
    looked = []

    def on_step(stage, step, metrics):
        if step in (2, 3):
            waits, copies = most[stage]
            assert counts.waits.total() <= waits and counts.copies.total() <= copies, f"{stage} {step}: {counts}"
            assert all(isinstance(value, float) for value in metrics.values())
            looked.append((stage, step))
        counts.reset()

    with pretended() as counts:
        on_cuda("stable-diffusion", words, tmp_path / "out", on_step=on_step)
    assert looked == [("coarse", 2), ("coarse", 3), ("fine", 2), ("fine", 3)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(RULES))
def test_rule_gives_on_the_device_what_it_gives_on_the_cpu(rule, folder):
    """Timesteps, noise levels and rows of embeddings are the device's there."""
    settings = GuidanceSettings(rule=rule, scale=7.5, threshold="static", threshold_range=(-2, 2))
    prompts = ViewPrompts("a red mug", "blurry", PromptSettings(blend="perp_neg"))
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(3))

    def asked(device: str) -> tuple[torch.Tensor, dict]:
        prior = load_prior(folder(tiny_folders.stable_diffusion), device, torch.float32)
        guide = Guidance(prior, settings, prompts, torch.Generator().manual_seed(5))
        pixels = images.clone().to(device).requires_grad_()
        views = orbit_views([20.0, 130.0], 20.0).to(device)
        answer = guide(pixels, views, 0.4, backdrop=torch.zeros(2, 64, 64, 3, device=device))
        answer.loss.backward()
        return pixels.grad.cpu(), {name: float(value) for name, value in answer.metrics.items()}

    gradient, metrics = asked("cpu")
    with pretended():
        there, their_metrics = asked("cuda")
    torch.testing.assert_close(there, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    assert their_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)


def test_predictions_of_nothing_finite_are_refused_on_the_device_once_they_are_read():
    guide = SimpleNamespace(check=partial(Guidance.check, SimpleNamespace(prior=SimpleNamespace(name="broken"))))
    check_predictions(guide, {"nonfinite": 0.5})
    with pytest.raises(UserError, match="The prior broken returned no finite number"):
        check_predictions(guide, {"nonfinite": 1.0})


@pytest.mark.slow
def test_no_fused_attention_has_a_gradient_to_take(folder, monkeypatch):
    """Its gradient differs from run to run on CUDA; the autoencoder's is spelt out there, recomputed or not."""
    fused = []
    source, views = folder(tiny_folders.stable_diffusion), orbit_views([0.0], 20.0)
    for checkpointing in (False, True):
        settings = DiffusionSettings(vae_checkpointing=checkpointing)
        with pretended(), monkeypatch.context() as patch:
            plain = torch.nn.functional.scaled_dot_product_attention

            def spy(query, *args, plain=plain, **kwargs):
                fused.append(query.requires_grad)
                return plain(query, *args, **kwargs)

            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            prior = load_prior(source, "cuda", torch.float32, settings=settings)
            guide = Guidance(prior, GuidanceSettings(), ViewPrompts("a mug"), torch.Generator().manual_seed(0))
            pixels = torch.rand(1, 64, 64, 3).to("cuda").requires_grad_()
            guide(pixels, views.to("cuda"), 0.5).loss.backward()
            assert pixels.grad is not None
    assert fused and not any(fused)


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 512), (64, 48, 128), (512, 512, 64), (100, 70, 33)])
def test_pictures_are_resized_by_matrices_on_cuda_as_torch_resizes_them(height, width, side):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with pretended() as counts:
        there = images.to("cuda").requires_grad_()
        small = resized(there, side)
        counts.reset()
        small = resized(there, side)
        assert counts.launches <= 4 and not counts.copies
        small.square().sum().backward()
        assert counts.launches <= 16
        gradient = there.grad.cpu()
        small = small.detach().cpu()
    here = images.requires_grad_()
    expected = resized(here, side)
    expected.square().sum().backward()
    torch.testing.assert_close(small, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, here.grad, rtol=1e-4, atol=1e-4)


def test_cublas_is_told_to_repeat_its_sums(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    choose_device("cpu")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pretended():
        assert choose_device("auto").type == "cuda"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
