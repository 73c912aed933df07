"""CLIP scores: the folder's own preprocessing, text pooling, caching, gradients, errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.guidance.clip import ClipScorer, Preprocessing, check_clip_folder
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from tests.tiny_clip import openai_like, pocket_like


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    return pocket_like(tmp_path_factory.mktemp("pocket"))


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    return openai_like(tmp_path_factory.mktemp("openai"))


def smooth_image(height: int, width: int) -> np.ndarray:
    """A picture with edges and gradients, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.09
    return (255 * np.stack([x, np.where(disc, 0.9, y), np.where(disc, 0.1, 1 - x)], -1)).round().astype(np.uint8)


@pytest.mark.parametrize("height, width", [(64, 64), (150, 150), (128, 200), (40, 33)])
@pytest.mark.parametrize("which", ["pocket", "openai"])
def test_preprocessing_agrees_with_the_folders_own_processor(which, height, width, request):
    from transformers import CLIPImageProcessor

    folder = request.getfixturevalue(which)
    picture = smooth_image(height, width)
    theirs = CLIPImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt").pixel_values
    preprocess = Preprocessing.read(folder)
    ours = preprocess(torch.from_numpy(picture)[None] / 255.0)
    assert ours.shape == theirs.shape
    rounding = 2.01 / 255 / min(preprocess.std)  # theirs rounds to 8 bits after each of the two resizing passes
    assert (ours - theirs).abs().max() < rounding


@pytest.mark.parametrize("which", ["pocket", "openai"])
def test_scores_equal_the_whole_transformers_model(which, request):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    folder = request.getfixturevalue(which)
    texts = ["a red mug", "a green chair", "a blue ball on a red cube"]
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    side = {"pocket": 64, "openai": 56}[which]
    picture = smooth_image(side, side)  # nothing is resized
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image
    scorer = ClipScorer(folder)
    images = srgb_to_linear(torch.from_numpy(picture)[None] / 255.0)
    assert torch.allclose(scorer.scores(images, texts) * scorer.logit_scale, logits, atol=2e-4)


def test_every_word_of_a_caption_changes_its_embedding(pocket):
    scorer = ClipScorer(pocket)
    base, *others = scorer.embed_texts(
        [
            "a yellow mug on a red table",
            "an yellow mug on a red table",
            "a red mug on a red table",
            "a yellow mug on a red cube",
        ]
    )
    assert min(float((base - other).norm()) for other in others) > 1e-3


def test_a_text_embeds_the_same_alone_and_beside_a_longer_one(pocket):
    together = ClipScorer(pocket).embed_texts(["a red mug", "a red ball next to a blue table"])[0]
    assert torch.allclose(together, ClipScorer(pocket).embed_texts(["a red mug"])[0], atol=1e-6)


def test_embeddings_are_unit_vectors_and_texts_are_encoded_once(pocket):
    scorer = ClipScorer(pocket)
    images = torch.rand(3, 80, 80, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scorer.embed_images(images).norm(dim=-1), torch.ones(3), atol=1e-5)
    first = scorer.embed_texts(["a red mug", "a car", "a red mug"])
    assert torch.equal(first[0], first[2])
    scorer.model.text_model = None  # nothing is left to encode with
    assert torch.equal(scorer.embed_texts(["a car"])[0], first[1])


def test_images_are_taken_as_linear(pocket):
    scorer = ClipScorer(pocket)
    linear = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(scorer.embed_images(linear), scorer.embed_srgb(linear_to_srgb(linear)))
    assert float((scorer.embed_images(linear) - scorer.embed_srgb(linear)).abs().max()) > 1e-4


@pytest.mark.parametrize("which", ["pocket", "openai"])
def test_score_gradient_agrees_with_finite_differences(which, request):
    scorer = ClipScorer(request.getfixturevalue(which))
    scorer.model.double()
    to = scorer.preprocess
    generator = torch.Generator().manual_seed(2)
    srgb = 0.3 + 0.4 * torch.rand(1, 70, 70, 3, generator=generator, dtype=torch.float64)
    direction = torch.randn(srgb.shape, generator=generator, dtype=torch.float64)
    text = scorer.embed_texts(["a red mug"])[0].double()

    def score(x):
        pooled = scorer.model.vision_model(pixel_values=to(x)).pooler_output
        return (torch.nn.functional.normalize(scorer.model.visual_projection(pooled), dim=-1) @ text).sum()

    srgb.requires_grad_()
    (gradient,) = torch.autograd.grad(score(srgb), srgb)
    h = 1e-5
    numeric = (score(srgb + h * direction) - score(srgb - h * direction)) / (2 * h)
    assert abs(numeric.item()) > 1e-8
    assert torch.allclose((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-10)


def test_score_reaches_linear_images_with_a_gradient(pocket):
    images = torch.full((1, 64, 64, 3), 0.3, requires_grad=True)
    ClipScorer(pocket).scores(images, ["a red mug"]).sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().max() > 0


def test_a_caption_that_does_not_fit_is_refused(pocket):
    with pytest.raises(UserError, match="tokens and it reads 20"):
        ClipScorer(pocket).embed_texts(["a red mug" + " on a red mug" * 10])


def test_folders_that_are_no_clip_are_refused(pocket, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ClipScorer(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert'"):
        ClipScorer(tmp_path)
    (tmp_path / "config.json").write_text((pocket / "config.json").read_text())
    with pytest.raises(UserError, match="safetensors"):
        ClipScorer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    (tmp_path / "preprocessor_config.json").write_text((pocket / "preprocessor_config.json").read_text())
    with pytest.raises(UserError, match=r"Cannot read .*model\.safetensors"):
        ClipScorer(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_std": [0.5, 0.5]}, "image_std"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_mean": [0.5, "x", 0.5]}, "image_mean"),
        ({"resample": [3]}, "resamples"),
        ({"crop_size": {"height": 224, "width": {}}}, "size"),
        ({"size": {"shortest_edge": "x"}}, "size"),
        ({"size": {"shortest_edge": 0}}, "size"),
        (
            {"size": {"height": 64, "width": 7}, "do_center_crop": False},
            r"of \(7, 64\) pixels, and its model sees 64 x 64",
        ),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "of 32 pixels a side, and its model sees 64 x 64"),
        ({"do_resize": False, "do_center_crop": False}, "of any size, and its model sees 64 x 64"),
    ],
)
def test_a_processors_config_of_other_kinds_is_refused(pocket, tmp_path, change, words):
    folder = shutil.copytree(pocket, tmp_path / "clip")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        check_clip_folder(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", '{"model_max_length": {}}'),
        ("config.json", "[]"),
    ],
)
def test_other_files_of_other_kinds_are_refused(pocket, tmp_path, name, text):
    folder = shutil.copytree(pocket, tmp_path / "clip")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}"):
        ClipScorer(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(pocket, tmp_path):
    """Without its settings the tokenizer makes special tokens of its own, beyond the model's last."""
    folder = shutil.copytree(pocket, tmp_path / "clip")
    (folder / "tokenizer_config.json").write_text('{"unk_token": "[UNK]"}')
    with pytest.raises(UserError, match="does not fit together") as error:
        ClipScorer(folder)
    assert "has embeddings for 60" in error.value.why


def test_a_clip_that_names_more_layers_than_its_weights_hold_is_refused_at_once(pocket, tmp_path):
    """2,000 layers took nine seconds to be made, before their weights were missed."""
    folder = shutil.copytree(pocket, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 2000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Cannot load the CLIP") as error:
        ClipScorer(folder)
    assert "2000 layers of the vision model, and the weights hold 4" in error.value.why


@pytest.mark.parametrize("pad", [{}, {"pad_token": ""}])
def test_a_tokenizer_without_its_special_tokens_is_refused(pocket, tmp_path, pad):
    """Without one for unknown words, and without one to pad with as well."""
    folder = shutil.copytree(pocket, tmp_path / "clip")
    path = folder / "tokenizer_config.json"
    known = {key: value for key, value in json.loads(path.read_text()).items() if key != "unk_token"}
    path.write_text(json.dumps(known | pad if pad else {"a": []}))
    with pytest.raises(UserError, match="Cannot load the CLIP tokenizer"):
        ClipScorer(folder)
