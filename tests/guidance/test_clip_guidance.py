"""CLIP guidance: the loss is the cosine, crops, words by view and look, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance.clip import ClipScorer
from stages.guidance.clip_guidance import ClipGuidance, ClipGuidanceSettings, random_crops
from stages.kernels.srgb import linear_to_srgb
from stages.prompts import PromptSettings, ViewPrompts
from tests.tiny_clip import openai_like, pocket_like

WHOLE = {"crop": (1.0, 1.0)}
VIEWS = orbit_views([0.0, 90.0, 180.0], 10.0)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return ClipScorer(pocket_like(tmp_path_factory.mktemp("pocket")))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 3, side: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, side, side, 3, generator=generator(seed))


def guidance(scorer, prompt="a red mug", settings=None, prompts=None, negative="", seed=0) -> ClipGuidance:
    prompts = ViewPrompts(prompt, negative, prompts or PromptSettings(view_words=False))
    return ClipGuidance(scorer, ClipGuidanceSettings(**(settings or WHOLE)), prompts, generator(seed))


def test_loss_is_minus_the_weighted_mean_cosine(scorer):
    images = pictures()
    cosines = scorer.scores(images, ["a red mug"])[:, 0]
    out = guidance(scorer, settings=WHOLE | {"weight": 2.5})(images, VIEWS, 0.0)
    assert float(out.loss) == pytest.approx(-2.5 * float(cosines.mean()), abs=1e-6)
    assert out.metrics == {"clip": pytest.approx(100 * float(cosines.mean()), abs=1e-4)}


def test_views_are_asked_with_their_own_words(scorer):
    images = pictures()
    by_view = guidance(scorer, prompts=PromptSettings())(images, VIEWS, 0.0)
    texts = ["a red mug, front view", "a red mug, side view", "a red mug, back view"]
    assert float(by_view.loss) == pytest.approx(-float(scorer.scores(images, texts).diagonal().mean()), abs=1e-6)


def test_textureless_renders_are_asked_without_the_words_named(scorer):
    words = {"textureless_without": ["red", "striped", "orange"]}
    images = pictures(1)
    guide = guidance(scorer, "an orange striped cat on a red chair", WHOLE | words)
    for textureless, text in ((True, "a cat on a chair"), (False, "an orange striped cat on a red chair")):
        expected = -float(scorer.scores(images, [text]))
        assert float(guide(images, VIEWS[:1], 0.0, textureless).loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("build", [pocket_like, openai_like])
def test_gradient_agrees_with_finite_differences(tmp_path, build):
    scorer = ClipScorer(build(tmp_path))
    scorer.model.double()
    scorer.embed_images = lambda images: _embed_double(scorer, images)
    scorer._texts = {}
    guide = guidance(scorer, settings={"crop": (0.8, 0.9), "crops": 2})
    scorer._texts = {text: value.double() for text, value in scorer._texts.items()}
    images = (0.2 + 0.6 * pictures(1, 50)).double()
    direction = torch.randn(images.shape, generator=generator(3), dtype=torch.float64)

    def loss(x):
        guide.generator.manual_seed(7)
        return guide(x, VIEWS[:1], 0.0).loss

    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    h = 1e-5
    numeric = (loss(images + h * direction) - loss(images - h * direction)) / (2 * h)
    assert abs(float(numeric)) > 1e-7
    assert torch.allclose((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-10)


def _embed_double(scorer, images):
    """ClipScorer.embed_images without its cast to float32."""
    pooled = scorer.model.vision_model(pixel_values=scorer.preprocess(linear_to_srgb(images))).pooler_output
    return torch.nn.functional.normalize(scorer.model.visual_projection(pooled), dim=-1)


def test_crops_are_windows_of_their_images_everywhere_with_equal_chance():
    row, column = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
    images = torch.stack([row, column, torch.zeros(10, 10)], -1).expand(2, 10, 10, 3).clone()
    images[1, ..., 2] = 1
    crops = random_crops(images, (0.7, 0.7), 400, generator())
    assert crops.shape == (800, 7, 7, 3)
    assert not crops[:400, ..., 2].any() and crops[400:, ..., 2].all()  # those of an image lie beside each other
    corners = crops[:, 0, 0, :2]
    assert torch.equal(crops[..., :2] - corners[:, None, None], images[:1, :7, :7, :2].expand(800, -1, -1, -1))
    for axis in range(2):
        counts = torch.bincount(corners[:, axis].long(), minlength=4)
        assert len(counts) == 4 and int(counts.min()) > 140  # 0 to 3, 200 each


def test_side_of_the_crops_is_drawn_from_its_range_and_whole_images_stay():
    images = pictures(2, 20)
    sides = {random_crops(images, (0.5, 0.9), 1, generator(seed)).shape[1] for seed in range(60)}
    assert sides == set(range(10, 19))
    assert random_crops(images, (1.0, 1.0), 1, generator()) is images
    assert torch.equal(random_crops(images, (1.0, 1.0), 2, generator()), images.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="images"):
        random_crops(torch.zeros(1, 4, 5, 3), (0.5, 0.5), 1, generator())


def test_gradient_of_a_crop_stays_within_it():
    images = pictures(1, 10).requires_grad_()
    random_crops(images, (0.5, 0.5), 1, generator()).sum().backward()
    assert int(images.grad.sum()) == 3 * 25


def test_state_of_the_generator_goes_on_where_it_stopped(scorer):
    settings, images = {"crop": (0.6, 0.9)}, pictures()
    straight = guidance(scorer, settings=settings)
    expected = [float(straight(images, VIEWS, 0.0).loss) for _ in range(3)]
    first = guidance(scorer, settings=settings)
    got = [float(first(images, VIEWS, 0.0).loss)]
    second = guidance(scorer, settings=settings, seed=9)
    second.load_state_dict(first.state_dict())
    got += [float(second(images, VIEWS, 0.0).loss) for _ in range(2)]
    assert got == expected and len(set(expected)) == 3


def test_what_only_a_diffusion_prior_can_do_is_refused(scorer):
    with pytest.raises(UserError, match="cannot be asked") as error:
        guidance(scorer, negative="ugly")
    assert "no negative prompt" in error.value.why
    with pytest.raises(UserError, match="cannot be asked") as error:
        guidance(scorer, prompts=PromptSettings(blend="perp_neg"))
    assert "prompts.blend=classes" in error.value.fix


def test_words_that_do_not_fit_are_refused_before_any_step(scorer):
    with pytest.raises(UserError, match="too long"):
        guidance(scorer, "a red mug" + " on a red mug" * 10)


@pytest.mark.parametrize("crop", [(0.0, 0.5), (0.9, 0.8), (0.5, 1.2)])
def test_crop_shares_out_of_order_are_refused(crop):
    with pytest.raises(ValueError, match="low <= high"):
        ClipGuidanceSettings(crop=crop)
