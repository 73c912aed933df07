"""SDXL, Stable Diffusion 3 and Flux folders: the noise their own diffusers pipelines compute, gradients, fit."""

import math

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance.diffusion.denoisers import join_pooled, split_pooled
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import add_noise
from stages.prompts import ViewPrompts
from tests import tiny_families, tiny_folders
from tests.guidance.diffusion.family_cases import PROMPTS, problem
from tests.guidance.gaussian_prior import with_rule


def overheard(pipe, name, *args, **kwargs):
    """What a pipeline hands its denoiser while it draws, and gets: (input, timestep, everything named, output)."""
    network, calls = getattr(pipe, name), []
    forward = network.forward

    def listen(*inputs, **options):
        out = forward(*inputs, **options)
        everything = dict(zip(("hidden_states", "timestep"), inputs, strict=False)) | options
        hidden = everything.get("hidden_states", everything.get("sample"))
        calls.append((hidden.clone(), everything["timestep"], everything, out[0].clone()))
        return out

    network.forward = listen
    pipe.set_progress_bar_config(disable=True)
    pipe(*args, num_inference_steps=2, **kwargs)
    network.forward = forward
    assert len(calls) == 2
    return calls


def test_stable_diffusion_hears_what_its_pipeline_says(tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tiny_folders.stable_diffusion(tmp_path / "sd", "v_prediction", zero_snr=True)
    absent = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe, prior = StableDiffusionPipeline.from_pretrained(folder, **absent), load_prior(folder, "cpu")
    embedding = torch.cat([prior.embed(["ugly"] * 2), prior.embed(PROMPTS)])
    size = dict(height=64, width=64, output_type="latent", guidance_scale=7.5)
    for z, t, _, expected in overheard(pipe, "unet", PROMPTS, negative_prompt=["ugly"] * 2, **size):
        torch.testing.assert_close(prior.denoiser(z, t.expand(4), embedding), expected)
        alpha_bar = pipe.scheduler.alphas_cumprod[t]
        eps = alpha_bar.sqrt() * expected + (1 - alpha_bar).sqrt() * z
        torch.testing.assert_close(prior.predict_noise(z, t.expand(4), embedding), eps)


def test_deepfloyd_hears_what_its_pipeline_says(tmp_path):
    from diffusers import IFPipeline

    folder = tiny_folders.deepfloyd(tmp_path / "if", length=77)
    absent = dict(safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False)
    pipe, prior = IFPipeline.from_pretrained(folder, **absent), load_prior(folder, "cpu")
    embedding = torch.cat([prior.embed(["", ""]), prior.embed(PROMPTS)])
    for z, t, _, expected in overheard(pipe, "unet", PROMPTS, height=16, width=16, output_type="pt"):
        assert expected.shape[1] == 6  # three of them a learned variance
        torch.testing.assert_close(prior.predict_noise(z, t.expand(4), embedding), expected[:, :3])


@pytest.mark.slow
def test_sdxl_hears_what_its_pipeline_says(family_folders, family_priors):
    from diffusers import StableDiffusionXLPipeline

    pipe, prior = StableDiffusionXLPipeline.from_pretrained(family_folders["sdxl"]), family_priors["sdxl"]
    assert (prior.resolution, prior.prediction, prior.family.name) == (64, "epsilon", "SDXL")
    tokens, zeros, pooled, pooled_zeros = pipe.encode_prompt(PROMPTS, None, "cpu", 1, True)
    torch.testing.assert_close(prior.embed(PROMPTS), join_pooled(tokens, pooled))
    assert torch.equal(prior.embed(["", ""]), join_pooled(zeros, pooled_zeros))  # zeros, not an encoded ""
    embedding = torch.cat([prior.embed(["", ""]), prior.embed(PROMPTS)])
    calls = overheard(pipe, "unet", PROMPTS, height=64, width=64, output_type="latent", guidance_scale=7.5)
    for z, t, inputs, expected in calls:
        torch.testing.assert_close(prior.predict_noise(z, t.long().expand(4), embedding), expected)
        assert inputs["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4
    other = load_prior(family_folders["sdxl"], "cpu", settings=DiffusionSettings(resolution=128))
    assert (other.predict_noise(z, t.long().expand(4), embedding) - expected).abs().max() > 1e-5  # it is told the size


@pytest.mark.slow
@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_hears_what_its_pipeline_says(family_folders, family_priors, tmp_path, with_t5):
    from diffusers import StableDiffusion3Pipeline

    folder = family_folders["sd3"] if with_t5 else tiny_families.sd3(tmp_path / "sd3", with_t5=False)
    absent = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    prior = family_priors["sd3"] if with_t5 else load_prior(folder, "cpu")
    assert (prior.resolution, prior.prediction) == (64, "flow_prediction")
    length = 16 if with_t5 else 256  # of the tiny tokenizer, and of the zeros in T5's place
    embedding = torch.cat([prior.embed(["", ""]), prior.embed(PROMPTS)])
    size = dict(height=64, width=64, output_type="latent", guidance_scale=5.0, max_sequence_length=length)
    for z, t, inputs, expected in overheard(pipe, "transformer", PROMPTS, **size):
        rows = join_pooled(inputs["encoder_hidden_states"], inputs["pooled_projections"])
        torch.testing.assert_close(embedding, rows)
        torch.testing.assert_close(prior.denoiser(z, t, embedding), expected)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_hears_what_its_pipeline_says(family_folders, family_priors, tmp_path, guidance):
    from diffusers import FluxPipeline

    folder = family_folders["flux"] if guidance else tiny_families.flux(tmp_path / "flux", guidance=False)
    pipe = FluxPipeline.from_pretrained(folder)
    prior = family_priors["flux"] if guidance else load_prior(folder, "cpu", settings=DiffusionSettings(resolution=64))
    assert (prior.resolution, prior.prediction) == (64, "flow_prediction")
    embedding = prior.embed(PROMPTS)
    size = dict(height=64, width=64, output_type="latent", guidance_scale=3.5, max_sequence_length=16)
    calls = overheard(pipe, "transformer", PROMPTS, **size)
    for packed, fraction, inputs, expected in calls:
        torch.testing.assert_close(
            embedding, join_pooled(inputs["encoder_hidden_states"], inputs["pooled_projections"])
        )
        z, expected = (pipe._unpack_latents(tensor, 64, 64, 8) for tensor in (packed, expected))
        torch.testing.assert_close(prior.denoiser(z, 1000 * fraction, embedding), expected)
    weak = load_prior(folder, "cpu", settings=DiffusionSettings(resolution=64, embedded_guidance=1.0))
    change = (weak.denoiser(z, 1000 * fraction, embedding) - expected).abs().max()
    assert (change > 1e-4) == guidance
    # the pipeline's second step of two: sigma 1/2 shifted by mu, which 16 image tokens of 4 to 64 move to 0.63
    e_mu = math.exp(0.5 + (1.15 - 0.5) * (16 - 4) / (64 - 4))
    assert calls[1][1][0].item() == pytest.approx(e_mu / (e_mu + 1), rel=1e-6)
    assert prior.schedule.timesteps[499].item() == pytest.approx(1000 * e_mu / (e_mu + 1), rel=1e-6)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_noise_of_a_flow_is_that_of_its_velocity(family_priors, name):
    """By the path's definition: x = noisy - sigma v, eps = x + v."""
    prior = family_priors[name]
    x, eps, t, z_t = problem(prior)
    sigma = (prior.schedule.timesteps[t] / 1000).reshape(2, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * eps
    embedding = prior.embed(PROMPTS)
    with torch.no_grad():
        velocity = prior.denoiser(noisy, prior.schedule.timesteps[t], embedding)
    expected = noisy - sigma * velocity + velocity
    torch.testing.assert_close(prior.predict_noise(z_t, t, embedding), expected, rtol=1e-4, atol=1e-5)


def test_an_euler_step_of_the_pipeline_is_a_ddim_step_of_the_prior(family_folders, family_priors):
    from diffusers import StableDiffusion3Pipeline

    from stages.guidance.prior import flow_scale, per_sample
    from stages.guidance.rules import ddim_step

    scheduler = StableDiffusion3Pipeline.from_pretrained(family_folders["sd3"]).scheduler
    prior = family_priors["sd3"]
    x, eps, _, _ = problem(prior)
    embedding, high, low = prior.embed(PROMPTS), torch.tensor([700, 700]), torch.tensor([640, 640])
    scheduler.set_timesteps(sigmas=[0.701, 0.641])  # before the shift: those of t = 700 and t = 640
    sigma = scheduler.sigmas[0]
    noisy = (1 - sigma) * x + sigma * eps
    with torch.no_grad():
        velocity = prior.denoiser(noisy, scheduler.timesteps[:1].expand(2), embedding)
    expected = scheduler.step(velocity, scheduler.timesteps[0], noisy).prev_sample
    alpha_bar, below = prior.alphas_cumprod[high], prior.alphas_cumprod[low]
    z_t = add_noise(x, eps, alpha_bar)
    moved = ddim_step(z_t, prior.predict_noise(z_t, high, embedding), alpha_bar, below)
    torch.testing.assert_close(moved * per_sample(flow_scale(below), moved), expected, rtol=1e-4, atol=1e-5)


def test_shifted_and_scaled_latents_are_the_pipelines(family_priors):
    prior, images = family_priors["sd3"], torch.rand(2, 64, 64, 3)
    posterior = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    got = prior.encode(images, torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, (posterior.mean + posterior.std * noise - 0.0609) * 1.5305)
    back = prior.vae.decode(got / 1.5305 + 0.0609).sample.permute(0, 2, 3, 1) / 2 + 0.5
    torch.testing.assert_close(prior.decode(got), back.clamp(0, 1))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_guidance_gradient_reaches_the_images_and_no_weight(family_priors, name):
    prior = family_priors[name]
    settings = GuidanceSettings(scale=7.5, t_min=0.3, t_max=0.6)
    guidance = Guidance(prior, settings, ViewPrompts("a red mug"), torch.Generator().manual_seed(0))
    images = torch.rand(2, 48, 48, 3, requires_grad=True)
    output = guidance(images, orbit_views([0.0, 180.0]), 0.0)
    output.loss.backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0
    assert all(value == value for value in output.metrics.values())
    for network in (prior.unet, prior.vae):
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize("rule", ["csd", "ism", "sdi"])
def test_every_kind_of_rule_runs_on_every_family(family_priors, name, rule):
    settings = GuidanceSettings(**with_rule({"rule": rule, "inversion_steps": 2}), t_min=0.3, t_max=0.6)
    guidance = Guidance(family_priors[name], settings, ViewPrompts("a red mug"), torch.Generator().manual_seed(0))
    metrics = guidance(torch.rand(1, 64, 64, 3), orbit_views([0.0]), 0.3).metrics
    assert metrics["grad_rms"] > 0 and metrics["nonfinite"] == 0


def test_the_pooled_embedding_travels_as_rows_and_comes_back():
    tokens, pooled = torch.randn(3, 5, 8), torch.randn(3, 20)
    joined = join_pooled(tokens, pooled)
    assert joined.shape == (3, 8, 8)  # 20 numbers in three rows of eight
    back = split_pooled(joined, 20)
    assert torch.equal(back[0], tokens) and torch.equal(back[1], pooled)
    mixed = split_pooled(0.25 * joined[:1] + 0.75 * joined[1:2], 20)
    torch.testing.assert_close(mixed[1], 0.25 * pooled[:1] + 0.75 * pooled[1:2])
    assert join_pooled(tokens, None) is tokens and split_pooled(tokens, 0)[1].shape == (3, 0)


@pytest.mark.parametrize(("name", "limit"), [("sdxl", 40), ("sd3", 16), ("flux", 16)])
def test_no_encoder_of_several_cuts_the_view_words(family_priors, name, limit):
    """A byte is a token of CLIP's tokenizer here and a word one of T5's: the encoder that reads least decides."""
    prior = family_priors[name]
    assert prior.text.limit == limit
    with pytest.raises(UserError, match="too long.*encoder reads"):
        prior.embed(["a red mug " * 5 + ", overhead view"])
    word = "a" * 50  # one unknown word to the word tokenizers, 52 tokens to the byte ones
    with pytest.raises(UserError, match="is 52 tokens and the encoder reads 40; the view words .* would be cut off"):
        prior.embed([word])
