"""CLIP similarity of images and sentences, from any folder with a CLIPModel, its tokenizer and its processor's config.

The processor's steps (resize, centre crop, normalise) are done in torch, so that scores are differentiable in the
images and torchvision is not needed. Images are linear colour as everywhere; CLIP sees sRGB.
Letters: B images, P texts, D the width of the joint space. Embeddings are unit vectors, scores their cosines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import UserError, check_shape
from stages.guidance.diffusion.folder import check_texts, load_part, read_json
from stages.guidance.diffusion.text import check_max_length
from stages.guidance.diffusion.weights import read_headers
from stages.kernels.srgb import linear_to_srgb
from stages.paths import from_home

RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as processors write them
LARGEST = 8192  # side of a picture, in pixels
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """The steps of a CLIPImageProcessor on an sRGB image in [0, 1].

    Args:
        size: (height, width) to resize to, one number for the shorter side, or None for no resizing.
        crop: (height, width) cut out of the middle, or None.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @staticmethod
    def read(folder: Path) -> Preprocessing:
        """Read preprocessor_config.json, with CLIPImageProcessor's own defaults for absent keys."""
        what = f"Cannot load the CLIP of {folder}"
        config = read_json(folder / "preprocessor_config.json", what)
        resample = config.get("resample", 3)
        if not isinstance(resample, int) or resample not in RESAMPLE:
            raise UserError(what, f"its processor resamples by Pillow's method {resample}", f"one of {list(RESAMPLE)}")
        size = _size(config.get("size", {"shortest_edge": 224}), what) if config.get("do_resize", True) else None
        crop = _size(config.get("crop_size", {"height": 224, "width": 224}), what)
        crop = (crop, crop) if isinstance(crop, int) else crop
        normalise = config.get("do_normalize", True)
        return Preprocessing(
            size=size,
            crop=crop if config.get("do_center_crop", True) else None,
            mode=RESAMPLE[resample],
            mean=_of_channels(config, "image_mean", OPENAI_MEAN, what) if normalise else (0.0, 0.0, 0.0),
            std=_of_channels(config, "image_std", OPENAI_STD, what) if normalise else (1.0, 1.0, 1.0),
        )

    def __call__(self, srgb: Tensor) -> Tensor:
        """sRGB images [B, H, W, 3] in [0, 1] to the model's pixel values [B, 3, h, w]."""
        x = srgb.permute(0, 3, 1, 2)
        size = self.size
        if isinstance(size, int):
            h, w = x.shape[-2:]
            size = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
        if size is not None and size != tuple(x.shape[-2:]):
            if self.mode == "nearest":
                x = F.interpolate(x, size, mode="nearest-exact")
            else:
                x = F.interpolate(x, size, mode=self.mode, align_corners=False, antialias=True).clamp(0, 1)
        if self.crop is not None:
            x = _centre_crop(x, self.crop)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


class ClipScorer:
    """Embeds images and texts with one CLIPModel; frozen weights, gradients to the images.

    Args:
        folder: config.json, *.safetensors, tokenizer files and preprocessor_config.json, as save_pretrained writes.
        device: where the model lives; images are moved there.
    Raises: UserError for a missing, damaged or foreign folder.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        import transformers

        folder = from_home(folder)
        check_clip_folder(folder)
        self.name, self.device = folder.name, torch.device(device)
        self.preprocess = Preprocessing.read(folder)
        _check_layers(folder)
        model = load_part(
            folder,
            "CLIP model",
            lambda: transformers.CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            ),
        )
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = load_tokenizer(folder)
        held = self.model.config.text_config.vocab_size
        if len(self.tokenizer) > held:
            raise UserError(
                f"the CLIP {folder} does not fit together",
                f"its tokenizer knows {len(self.tokenizer)} tokens and its text model has embeddings for {held}",
                "get the folder again, tokenizer and weights of one model",
            )
        self.limit = token_limit(folder, self.tokenizer)
        self._texts: dict[str, Tensor] = {}

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature that turns cosines into logits."""
        return float(self.model.logit_scale.exp())

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed linear images [B, H, W, 3] in [0, 1], unit [B, D]; differentiable in them."""
        check_shape("images", images, (None, None, None, 3))
        return self.embed_srgb(linear_to_srgb(images))

    def embed_srgb(self, images: Tensor) -> Tensor:
        """Embed sRGB images [B, H, W, 3] in [0, 1], unit [B, D]; differentiable in them."""
        check_shape("images", images, (None, None, None, 3))
        pixels = self.preprocess(images.to(self.device, torch.float32))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def grid(self, images: Tensor) -> Tensor:
        """Return the vision model's tokens [B, L, W] of sRGB images [B, H, W, 3] in [0, 1], without the class's."""
        check_shape("images", images, (None, None, None, 3))
        pixels = self.preprocess(images.to(self.device, torch.float32))
        return self.model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts, unit [P, D]; each is encoded once and cached. Raises: UserError for one that does not fit."""
        new = list(dict.fromkeys(text for text in texts if text not in self._texts))
        if new:
            check_captions(self.name, self.tokenizer, self.limit, new)
            tokens = self.tokenizer(new, padding=True, return_tensors="pt")
            out = self.model.text_model(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
            )
            embeddings = F.normalize(self.model.text_projection(out.pooler_output), dim=-1)
            self._texts.update(zip(new, embeddings, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    @torch.no_grad()
    def read_texts(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a network can be told of texts; texts of any length below the CLIP's limit.

        Returns: embeddings [P, D], unit times sqrt(D); states of their tokens [P, L, W]; [P, L] bool which there are.
        """
        vectors = self.embed_texts(texts) * math.sqrt(self.model.config.projection_dim)
        tokens = self.tokenizer(texts, padding="max_length", max_length=self.limit, return_tensors="pt")
        mask = tokens.attention_mask.to(self.device)
        out = self.model.text_model(input_ids=tokens.input_ids.to(self.device), attention_mask=mask)
        return vectors, out.last_hidden_state, mask.bool()

    def scores(self, images: Tensor, texts: list[str]) -> Tensor:
        """Return cosines [B, P] of linear images [B, H, W, 3] and texts; differentiable in the images."""
        return self.embed_images(images) @ self.embed_texts(texts).T


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a CLIP's folder."""
    import transformers

    tokenizer = load_part(
        folder,
        "CLIP tokenizer",
        lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )
    check_max_length(tokenizer, f"Cannot load the CLIP {folder}")
    texts = ["\N{SNOWMAN}", "a red mug"]  # its tokens for unknown words and for padding may be missing
    load_part(folder, "CLIP tokenizer", lambda: tokenizer(texts, padding=True, return_tensors="pt"))
    return tokenizer


def token_limit(folder: Path, tokenizer: Any) -> int:
    """Return how many tokens a CLIP reads of a text, special tokens included."""
    import transformers

    config = load_part(
        folder, "CLIP config", lambda: transformers.CLIPConfig.from_pretrained(folder, local_files_only=True)
    )
    return min(tokenizer.model_max_length, config.text_config.max_position_embeddings)


def check_captions(name: str, tokenizer: Any, limit: int, texts: list[str]) -> None:
    """Raise UserError naming the longest text where the CLIP called `name` does not read all of it."""
    lengths = {text: len(tokenizer(text).input_ids) for text in texts}
    longest = max(lengths, key=lengths.__getitem__)
    if lengths[longest] > limit:
        why = f"{longest!r} is {lengths[longest]} tokens and it reads {limit}"
        raise UserError(f"A caption is too long for the CLIP {name}", why, "shorten it")


def check_clip_folder(folder: Path) -> None:
    """Raise UserError unless the folder looks like a CLIPModel's; reads its small files alone."""
    what = f"Cannot load the CLIP {folder}"
    if not folder.is_dir():
        raise UserError(what, "there is no such folder", "name a folder with a CLIPModel and its processor")
    kind = read_json(folder / "config.json", what).get("model_type")
    if kind != "clip":
        raise UserError(what, f"its config.json says model_type {kind!r}", "use a CLIPModel folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(what, "it has no *.safetensors", "convert its weights, or get the folder again")
    check_texts(folder, what)
    preprocessing = Preprocessing.read(folder)
    vision = read_json(folder / "config.json", what).get("vision_config")
    side = vision.get("image_size", 224) if isinstance(vision, dict) else 224
    output = preprocessing.crop or preprocessing.size
    if output not in (side, (side, side)):
        size = f"{output} pixels a side"
        if not isinstance(output, int):
            size = "any size" if output is None else f"{output[::-1]} pixels"
        why = f"its processor makes pictures of {size}, and its model sees {side} x {side}"
        raise UserError(what, why, "get the folder again")


def _check_layers(folder: Path) -> None:
    """Raise UserError where config.json names more layers than the weights hold: thousands take long to be made."""
    what = f"Cannot load the CLIP {folder}"
    config, names = read_json(folder / "config.json", what), read_headers(sorted(folder.glob("*.safetensors")))
    for tower in ("text", "vision"):
        part, prefix = config.get(f"{tower}_config"), f"{tower}_model.encoder.layers."
        count = part.get("num_hidden_layers") if isinstance(part, dict) else None
        held = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
        if isinstance(count, int) and count > len(held):
            why = f"config.json says {count} layers of the {tower} model, and the weights hold {len(held)}"
            raise UserError(what, why, "get the folder again")


def _size(value: dict | int | list, what: str) -> tuple[int, int] | int:
    """A processor's size entry: (height, width), or one number for the shorter side."""
    sides = [value]
    if isinstance(value, dict):
        sides = [value[name] for name in ("shortest_edge", "height", "width") if name in value]
        sides = sides[:1] if "shortest_edge" in value else sides
    if len(sides) not in (1, 2) or not all(_is_whole(side) and 0 < side <= LARGEST for side in sides):
        raise UserError(what, f"its processor's size is {value!r}", "wanted shortest_edge, or height and width")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1


def _of_channels(
    config: dict[str, Any], name: str, otherwise: tuple[float, float, float], what: str
) -> tuple[float, float, float]:
    """A processor's three numbers of a name."""
    values = config.get(name, otherwise)
    numbers = isinstance(values, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
    if not numbers or len(values) != 3 or (name == "image_std" and not all(values)):
        raise UserError(
            what, f"its processor's {name} is {values!r}", "wanted a number for each of red, green and blue"
        )
    return tuple(values)


def _centre_crop(x: Tensor, crop: tuple[int, int]) -> Tensor:
    """The middle of [B, C, H, W]; black where the crop is larger, as transformers pads."""
    height, width = x.shape[-2:]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    if top < 0 or left < 0:
        up, side = max(0, -top), max(0, -left)
        x = F.pad(x, (side, max(0, crop[1] - width) - side, up, max(0, crop[0] - height) - up))
        top, left = max(0, top), max(0, left)
    return x[..., top : top + crop[0], left : left + crop[1]]
