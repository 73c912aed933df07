"""Memory counted before loading equals the memory of what is then loaded and run."""

import pytest
import torch

from stages.guidance.diffusion.footprint import embedding_shape, footprint, live_bytes, resident
from stages.guidance.diffusion.plan import make_plan
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.diffusion.weights import Header
from stages.guidance.vsd import RenderScore, VsdSettings
from tests import tiny_families, tiny_folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("footprint")
    return {
        "sdxl": tiny_families.sdxl(root / "sdxl"),
        "sd3": tiny_families.sd3(root / "sd3"),
        "deepfloyd": tiny_folders.deepfloyd(root / "if"),
        "flux": tiny_families.flux(root / "flux"),
    }


def found(folder, images=2, predictions=4, device=CPU, vsd=None, **settings):
    chosen_settings = DiffusionSettings(**settings)
    return footprint(
        make_plan(folder, chosen_settings), chosen_settings, device, images=images, predictions=predictions, vsd=vsd
    )


@pytest.mark.slow
def test_weights_are_those_of_the_loaded_networks(folders):
    prior = load_prior(folders["sdxl"], "cpu")
    counted = found(folders["sdxl"])
    assert counted.weights == {"unet": size(prior.unet), "vae": size(prior.vae)}
    sizes = {f"text_encoder{end}": size(e.load()) for end, e in zip(("", "_2"), prior.text.encoders, strict=True)}
    assert counted.text == sizes
    assert found(folders["deepfloyd"]).weights.keys() == {"unet"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_t5_in_float16_takes_what_it_keeps_in_float32(folders, dtype):
    prior = load_prior(folders["deepfloyd"], "cpu", settings=DiffusionSettings(dtype=dtype))
    assert found(folders["deepfloyd"], dtype=dtype).text == {"text_encoder": size(prior.text.encoders[0].load())}


def size(network):
    return sum(p.numel() * p.element_size() for p in network.parameters())


@pytest.mark.slow
def test_precision_halves_weights_but_not_sdxls_autoencoder_in_float16(folders):
    whole, half = found(folders["sdxl"]), found(folders["sdxl"], dtype="float16")
    assert half.weights["unet"] * 2 == whole.weights["unet"] and half.weights["vae"] == whole.weights["vae"]
    assert found(folders["sdxl"], dtype="bfloat16").weights["vae"] * 2 == whole.weights["vae"]
    assert found(folders["sdxl"], device=torch.device("cuda")).dtype == torch.float16
    assert found(folders["sd3"], device=torch.device("cuda")).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_bytes_counted_without_memory_are_those_counted_in_memory(folders, name):
    """The same forward and backward passes once on the meta device and once for real."""
    prior = load_prior(folders[name], "cpu", settings=DiffusionSettings(vae_sample="mode"))
    pictures = torch.rand(2, 3, 64, 64, requires_grad=True)
    live, peak = live_bytes(prior.vae, lambda: prior.autoencoder.encode(pictures, torch.Generator()), backward=True)
    z, t, embedding = torch.randn(4, 4, 8, 8), torch.full((4,), 500.0), prior.embed(["a"] * 4)
    with torch.no_grad():
        _, predicting = live_bytes(prior.unet, lambda: prior.denoiser(z, t, embedding))
    counted = found(folders[name])
    assert counted.images == pytest.approx(max(peak, live + predicting), rel=0.02)


@pytest.mark.parametrize("name", ["deepfloyd", "sdxl", "sd3", "flux"])
def test_text_is_as_long_as_what_the_family_embeds(folders, name):
    """Three encoders of Stable Diffusion 3 give 40 + 256 rows here, and 77 + 256 of the real one."""
    settings = DiffusionSettings(resolution=64 if name == "flux" else None)
    prior = load_prior(folders[name], "cpu", settings=settings)
    assert embedding_shape(make_plan(folders[name], settings)) == tuple(prior.embed(["a red mug"]).shape[1:])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lora", "copy"])
def test_what_vsd_learns_with_is_what_its_lesson_takes(folders, model):
    vsd = VsdSettings(model=model, rank=4)
    plain, counted = found(folders["deepfloyd"], predictions=1), found(folders["deepfloyd"], predictions=1, vsd=vsd)
    prior = load_prior(folders["deepfloyd"], "cpu")
    score = RenderScore(prior, vsd, torch.Generator())
    z, t, camera = torch.randn(2, 3, 16, 16), torch.tensor([500, 500]), torch.zeros(2, 13)
    embedding = prior.embed(["a"] * 2)
    _, lesson = live_bytes(score.unet, lambda: score.noise(z, t, embedding, camera), backward=True)
    learned = sum(4 * p.numel() for p in score.parameters.values())
    assert counted.weights == plain.weights | {"vsd": 3 * learned}  # the numbers themselves and two moments of Adam
    assert counted.images == pytest.approx(lesson, rel=0.03) and counted.images > 2 * plain.images
    assert "vsd" in counted.describe()


@pytest.mark.slow
def test_a_rule_that_looks_at_decoded_pictures_counts_them(folders):
    from dataclasses import replace

    folder = folders["sdxl"]
    chosen_settings = DiffusionSettings()
    plan, device = make_plan(folder, chosen_settings), torch.device("cpu")
    plain, counted = (
        footprint(plan, chosen_settings, device, images=8, predictions=1, decodes=decodes) for decodes in (False, True)
    )
    prior = load_prior(folder, "cpu", settings=chosen_settings)
    z = torch.randn(8, prior.channels, plan.geometry.latents, plan.geometry.latents)
    with torch.no_grad():
        _, decoding = live_bytes(prior.vae, lambda: prior.autoencoder.decode(z))
    assert counted.images >= plain.images and counted.images >= 0.97 * decoding
    assert replace(counted, images=0) == replace(plain, images=0)


@pytest.mark.slow
def test_careful_settings_take_less(folders):
    plain = found(folders["sdxl"])
    assert found(folders["sdxl"], vae_slicing=True).images < 0.7 * plain.images
    assert found(folders["sdxl"], vae_checkpointing=True).images < 0.9 * plain.images
    assert found(folders["sdxl"], max_batch=1).images < plain.images
    assert found(folders["sdxl"], offload="blocks").weights["unet"] < 0.6 * plain.weights["unet"]
    assert found(folders["sdxl"], text_device="cpu").text == {}
    assert found(folders["sdxl"], images=1, predictions=2).images < 0.6 * plain.images


def test_blocks_in_main_memory_leave_the_largest_and_the_rest():
    numbers = {
        "conv_in.weight": 1,
        "down_blocks.0.a": 20,
        "down_blocks.0.b": 3,
        "down_blocks.1.a": 15,
        "mid_block.a": 8,
    }
    assert resident({name: Header("F16", (n,)) for name, n in numbers.items()}) == 1 + 23
    assert resident({"single_transformer_blocks.7.a": Header("F32", (5,)), "x": Header("F32", (2, 2))}) == 4 + 5


@pytest.mark.slow
def test_the_peak_is_the_largest_text_encoder_or_a_step(folders):
    counted = found(folders["sdxl"])
    assert counted.peak == sum(counted.weights.values()) + counted.images
    from dataclasses import replace

    assert replace(counted, text={"t5": 10**9}).peak == 10**9
    assert "GB at most" in counted.describe() and "float32" in counted.describe()
