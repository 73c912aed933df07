"""Gradients through the autoencoder at a smaller side: what they are, how near the whole ones, what they save."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from stages.errors import UserError
from stages.guidance.diffusion.autoencoder import Autoencoder
from stages.guidance.diffusion.footprint import footprint
from stages.guidance.diffusion.plan import make_plan
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.pocket.models import WEIGHTS
from tests import tiny_families, tiny_folders


def shrunk(x, side):
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)


def enlarged(x, side):
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


class Linear(torch.nn.Module):
    """An encoder of four pixels a latent that is one matrix, and a posterior as wide as its mean."""

    config = SimpleNamespace(
        latent_channels=2, scaling_factor=0.5, block_out_channels=(1, 1, 1), shift_factor=0.25, latents_mean=None
    )

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 2, 4, stride=4)
        self.requires_grad_(False)

    def encode(self, pictures):
        mean = self.conv(pictures)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.abs()))


def gradient(autoencoder, pictures, g):
    x = pictures.clone().requires_grad_(True)
    latents = autoencoder.encode(x, torch.Generator().manual_seed(1))
    (latents * g).sum().backward()
    return latents.detach(), x.grad


def test_of_a_linear_encoder_it_is_the_product_of_the_transposes():
    module, side = Linear(), 16
    pictures, g = torch.rand(1, 3, side, side), torch.randn(1, 2, side // 4, side // 4)
    _, actual = gradient(Autoencoder(module, gradient_side=8), pictures, g)
    weight = module.conv.weight.double()
    units = torch.eye(3 * side * side, dtype=torch.float64).reshape(-1, 3, side, side)
    down = shrunk(units, 8)
    encoded = F.conv2d(down, weight, stride=4) * 0.5
    rows = enlarged(encoded, side // 4).flatten(1)  # a picture's unit vector to all latents: the transpose of U K D
    torch.testing.assert_close(actual.flatten().double(), rows @ g.double().flatten(), rtol=1e-5, atol=1e-6)


def test_the_latents_are_those_of_the_whole_picture_with_its_noise():
    pictures, g = torch.rand(2, 3, 16, 16), torch.zeros(2, 2, 4, 4)
    for sample in (True, False):
        whole, part = (gradient(Autoencoder(Linear(), sample, gradient_side=s), pictures, g)[0] for s in (None, 8))
        assert torch.equal(whole, part)
    with torch.no_grad():  # nothing else is computed where no gradient is asked for
        calls, module = [], Linear()
        module.conv.register_forward_hook(lambda *_: calls.append(1))
        Autoencoder(module, gradient_side=8).encode(pictures, torch.Generator())
    assert len(calls) == 1


def test_of_a_real_autoencoder_it_matches_float64_differences():
    torch.manual_seed(3)
    module = tiny_families.vae(4, scaling_factor=0.2).eval().requires_grad_(False)
    pictures, g = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    _, actual = gradient(Autoencoder(module, gradient_side=32), pictures, g)
    module.double()

    def value(x):
        return (enlarged(module.encode(shrunk(x, 32)).latent_dist.mean * 0.2, 8) * g.double()).sum()

    along, x, h = torch.randn(1, 3, 64, 64, dtype=torch.float64), pictures.double(), 1e-5
    numeric = float(value(x + h * along) - value(x - h * along)) / (2 * h)
    assert float((actual.double() * along).sum()) == pytest.approx(numeric, rel=1e-3)


@pytest.mark.slow
def test_between_smooth_pictures_a_trained_autoencoders_is_near_the_whole_one():
    """A render of few pixels, enlarged, on its way to another."""
    from diffusers import AutoencoderTiny

    module = AutoencoderTiny.from_pretrained(WEIGHTS / "latent" / "vae").eval().requires_grad_(False)
    vae = Autoencoder(module)
    g = torch.Generator().manual_seed(0)
    here, there = (enlarged(torch.rand(1, 3, 4, 4, generator=g) * 2 - 1, 128) for _ in range(2))
    towards = (vae.encode(here, g) - vae.encode(there, g)).detach()

    def of_render(side):
        """In the pixels that a stage would have rendered."""
        vae.gradient_side = side
        return F.avg_pool2d(gradient(vae, here, towards)[1], 8).flatten()

    whole, half, quarter = of_render(None), of_render(64), of_render(32)
    near = [float(F.cosine_similarity(x, whole, dim=0)) for x in (half, quarter)]
    assert near[0] > 0.97 > near[1] > 0.85, near


@pytest.mark.slow
@pytest.mark.parametrize("side, share", [(32, 0.75), (16, 0.5625)])
def test_it_saves_work_and_memory_as_they_are_foretold(tmp_path, side, share):
    """Forwards the whole picture, forwards and backwards the smaller one, against twice the whole."""
    folder = tiny_folders.stable_diffusion(tmp_path / "sd")
    whole, part = DiffusionSettings(), DiffusionSettings(vae_gradient=side)
    flops, bytes_kept = [], []
    for settings in (whole, part):
        prior = load_prior(folder, "cpu", settings=settings)
        x = torch.rand(2, 3, 64, 64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            prior.autoencoder.encode(x, torch.Generator()).sum().backward()
        flops.append(counter.get_total_flops())
        plan = make_plan(folder, settings)
        bytes_kept.append(footprint(plan, settings, torch.device("cpu"), images=8, predictions=1).images)
    assert flops[1] / flops[0] == pytest.approx(share, rel=0.05)
    assert bytes_kept[1] < 0.7 * bytes_kept[0]


@pytest.mark.parametrize("side", [20, 64, 128])
def test_a_side_that_does_not_fit_is_refused_before_loading(tmp_path, side):
    folder = tiny_folders.stable_diffusion(tmp_path / "sd")
    with pytest.raises(UserError, match="wanted a multiple of .* below the"):
        make_plan(folder, DiffusionSettings(vae_gradient=side))


def test_a_prior_of_pixels_has_no_such_side(tmp_path):
    folder = tiny_folders.deepfloyd(tmp_path / "if")
    with pytest.raises(UserError, match="without an autoencoder"):
        make_plan(folder, DiffusionSettings(vae_gradient=8))
