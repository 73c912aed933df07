"""Teach the camera layout alone, before a UNet learns to draw by it: `python -m stages.pocket.train camera`.

Its mean picture is regressed on renders, words and view numbers, without the noise that a UNet learns through: after
four minutes on two cores a bus is long from the side and narrow from the front.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cameras import orbit_views
from stages.guidance.diffusion.camera import CameraLayout, view_numbers
from stages.pocket import data, models
from stages.pocket.training import Training

LEARNT = ("fine", "coarse")
GRID_PROMPTS = ("a yellow bus", "a red chair", "a blue duck", "a red mug")


def camera_from(start: Path | None) -> CameraLayout | None:
    """The camera layout of an exported folder, None where there is none yet."""
    return None if start is None or not (start / "camera").is_dir() else CameraLayout.load(start / "camera")


def learnt(camera: CameraLayout) -> dict[str, torch.nn.Module]:
    """The layers of a layout that are taught together with a UNet; what it knows of the world stays as it is."""
    return {f"camera.{name}": getattr(camera, name).requires_grad_() for name in LEARNT}


def seen_by(camera: CameraLayout | None, records: list[dict], indices: np.ndarray, text: Tensor, step: int) -> dict:
    """The camera's residuals for a batch of renders, none in one of five steps."""
    if camera is None or step % data.UNSEEN == 0:
        return {}
    with torch.no_grad():
        features = camera.features(text, data.view_numbers_of(records, indices))
    return camera.residuals(features)


def train_camera(args: argparse.Namespace) -> None:
    """The camera layout beside the pixel UNet in --out or --start, under that UNet's text encoder."""
    from transformers import AutoTokenizer, CLIPTextModel

    from stages.pocket import train as tools  # which imports this module

    folder = args.start or args.out / "pixel"
    pool = data.make_pool(args.data / "pixel", size=64, count=args.images or 60000, seed=args.seed)
    images, records = data.load_pool(pool)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    camera = (camera_from(folder) or models.make_camera(3 * models.PIXEL_PATCH**2)).requires_grad_()
    for layer in learnt(camera).values():  # not yet: they speak to a UNet
        layer.requires_grad_(False)
    work = args.work / "camera"
    training = Training({"camera": camera}, work, lr=args.lr or 2e-3, steps=args.steps, minutes=args.minutes)

    def seen(captions: list[str], numbers: Tensor) -> Tensor:
        with torch.no_grad():
            text = tools.encode_text(tokenizer, text_encoder, captions)
        return camera.picture(camera.features(text, numbers))

    def loss_step(step: int) -> Tensor:
        chosen = np.sort(data.batch_indices(args.seed, step, args.batch, len(records)))
        captions = data.captions_for(records, chosen, args.seed, step, tools.UNCONDITIONAL)
        x0 = F.pixel_unshuffle(tools.to_tensor(images[chosen]), models.PIXEL_PATCH)
        return (seen(captions, data.view_numbers_of(records, chosen)) - x0).square().mean()

    def grid() -> None:
        numbers = view_numbers(orbit_views(torch.arange(8) * 45.0, 15.0), torch.full((3,), 0.35))
        with torch.no_grad():
            pictures = [seen([prompt] * 8, numbers) for prompt in GRID_PROMPTS]
        path = work / f"samples_{training.step_index:06d}.png"
        tools.write_grid(F.pixel_shuffle(torch.cat(pictures), models.PIXEL_PATCH), path)

    tools._finish(args, training, loss_step, grid, lambda: camera.save(folder / "camera"))
