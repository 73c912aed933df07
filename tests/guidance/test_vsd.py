"""Variational score distillation: its rule in closed form, the score it learns, and its way through a resume."""

import shutil

import pytest
import torch

from pipeline.runs.checkpoint import load_checkpoint, save_checkpoint
from stages.cameras import orbit_views
from stages.coarse import CoarseSettings, CoarseStage
from stages.errors import UserError
from stages.guidance import vsd
from stages.guidance.diffusion.layout import CLASSES, Layout
from stages.guidance.diffusion.layout_condition import LayoutCondition
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import (
    PREDICTIONS,
    ViewContext,
    add_noise,
    eps_from_prediction,
    per_sample,
    scaled_linear_alphas_cumprod,
)
from stages.guidance.residuals import RULES, StepInputs
from stages.guidance.vsd import (
    Lesson,
    RenderScore,
    VsdSettings,
    attention_layers,
    camera_vector,
    prediction_weight,
)
from stages.parallel import StepParts
from stages.prompts import ViewPrompts
from tests import tiny_families, tiny_folders
from tests.guidance.gaussian_prior import PROMPT, GaussianPrior, k_of

FAMILIES = ("stable_diffusion", "pocket_pixel", "sdxl", "sd3", "flux")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vsd")
    builders = {name: getattr(tiny_folders, name, None) or getattr(tiny_families, name) for name in FAMILIES}
    return {name: build(root / name) for name, build in builders.items()}


T = torch.full((4096,), 400)
ALPHA_BAR = scaled_linear_alphas_cumprod()[400].item()


def gaussian_noise(z, t, mean, std):
    alpha_bar = per_sample(scaled_linear_alphas_cumprod()[t], z)
    return (1 - alpha_bar).sqrt() / (alpha_bar * std**2 + 1 - alpha_bar) * (z - alpha_bar.sqrt() * mean)


def residual_of(x, score, rule="vsd", scale=1.0):
    """The rule on data N(PROMPT) for points x [B, 1, 1, 1] with the score of the renders given."""
    prior, generator = GaussianPrior(), torch.Generator().manual_seed(0)
    eps = torch.randn(x.shape, generator=generator)

    def predict(z, t, *names):
        embedding = prior.embed([{"prompt": "a mug", "empty": "", "negative": ""}[name] for name in names for _ in z])
        k = len(names)
        return list(prior.predict_noise(z.repeat(k, 1, 1, 1), t.repeat(k), embedding, embedding).chunk(k))

    problem = StepInputs(x, eps, T[: len(x)], prior.alphas_cumprod, 0.0, predict, score=lambda z, t: score(z, t, eps))
    return RULES[rule].residual(problem, GuidanceSettings(rule=rule, scale=scale)).residual


def test_vsd_of_one_fixed_image_is_sds():
    x = torch.full((16, 1, 1, 1), 0.2)
    got = residual_of(x, lambda z, t, eps: eps, scale=7.5)  # the best score of a single picture is the noise itself
    assert torch.equal(got, residual_of(x, None, rule="sds", scale=7.5))


def test_vsd_is_zero_at_every_point_when_renders_are_distributed_as_the_prior_says():
    mean, std = PROMPT
    x = mean + std * torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(3))
    got = residual_of(x, lambda z, t, eps: gaussian_noise(z, t, mean, std))
    assert got.abs().max() < 1e-5
    assert residual_of(x, None, rule="sds").abs().mean() > 0.1  # SDS is not: it pulls them all to the mode


def test_monte_carlo_gradient_of_vsd_is_its_formula():
    mu, spread, x = -0.3, 0.2, 0.4  # of the renders, and where one of them is
    got = residual_of(torch.full((4096, 1, 1, 1), x), lambda z, t, eps: gaussian_noise(z, t, mu, spread))
    a = torch.tensor(ALPHA_BAR)
    expected = k_of(a, PROMPT[1]) * (x - PROMPT[0]) - k_of(a, spread) * (x - mu)
    assert got.mean().item() == pytest.approx(expected.item(), abs=5 * got.std().item() / 64)
    assert abs(expected) > 10 * got.std() / 64


def renders(prior, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = prior.encode(torch.rand(batch, 64, 64, 3, generator=generator), generator).detach()
    t = torch.linspace(100, 800, batch).long()
    z = add_noise(x, torch.randn(x.shape, generator=generator), prior.alphas_cumprod[t])
    camera = camera_vector(orbit_views(torch.arange(batch) * 40.0, 20.0))
    return x, z, t, prior.embed(["a red mug", "a blue cat"] * (batch // 2)), camera


def scores(folder, model, max_batch=0, **settings):
    side = 64 if folder.name == "flux" else None
    prior = load_prior(folder, "cpu", settings=DiffusionSettings(max_batch=max_batch, resolution=side))
    return prior, RenderScore(prior, VsdSettings(model=model, **settings), torch.Generator().manual_seed(4))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lora", "copy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_score_begins_as_the_prior_under_the_prompt_for_every_camera(folders, family, model):
    prior, score = scores(folders[family], model)
    x, z, t, embedding, camera = renders(prior)
    begin = score.predict(z, t, embedding, camera)
    torch.testing.assert_close(begin, prior.predict_noise(z, t, embedding))
    assert torch.equal(score.predict(z, t, embedding, 2 * camera), begin)
    assert score.train([Lesson(x, embedding, camera, torch.Generator().manual_seed(0))]) > 0
    assert not torch.equal(score.predict(z, t, embedding, camera), begin)  # whatever the family, it learns


@pytest.fixture(scope="module")
def with_camera(folders, tmp_path_factory):
    """The pixel folder with a layout that has something to say."""
    folder = shutil.copytree(folders["pocket_pixel"], tmp_path_factory.mktemp("camera") / "pixel")
    torch.manual_seed(8)
    words = {name: ["a", "b"] for name in CLASSES}
    condition = LayoutCondition(Layout(32, words, code=8, channels=(4, 4, 4), paints=2), 32, 8, (16, 32))
    for layer in condition.levels:
        torch.nn.init.normal_(layer.weight, std=0.3)
    condition.save(folder / "layout")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lora", "copy"])
def test_score_of_a_prior_that_is_told_the_camera_begins_as_that_prior(with_camera, model):
    prior, score = scores(with_camera, model, lr=5e-3)
    x, z, t, embedding, camera = renders(prior)
    context = ViewContext(orbit_views([0.0, 120.0], 20.0), torch.full((3,), 0.4))
    begin = score.predict(z, t, embedding, camera, context)
    torch.testing.assert_close(begin, prior.predict_noise(z, t, embedding, context))
    assert (begin - prior.predict_noise(z, t, embedding)).abs().max() > 1e-3  # what it was without the camera
    twin = scores(with_camera, model, lr=5e-3)[1]
    score.train([Lesson(x, embedding, camera, torch.Generator().manual_seed(0), context)])
    twin.train([Lesson(x, embedding, camera, torch.Generator().manual_seed(0))])
    with_shading, untold = (one.predict(z, t, embedding, camera, context) for one in (score, twin))
    assert not torch.allclose(with_shading, untold, atol=1e-4)  # it learns under the camera, too
    assert all(p.grad is None for p in prior.layout.parameters())


def test_a_step_of_vsd_tells_its_score_the_views(with_camera):
    calls = []
    settings = GuidanceSettings(rule={"name": "vsd", "updates": 2}, scale=7.5)
    guidance = Guidance(load_prior(with_camera, "cpu"), settings, ViewPrompts("a mug"), torch.Generator())
    conditions = guidance.prior.conditions
    guidance.prior.conditions = lambda embedding, context: calls.append(context) or conditions(embedding, context)
    views = orbit_views([0.0, 90.0])
    guidance(torch.rand(2, 32, 32, 3), views, 0.0, backdrop=torch.full((2, 32, 32, 3), 0.5))
    assert [len(context) for context in calls] == [4, 2, 2, 2]  # both prompts; the score's look, and its two lessons
    assert all(context.views.azimuth_deg[:2].tolist() == [0.0, 90.0] for context in calls)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "share"), [("lora", 0.99), ("copy", 0.95)])
def test_training_fits_the_renders_and_their_cameras_and_leaves_the_prior_alone(folders, model, share):
    prior, score = scores(folders["pocket_pixel"], model, lr=5e-3, updates=20, camera_drop=0.0)
    x, z, t, embedding, camera = renders(prior)
    before = prior.predict_noise(z, t, embedding)
    alpha_bar = per_sample(prior.alphas_cumprod[t], z)
    eps = (z - alpha_bar.sqrt() * x) / (1 - alpha_bar).sqrt()
    assert score.train([Lesson(x, embedding, camera, torch.Generator().manual_seed(7))]) > 0
    learned = score.predict(z, t, embedding, camera)
    assert (learned - eps).square().mean() < share * (before - eps).square().mean()
    assert (score.predict(z, t, embedding, camera.flip(0)) - learned).abs().max() > 1e-4
    assert torch.equal(prior.predict_noise(z, t, embedding), before)
    assert not any(p.requires_grad or p.grad is not None for p in prior.unet.parameters())


def test_first_gradient_is_zero_in_the_inner_matrices_and_not_in_the_outer_ones(folders):
    """y = W x + U D x with U = 0 at first: the loss sees D only through U."""
    prior, score = scores(folders["stable_diffusion"], "lora", rank=3)
    x, _, _, embedding, camera = renders(prior)
    assert len(score.parameters) == 2 * len(attention_layers(prior.unet)) + 2
    assert all(p.shape[0] == 3 for name, p in score.parameters.items() if name.endswith(".down"))
    old = {name: p.detach().clone() for name, p in score.parameters.items()}
    score.train([Lesson(x, embedding, camera, torch.Generator().manual_seed(0))])
    moved = {name for name, p in score.parameters.items() if not torch.equal(p, old[name])}
    assert moved == {name for name in old if name.endswith((".up", "camera.out"))}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lora"])
def test_a_batch_that_the_prior_splits_gives_each_sample_its_own_camera(folders, model):
    whole, parts = (scores(folders["stable_diffusion"], model, max_batch=n, lr=3e-3, updates=2) for n in (0, 3))
    x, z, t, embedding, camera = renders(whole[0], batch=4)
    for _, score in (whole, parts):
        score.train([Lesson(x, embedding, camera, torch.Generator().manual_seed(0))])
    got, expected = (score.predict(z, t, embedding, camera) for _, score in (parts, whole))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_errors_are_weighed_as_the_network_predicts():
    alpha_bar, generator = torch.tensor([0.9, 0.2]), torch.Generator().manual_seed(0)
    z, a, b = (torch.randn(2, 1, 1, 1, generator=generator) for _ in range(3))
    for kind in PREDICTIONS:
        eps = eps_from_prediction(a, z, alpha_bar, kind) - eps_from_prediction(b, z, alpha_bar, kind)
        weighed = prediction_weight(alpha_bar, kind) * eps.flatten().square()
        torch.testing.assert_close(weighed, (a - b).flatten().square(), rtol=1e-4, atol=1e-5)


def test_a_step_that_is_not_finite_is_not_taken(folders):
    prior, score = scores(folders["stable_diffusion"], "lora")
    x, _, _, embedding, camera = renders(prior)
    before = score.state_dict()
    assert score.train([Lesson(x * float("nan"), embedding, camera, torch.Generator())]) == -1.0
    assert all(torch.equal(value, before[key]) for key, value in score.state_dict().items())


def test_a_prior_without_attention_is_refused():
    class Plain(GaussianPrior):
        name, unet, device = "plain", torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.device("cpu")
        offload, noise, conditions = "none", len, len

    with pytest.raises(UserError, match="rule=vsd does not fit the prior plain.*Sequential lacks a time embedding"):
        RenderScore(Plain(), VsdSettings(), torch.Generator())


def test_a_whole_copy_in_half_precision_and_offloaded_weights_are_refused(folders):
    half = load_prior(folders["stable_diffusion"], "cpu", torch.bfloat16)
    with pytest.raises(UserError, match="half precision is too coarse") as error:
        RenderScore(half, VsdSettings(model="copy"), torch.Generator())
    assert "rule.model=lora" in error.value.fix
    x, _, _, embedding, camera = renders(half)
    score = RenderScore(half, VsdSettings(), torch.Generator().manual_seed(0))
    assert score.train([Lesson(x, embedding, camera, torch.Generator().manual_seed(0))]) > 0
    assert all(p.dtype == torch.float32 for p in score.parameters.values())
    away = load_prior(folders["stable_diffusion"], "cpu", settings=DiffusionSettings(offload="blocks"))
    with pytest.raises(UserError, match="leave the device"):
        RenderScore(away, VsdSettings(), torch.Generator())


def make(folder, model):
    settings = GuidanceSettings(rule={"name": "vsd", "model": model, "lr": 1e-3}, scale=7.5)
    return Guidance(load_prior(folder, "cpu"), settings, ViewPrompts("a red mug"), torch.Generator().manual_seed(1))


def step(guidance, progress):
    picture = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(9)).requires_grad_()
    output = guidance(picture, orbit_views([0.0, 90.0]), progress)
    output.loss.backward()
    return picture.grad, output.metrics


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lora", "copy"])
def test_restored_guidance_goes_on_to_the_same_bytes(folders, model):
    guidance = make(folders["pocket_pixel"], model)
    for progress in (0.0, 0.1):
        step(guidance, progress)
    state = {key: value.clone() for key, value in guidance.state_dict().items()}
    later = make(folders["pocket_pixel"], model)
    later.load_state_dict(state)
    for progress in (0.2, 0.3):
        (expected, facts), (got, actual) = step(guidance, progress), step(later, progress)
        assert torch.equal(got, expected) and actual == facts
    assert facts["score_error"] > 0
    assert not torch.equal(step(make(folders["pocket_pixel"], model), 0.3)[0], expected)


@pytest.mark.slow
def test_coarse_stage_under_vsd_resumes_from_its_checkpoint_to_the_same_bytes(folders, tmp_path):
    settings = CoarseSettings(steps=6, resolution=16, views_per_step=2, accumulate=2, samples=16)

    def stage():
        return CoarseStage(settings, make(folders["pocket_pixel"], "lora"), torch.device("cpu"), seed=3)

    whole = stage()
    whole.step()
    save_checkpoint(tmp_path / "c.safetensors", whole.state_dict(), {"step": 1})
    resumed = stage()
    resumed.load_state_dict(load_checkpoint(tmp_path / "c.safetensors")[0])
    assert resumed.step() == whole.step()
    expected, got = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == got.keys() and any(key.startswith("guidance.score.adam.") for key in expected)
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


def test_lessons_take_no_fused_attention_on_cuda_where_bytes_are_to_repeat(folders, monkeypatch):
    entered = []

    class Spy:
        def __init__(self, device):
            entered.append(device.type)

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    monkeypatch.setattr(vsd, "repeatable_attention", Spy)
    step(make(folders["pocket_pixel"], "lora"), 0.3)
    assert entered == ["cpu", "in", "out"]
    monkeypatch.undo()
    mode = torch.get_deterministic_debug_mode()
    try:
        for wanted, fused in ((0, True), (1, False)):
            torch.set_deterministic_debug_mode(wanted)
            with vsd.repeatable_attention(torch.device("cuda")):
                assert torch.backends.cuda.flash_sdp_enabled() == fused
                assert torch.backends.cuda.mem_efficient_sdp_enabled() == fused
    finally:
        torch.set_deterministic_debug_mode(mode)


def test_a_step_in_parts_teaches_the_score_once_of_all_its_views(folders):
    """One lesson a step, of the same size, whether a step's views come together or one after the other."""
    guidance = make(folders["pocket_pixel"], "lora")
    steps = []
    guidance._score.optimiser.step = lambda: steps.append(
        torch.stack([p.grad.norm() for p in guidance._score.parameters.values() if p.grad is not None]).norm()
    )
    images, views = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0)), orbit_views([0.0, 90.0], 15.0)
    errors = [
        guidance(images[part.slice], views[part.slice], 0.3, part=part).metrics["score_error"]
        for part in StepParts(2, 2)
    ]
    assert len(steps) == 1 and steps[0] > 0 and errors[0] == 0 and errors[1] > 0
