"""The pocket world's trainers: the loop resumes to the bit, losses have their closed forms, pools hold the scenes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.kernels.srgb import srgb_to_linear
from stages.pocket import data, models, world
from stages.pocket.train import layout as layout_trainer
from stages.pocket.train.denoisers import LayoutPictures, batch_of, velocity_loss
from stages.pocket.train.loop import Training
from stages.pocket.train.text import Sentences, encode_text


def linear(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def train(folder, steps: int, stop: int | None = None, **more) -> torch.nn.Linear:
    """A linear layer taught y = 2 x for some steps; `stop`: in two sittings, the first of that many steps."""
    module = linear()

    def loss_step(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (module(x) - 2 * x[:, :2]).square().mean()

    training = Training({"layer": module}, folder, lr=0.05, steps=steps, warmup=2, **more)
    try:
        training.run(loss_step)
    except KeyboardInterrupt:
        training.save()
        return train(folder, steps, **more)
    return module


def test_a_training_in_two_sittings_ends_where_one_in_a_single_sitting_does(tmp_path):
    whole, parts = train(tmp_path / "a", 12), train(tmp_path / "b", 12, stop=5)
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole.bias, parts.bias)
    assert not torch.equal(whole.weight, linear().weight)


def test_a_modules_rate_is_multiplied_by_its_factor(tmp_path):
    still = train(tmp_path / "a", 4, rates={"layer": 0.0}, weight_decay=0.0)
    assert torch.equal(still.weight, linear().weight)


@pytest.mark.parametrize("mean", [None, 0.3])
def test_the_velocity_of_the_rest_costs_nothing_and_an_error_its_square(mean):
    """A network that knows x0: its velocity is of x0 minus the mean where a mean is given."""
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    layout_conditions = {} if mean is None else {"mean": torch.full_like(x0, mean)}
    alphas = models.make_scheduler().alphas_cumprod
    losses = []
    for error in (0.0, 0.1, 0.2):

        def unet(x_t, t, text, error=error, **conditions):
            assert not conditions
            a = alphas[t].view(-1, 1, 1, 1)
            rest, z = x0 - (mean or 0.0), F.pixel_shuffle(x_t, 2)
            eps = (z - a.sqrt() * rest) / (1 - a).sqrt().clamp_min(1e-4)
            v = a.sqrt() * eps - (1 - a).sqrt() * rest + error
            return SimpleNamespace(sample=F.pixel_unshuffle(v, 2))

        generator = torch.Generator().manual_seed(3)
        losses.append(float(velocity_loss(unet, alphas, x0, torch.zeros(4, 1, 1), layout_conditions, 2, generator)))
    assert losses[0] < 1e-3 < losses[1] and losses[2] == pytest.approx(4 * losses[1], rel=0.05)


def test_a_batch_has_all_renders_of_its_meshes_and_one_caption_a_mesh_for_the_layout():
    view = {"view": "front", "shading": "albedo"}
    records = [{"caption": f"a red {kind}"} | view for kind in list(world.KINDS)[:8] for _ in range(4)]
    index, captions, layout_captions = batch_of(records, 0, 3, 16)
    assert len(index) == 16 and all(len(set(index[k : k + 4] // 4)) == 1 for k in range(0, 16, 4))
    for i, text, name in zip(index, captions, layout_captions, strict=True):
        assert name in ("", records[i]["caption"]) and text.startswith(name)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return data.make_pool(tmp_path_factory.mktemp("pool") / "p", size=32, count=24, seed=5, workers=1)


@pytest.mark.slow
def test_a_pool_says_where_its_cameras_and_objects_are(pool):
    images, records, scenes = data.load_pool(pool)
    assert images.shape == (24, 32, 32, 3) and len(records) == 24
    views = scenes.views()
    for k, record in enumerate(records):
        under = (images[k, 0, 0] / 255.0).astype(np.float32)
        assert np.abs(srgb_to_linear(torch.from_numpy(under)).numpy() - scenes.under[k]).max() < 0.02
        assert scenes.bare[k] == float(record["shading"] == "textureless")
        spec = world.parse(record["caption"])
        assert np.isnan(scenes.placement[k, 1]).any() == (spec.other is None)
        angles = float(views.azimuth_deg[k]), float(views.elevation_deg[k])
        assert data.view_class(*angles, data.SIDES) == record["view"] or _near_an_edge(*angles)


def _near_an_edge(azimuth: float, elevation: float) -> bool:
    """Whether the camera's jitter can have moved it to another class than the one it was drawn for."""
    return min(abs(azimuth % 90 - 45), abs(elevation - 60)) < 4


@pytest.mark.slow
def test_smaller_renders_are_averages_in_linear_light(pool):
    images, small = data.load_pool(pool)[0], data.resized_pool(pool, 16)
    linear_large = srgb_to_linear(torch.from_numpy(np.array(images)) / 255)
    expected = F.avg_pool2d(linear_large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert (srgb_to_linear(torch.from_numpy(small) / 255) - expected).abs().max() < 0.01


@pytest.mark.slow
def test_rays_of_a_pool_show_the_colours_of_its_pixels(pool):
    rays = layout_trainer.Pool(pool).rays(np.array([3, 7]), 200, 32, np.random.default_rng(0))
    origins, directions, colours = rays
    images, _, scenes = data.load_pool(pool)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(2, 200), atol=1e-5)
    assert torch.allclose(origins[0, 0], torch.from_numpy(scenes.c2w[3, :3, 3]))
    pixel_colours = {tuple(c) for c in images[3].reshape(-1, 3).tolist()}
    assert {tuple(c) for c in (colours[0] * 255).round().int().tolist()} <= pixel_colours


def test_every_token_of_a_sentence_has_the_number_of_its_word():
    layout = models.make_layout(fine=False)
    sentences = Sentences(layout.config["words"])
    texts, truth = sentences.draw(np.random.default_rng(0), 20, 0.5)
    assert truth.shape == (20, models.TOKENS)
    for text, row in zip(texts, truth, strict=True):
        words = text.split()
        assert row[0] == sentences.other and (row[len(words) + 1 :] == sentences.other).all()
        assert [sentences.number[word] for word in words] == row[1 : len(words) + 1].tolist()
    number = [k for name in ("kinds", "patterns", "colours", "joints") for k in layout.config["words"][name]]
    assert [sentences.number[word] for word in number] == list(range(len(number)))


@pytest.mark.slow
def test_kept_pictures_are_the_layouts_and_another_layout_makes_its_own(pool, tmp_path):
    scenes, keep = data.load_pool(pool)[2], tmp_path / "told.npy"
    tokenizer = models.make_tokenizer()
    torch.manual_seed(0)
    encoder = models.make_text_encoder(len(tokenizer)).eval().requires_grad_(False)
    condition = models.make_condition("pixel", models.make_layout(fine=False)).requires_grad_(False)

    def encode(captions):
        return encode_text(tokenizer, encoder, captions)

    captions, index = ["a red mug", "", "a red mug", "a blue ball"], np.array([3, 5, 8, 3])
    plain = LayoutPictures(condition, scenes, encode).pictures(captions, index)
    writer = LayoutPictures(condition, scenes, encode, keep)
    torch.testing.assert_close(writer.pictures(captions[:3], index[:3]), plain[:3], atol=1e-5, rtol=0)
    assert writer.available.nonzero()[0].tolist() == [3, 8]  # not the empty caption's
    writer.save()

    calls = []
    reader = LayoutPictures(condition, scenes, lambda texts: calls.append(texts) or encode(texts), keep)
    pictures = reader.pictures(captions[:3], index[:3])
    assert calls == [[""]] and (pictures - plain[:3]).abs().max() <= 0.5 / 255 + 1e-5

    other = models.make_condition("pixel", models.make_layout(fine=False)).requires_grad_(False)
    assert not LayoutPictures(other, scenes, encode, keep).available.any()
    assert not LayoutPictures(condition, scenes[:12], encode, keep).available.any()  # another pool, of the same layout
    assert len(list(tmp_path.glob("told.*.npy"))) == 1
