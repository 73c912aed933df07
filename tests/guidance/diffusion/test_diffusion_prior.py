"""Priors from diffusers folders: loading, equality with diffusers' own computation, gradients, errors."""

import json
import shutil

import pytest
import torch

from stages.cameras import orbit_views
from stages.errors import UserError
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import add_noise
from stages.prompts import ViewPrompts
from tests import tiny_folders

FAMILIES = ("stable_diffusion", "pocket_latent", "pocket_pixel", "deepfloyd")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    return {name: getattr(tiny_folders, name)(root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def priors(folders):
    return {name: load_prior(folder, "cpu") for name, folder in folders.items()}


def noisy(prior, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = prior.encode(torch.rand(batch, 64, 64, 3, generator=generator), generator).detach()
    t = torch.tensor([150, 700])[:batch]
    eps = torch.randn(x.shape, generator=generator)
    return x, eps, t, add_noise(x, eps, prior.alphas_cumprod[t])


@pytest.mark.parametrize(
    ("name", "resolution", "patch", "prediction", "shape"),
    [
        ("stable_diffusion", 64, 1, "epsilon", (4, 8, 8)),
        ("pocket_latent", 64, 2, "v_prediction", (4, 16, 16)),
        ("pocket_pixel", 32, 4, "v_prediction", (3, 32, 32)),
        ("deepfloyd", 16, 1, "epsilon", (3, 16, 16)),
    ],
)
def test_space_patch_and_prediction_are_read_from_the_folder(priors, name, resolution, patch, prediction, shape):
    prior = priors[name]
    assert (prior.resolution, prior.patch, prior.prediction) == (resolution, patch, prediction)
    x, eps, t, z_t = noisy(prior)
    assert x.shape[1:] == shape
    assert prior.predict_noise(z_t, t, prior.embed(["a red mug", "a blue cat"])).shape == x.shape
    assert prior.decode(x).shape == (2, resolution, resolution, 3)


def test_stable_diffusion_noise_is_what_its_own_pipeline_computes(folders, priors):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folders["stable_diffusion"], safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    prior = priors["stable_diffusion"]
    x, eps, t, z_t = noisy(prior)
    prompts = ["a red mug, front view", "a blue cat"]
    embeddings, negatives = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=["", ""])
    torch.testing.assert_close(prior.embed(prompts), embeddings)
    torch.testing.assert_close(prior.embed(["", ""]), negatives)
    torch.testing.assert_close(pipe.scheduler.add_noise(x, eps, t), z_t)
    with torch.no_grad():
        expected = pipe.unet(z_t, t, encoder_hidden_states=embeddings).sample
    torch.testing.assert_close(prior.predict_noise(z_t, t, embeddings), expected)


def test_latents_are_the_vaes_posterior_sample_times_its_scale(priors):
    prior = priors["stable_diffusion"]
    images = torch.rand(2, 64, 64, 3)
    posterior = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    got = prior.encode(images, torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, (posterior.mean + posterior.std * noise) * 0.18215)
    back = prior.decode(got)
    expected = prior.vae.decode(got / 0.18215).sample.permute(0, 2, 3, 1) / 2 + 0.5
    torch.testing.assert_close(back, expected.clamp(0, 1))


def test_posterior_mode_takes_no_randomness(folders):
    prior = load_prior(folders["stable_diffusion"], "cpu", settings=DiffusionSettings(vae_sample="mode"))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    first = prior.encode(torch.full((1, 64, 64, 3), 0.5), generator)
    assert torch.equal(before, generator.get_state())
    torch.testing.assert_close(first, prior.encode(torch.full((1, 64, 64, 3), 0.5), generator))


def test_tiny_vae_latents_and_patched_v_prediction_equal_the_modules(priors):
    prior = priors["pocket_latent"]
    images = torch.rand(2, 64, 64, 3)
    expected = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latents * 0.7
    torch.testing.assert_close(prior.encode(images, torch.Generator()), expected)
    x, eps, t, z_t = noisy(prior)
    embeddings = prior.embed(["a red mug", "a ball"])
    # patches by hand: channel c, row offset i, column offset j -> c * 4 + i * 2 + j
    patched = z_t.reshape(2, 4, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 16, 8, 8)
    with torch.no_grad():
        v = prior.unet(patched, t, encoder_hidden_states=embeddings).sample
    v = v.reshape(2, 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 4, 16, 16)
    alpha_bar = prior.alphas_cumprod[t].view(2, 1, 1, 1)
    expected = alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * z_t
    torch.testing.assert_close(prior.predict_noise(z_t, t, embeddings), expected)


def test_pixel_unet_with_pooled_text_equals_the_module(priors):
    prior = priors["pocket_pixel"]
    assert prior.unet.config.addition_embed_type == "text"
    x, eps, t, z_t = noisy(prior)
    embeddings = prior.embed(["a red mug", "a ball"])
    with torch.no_grad():
        v = prior.unet(torch.nn.functional.pixel_unshuffle(z_t, 4), t, encoder_hidden_states=embeddings).sample
    alpha_bar = prior.alphas_cumprod[t].view(2, 1, 1, 1)
    expected = alpha_bar.sqrt() * torch.nn.functional.pixel_shuffle(v, 4) + (1 - alpha_bar).sqrt() * z_t
    torch.testing.assert_close(prior.predict_noise(z_t, t, embeddings), expected)
    text_matters = prior.predict_noise(z_t, t, prior.embed(["a blue cat"] * 2))
    assert (text_matters - expected).abs().max() > 1e-4


def test_deepfloyd_drops_the_variance_and_masks_the_padding(folders, priors):
    from diffusers import IFPipeline

    absent = dict(safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False)
    pipe = IFPipeline.from_pretrained(folders["deepfloyd"], **absent)
    prior = priors["deepfloyd"]
    # IFPipeline pads to its constant 77, beyond this tiny tokenizer's 16: encode as it does, at 16
    tokens = pipe.tokenizer(["a red mug"], padding="max_length", max_length=16, return_tensors="pt")
    expected = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    torch.testing.assert_close(prior.embed([" A red MUG "]), expected)
    unmasked = pipe.text_encoder(tokens.input_ids)[0]
    assert (unmasked - expected).abs().max() > 1e-4
    x, eps, t, z_t = noisy(prior)
    with torch.no_grad():
        six = pipe.unet(z_t, t, encoder_hidden_states=expected.expand(2, -1, -1)).sample
    assert six.shape[1] == 6
    torch.testing.assert_close(prior.predict_noise(z_t, t, expected.expand(2, -1, -1)), six[:, :3])


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_gradient_reaches_the_images_and_no_weight(priors, name):
    prior = priors[name]
    settings = GuidanceSettings(scale=7.5, t_min=0.3, t_max=0.6)
    guidance = Guidance(prior, settings, ViewPrompts("a red mug"), torch.Generator().manual_seed(0))
    images = torch.rand(2, 48, 48, 3, requires_grad=True)
    output = guidance(images, orbit_views([0.0, 180.0]), 0.0)
    output.loss.backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().sum() > 0
    for network in (prior.unet, prior.vae):
        assert network is None or all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_encoder_gradient_matches_finite_differences(folders):
    prior = load_prior(folders["pocket_latent"], "cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 64, 64, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 4, 16, 16, generator=generator)

    def value(x):
        return (prior.encode(x, generator).double() * weights).sum()

    (gradient,) = torch.autograd.grad(value(image), image)
    direction = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        numeric = (value(image + 1e-4 * direction) - value(image - 1e-4 * direction)) / 2e-4
    assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-2)


def test_small_batches_and_slicing_change_memory_not_results(folders, priors):
    settings = DiffusionSettings(max_batch=1, attention_slicing=True, vae_checkpointing=True, channels_last=True)
    careful = load_prior(folders["stable_diffusion"], "cpu", settings=settings)
    x, eps, t, z_t = noisy(priors["stable_diffusion"])
    embeddings = careful.embed(["a red mug", "a ball"])
    expected = priors["stable_diffusion"].predict_noise(z_t, t, embeddings)
    torch.testing.assert_close(careful.predict_noise(z_t, t, embeddings), expected, rtol=1e-4, atol=1e-5)
    images = torch.rand(1, 64, 64, 3, requires_grad=True)
    grads = []
    for prior in (careful, priors["stable_diffusion"]):
        loss = prior.encode(images, torch.Generator().manual_seed(0)).square().sum()
        grads.append(torch.autograd.grad(loss, images)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_half_precision_network_answers_in_the_callers_precision(folders):
    prior = load_prior(folders["pocket_pixel"], "cpu", torch.bfloat16)
    x, eps, t, z_t = noisy(prior)
    assert x.dtype == torch.float32
    predicted = prior.predict_noise(z_t, t, prior.embed(["a red mug", "a ball"]))
    assert predicted.dtype == torch.float32 and torch.isfinite(predicted).all()


def test_zero_terminal_snr_schedule_is_read_and_survived(tmp_path):
    prior = load_prior(tiny_folders.stable_diffusion(tmp_path / "p", "v_prediction", zero_snr=True), "cpu")
    assert prior.prediction == "v_prediction" and prior.alphas_cumprod[-1] == 0
    x, eps, _, _ = noisy(prior)
    t = torch.tensor([999, 999])
    predicted = prior.predict_noise(eps, t, prior.embed(["a", "b"]))
    torch.testing.assert_close(predicted, eps)  # pure noise: the whole input is the noise


def test_text_encoder_is_freed_embeddings_stay_and_new_prompts_load_it_again(folders):
    prior = load_prior(folders["pocket_pixel"], "cpu")
    before = prior.embed(["a red mug", "a ball"])
    prior.release_text_encoder()
    assert prior.text.encoders[0]._model is None
    torch.testing.assert_close(prior.embed(["a ball", "a red mug"]), before.flip(0))
    assert prior.text.encoders[0]._model is None
    prior.embed(["a cat"])
    assert prior.text.encoders[0]._model is not None


def test_view_words_are_never_cut_off_silently(priors):
    with pytest.raises(UserError, match="too long.*is 20 tokens and the encoder reads 16.*shorten .* about 4 tokens"):
        priors["pocket_latent"].embed(["a red ball " * 5 + ", overhead view"])


@pytest.fixture
def broken(folders, tmp_path):
    def copy(name="pocket_latent"):
        return shutil.copytree(folders[name], tmp_path / "copy")

    return copy


def refuse(folder, pattern, **settings):
    with pytest.raises(UserError, match=pattern) as error:
        load_prior(folder, "cpu", settings=DiffusionSettings(**settings))
    assert error.value.what and error.value.why and error.value.fix


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component_is_named(broken, part):
    folder = broken()
    shutil.rmtree(folder / part)
    refuse(folder, f"its {part}/ is missing")


def test_tokenizer_without_its_words_is_refused(broken, monkeypatch):
    """transformers makes one that knows no word of it, without a sound."""
    folder = broken()
    for path in (folder / "tokenizer").glob("*"):
        if path.name != "tokenizer_config.json":
            path.unlink()
    refuse(folder, "neither tokenizer.json, nor vocab.json and merges.txt, nor a .model file")
    (folder / "tokenizer" / "spiece.model").write_bytes(b"")
    monkeypatch.setattr("stages.guidance.diffusion.text._installed", lambda package: package != "sentencepiece")
    refuse(folder, r"not installed \(sentencepiece\).*pip install sentencepiece protobuf")


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("model_index.json", "model_index.json is damaged"),
        ("unet/config.json", "Cannot load the unet"),
        ("unet/diffusion_pytorch_model.safetensors", "Cannot load the unet"),
        ("vae/diffusion_pytorch_model.safetensors", "Cannot load the vae"),
        ("text_encoder/model.safetensors", "Cannot load the text_encoder"),
        ("tokenizer/tokenizer.json", "Cannot load the tokenizer"),
        ("scheduler/scheduler_config.json", "Cannot load the scheduler"),
    ],
)
def test_damaged_file_is_named(broken, file, pattern):
    folder = broken()
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    refuse(folder, pattern)


def test_weights_that_are_absent_from_the_file_are_not_left_random(broken):
    from safetensors.torch import load_file, save_file

    folder = broken()
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folder / part / f"{file}.safetensors"
        whole = load_file(path)
        save_file({k: v for i, (k, v) in enumerate(whole.items()) if i != 3}, path, metadata={"format": "pt"})
        refuse(folder, f"Cannot load the {part}.*1 missing key")
        save_file(whole, path, metadata={"format": "pt"})


def test_pickled_weights_are_refused(broken):
    folder = broken()
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    refuse(folder, "only pickled weights.*can run code")


def test_missing_variant_names_what_is_there(broken):
    refuse(
        broken(),
        "diffusion_pytorch_model.fp16.safetensors is missing; there is diffusion_pytorch_model.safetensors",
        variant="fp16",
    )


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unsupported_models_say_what_they_are(broken):
    folder = broken()
    index = folder / "model_index.json"
    edit(index, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    refuse(folder, "lists no tokenizer_2, which SDXL needs")
    edit(index, text_encoder_2=None, unet=["diffusers", "UNet2DModel"])
    refuse(folder, "unet is a UNet2DModel.*supported: UNet2DConditionModel")
    edit(index, unet=["diffusers", "UNet2DConditionModel"], scheduler=["diffusers", "EDMEulerScheduler"])
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    refuse(folder, "EDMEulerScheduler .* is neither a discrete variance-preserving schedule nor a rectified flow")
    edit(index, scheduler=["diffusers", "DDPMScheduler"], vae=["diffusers", "VQModel"])
    refuse(folder, "its vae is a VQModel.*supported: AutoencoderKL, AutoencoderTiny")
    edit(index, unet=None, transformer=["diffusers", "PixArtTransformer2DModel"])
    refuse(folder, "its transformer is a PixArtTransformer2DModel.*supported: SD3Transformer2DModel, Flux")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"addition_embed_type": "image"}, "extra conditioning .image."),
        ({"class_embed_type": "timestep"}, "class labels"),
        ({"time_cond_proj_dim": 16}, "guidance as an input"),
        ({"sample_size": None}, "no sample_size"),
        ({"sample_size": 16.5}, "no number of cells"),
        ({"in_channels": 9}, "9 input channels, which is not 4 times a square"),
    ],
)
def test_unet_that_wants_more_than_text_is_refused(broken, change, pattern):
    folder = broken()
    edit(folder / "unet" / "config.json", **change)
    refuse(folder, pattern)


def test_unet_of_another_space_or_text_width_is_refused(broken, folders):
    folder = broken()
    shutil.rmtree(folder / "unet")
    shutil.copytree(folders["deepfloyd"] / "unet", folder / "unet")
    refuse(folder, "text encoder gives 32 numbers a token and its unet wants 24")
    shutil.rmtree(folder / "unet")
    shutil.copytree(folders["pocket_pixel"] / "unet", folder / "unet")
    refuse(folder, "48 input channels, which is not 4 times a square")


def test_neither_folder_nor_hub_id_is_refused(tmp_path):
    refuse(tmp_path / "nothing", "no such folder")
    refuse("stable", "no such folder")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "it is a file")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "model_index.json is missing")


def test_offline_hub_id_says_so(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refuse("owner/name", "HF_HUB_OFFLINE is set and it is not in the cache")
