"""The measurement of the pocket models: captions, distractors, sampling, and the command on tiny random folders."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.pocket import chain, fidelity, pocket
from benchmarks.quality import metrics
from stages.pocket import data, world
from tests.tiny_clip import pocket_like
from tests.tiny_folders import pocket_latent, pocket_pixel


def test_every_listed_caption_is_held_out_and_parses():
    captions = pocket.held_out_captions()
    lines = [line for line in world.HELDOUT_FILE.read_text().split("\n") if line]
    assert len(captions) == len(set(captions)) == len(lines)
    assert all(world.held_out(world.parse(caption)) for caption in captions)


@pytest.mark.parametrize("textureless", [False, True])
def test_candidates_are_of_different_meaning_and_every_caption_is_among_them(textureless):
    captions = pocket.held_out_captions()
    texts = pocket.with_distractors(captions, textureless)
    assert len({metrics.meaning(text) for text in texts}) == len(texts) == (85 if textureless else 100)
    truth = metrics.truth_of(captions, texts, textureless)
    expected = [metrics.geometry_text(c) if textureless else c for c in captions]
    assert [metrics.meaning(texts[k]) for k in truth] == [metrics.meaning(w) for w in expected]
    assert texts == pocket.with_distractors(captions, textureless)


class PointPrior:
    """A prior whose data are two points, -1/2 under "low" and +1/2 under anything else: its denoiser is exact."""

    resolution = 4
    alphas_cumprod = torch.linspace(0.9999, 0.001, 200)

    def embed(self, prompts):
        return torch.tensor([-0.5 if p == "low" else 0.5 for p in prompts])

    def encode(self, images, generator):
        return images.permute(0, 3, 1, 2) * 2 - 1

    def decode(self, x):
        return (x.permute(0, 2, 3, 1) + 1) / 2

    def predict_noise(self, z, t, embedding, context=None):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (z - a.sqrt() * embedding.view(-1, 1, 1, 1)) / (1 - a).sqrt()


def test_ddim_samples_of_an_exact_denoiser_are_its_data():
    samples = pocket.ddim_samples(PointPrior(), ["low", "high", "low"], scale=1.0, steps=12, seed=0, batch=2)
    assert samples.shape == (3, 4, 4, 3)
    assert torch.allclose(samples.mean((1, 2, 3)), torch.tensor([0.25, 0.75, 0.25]), atol=1e-3)
    assert samples.std((1, 2, 3)).max() < 1e-3


def test_samples_without_guidance_ask_for_the_prompt_alone():
    """A scale of 1 is the prompt's own prediction: half the work, and what a scale next to it comes to."""

    class Counting(PointPrior):
        rows = 0

        def predict_noise(self, z, t, embedding, context=None):
            self.rows += len(z)
            return super().predict_noise(z, t, embedding, context)

    plain, guided = Counting(), Counting()
    first = pocket.ddim_samples(plain, ["low", "high"], scale=1.0, steps=5, seed=0)
    second = pocket.ddim_samples(guided, ["low", "high"], scale=1.0 + 1e-6, steps=5, seed=0)
    assert plain.rows == guided.rows / 2 == 10
    assert torch.allclose(first, second, atol=1e-4)


def test_ddim_samples_repeat_with_their_seed():
    first, second, other = (pocket.ddim_samples(PointPrior(), ["low"], scale=2.0, steps=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_the_command_measures_and_writes_pictures_and_one_line(tmp_path, capsys):
    clip = pocket_like(tmp_path / "clip")
    words = [
        "--clip",
        str(clip),
        "--pixel",
        str(pocket_pixel(tmp_path / "pixel")),
        "--latent",
        str(pocket_latent(tmp_path / "latent")),
        "--models",
        "truth,pixel,latent",
        "--steps",
        "2",
        "--limit",
        "3",
    ]
    assert pocket.main([*words, "--out", str(tmp_path / "out")]) == 0
    (line,) = [json.loads(text) for text in (tmp_path / "out" / "pocket.jsonl").read_text().splitlines()]
    assert line["settings"]["candidates"] == 100
    assert [line["truth"][look]["candidates"] for look in ("colour", "textureless")] == [100, 85]
    for name in ("pixel", "latent"):
        assert 0 <= line[name]["r_precision"] <= 100
        assert line[name]["samples"] == 3
        assert (tmp_path / "out" / f"pocket_{name}_samples.png").stat().st_size > 1000
    assert "pixel:" in capsys.readouterr().out


def test_a_missing_model_is_said_without_a_traceback(tmp_path, capsys):
    assert pocket.main(["--clip", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no such folder" in capsys.readouterr().out
    assert not (tmp_path / "pocket.jsonl").exists()


class KnowingPrior:
    """A pixel prior that knows each picture up to a constant error, whatever the noise."""

    alphas_cumprod = torch.linspace(0.9999, 0.001, 200)

    def __init__(self, size: int, error: float) -> None:
        self.resolution, self.error, self.clean = size, error, []

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1)

    def encode(self, images, generator):
        self.clean.append(images.permute(0, 3, 1, 2) * 2 - 1)
        return self.clean[-1]

    def decode(self, x):
        return x.permute(0, 2, 3, 1) / 2 + 0.5

    def predict_noise(self, z, t, embedding, context=None):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (z - a.sqrt() * (self.clean[-1] + 2 * self.error)) / (1 - a).sqrt()


@pytest.fixture(scope="module")
def few():
    return fidelity.shots(8, 32, data.COARSE_CAMERAS, seed=1)


@pytest.mark.slow
def test_renders_are_of_held_out_captions_and_of_all_four_kinds(few):
    assert [shot.kind for shot in few] == [*fidelity.KINDS] * 2
    for shot in few:
        spec = world.parse(shot.caption)
        assert world.held_out(spec)
        assert shot.kind == "clay" or shot.kind == (
            "pair" if spec.other else "plain" if spec.pattern == "plain" else "pattern"
        )
        assert shot.words.endswith(", clay render") == (shot.kind == "clay")


@pytest.mark.parametrize("error", [0.1, 0.01])
def test_x0_of_a_prior_with_a_known_error_has_the_psnr_of_that_error(few, error):
    rows = fidelity.x0_psnr(KnowingPrior(32, error), few, (0.1, 0.9))
    assert rows == {
        "0.1": pytest.approx(-20 * math.log10(error), abs=0.05),
        "0.9": pytest.approx(-20 * math.log10(error), abs=0.05),
    }


def test_a_perfect_autoencoder_beats_averages_and_finer_averages_beat_coarser_ones(few):
    rows = fidelity.autoencoder_psnr(KnowingPrior(32, 0.0), few)
    assert rows["autoencoder"] > 60 > rows["2x average"] > rows["4x average"] > rows["8x average"] > 5


@pytest.mark.slow
def test_words_allow_more_than_the_variation_hides():
    rows = fidelity.ceiling(4, seed=3)
    assert set(rows) == {"all", *fidelity.KINDS} and 24 < rows["all"] < 45


def test_only_pixels_that_show_the_object_count():
    truth = torch.full((16, 16, 3), 0.5)
    truth[4:12, 4:12] = 0.9
    picture = truth.clone()
    picture[0] = 0.0  # of the backdrop
    assert fidelity.object_psnr(picture, truth) > 80
    picture[4:12, 4:12] = 0.8
    assert fidelity.object_psnr(picture, truth) == pytest.approx(20, abs=1e-3)
    assert fidelity.object_psnr(truth, torch.full((16, 16, 3), 0.5)) is None


@pytest.mark.slow
def test_the_chain_compares_each_step_of_a_run_with_the_truth(tmp_path, monkeypatch):
    from stages.guidance.diffusion.prior import load_prior

    monkeypatch.setattr(chain, "LARGE", 128)
    settings = {"coarse.steps": 2, "fine.steps": 1, "fine.tets": 24, "fine.resolution": 64, "export.texture_size": 64}
    settings |= {"coarse.start.steps": 60, "export.turntable_frames": 0}
    prior = load_prior(pocket.WEIGHTS / "pixel", "cpu")
    facts = chain.measure_chain(prior, ["a red mug"], tmp_path, settings=settings)
    assert set(facts["small"]) == {"layout", "x0", "coarse", "fine"} and set(facts["large"]) == {
        "layout",
        "coarse",
        "fine",
    }
    assert facts["small"]["layout"] > 18 and facts["small"]["x0"] > 18  # a mug, not grey
    assert facts["small"]["coarse"] > 12  # begun from the layout's volume
    assert facts["finer"] in (0, 1) and (tmp_path / "pocket_chain.png").stat().st_size > 1000
