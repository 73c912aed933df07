"""Random CLIP folders built for tests: one as the pocket world saves its own, one with OpenAI's tokenizer and crop."""

from __future__ import annotations

from pathlib import Path

import torch

from stages.guidance.clip import ClipScorer
from stages.guidance.clip_guidance import ClipGuidance, ClipGuidanceSettings
from stages.pocket.models import CLIP_EOS, make_clip, make_tokenizer
from stages.prompts import ViewPrompts
from tests.tiny_folders import byte_tokenizer


def pocket_like(folder: Path, seed: int = 0) -> Path:
    """The pocket CLIP's architecture, tokenizer and processor with random weights."""
    from transformers import CLIPImageProcessor

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(CLIP_EOS)
    clip = make_clip(len(tokenizer))
    with torch.no_grad():  # fresh weights are so small that all texts embed nearly alike
        clip.text_model.embeddings.token_embedding.weight.mul_(50)
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    size = {"height": 64, "width": 64}
    CLIPImageProcessor(do_center_crop=False, size=size, image_mean=half, image_std=half).save_pretrained(folder)
    return folder


def openai_like(folder: Path, seed: int = 0) -> Path:
    """A tiny CLIPModel behind OpenAI's preprocessing (shorter side, centre crop) and a byte-level CLIPTokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(folder)
    text = {
        "vocab_size": 514,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "pad_token_id": 513,
        "bos_token_id": 512,
        "eos_token_id": 513,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 16,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    with torch.no_grad():
        clip.text_model.embeddings.token_embedding.weight.mul_(50)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size, crop = {"shortest_edge": 56}, {"height": 48, "width": 48}
    CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(folder)
    return folder


def guide_of(folder: Path, prompt: str = "a red ball") -> ClipGuidance:
    """A guidance by the CLIP of a folder."""
    return ClipGuidance(ClipScorer(folder), ClipGuidanceSettings(), ViewPrompts(prompt), torch.Generator())
