"""Train the CLIPModel for scores, on renders of its own seed."""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.pocket import data, models, world
from stages.pocket.train.device import device_of, pool_rows
from stages.pocket.train.export import half, signed, start_from
from stages.pocket.train.loop import Training

TEXTURELESS = 0.4  # clay renders must be read as surely as coloured ones: shape R-Precision hangs on them


def train_clip(args: argparse.Namespace) -> None:
    """Train the CLIPModel by symmetric InfoNCE on renders; clay renders have captions without colours and patterns."""
    count = args.images or 40000
    pool = data.make_pool(args.data / "clip", size=64, count=count, seed=args.seed + 1, textureless=TEXTURELESS)
    images, records, _ = data.load_pool(pool)
    torch.manual_seed(args.seed)
    tokenizer = models.make_tokenizer(models.CLIP_EOS)
    device = device_of(args)
    clip, rows_of = models.make_clip(len(tokenizer)).to(device), pool_rows(images, device)
    if args.start is not None:
        start_from(args.start, clip)
    work = args.work / "clip"
    training = Training({"clip": clip}, work, lr=args.lr or 1e-3, steps=args.steps, minutes=args.minutes)

    textureless = np.array([record["shading"] == "textureless" for record in records])
    clay, coloured = np.flatnonzero(textureless), np.flatnonzero(~textureless)

    def loss_step(step: int) -> Tensor:
        """Return the loss of a batch of clay renders alone or of coloured ones alone, as in the benchmarks."""
        turn, bare = divmod(step, 2)
        group = clay if bare else coloured
        index = np.sort(group[data.batch_indices(args.seed, turn, args.batch, len(group))])
        rng = np.random.default_rng([args.seed, step, 1])
        captions = [records[i]["caption"] for i in index]
        if bare:
            captions = [world.geometry_caption(world.parse(text)) for text in captions]
        x = signed(rows_of(index))
        x = x + torch.from_numpy(rng.normal(0, rng.choice([0, 0.03, 0.1]), x.shape)).float().to(device)
        ids = tokenizer(captions, padding="max_length", max_length=models.TOKENS, return_tensors="pt").input_ids
        with torch.autocast(device.type, torch.bfloat16):
            out = clip(input_ids=ids.to(device), pixel_values=x)
        image = F.normalize(out.image_embeds.float(), dim=-1)
        text = F.normalize(out.text_embeds.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (
            torch.tensor([[a == b for b in captions] for a in captions]).float().to(device)
        )  # equal ones share the mass
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def export() -> None:
        from transformers import CLIPImageProcessor

        folder = args.out / "clip"
        half(clip).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = {"height": 64, "width": 64}
        half_range = [0.5, 0.5, 0.5]
        settings = {"do_center_crop": False, "size": size, "image_mean": half_range, "image_std": half_range}
        CLIPImageProcessor(**settings).save_pretrained(folder)

    training.finish(loss_step, lambda: None, export, args.export)
