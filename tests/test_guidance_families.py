"""SDXL, Stable Diffusion 3 and Flux folders: the noise their own diffusers pipelines compute, gradients, fit."""

import json
import math
import shutil

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
from tests.gaussian_prior import with_rule

SETTINGS = {"flux": DiffusionSettings(resolution=64)}
PROMPTS = ["a red mug, front view", "a blue cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: getattr(tiny_families, name)(root / name) for name in ("sdxl", "sd3", "flux")}


@pytest.fixture(scope="module")
def priors(folders):
    return {name: load_prior(folder, "cpu", settings=SETTINGS.get(name)) for name, folder in folders.items()}


def problem(prior, seed=0):
    """(x, eps, t, z_t) of two random pictures."""
    generator = torch.Generator().manual_seed(seed)
    x = prior.encode(torch.rand(2, 64, 64, 3, generator=generator), generator).detach()
    t, eps = torch.tensor([150, 700]), torch.randn(x.shape, generator=generator)
    return x, eps, t, add_noise(x, eps, prior.alphas_cumprod[t])


def overheard(pipe, name, *args, **kwargs):
    """What a pipeline hands its denoiser while it draws, and gets: (input, timestep, everything named, output)."""
    network, calls = getattr(pipe, name), []
    forward = network.forward

    def listen(*given, **named):
        out = forward(*given, **named)
        everything = dict(zip(("hidden_states", "timestep"), given, strict=False)) | named
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
    for z, t, _, wanted in overheard(pipe, "unet", PROMPTS, negative_prompt=["ugly"] * 2, **size):
        torch.testing.assert_close(prior.denoiser(z, t.expand(4), embedding), wanted)
        alpha_bar = pipe.scheduler.alphas_cumprod[t]
        eps = alpha_bar.sqrt() * wanted + (1 - alpha_bar).sqrt() * z
        torch.testing.assert_close(prior.predict_noise(z, t.expand(4), embedding), eps)


def test_deepfloyd_hears_what_its_pipeline_says(tmp_path):
    from diffusers import IFPipeline

    folder = tiny_folders.deepfloyd(tmp_path / "if", length=77)
    absent = dict(safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False)
    pipe, prior = IFPipeline.from_pretrained(folder, **absent), load_prior(folder, "cpu")
    embedding = torch.cat([prior.embed(["", ""]), prior.embed(PROMPTS)])
    for z, t, _, wanted in overheard(pipe, "unet", PROMPTS, height=16, width=16, output_type="pt"):
        assert wanted.shape[1] == 6  # three of them a learned variance
        torch.testing.assert_close(prior.predict_noise(z, t.expand(4), embedding), wanted[:, :3])


@pytest.mark.slow
def test_sdxl_hears_what_its_pipeline_says(folders, priors):
    from diffusers import StableDiffusionXLPipeline

    pipe, prior = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"]), priors["sdxl"]
    assert (prior.resolution, prior.prediction, prior.family.name) == (64, "epsilon", "SDXL")
    tokens, zeros, pooled, pooled_zeros = pipe.encode_prompt(PROMPTS, None, "cpu", 1, True)
    torch.testing.assert_close(prior.embed(PROMPTS), join_pooled(tokens, pooled))
    assert torch.equal(prior.embed(["", ""]), join_pooled(zeros, pooled_zeros))  # zeros, not an encoded ""
    embedding = torch.cat([prior.embed(["", ""]), prior.embed(PROMPTS)])
    calls = overheard(pipe, "unet", PROMPTS, height=64, width=64, output_type="latent", guidance_scale=7.5)
    for z, t, given, wanted in calls:
        torch.testing.assert_close(prior.predict_noise(z, t.long().expand(4), embedding), wanted)
        assert given["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4
    other = load_prior(folders["sdxl"], "cpu", settings=DiffusionSettings(resolution=128))
    assert (other.predict_noise(z, t.long().expand(4), embedding) - wanted).abs().max() > 1e-5  # it is told the size


@pytest.mark.slow
@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_hears_what_its_pipeline_says(folders, priors, tmp_path, with_t5):
    from diffusers import StableDiffusion3Pipeline

    folder = folders["sd3"] if with_t5 else tiny_families.sd3(tmp_path / "sd3", with_t5=False)
    absent = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    prior = priors["sd3"] if with_t5 else load_prior(folder, "cpu")
    assert (prior.resolution, prior.prediction) == (64, "flow_prediction")
    length = 16 if with_t5 else 256  # of the tiny tokenizer, and of the zeros in T5's place
    embedding = torch.cat([prior.embed(["", ""]), prior.embed(PROMPTS)])
    size = dict(height=64, width=64, output_type="latent", guidance_scale=5.0, max_sequence_length=length)
    for z, t, given, wanted in overheard(pipe, "transformer", PROMPTS, **size):
        rows = join_pooled(given["encoder_hidden_states"], given["pooled_projections"])
        torch.testing.assert_close(embedding, rows)
        torch.testing.assert_close(prior.denoiser(z, t, embedding), wanted)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_hears_what_its_pipeline_says(folders, priors, tmp_path, guidance):
    from diffusers import FluxPipeline

    folder = folders["flux"] if guidance else tiny_families.flux(tmp_path / "flux", guidance=False)
    pipe = FluxPipeline.from_pretrained(folder)
    prior = priors["flux"] if guidance else load_prior(folder, "cpu", settings=SETTINGS["flux"])
    assert (prior.resolution, prior.prediction) == (64, "flow_prediction")
    embedding = prior.embed(PROMPTS)
    size = dict(height=64, width=64, output_type="latent", guidance_scale=3.5, max_sequence_length=16)
    calls = overheard(pipe, "transformer", PROMPTS, **size)
    for packed, fraction, given, wanted in calls:
        torch.testing.assert_close(embedding, join_pooled(given["encoder_hidden_states"], given["pooled_projections"]))
        z, wanted = (pipe._unpack_latents(tensor, 64, 64, 8) for tensor in (packed, wanted))
        torch.testing.assert_close(prior.denoiser(z, 1000 * fraction, embedding), wanted)
    weak = load_prior(folder, "cpu", settings=DiffusionSettings(resolution=64, embedded_guidance=1.0))
    change = (weak.denoiser(z, 1000 * fraction, embedding) - wanted).abs().max()
    assert (change > 1e-4) == guidance
    # the pipeline's second step of two: sigma 1/2 shifted by mu, which 16 image tokens of 4 to 64 move to 0.63
    e_mu = math.exp(0.5 + (1.15 - 0.5) * (16 - 4) / (64 - 4))
    assert calls[1][1][0].item() == pytest.approx(e_mu / (e_mu + 1), rel=1e-6)
    assert prior.schedule.timesteps[499].item() == pytest.approx(1000 * e_mu / (e_mu + 1), rel=1e-6)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_noise_of_a_flow_is_that_of_its_velocity(priors, name):
    """By the path's definition: x = noisy - sigma v, eps = x + v."""
    prior = priors[name]
    x, eps, t, z_t = problem(prior)
    sigma = (prior.schedule.timesteps[t] / 1000).reshape(2, 1, 1, 1)
    noisy = (1 - sigma) * x + sigma * eps
    embedding = prior.embed(PROMPTS)
    with torch.no_grad():
        velocity = prior.denoiser(noisy, prior.schedule.timesteps[t], embedding)
    wanted = noisy - sigma * velocity + velocity
    torch.testing.assert_close(prior.predict_noise(z_t, t, embedding), wanted, rtol=1e-4, atol=1e-5)


def test_an_euler_step_of_the_pipeline_is_a_ddim_step_of_the_prior(folders, priors):
    from diffusers import StableDiffusion3Pipeline

    from stages.guidance.prior import flow_scale, per_sample
    from stages.guidance.rules import ddim_step

    scheduler = StableDiffusion3Pipeline.from_pretrained(folders["sd3"]).scheduler
    prior = priors["sd3"]
    x, eps, _, _ = problem(prior)
    embedding, high, low = prior.embed(PROMPTS), torch.tensor([700, 700]), torch.tensor([640, 640])
    scheduler.set_timesteps(sigmas=[0.701, 0.641])  # before the shift: those of t = 700 and t = 640
    sigma = scheduler.sigmas[0]
    noisy = (1 - sigma) * x + sigma * eps
    with torch.no_grad():
        velocity = prior.denoiser(noisy, scheduler.timesteps[:1].expand(2), embedding)
    wanted = scheduler.step(velocity, scheduler.timesteps[0], noisy).prev_sample
    alpha_bar, below = prior.alphas_cumprod[high], prior.alphas_cumprod[low]
    z_t = add_noise(x, eps, alpha_bar)
    moved = ddim_step(z_t, prior.predict_noise(z_t, high, embedding), alpha_bar, below)
    torch.testing.assert_close(moved * per_sample(flow_scale(below), moved), wanted, rtol=1e-4, atol=1e-5)


def test_shifted_and_scaled_latents_are_the_pipelines(priors):
    prior, images = priors["sd3"], torch.rand(2, 64, 64, 3)
    posterior = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    got = prior.encode(images, torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, (posterior.mean + posterior.std * noise - 0.0609) * 1.5305)
    back = prior.vae.decode(got / 1.5305 + 0.0609).sample.permute(0, 2, 3, 1) / 2 + 0.5
    torch.testing.assert_close(prior.decode(got), back.clamp(0, 1))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_guidance_gradient_reaches_the_images_and_no_weight(priors, name):
    prior = priors[name]
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
def test_every_kind_of_rule_runs_on_every_family(priors, name, rule):
    settings = GuidanceSettings(**with_rule({"rule": rule, "inversion_steps": 2}), t_min=0.3, t_max=0.6)
    guidance = Guidance(priors[name], settings, ViewPrompts("a red mug"), torch.Generator().manual_seed(0))
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


def test_prompts_given_at_loading_are_embedded_one_encoder_at_a_time_before_the_denoiser(folders, monkeypatch):
    import diffusers
    import transformers

    order, present = [], set()

    def watch(kind, name):
        load = kind.from_pretrained.__func__

        def from_pretrained(cls, *args, **kwargs):
            order.append(name)
            present.add(name)
            assert not {"text_encoder_2", "text_encoder_3", "transformer"} < present
            return load(cls, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))

    watch(transformers.CLIPTextModelWithProjection, "clip")
    watch(transformers.T5EncoderModel, "t5")
    watch(diffusers.SD3Transformer2DModel, "transformer")
    texts = ["a red mug", ""]
    prior = load_prior(folders["sd3"], "cpu", prompts=texts)
    assert order == ["clip", "clip", "t5", "transformer"]
    assert all(encoder._model is None for encoder in prior.text.encoders)
    whole = load_prior(folders["sd3"], "cpu")
    order.clear()
    torch.testing.assert_close(prior.embed(texts), whole.embed(texts))
    assert order == []


@pytest.mark.parametrize(("name", "limit"), [("sdxl", 40), ("sd3", 16), ("flux", 16)])
def test_no_encoder_of_several_cuts_the_view_words(priors, name, limit):
    """A byte is a token of CLIP's tokenizer here and a word one of T5's: the encoder that reads least decides."""
    prior = priors[name]
    assert prior.text.limit == limit
    with pytest.raises(UserError, match="too long.*encoder reads"):
        prior.embed(["a red mug " * 5 + ", overhead view"])
    word = "a" * 50  # one unknown word to the word tokenizers, 52 tokens to the byte ones
    with pytest.raises(UserError, match="is 52 tokens and the encoder reads 40; the view words .* would be cut off"):
        prior.embed([word])


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(folder, pattern, **settings):
    with pytest.raises(UserError, match=pattern) as caught:
        load_prior(folder, "cpu", settings=DiffusionSettings(**settings))
    assert caught.value.what and caught.value.why and caught.value.fix


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_3", "transformer", "vae", "scheduler"])
def test_missing_component_of_a_transformer_model_is_named(copied, part):
    folder = copied("sd3")
    shutil.rmtree(folder / part)
    refuse(folder, f"its {part}/ is missing")


def test_parts_of_different_models_are_refused(copied, folders):
    folder = copied("sd3")
    shutil.rmtree(folder / "text_encoder_3")
    shutil.copytree(folders["flux"] / "text_encoder_2", folder / "text_encoder_3")
    refuse(folder, "text encoder gives 40 numbers a token and its transformer wants 48")
    shutil.rmtree(folder / "text_encoder_3")
    shutil.copytree(folders["sd3"] / "text_encoder_3", folder / "text_encoder_3")
    edit(folder / "transformer" / "config.json", pooled_projection_dim=40)
    refuse(folder, "gives 32 numbers in the pooled embedding and its transformer wants 40")
    edit(folder / "transformer" / "config.json", pooled_projection_dim=32, in_channels=16)
    refuse(folder, "16 input channels, which is not what 4 latent channels need")


def test_sdxl_refiner_is_refused(copied):
    """Its five sizes leave another width to the pooled embedding."""
    folder = copied("sdxl")
    edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=5 * 8 + 20)
    refuse(folder, "gives 20 numbers in the pooled embedding and its unet wants 12")


def test_resolution_that_the_model_cannot_draw_is_refused(folders):
    refuse(folders["sd3"], "cannot work at 72.*multiple of 16 up to 128; it was trained at 64", resolution=72)
    refuse(folders["sd3"], "cannot work at 256", resolution=256)
    assert load_prior(folders["sdxl"], "cpu", settings=DiffusionSettings(resolution=72)).resolution == 72


def test_slices_of_attention_that_a_transformer_does_not_have_are_refused(folders):
    for name in ("sd3", "flux"):
        refuse(folders[name], "attention_slicing is for UNets; its .*Transformer2DModel", attention_slicing=True)
    prior = load_prior(folders["sdxl"], "cpu", settings=DiffusionSettings(attention_slicing=True))
    processors = {type(p).__name__ for p in prior.unet.attn_processors.values()}
    assert processors == {"SlicedAttnProcessor"}


def test_flow_that_runs_backwards_is_refused(copied):
    folder = copied("sd3")
    edit(folder / "scheduler" / "scheduler_config.json", invert_sigmas=True)
    refuse(folder, "run backwards")


def test_schedule_of_a_flow_is_read_from_the_folder(tmp_path):
    plain = load_prior(tiny_families.sd3(tmp_path / "one", shift=1.0), "cpu").schedule
    torch.testing.assert_close(plain.timesteps, torch.arange(1, 1001).float())
    sigma = torch.tensor(0.5, dtype=torch.float64)  # at t = 499 both halves weigh the same
    assert plain.alphas_cumprod[499].item() == pytest.approx(0.5, abs=1e-6)
    assert plain.alphas_cumprod[-1] == 0
    first = 1 - plain.alphas_cumprod[0].item()  # sigma^2 / ((1 - sigma)^2 + sigma^2) at sigma 0.001, not rounded away
    assert first == pytest.approx(1e-6 / (0.999**2 + 1e-6), rel=1e-6)
    shifted = load_prior(tiny_families.sd3(tmp_path / "three", shift=3.0), "cpu").schedule
    sigma = 3 * 0.5 / (1 + 2 * 0.5)
    assert shifted.timesteps[499].item() == pytest.approx(1000 * sigma, rel=1e-6)
    assert shifted.alphas_cumprod[499].item() == pytest.approx(0.0625 / (0.0625 + 0.5625), rel=1e-5)


def test_another_autoencoder_of_the_same_latents_takes_the_place_of_the_models_own(folders, tmp_path):
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    tiny_families.tiny_vae(4).save_pretrained(str(folder))
    prior = load_prior(folders["sdxl"], "cpu", settings=DiffusionSettings(autoencoder=str(folder)))
    images = torch.rand(1, 64, 64, 3)
    wanted = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latents
    assert type(prior.vae).__name__ == "AutoencoderTiny"
    torch.testing.assert_close(prior.encode(images, torch.Generator()), wanted)
    other = tmp_path / "other"
    tiny_families.tiny_vae(16).save_pretrained(str(other))
    refuse(folders["sdxl"], "latents have 16 channels, the model's 4", autoencoder=str(other))
    refuse(folders["sdxl"], "no config.json in it", autoencoder=str(tmp_path / "nothing"))


def test_careful_memory_settings_do_not_change_the_result(folders, priors):
    s = DiffusionSettings(max_batch=1, vae_slicing=True, vae_checkpointing=True, offload="blocks", text_device="cpu")
    careful, plain = load_prior(folders["sdxl"], "cpu", settings=s), priors["sdxl"]
    x, eps, t, z_t = problem(plain)
    wanted = plain.predict_noise(z_t, t, plain.embed(PROMPTS))
    torch.testing.assert_close(careful.predict_noise(z_t, t, careful.embed(PROMPTS)), wanted, rtol=1e-4, atol=1e-5)
    images = torch.rand(2, 64, 64, 3, requires_grad=True)
    results = []
    for prior in (careful, plain):
        latents = prior.encode(images, torch.Generator().manual_seed(0))
        results.append((latents.detach(), torch.autograd.grad(latents.square().sum(), images)[0], prior.decode(x)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_tiled_autoencoder_runs_beyond_its_own_size(folders):
    prior = load_prior(folders["sdxl"], "cpu", settings=DiffusionSettings(resolution=96, vae_tiling=True))
    assert prior.vae.use_tiling
    images = torch.rand(1, 96, 96, 3, requires_grad=True)
    latents = prior.encode(images, torch.Generator().manual_seed(0))
    assert latents.shape == (1, 4, 12, 12)
    (gradient,) = torch.autograd.grad(latents.square().sum(), images)
    assert (gradient.abs().amax((0, 3)) > 0).all()


def test_offloaded_blocks_are_on_the_device_only_while_they_run(priors):
    import copy

    from stages.guidance.diffusion.offload import offload_blocks

    network = copy.deepcopy(priors["sd3"].unet)
    homes = {id(p): p.data for block in network.transformer_blocks for p in block.parameters()}
    blocks = offload_blocks(network, torch.device("cpu"))
    assert blocks == list(network.transformer_blocks)
    there = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: there.append(module))
    with torch.no_grad():
        network(
            hidden_states=torch.randn(1, 4, 8, 8),
            timestep=torch.tensor([5.0]),
            encoder_hidden_states=torch.randn(1, 3, 48),
            pooled_projections=torch.randn(1, 32),
        )
    assert there == blocks
    assert all(p.data.data_ptr() == homes[id(p)].data_ptr() for block in blocks for p in block.parameters())
    with pytest.raises(UserError, match="offload=blocks cannot be used"):
        blocks[0](torch.randn(1, 16, 16), torch.randn(1, 3, 16), torch.randn(1, 16))


def test_sdxls_autoencoder_stays_in_float32_beside_a_float16_denoiser(folders, priors):
    prior = load_prior(folders["sdxl"], "cpu", torch.float16)
    assert next(prior.vae.parameters()).dtype == torch.float32
    assert next(prior.unet.parameters()).dtype == torch.float16
    other = load_prior(folders["sd3"], "cpu", torch.bfloat16)
    assert next(other.vae.parameters()).dtype == torch.bfloat16
    x, eps, t, z_t = problem(other)
    predicted = other.predict_noise(z_t, t, other.embed(PROMPTS))
    assert predicted.dtype == torch.float32 and torch.isfinite(predicted).all()
