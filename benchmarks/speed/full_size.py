"""A model of Stable Diffusion 2.1's size with random weights, to time full-size runs without anybody's weights.

What such a run makes is noise; its time and memory are those of the real model, whose networks have these shapes. The
tokenizer is word-level instead of byte-pair, which the embeddings do not notice: 77 tokens either way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = "a an the of on in with and red blue green yellow white black mug ball cat dog house car , "
WORDS += "front side back left right overhead view"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Size:
    """Widths of UNet, autoencoder and text encoder; sample: side of the latents."""

    unet: tuple[int, ...]
    heads: tuple[int, ...]
    vae: tuple[int, ...]
    text: int
    text_layers: int
    text_heads: int
    vocabulary: int
    tokens: int
    sample: int
    layers: int
    groups: int


SIZES = {
    "sd21": Size(
        unet=(320, 640, 1280, 1280), heads=(5, 10, 20, 20), vae=(128, 256, 512, 512), text=1024, text_layers=23,
        text_heads=16, vocabulary=49408, tokens=77, sample=64, layers=2, groups=32,
    ),
    "tiny": Size(
        unet=(16, 32, 32, 32), heads=(2, 4, 4, 4), vae=(8, 8, 16, 16), text=32, text_layers=1,
        text_heads=4, vocabulary=64, tokens=16, sample=8, layers=1, groups=4,
    ),
}  # fmt: skip


def networks(size: str) -> dict[str, Any]:
    """Return the three networks by their folder's names, from torch's global generator."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    s = SIZES[size]
    unet = UNet2DConditionModel(
        sample_size=s.sample,
        in_channels=4,
        out_channels=4,
        block_out_channels=s.unet,
        layers_per_block=s.layers,
        attention_head_dim=s.heads,
        cross_attention_dim=s.text,
        use_linear_projection=True,
        norm_num_groups=s.groups,
    )
    vae = AutoencoderKL(
        block_out_channels=s.vae,
        layers_per_block=s.layers,
        latent_channels=4,
        norm_num_groups=s.groups,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )
    text = CLIPTextConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.text,
        intermediate_size=4 * s.text,
        num_hidden_layers=s.text_layers,
        num_attention_heads=s.text_heads,
        max_position_embeddings=s.tokens,
        hidden_act="gelu",
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}


def parameters(parts: dict[str, Any]) -> dict[str, int]:
    """Return how many parameters each network has."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def write_random_model(folder: Path, size: str, *, half: bool, seed: int = 0) -> dict[str, int]:
    """Write a diffusers folder in the layout of Stable Diffusion 2.1-base, epsilon prediction, random weights.

    Args:
        size: a key of SIZES.
        half: store float16.
    Returns: parameters by part.
    """
    import torch
    from diffusers import DDIMScheduler

    torch.manual_seed(seed)
    parts = networks(size)
    for name, part in parts.items():
        (part.half() if half else part).save_pretrained(str(folder / name))
    DDIMScheduler(**BETAS).save_pretrained(str(folder / "scheduler"))
    _tokenizer(SIZES[size].tokens).save_pretrained(str(folder / "tokenizer"))
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.32.0"}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return parameters(parts)


def _tokenizer(tokens: int) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    known = {word: k for k, word in enumerate([*special, *dict.fromkeys(WORDS.split())])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    tokenizer.enable_padding(length=tokens, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(tokens)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=tokens, **names)
