"""SDXL, Stable Diffusion 3 and Flux folders as they are loaded: what is refused, and what saves memory."""

import json
import shutil

import pytest
import torch

from stages.errors import UserError
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from tests import tiny_families
from tests.guidance.diffusion.family_cases import PROMPTS, problem


def test_prompts_given_at_loading_are_embedded_one_encoder_at_a_time_before_the_denoiser(family_folders, monkeypatch):
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
    prior = load_prior(family_folders["sd3"], "cpu", prompts=texts)
    assert order == ["clip", "clip", "t5", "transformer"]
    assert all(encoder._model is None for encoder in prior.text.encoders)
    whole = load_prior(family_folders["sd3"], "cpu")
    order.clear()
    torch.testing.assert_close(prior.embed(texts), whole.embed(texts))
    assert order == []


@pytest.fixture
def copied(family_folders, tmp_path):
    return lambda name: shutil.copytree(family_folders[name], tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(folder, pattern, **settings):
    with pytest.raises(UserError, match=pattern) as error:
        load_prior(folder, "cpu", settings=DiffusionSettings(**settings))
    assert error.value.what and error.value.why and error.value.fix


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_3", "transformer", "vae", "scheduler"])
def test_missing_component_of_a_transformer_model_is_named(copied, part):
    folder = copied("sd3")
    shutil.rmtree(folder / part)
    refuse(folder, f"its {part}/ is missing")


def test_parts_of_different_models_are_refused(copied, family_folders):
    folder = copied("sd3")
    shutil.rmtree(folder / "text_encoder_3")
    shutil.copytree(family_folders["flux"] / "text_encoder_2", folder / "text_encoder_3")
    refuse(folder, "text encoder gives 40 numbers a token and its transformer wants 48")
    shutil.rmtree(folder / "text_encoder_3")
    shutil.copytree(family_folders["sd3"] / "text_encoder_3", folder / "text_encoder_3")
    edit(folder / "transformer" / "config.json", pooled_projection_dim=40)
    refuse(folder, "gives 32 numbers in the pooled embedding and its transformer wants 40")
    edit(folder / "transformer" / "config.json", pooled_projection_dim=32, in_channels=16)
    refuse(folder, "16 input channels, which is not what 4 latent channels need")


def test_sdxl_refiner_is_refused(copied):
    """Its five sizes leave another width to the pooled embedding."""
    folder = copied("sdxl")
    edit(folder / "unet" / "config.json", projection_class_embeddings_input_dim=5 * 8 + 20)
    refuse(folder, "gives 20 numbers in the pooled embedding and its unet wants 12")


def test_resolution_that_the_model_cannot_draw_is_refused(family_folders):
    refuse(family_folders["sd3"], "cannot work at 72.*multiple of 16 up to 128; it was trained at 64", resolution=72)
    refuse(family_folders["sd3"], "cannot work at 256", resolution=256)
    assert load_prior(family_folders["sdxl"], "cpu", settings=DiffusionSettings(resolution=72)).resolution == 72


def test_slices_of_attention_that_a_transformer_does_not_have_are_refused(family_folders):
    for name in ("sd3", "flux"):
        refuse(family_folders[name], "attention_slicing is for UNets; its .*Transformer2DModel", attention_slicing=True)
    prior = load_prior(family_folders["sdxl"], "cpu", settings=DiffusionSettings(attention_slicing=True))
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


def test_another_autoencoder_of_the_same_latents_takes_the_place_of_the_models_own(family_folders, tmp_path):
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    tiny_families.tiny_vae(4).save_pretrained(str(folder))
    prior = load_prior(family_folders["sdxl"], "cpu", settings=DiffusionSettings(autoencoder=str(folder)))
    images = torch.rand(1, 64, 64, 3)
    expected = prior.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latents
    assert type(prior.vae).__name__ == "AutoencoderTiny"
    torch.testing.assert_close(prior.encode(images, torch.Generator()), expected)
    other = tmp_path / "other"
    tiny_families.tiny_vae(16).save_pretrained(str(other))
    refuse(family_folders["sdxl"], "latents have 16 channels, the model's 4", autoencoder=str(other))
    refuse(family_folders["sdxl"], "no config.json in it", autoencoder=str(tmp_path / "nothing"))


def test_careful_memory_settings_do_not_change_the_result(family_folders, family_priors):
    s = DiffusionSettings(max_batch=1, vae_slicing=True, vae_checkpointing=True, offload="blocks", text_device="cpu")
    careful, plain = load_prior(family_folders["sdxl"], "cpu", settings=s), family_priors["sdxl"]
    x, eps, t, z_t = problem(plain)
    reference = plain.predict_noise(z_t, t, plain.embed(PROMPTS))
    torch.testing.assert_close(careful.predict_noise(z_t, t, careful.embed(PROMPTS)), reference, rtol=1e-4, atol=1e-5)
    images = torch.rand(2, 64, 64, 3, requires_grad=True)
    results = []
    for prior in (careful, plain):
        latents = prior.encode(images, torch.Generator().manual_seed(0))
        results.append((latents.detach(), torch.autograd.grad(latents.square().sum(), images)[0], prior.decode(x)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_tiled_autoencoder_runs_beyond_its_own_size(family_folders):
    prior = load_prior(family_folders["sdxl"], "cpu", settings=DiffusionSettings(resolution=96, vae_tiling=True))
    assert prior.vae.use_tiling
    images = torch.rand(1, 96, 96, 3, requires_grad=True)
    latents = prior.encode(images, torch.Generator().manual_seed(0))
    assert latents.shape == (1, 4, 12, 12)
    (gradient,) = torch.autograd.grad(latents.square().sum(), images)
    assert (gradient.abs().amax((0, 3)) > 0).all()


def test_offloaded_blocks_are_on_the_device_only_while_they_run(family_priors):
    import copy

    from stages.guidance.diffusion.offload import offload_blocks

    network = copy.deepcopy(family_priors["sd3"].unet)
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


def test_sdxls_autoencoder_stays_in_float32_beside_a_float16_denoiser(family_folders, family_priors):
    prior = load_prior(family_folders["sdxl"], "cpu", torch.float16)
    assert next(prior.vae.parameters()).dtype == torch.float32
    assert next(prior.unet.parameters()).dtype == torch.float16
    other = load_prior(family_folders["sd3"], "cpu", torch.bfloat16)
    assert next(other.vae.parameters()).dtype == torch.bfloat16
    x, eps, t, z_t = problem(other)
    predicted = other.predict_noise(z_t, t, other.embed(PROMPTS))
    assert predicted.dtype == torch.float32 and torch.isfinite(predicted).all()
