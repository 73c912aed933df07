"""The pocket world's trainers on a pretended CUDA device: no tensor is left behind, and the numbers are the CPU's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.pocket import data, models
from stages.pocket.train.denoisers import LayoutPictures, velocity_loss
from stages.pocket.train.device import device_of, placed, pool_rows
from stages.pocket.train.layout import Pool
from stages.pocket.train.loop import Training
from stages.pocket.train.text import encode_text
from tests.pretend_cuda import pretended

pytest.importorskip("warp", reason="warp-lang is not installed (extra: cuda)")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return data.make_pool(tmp_path_factory.mktemp("pool") / "p", size=32, count=24, seed=5, workers=1)


def test_a_device_is_taken_where_it_is_there_and_asked_for():
    assert device_of(SimpleNamespace(device="auto")) == device_of(SimpleNamespace(device="cpu")) == CPU
    with pytest.raises(SystemExit, match="no CUDA device"):
        device_of(SimpleNamespace(device="cuda"))
    with pretended():
        assert device_of(SimpleNamespace(device="auto")) == CUDA


def test_a_pool_is_kept_on_the_device_and_read_from_its_file_on_the_cpu():
    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    index = np.array([3, 0])
    assert np.array_equal(pool_rows(images, CPU)(index), images[index])
    with pretended() as counts:
        rows_of = pool_rows(images, CUDA)
        before = sum(counts.copies.values())
        rows = rows_of(index)
        assert rows.device.type == "cuda" and sum(counts.copies.values()) - before == 1  # the index alone
        assert np.array_equal(rows.cpu(), images[index])


@pytest.mark.slow
def test_rays_of_a_pool_are_the_same_on_both(pool):
    here = Pool(pool).rays(np.array([3, 7]), 50, 32, np.random.default_rng(0))
    with pretended():
        there = Pool(pool).rays(np.array([3, 7]), 50, 32, np.random.default_rng(0), CUDA)
        assert all(part.device.type == "cuda" for part in there)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.slow
def test_a_unets_lesson_is_the_same_on_both(pool):
    scenes, index = data.load_pool(pool)[2], np.array([3, 5])
    tokenizer, captions = models.make_tokenizer(), ["a red mug", "a blue ball"]
    torch.manual_seed(0)
    encoder = models.make_text_encoder(len(tokenizer)).eval().requires_grad_(False)
    condition = models.make_condition("pixel", models.make_layout(fine=False)).requires_grad_(False)
    alphas = models.make_scheduler().alphas_cumprod

    def unet(x_t, t, text, **conditions):
        assert {x.device.type for x in (x_t, t, text)} == {x_t.device.type}
        return SimpleNamespace(sample=x_t * 0.5 + text.mean())

    def lesson(device):
        def encode(texts):
            return encode_text(tokenizer, encoder, texts)

        conditions = condition.conditions(LayoutPictures(condition, scenes, encode).pictures(captions, index))
        x0 = placed(np.random.default_rng(0).random((2, 3, 64, 64), dtype=np.float32), device)
        generator = torch.Generator().manual_seed(3)
        mean = {"mean": torch.nn.functional.interpolate(conditions["mean"], (64, 64))}
        return velocity_loss(unet, alphas, x0, encode(captions), mean, 2, generator)

    here = float(lesson(CPU))
    with pretended():
        encoder, condition = encoder.to(CUDA), condition.to(CUDA)
        there = lesson(CUDA)
        assert there.device.type == "cuda" and float(there) == pytest.approx(here, rel=1e-4)


def test_a_training_saved_on_a_device_goes_on_there(tmp_path):
    def train(folder, steps, device):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2).to(device)

        def loss_step(step):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)).to(device)
            return (module(x) - 2 * x[:, :2]).square().mean()

        Training({"layer": module}, folder, lr=0.05, steps=steps, warmup=2).run(loss_step)
        return module.weight.detach().cpu()

    whole = train(tmp_path / "cpu", 6, CPU)
    with pretended():
        train(tmp_path / "cuda", 3, CUDA)
        torch.testing.assert_close(train(tmp_path / "cuda", 3, CUDA), train(tmp_path / "cpu3", 3, CPU))
    assert whole.isfinite().all()
