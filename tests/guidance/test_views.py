"""How views enter a step: mixed embeddings, Perp-Neg, negatives by view; and what does not fit is refused at once."""

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance.compatibility import check_compatibility
from stages.guidance.conditions import Conditions
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import add_noise, x0_from_eps
from stages.guidance.residuals import RULES, StepInputs, max_predictions
from stages.guidance.rules import classifier_free_guidance, perp_neg
from stages.prompts import PromptSettings, ViewPrompts, perp_neg_weights
from tests import tiny_folders
from tests.guidance.gaussian_prior import VIEWS, GaussianPrior, images, k_of, with_rule

T, SCALE = 600, 5.0
MEANS = {"front": 0.6, "side": -0.4, "back": 0.1, "overhead": 0.3, "": -0.1, "bad": 0.8, "worse": -0.7}
STD = 0.5


class ViewPrior(GaussianPrior):
    """Pictures of one grey level, which the view words of the prompt choose."""

    def embed(self, prompts):
        words = [next((word for word in MEANS if word and word in prompt), "") for prompt in prompts]
        return torch.tensor([[MEANS[word], STD] for word in words])


def make(prompts, **settings):
    settings = {"weighting": "uniform", "srgb": False, "t_min": T / 1000, "t_max": T / 1000} | settings
    return Guidance(ViewPrior(), GuidanceSettings(**with_rule(settings)), prompts, torch.Generator().manual_seed(0))


def gradient_at(guidance, azimuth, x=0.2):
    picture = images(x)
    views = orbit_views(torch.full((VIEWS,), float(azimuth)), 10.0)
    guidance(picture, views, 0.5).loss.backward()
    return picture.grad.mean().item() * VIEWS / 2


ALPHA_BAR = GaussianPrior.alphas_cumprod[T]
K = k_of(ALPHA_BAR, STD).item()
NOISE = 5 * SCALE / (VIEWS * 768) ** 0.5


@pytest.mark.parametrize(
    ("azimuth", "mean"), [(0, 0.6), (30, (2 * 0.6 - 0.4) / 3), (-45, 0.1), (90, -0.4), (135, -0.15), (180, 0.1)]
)
def test_interpolated_embedding_moves_with_the_azimuth(azimuth, mean):
    guidance = make(ViewPrompts("a mug", settings=PromptSettings(blend="interpolated")), scale=1.0)
    assert gradient_at(guidance, azimuth) == pytest.approx(K * (0.2 - mean), abs=NOISE / SCALE)


def test_class_embeddings_jump_where_interpolated_ones_glide():
    guidance = make(ViewPrompts("a mug"), scale=1.0)
    assert gradient_at(guidance, 40) == pytest.approx(K * (0.2 - 0.6), abs=NOISE / SCALE)
    assert gradient_at(guidance, 50) == pytest.approx(K * (0.2 + 0.4), abs=NOISE / SCALE)


@pytest.mark.parametrize(("azimuth", "mean"), [(0, 0.8), (90, 0.8), (180, -0.7)])
def test_negative_prompt_of_a_view_is_what_guidance_leaves_behind(azimuth, mean):
    prompts = ViewPrompts("a mug", "bad", PromptSettings(per_view_negative={"back": "worse"}))
    share = {0: 0.6, 90: -0.4, 180: 0.1}[azimuth]
    expected = K * ((1 - SCALE) * (0.2 - mean) + SCALE * (0.2 - share))
    assert gradient_at(make(prompts, scale=SCALE), azimuth) == pytest.approx(expected, abs=NOISE)


def test_perp_neg_uses_only_what_is_perpendicular_to_the_prompt():
    def vector(*values):
        return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)

    eps_0, eps_y = vector(1, 1, 1), vector(3, 1, 1)  # d_y = (2, 0, 0)
    got = perp_neg(eps_y, eps_0, [vector(4, 2, 1), vector(0, 1, 3)], [torch.tensor([-2.0]), torch.tensor([-0.5])])
    torch.testing.assert_close(got, vector(3, 1 - 2 * 1, 1 - 0.5 * 2))
    parallel = perp_neg(eps_y, eps_0, [vector(9, 1, 1)], [torch.tensor([-3.0])])
    torch.testing.assert_close(parallel, eps_y)  # a negative that says the same as the prompt takes nothing away


@pytest.mark.parametrize("rule", ["sds", "csd", "nfsd"])
def test_perp_neg_in_a_step_is_its_formula_on_the_predictions(rule):
    prompts = ViewPrompts("a mug", "bad", PromptSettings(blend="perp_neg", perp_neg=0.7))
    guidance = make(prompts, rule=rule, scale=SCALE, negative_share=(0.0, 1.0, 0.9, 1.0))
    generator = torch.Generator().manual_seed(5)
    picture = torch.rand(2, 8, 8, 3, generator=generator).requires_grad_()
    guidance(picture, orbit_views([60.0, 150.0], 10.0), 0.5).loss.backward()

    x = picture.detach().permute(0, 3, 1, 2) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    torch.rand(2, generator=generator, dtype=torch.float64), torch.randperm(2, generator=generator)
    eps, t = torch.randn(x.shape, generator=generator), torch.tensor([T, T])
    z = add_noise(x, eps, ALPHA_BAR.expand(2))

    def predicted(*means):
        embedding = torch.tensor([[mean, STD] for mean in means])
        return guidance.prior.predict_noise(z, t, embedding, [0, 0])

    eps_y = predicted(0.6 / 3 - 0.4 * 2 / 3, -0.4 / 3 + 0.1 * 2 / 3)
    eps_n, eps_0 = predicted(0.8, 0.8), predicted(-0.1, -0.1)
    reference = eps_n if rule == "sds" else eps_0
    weights = [0.7 * torch.tensor(w) for w in zip(perp_neg_weights(60.0), perp_neg_weights(150.0), strict=True)]
    pushed = perp_neg(eps_y, reference, [predicted(0.6, -0.4), predicted(-0.4, 0.6)], weights)
    if rule == "sds":
        expected = classifier_free_guidance(pushed, reference, SCALE) - eps
    elif rule == "csd":
        expected = SCALE * (pushed - eps_0)
    else:
        expected = eps_0 - eps_n + SCALE * (pushed - eps_0)
    torch.testing.assert_close(picture.grad.permute(0, 3, 1, 2) * 2 / 2, expected, atol=1e-4, rtol=1e-4)


def test_perp_neg_asks_for_two_further_predictions_and_none_from_above():
    guidance = make(ViewPrompts("a mug", settings=PromptSettings(blend="perp_neg")), scale=SCALE)
    guidance(images(batch=3), orbit_views([0.0, 90.0, 180.0], 10.0), 0.0)
    guidance(images(batch=3), orbit_views([0.0, 90.0, 180.0], 80.0), 0.0)
    guidance(images(batch=3), orbit_views([30.0, 90.0, 180.0], torch.tensor([10.0, 80.0, 80.0])), 0.0)
    guidance(images(batch=3), orbit_views([0.0, 90.0, 180.0], torch.tensor([10.0, 80.0, 80.0])), 0.0)
    assert guidance.prior.calls == [12, 6, 12, 9]  # straight from the front one of the two is the prompt itself


def step_of(rule, phi=0.0, blend="perp_neg", scale=SCALE):
    """(residual, eps_hat, eps_y, predictions by branch) of a rule where the branches are known tensors."""
    generator = torch.Generator().manual_seed(3)
    names = ("prompt", "negative", "empty", "perp_neg 0", "perp_neg 1")
    known = {name: torch.randn(2, 3, 4, 4, generator=generator) for name in names}
    x, eps = torch.randn(2, 2, 3, 4, 4, generator=generator)
    inputs = StepInputs(
        x,
        eps,
        torch.tensor([T, T]),
        GaussianPrior.alphas_cumprod,
        0.5,
        lambda z, t, *branches: [known[branch] for branch in branches],
        perp_neg_weights=[torch.tensor([-1.5, -0.5]), torch.tensor([-0.7, -1.2])] if blend == "perp_neg" else [],
    )
    share = {"rule": rule, "negative_share": (0.0, 1.0, 0.4, 0.6)}
    settings = GuidanceSettings(**with_rule(share), scale=scale, rescale=phi)
    return RULES[rule].residual(inputs, settings), known


@pytest.mark.parametrize("rule", ["sds", "csd", "nfsd"])
def test_prompts_own_prediction_is_reported_and_not_the_one_that_perp_neg_pushed(rule):
    actual, known = step_of(rule)
    assert torch.equal(actual.eps_y, known["prompt"])
    plain, _ = step_of(rule, blend="classes")
    assert (actual.residual - plain.residual).abs().mean() > 0.1  # and it is pushed


def test_rescale_gives_back_the_contrast_of_the_prompts_own_prediction_under_perp_neg():
    actual, known = step_of("sds", phi=1.0)
    alpha_bar = ALPHA_BAR.expand(2)
    expected, got = (x0_from_eps(eps, actual.z_t, alpha_bar) for eps in (known["prompt"], actual.eps_hat))
    torch.testing.assert_close(got.std((1, 2, 3)), expected.std((1, 2, 3)))


@pytest.mark.parametrize(
    ("settings", "negative", "calls"),
    [
        (dict(rule="csd"), "", 2),  # the empty prompt is the negative one
        (dict(rule="csd", negative_share=(0.0, 1.0, 0.0, 0.8)), "bad", 3),
        (dict(rule="csd", negative_share=(0.0, 1.0, 0.6, 0.8)), "bad", 2),  # it counts nothing yet
        (dict(rule="csd", negative_share=(0.0, 1.0, 0.0, 0.2)), "bad", 2),  # and now the empty one does
        (dict(rule="sds"), "bad", 2),
        (dict(rule="nfsd"), "bad", 3),
    ],
)
def test_every_text_is_asked_for_once_and_those_that_count_nothing_never(settings, negative, calls):
    guidance = make(ViewPrompts("a mug", negative), scale=SCALE, **settings)
    guidance(images(batch=3), orbit_views([0.0, 90.0, 180.0], 10.0), 0.5)
    assert guidance.prior.calls == [3 * calls]


@pytest.mark.parametrize("anneal", [(0.0, 1.0), (0.6, 0.8), (0.0, 0.2)])
@pytest.mark.parametrize("negative", ["", "bad"])
def test_gradient_of_csd_is_its_formula_whatever_is_asked_for_once(anneal, negative):
    """E[eps(z) | x] = K (x - mean), so the expected residual is s K times a difference of means."""
    guidance = make(ViewPrompts("a mug", negative), rule="csd", scale=SCALE, negative_share=(0.0, 1.0, *anneal))
    share = {(0.0, 1.0): 0.5, (0.6, 0.8): 0.0, (0.0, 0.2): 1.0}[anneal]
    reference = share * MEANS[negative] + (1 - share) * MEANS[""]
    assert gradient_at(guidance, 0) == pytest.approx(SCALE * K * (reference - MEANS["front"]), abs=1e-3)


ASKED = [  # vsd asks for what sds does; the others' refusals are left out
    (rule, negative, blend, scale)
    for rule in sorted(set(RULES) - {"vsd"})
    for negative in ("", "bad")
    for blend, scale in (("classes", 1.0), ("classes", SCALE), ("perp_neg", SCALE))
    if rule != "nfsd" or negative
]


@pytest.mark.parametrize(("rule", "negative", "blend", "scale"), ASKED)
def test_most_predictions_at_once_are_those_counted_beforehand(rule, negative, blend, scale):
    prompts = ViewPrompts("a mug", negative, PromptSettings(blend=blend))
    guidance = make(prompts, rule=rule, scale=scale)
    for progress in (0.0, 0.25, 0.5):
        guidance(images(batch=1, side=8), orbit_views([60.0], 10.0), progress)
    assert max_predictions(guidance.settings, prompts) == max(guidance.prior.calls)


def test_embeddings_of_several_branches_are_mixed_in_the_prompt_only():
    prompts = ViewPrompts("a mug", "bad", PromptSettings(blend="interpolated"))
    conditions = Conditions(ViewPrior(), prompts).for_views(orbit_views([45.0, 90.0], 10.0))
    means = conditions.embedding("prompt", "negative", "empty")[:, 0]
    torch.testing.assert_close(means, torch.tensor([0.1, -0.4, 0.8, 0.8, -0.1, -0.1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folders.stable_diffusion(tmp_path_factory.mktemp("views") / "sd")


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(position="prefix"),  # then the prompt's own end would be cut
        dict(per_view_negative={"back": "a negative prompt with more letters than forty of them"}),
        dict(per_view={"overhead": "a prompt written by hand with more letters than forty"}),
    ],
)
def test_a_text_that_the_encoder_would_cut_is_refused_before_any_step(folder, settings):
    prompt = "a mug" if "per_view" in str(settings) else "a red mug on a table beside a lamp"
    with pytest.raises(UserError, match="too long for the prior's text encoder") as error:
        Guidance(
            load_prior(folder, "cpu"),
            GuidanceSettings(),
            ViewPrompts(prompt, settings=PromptSettings(**settings)),
            torch.Generator(),
        )
    assert "would be cut" in error.value.why and "shorten" in error.value.fix


class Wordless(GaussianPrior):
    reads_prompts = False


class Sampler(GaussianPrior):
    prediction = "sample"


@pytest.mark.parametrize(
    ("prior", "settings", "prompts", "what"),
    [
        (Wordless, dict(rule="csd"), {}, "rule=csd does not fit the prior gaussian"),
        (Wordless, dict(rule="nfsd"), {}, "rule=nfsd does not fit"),
        (Wordless, dict(rule="vsd"), {}, "rule=vsd does not fit"),
        (GaussianPrior, dict(rule="vsd"), {}, "rule=vsd does not fit"),
        (Wordless, dict(), dict(blend="perp_neg"), "prompts.blend=perp_neg does not fit the prior"),
        (Wordless, dict(), dict(blend="interpolated"), "prompts.blend=interpolated does not fit the prior"),
        (Sampler, dict(rule="ism"), {}, "rule=ism does not fit the prior gaussian"),
        (Sampler, dict(rule="sdi"), {}, "rule=sdi does not fit the prior gaussian"),
        (GaussianPrior, dict(rule="nfsd"), {}, "rule=nfsd has no negative prompt"),
        (GaussianPrior, dict(scale=1.0), dict(blend="perp_neg"), "prompts.blend=perp_neg does not fit scale=1"),
    ],
)
def test_rule_that_does_not_fit_the_prior_or_the_prompts_is_refused(prior, settings, prompts, what):
    prompts = ViewPrompts("a mug", settings=PromptSettings(**prompts))
    with pytest.raises(UserError, match=what) as error:
        check_compatibility(prior(), GuidanceSettings(**settings), prompts)
    assert error.value.why and error.value.fix


@pytest.mark.parametrize("rule", ["sds", "sjc", "ism", "sdi"])
def test_rules_that_need_no_words_fit_a_prior_without(rule):
    check_compatibility(Wordless(), GuidanceSettings(rule=rule, scale=1.0), ViewPrompts("a mug"))
