"""Train the two UNets, pixel (64x64) and latent (512x512), with the layout's picture as input in four of five steps.

The layout stays as it is; what translates its picture for a UNet (guidance/diffusion/layout_condition.py) is taught
with the UNet, several times faster, since it begins at nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.guidance.diffusion.layout import Layout
from stages.guidance.diffusion.layout_condition import LayoutCondition
from stages.pocket import data, models
from stages.pocket.train.device import device_of, placed, pool_rows
from stages.pocket.train.export import save_prior, signed, start_from, write_grid
from stages.pocket.train.loop import Training
from stages.pocket.train.text import encode_text, find_text

UNCONDITIONAL = 0.1  # share of meshes whose caption is replaced by "" for classifier-free guidance
PLAIN_EVERY = 5  # every so many steps go without the layout: the network is an ordinary text-to-image model, too
SNR_RANGE = (1.0, 5.0)  # min-SNR weighting (Hang et al. 2023), with a floor: words are learnt at high noise
ADAPTER_LR = 4.0  # times the UNet's rate, of what translates the picture
TEST_TIMES = (100, 300, 500, 700, 900)  # timesteps at which the averaged weights are evaluated


def velocity_loss(
    unet: Callable,
    alphas_cumprod: Tensor,
    x0: Tensor,
    text: Tensor,
    conditions: dict,
    patch: int,
    generator: torch.Generator,
) -> Tensor:
    """v-prediction loss with clamped-SNR weighting on x0 [B, C, h, w]; bf16 inside the network.

    conditions: of LayoutCondition.conditions; without a mean the network sees x0 itself, else x0 minus the mean.
    """
    batch = len(x0)
    u = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
    t = (u[torch.randperm(batch, generator=generator)] * len(alphas_cumprod)).long()
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    a = alphas_cumprod[t].view(-1, 1, 1, 1).to(x0)
    conditions = dict(conditions)
    rest = x0 - conditions.pop("mean").detach() if "mean" in conditions else x0
    x_t, v = a.sqrt() * rest + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * rest
    x_t = F.pixel_unshuffle(x_t, patch).contiguous(memory_format=torch.channels_last)
    on_cpu = x0.device.type == "cpu"
    attention = sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext()  # there 6 % faster on these grids
    with torch.autocast(x0.device.type, torch.bfloat16), attention:
        out = F.pixel_shuffle(unet(x_t, t.to(x0.device), text, **conditions).sample.float(), patch)
    snr = a / (1 - a)
    weight = snr.clamp(*SNR_RANGE) / (snr + 1)
    return (weight * (out - v) ** 2).mean() / 0.4


class LayoutPictures:
    """The layout's pictures for the renders of a pool, made on demand and optionally kept in a file.

    Args:
        keep: a file where pictures of whole captions are kept, in 8 bits, since the layout stays as it is: at 64^3
            cells they took a third of a step of the latent UNet, 1.3 of 3.8 s on one thread. It is begun anew for
            another layout and for another pool.
    """

    def __init__(
        self,
        condition: LayoutCondition,
        scenes: data.Scenes,
        encode: Callable[[list[str]], Tensor],
        keep: Path | None = None,
    ) -> None:
        self.condition, self.scenes, self.encode = condition, scenes, encode
        self.device = next(condition.parameters()).device
        self.stored_pictures, self.available = None, np.zeros(len(scenes.fov_deg), bool)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shape = (len(self.available), 4, condition.side, condition.side)
            self._available_path = keep.with_suffix(f".{_fingerprint(condition, scenes)}.npy")
            old = [path for path in keep.parent.glob(f"{keep.stem}.*.npy") if path != self._available_path]
            if keep.exists() and self._available_path.exists() and not old:
                self.stored_pictures = np.lib.format.open_memmap(keep, "r+")
                self.available = np.load(self._available_path)
            else:
                for path in old:
                    path.unlink()
                self.stored_pictures = np.lib.format.open_memmap(keep, "w+", np.uint8, shape)
                np.save(self._available_path, self.available)

    @torch.no_grad()
    def pictures(self, captions: list[str], index: np.ndarray) -> Tensor:
        """Return pictures [B, 4, side, side] for renders [B], one caption each; equal captions share a volume."""
        if self.stored_pictures is None:
            return self._draw(captions, index)
        whole = np.array([caption != "" for caption in captions])
        missing = np.flatnonzero(~(whole & self.available[index]))
        rows = placed(self.stored_pictures[index], self.device).float() / 255
        if len(missing):
            rows[missing] = self._draw([captions[k] for k in missing], index[missing])
            new = missing[whole[missing]]
            self.stored_pictures[index[new]] = (rows[new] * 255).round().to(torch.uint8).cpu().numpy()
            self.available[index[new]] = True
        return rows

    def save(self) -> None:
        """Write the pictures, then which of them are available."""
        if self.stored_pictures is not None:
            self.stored_pictures.flush()
            np.save(self._available_path, self.available)

    def _draw(self, captions: list[str], index: np.ndarray) -> Tensor:
        texts = list(dict.fromkeys(captions))
        rows = torch.tensor([texts.index(caption) for caption in captions], device=self.device)
        layout = self.condition.layout
        objects = layout.objects(layout.read(self.encode(texts)))
        return self.condition.look(objects, rows, data.setting_of(self.scenes[index], self.device))


def _fingerprint(condition: LayoutCondition, scenes: data.Scenes) -> str:
    """Return a hash of all that the pictures depend on: a layout's weights, their size, and a pool's scenes."""
    digest = hashlib.sha256(str(condition.side).encode())
    weights = [value.detach().cpu().contiguous().numpy() for value in condition.layout.state_dict().values()]
    for value in (*weights, *(getattr(scenes, f.name) for f in fields(scenes))):
        digest.update(np.nan_to_num(value).tobytes())
    return digest.hexdigest()[:12]


def batch_of(records: list[dict], seed: int, step: int, batch: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Return a step's renders, all of each mesh; the captions for the UNet; the captions for the layout."""
    many = data.VIEWS_PER_MESH
    meshes = np.sort(data.batch_indices(seed, step, batch // many, len(records) // many))
    index = (meshes[:, None] * many + np.arange(many)).reshape(-1)
    rng = np.random.default_rng([seed, step, 1])
    keep = np.repeat(rng.random(len(meshes)) >= UNCONDITIONAL, many)
    captions = [data.training_caption(records[i], rng) if k else "" for i, k in zip(index, keep, strict=True)]
    layout_captions = [records[i]["caption"] if k else "" for i, k in zip(index, keep, strict=True)]
    return index, captions, layout_captions


def psnr(pictures: Tensor, truth: Tensor) -> float:
    """Return the mean PSNR in dB over the objects of pictures [B, H, W, 3] in [0, 1] before flat backdrops."""
    each = [data.object_psnr(a, b) for a, b in zip(pictures, truth, strict=True)]
    return round(float(np.mean([value for value in each if value is not None])), 2)


@dataclass(frozen=True)
class TestSet:
    """Renders of held-out captions for evaluation: x0 [B, C, h, w], sRGB pictures [B, H, W, 3], how to decode."""

    x0: Tensor
    truth: Tensor
    records: list[dict]
    scenes: data.Scenes
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """The settings and data in which the two trainings differ."""

    name: str
    pipeline: str
    patch: int
    x0_of: Callable[[np.ndarray, int], Tensor]  # renders [B] and the step to x0 [B, C, h, w]
    records: list[dict]
    scenes: data.Scenes
    test_set: TestSet


def _fit(args: argparse.Namespace, task: Task, unet, condition: LayoutCondition, parts: dict, encode) -> None:
    """Train one of the two UNets, write samples on the way and export it at the end."""
    scheduler, device = models.make_scheduler(), device_of(args)
    adapter = {n: getattr(condition, n) for n in ("levels", "mean", "edges") if hasattr(condition, n)}
    condition.layout.requires_grad_(False)
    if args.start is not None and (args.start / "layout").is_dir():  # what translated the picture for that UNet
        state = LayoutCondition.load(args.start / "layout").state_dict()
        condition.load_state_dict({k: v for k, v in state.items() if not k.startswith("layout.")}, strict=False)
    unet, condition = unet.to(device), condition.to(device)
    modules = {"unet": unet} | {f"told.{n}": m for n, m in adapter.items()}
    rates = {f"told.{n}": ADAPTER_LR for n in adapter}
    work = args.work / task.name
    training = Training(modules, work, lr=args.lr or 1e-3, steps=args.steps, minutes=args.minutes, rates=rates)
    denoise = torch.compile(unet, dynamic=False) if args.compile else unet
    layout_pictures = LayoutPictures(condition, task.scenes, encode, work / "told.npy")

    def loss_step(step: int) -> Tensor:
        index, captions, layout_captions = batch_of(task.records, args.seed, step, args.batch)
        x0 = task.x0_of(index, step)
        facts, extra = {}, 0.0
        if step % PLAIN_EVERY:
            facts = condition.conditions(layout_pictures.pictures(layout_captions, index))
            if condition.latents:
                extra = (facts["mean"] - x0).square().mean()
        else:
            facts = condition.zero_conditions(len(x0))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        text = encode(captions)
        return velocity_loss(denoise, scheduler.alphas_cumprod, x0, text, facts, task.patch, generator) + extra

    @torch.no_grad()
    def grid() -> None:
        layout_pictures.save()
        test_set = task.test_set
        captions = [data.training_caption(r, np.random.default_rng(0)) for r in test_set.records]
        layout_captions = [r["caption"] for r in test_set.records]
        facts = condition.conditions(
            LayoutPictures(condition, test_set.scenes, encode).pictures(
                layout_captions, np.arange(len(layout_captions))
            )
        )
        mean, text = facts.pop("mean"), encode(captions)

        def predict(t: int) -> Tensor:
            """Predict x0 of the held-out renders from their noisy versions at timestep t, and decode it."""
            alpha_bar = scheduler.alphas_cumprod[t]
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(t)).to(mean)
            rest = alpha_bar.sqrt() * (test_set.x0 - mean) + (1 - alpha_bar).sqrt() * noise
            times = torch.full((len(rest),), t, device=device)
            with torch.autocast(device.type, torch.bfloat16):
                v = unet(F.pixel_unshuffle(rest, task.patch), times, text, **facts).sample.float()
            return test_set.decode(
                mean + alpha_bar.sqrt() * rest - (1 - alpha_bar).sqrt() * F.pixel_shuffle(v, task.patch)
            )

        pictures = {"mean": test_set.decode(mean)} | {t: predict(t) for t in TEST_TIMES}
        row = {name: psnr(picture, test_set.truth) for name, picture in pictures.items()}
        print({"step": training.step_index, "minutes": round(training.seconds / 60, 1), "x0 PSNR": row}, flush=True)
        sheet = torch.cat([test_set.truth[:8], *(picture[:8] for picture in pictures.values())]).permute(0, 3, 1, 2)
        write_grid(F.adaptive_avg_pool2d(sheet, 128) * 2 - 1, work / f"samples_{training.step_index:06d}.png")

    def export() -> None:
        base = models.PIXEL_LAYOUT if condition.latents else ""
        condition.cpu()
        everything = {"unet": unet, "scheduler": scheduler, "layout": condition, "base": base} | parts
        save_prior(args.out / task.name, pipeline=task.pipeline, **everything)

    training.finish(loss_step, grid, export, args.export)


def train_pixel(args: argparse.Namespace) -> None:
    """Train the 64x64 UNet, from the weights in --start if given, under the layout from --work or that folder."""
    pool = data.make_pool(args.data / "pixel128", size=128, count=args.images or 60000, seed=args.seed)
    test_pool = data.make_pool(args.data / "held128", size=128, count=800, seed=777, split="heldout")
    images, (_, records, scenes) = data.resized_pool(pool, 64), data.load_pool(pool)
    tests, (_, test_records, test_scenes) = data.resized_pool(test_pool, 64), data.load_pool(test_pool)
    folder = args.start or args.out / "pixel"
    torch.manual_seed(args.seed)
    tokenizer, text_encoder = find_text(args)
    encode = partial(encode_text, tokenizer, text_encoder)
    unet = models.make_unet("pixel").to(memory_format=torch.channels_last)
    if (folder / "unet").is_dir():
        start_from(folder / "unet", unet)
    condition = models.make_condition("pixel", find_layout(args))

    def decode(x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    device, some = device_of(args), np.arange(0, len(tests), 10)
    rows_of, rgb = pool_rows(images, device), placed(tests[some], device)
    test_set = TestSet(signed(rgb), rgb.float() / 255, [test_records[i] for i in some], test_scenes[some], decode)
    task = Task(
        "pixel", "IFPipeline", models.PIXEL_PATCH, lambda i, step: signed(rows_of(i)), records, scenes, test_set
    )
    _fit(args, task, unet, condition, {"tokenizer": tokenizer, "text_encoder": text_encoder}, encode)


def train_latent(args: argparse.Namespace) -> None:
    """Train the latent UNet for 512x512 under the pixel prior's layout and text encoder."""
    from diffusers import AutoencoderTiny

    folder = args.work / "vae" / "model"
    if not folder.is_dir():  # no autoencoder was trained here: take the exported one
        folder = args.out / "latent" / "vae"
    vae = AutoencoderTiny.from_pretrained(folder).float().eval().requires_grad_(False)
    device = device_of(args)
    vae = vae.to(device, memory_format=torch.channels_last)
    latents, records, scenes = latent_pool(args, vae, "latents512", args.images or 16000, args.seed + 3, "train")
    tests, test_records, test_scenes = latent_pool(args, vae, "heldlatents512", 200, args.seed + 778, "heldout")
    torch.manual_seed(args.seed)
    tokenizer, text_encoder = find_text(args)
    encode = partial(encode_text, tokenizer, text_encoder)
    unet = models.make_unet("latent").to(memory_format=torch.channels_last)
    if args.start is not None and (args.start / "unet").is_dir():
        start_from(args.start / "unet", unet)
    condition = models.make_condition("latent", find_layout(args))
    scale = vae.config.scaling_factor

    @torch.no_grad()
    def decode(x: Tensor) -> Tensor:
        parts = [vae.decode(part / scale).sample for part in x.split(4)]
        return (torch.cat(parts).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    rows_of = pool_rows(latents, device)

    def x0_of(index: np.ndarray, step: int) -> Tensor:
        return rows_of(index).float()

    some = np.arange(0, len(tests), 8)
    x0 = placed(tests[some], device).float()
    pictures = np.load(args.data / "heldlatents512" / "images.npy", mmap_mode="r")[some]
    truth = placed(pictures, device).float() / 255
    test_set = TestSet(x0, truth, [test_records[i] for i in some], test_scenes[some], decode)
    task = Task("latent", "StableDiffusionPipeline", models.LATENT_PATCH, x0_of, records, scenes, test_set)
    _fit(args, task, unet, condition, {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae}, encode)


def latent_pool(args: argparse.Namespace, vae, name: str, count: int, seed: int, split: str):
    """Return latents [N, 12, 64, 64] fp16 of a pool of 512x512 renders, its records and scenes; encode them once."""
    cameras = data.FINE_CAMERAS
    pool = data.make_pool(args.data / name, size=512, count=count, seed=seed, cameras=cameras, split=split)
    images, records, scenes = data.load_pool(pool)
    path = pool / "latents.npy"
    if not path.exists():
        out = np.empty((len(images), models.LATENT_CHANNELS, 64, 64), np.float16)
        with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
            for i in range(0, len(images), 8):
                x = signed(placed(images[i : i + 8], vae.device)).contiguous(memory_format=torch.channels_last)
                out[i : i + 8] = (vae.encode(x).latents.float() * vae.config.scaling_factor).cpu().numpy()
        np.save(path, out)
    return np.load(path), records, scenes


def find_layout(args: argparse.Namespace) -> Layout:
    """Return the layout trained in --work, else that of the exported pixel prior."""
    state = args.work / "layout" / "layout.safetensors"
    return models.load_layout(state) if state.exists() else LayoutCondition.load(args.out / "pixel" / "layout").layout
