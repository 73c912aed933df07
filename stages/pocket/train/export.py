"""Write the trainers' results: sample grids, and model folders in fp16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from stages.pocket import world


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert uint8 [B, S, S, 3] to [-1, 1] [B, 3, S, S]."""
    return signed(torch.from_numpy(np.array(images)))


def signed(images: Tensor) -> Tensor:
    """Convert uint8 [B, S, S, 3] to [-1, 1] [B, 3, S, S], on their device."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def write_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Write images [B, 3, S, S] in [-1, 1] as one PNG."""
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(images[i : i + columns], 1) for i in range(0, len(images) - columns + 1, columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def half(module):
    """Convert a module to fp16 for saving and return it."""
    return module.half().eval()


def start_from(folder: Path, module: torch.nn.Module) -> None:
    """Load an exported folder's weights into a module of the same architecture."""
    (file,) = folder.glob("*.safetensors")
    module.load_state_dict({k: v.float() for k, v in load_file(file).items()})


def save_prior(
    folder: Path, *, pipeline: str, unet, scheduler, tokenizer, text_encoder, layout=None, vae=None, base=""
) -> None:
    """Write a diffusers folder: model_index.json and one subfolder a component, fp16 safetensors.

    base: where the layout's tensors are that this one shares, relative to its own folder.
    """
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    half(unet).save_pretrained(part / "unet")
    half(text_encoder).save_pretrained(part / "text_encoder")
    if layout is not None:
        layout.save(part / "layout", base)
    scheduler.save_pretrained(part / "scheduler")
    tokenizer.save_pretrained(part / "tokenizer")
    if vae is not None:
        index["vae"] = ["diffusers", "AutoencoderTiny"]
        half(vae).save_pretrained(part / "vae")
    for path in part.glob("*/config.json"):  # without the path that its parts were read from
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (part / "model_index.json").write_text(json.dumps(index, indent=2))
    pocket = {"words": sorted(world.words()), "kinds": list(world.KINDS), "colours": list(world.COLOURS)}
    (part / "pocket.json").write_text(json.dumps(pocket, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
