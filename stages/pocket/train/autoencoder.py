"""Train the 8x autoencoder of the latent prior on 128-pixel crops of 512x512 renders."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from stages.pocket import data, models
from stages.pocket.train.device import device_of, placed
from stages.pocket.train.export import half, signed, write_grid
from stages.pocket.train.loop import Training

LATENT_NOISE = 0.03  # added before decoding, of latents half a unit wide: what a denoiser leaves must not show
CROP = 128  # pixels a side
SPREAD = 0.25  # variance that every channel is held at, so that one scaling factor serves all


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder on squared error, absolute error and gradients, with noisy latents of equal variance."""
    cameras = data.FINE_CAMERAS
    pool = data.make_pool(
        args.data / "latent512", size=512, count=args.images or 5000, seed=args.seed + 2, cameras=cameras
    )
    test_pool = data.make_pool(
        args.data / "heldlatent512", size=512, count=200, seed=778, cameras=cameras, split="heldout"
    )
    images, (tests, _, _) = data.load_pool(pool)[0], data.load_pool(test_pool)
    torch.manual_seed(args.seed)
    device = device_of(args)
    vae = models.make_vae().to(device, memory_format=torch.channels_last)
    work = args.work / "vae"
    settings = {"steps": args.steps, "minutes": args.minutes, "weight_decay": 0, "ema": 0.998}
    training = Training({"vae": vae}, work, lr=args.lr or 2e-3, **settings)

    def crops(rng: np.random.Generator, batch: int) -> Tensor:
        out = np.empty((batch, CROP, CROP, 3), np.uint8)
        for b in range(batch):
            if b % 4 == 0:
                picture = images[rng.integers(len(images))]  # four crops of a picture: reading it is what takes time
            for _ in range(6):  # prefer crops that show something
                y, x = rng.integers(0, 512 - CROP, 2)
                out[b] = picture[y : y + CROP, x : x + CROP]
                if out[b][::16, ::16].std() > 4:
                    break
        return signed(placed(out, device)).contiguous(memory_format=torch.channels_last)

    def loss_step(step: int) -> Tensor:
        x = crops(np.random.default_rng([args.seed, step]), args.batch)
        with torch.autocast(device.type, torch.bfloat16):
            z = vae.encoder(x).float()
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).to(z) * LATENT_NOISE
            y = vae.decoder(z + noise).float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        spread = (z.var((0, 2, 3)) - SPREAD).square().mean()
        return 4 * (y - x).square().mean() + 0.2 * (y - x).abs().mean() + 0.1 * edges + 0.02 * spread

    @torch.no_grad()
    def grid() -> None:
        rows = []
        for k in range(0, len(tests), 5):
            x = signed(placed(tests[k : k + 1], device))
            y = vae.decoder(vae.encoder(x.contiguous(memory_format=torch.channels_last)))
            value = data.object_psnr(*(part[0].permute(1, 2, 0) / 2 + 0.5 for part in (y, x)))
            rows += [] if value is None else [value]
        print({"step": training.step_index, "psnr over the object": round(float(np.mean(rows)), 2)}, flush=True)
        x = crops(np.random.default_rng(0), 8)
        write_grid(torch.cat([x, vae.decoder(vae.encoder(x))]), work / f"samples_{training.step_index:06d}.png")

    def export() -> None:
        with torch.no_grad():
            z = vae.encoder(crops(np.random.default_rng(1), 64))
        vae.register_to_config(scaling_factor=round(1 / float(z.std()), 3))
        print({"scaling_factor": vae.config.scaling_factor, "std": z.std((0, 2, 3)).tolist()}, flush=True)
        half(vae).save_pretrained(work / "model")

    training.finish(loss_step, grid, export, args.export)
