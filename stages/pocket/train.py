"""Make the pocket weights from nothing: `python -m stages.pocket.train pixel|camera|vae|latent|clip`.

Order: pixel (with the text encoder), camera (what is where in a view; then pixel again with --start, to draw by it),
vae, latent (starts from the pixel UNet's trunk), clip (on its own renders).
Each resumes where it stopped, logs to log.jsonl, writes sample grids beside its state, and at the end writes an
ordinary model folder, fp16 safetensors, below --out.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.pocket import data, models, world
from stages.pocket.train_camera import camera_from, learnt, seen_by, train_camera
from stages.pocket.training import Training

UNCONDITIONAL = 0.1  # share of training captions replaced by "" for classifier-free guidance
SNR_RANGE = (1.0, 5.0)  # min-SNR weighting (Hang et al. 2023), with a floor: words are learnt at high noise
HIGH_NOISE = 0.6  # every second image is noised beyond this share of the steps: there a sentence becomes a shape
CLIP_TEXTURELESS = 0.4  # clay renders must be read as surely as coloured ones: shape R-Precision hangs on them
PIXEL_CAMERA = "../../pixel/camera"  # the latent prior's layout is the pixel one's but for what speaks to the UNet
GRID_PROMPTS = (
    "a red mug, front view",
    "a blue car, left side view",
    "a yellow snowman, front view",
    "a green house, back view",
    "a white rocket, side view",
    "a purple chair, front view",
    "an orange cat, front view",
    "a cyan teapot, right side view",
)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] to [-1, 1] [B, 3, S, S]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def diffusion_loss(
    unet, alphas_cumprod: Tensor, x0: Tensor, text: Tensor, generator: torch.Generator, *,
    told: dict | None = None, high_noise: float = HIGH_NOISE,
) -> Tensor:  # fmt: skip
    """v-prediction loss with clamped-SNR weighting on x0 [B, C, h, w]; bf16 inside the network.

    told: the camera's residuals (stages/guidance/camera.py), as the network takes them.
    high_noise: every second image is noised beyond this share of the steps; 0 spreads all evenly.
    """
    batch = x0.shape[0]
    u = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
    u = torch.where(torch.arange(batch) % 2 == 0, u, high_noise + (1 - high_noise) * u)
    t = (u * len(alphas_cumprod)).long()
    noise = torch.randn(x0.shape, generator=generator)
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
    with torch.autocast(x0.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # 6 % faster on these grids
        out = unet(x_t.to(memory_format=torch.channels_last), t, text, **(told or {})).sample
    snr = a / (1 - a)
    weight = snr.clamp(*SNR_RANGE) / (snr + 1)
    return (weight * (out.float() - v) ** 2).mean() / 0.4


def encode_text(tokenizer, text_encoder, captions: list[str]) -> Tensor:
    """Captions to [B, TOKENS, WIDTH]."""
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=models.TOKENS, return_tensors="pt")
    return text_encoder(ids.input_ids).last_hidden_state


@torch.no_grad()
def sample(unet, scheduler, text: Tensor, empty: Tensor, *, scale: float, steps: int, seed: int) -> Tensor:
    """DDIM samples [B, C, 16, 16] with classifier-free guidance, in the unshuffled space."""
    scheduler.set_timesteps(steps)
    x = torch.randn(len(text), unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([text, empty.expand_as(text)])
    for t in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            cond, uncond = unet(torch.cat([x, x]), t, both).sample.float().chunk(2)
        x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return x


def write_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """[-1, 1] [B, 3, S, S] as one PNG."""
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [np.concatenate(images[i : i + columns], 1) for i in range(0, len(images) - columns + 1, columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def half(module):
    """The module in fp16, for saving."""
    return module.half().eval()


def save_prior(
    folder: Path, *, pipeline: str, unet, scheduler, tokenizer, text_encoder, camera=None, vae=None, base=""
) -> None:
    """Write a diffusers folder: model_index.json and one subfolder a component, fp16 safetensors.

    base: where the camera layout's layers are that this one shares, relative to its own folder.
    """
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
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
    if camera is not None:
        camera.save(part / "camera", base)
    scheduler.save_pretrained(part / "scheduler")
    tokenizer.save_pretrained(part / "tokenizer")
    if vae is not None:
        index["vae"] = ["diffusers", "AutoencoderTiny"]
        half(vae).save_pretrained(part / "vae")
    for path in part.glob("*/config.json"):  # no word of where its parts were read from
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (part / "model_index.json").write_text(json.dumps(index, indent=2))
    pocket = {"words": sorted(world.words()), "kinds": list(world.KINDS), "colours": list(world.COLOURS)}
    (part / "pocket.json").write_text(json.dumps(pocket, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def train_pixel(args: argparse.Namespace) -> None:
    """The 64x64 UNet and its text encoder."""
    pool = data.make_pool(args.data / "pixel", size=64, count=args.images or 60000, seed=args.seed)
    images, records = data.load_pool(pool)
    torch.manual_seed(args.seed)
    tokenizer = models.make_tokenizer()
    text_encoder = models.make_text_encoder(len(tokenizer))
    unet = models.make_unet(3 * models.PIXEL_PATCH**2).to(memory_format=torch.channels_last)
    if args.start is not None:
        _start_from(args.start / "unet", unet)
        _start_from(args.start / "text_encoder", text_encoder)
    scheduler = models.make_scheduler()
    work = args.work / "pixel"
    camera = camera_from(args.start)
    modules = {"unet": unet} | ({"text": text_encoder} if camera is None else learnt(camera))
    text_encoder.requires_grad_(camera is None)  # what the camera layout was taught under
    training = Training(modules, work, lr=args.lr or 1.5e-3, steps=args.steps, minutes=args.minutes)
    denoise = torch.compile(unet, dynamic=False) if args.compile else unet

    def loss_step(step: int) -> Tensor:
        chosen = data.batch_indices(args.seed, step, args.batch, len(records))
        x0 = F.pixel_unshuffle(to_tensor(images[np.sort(chosen)]), models.PIXEL_PATCH)
        captions = data.captions_for(records, np.sort(chosen), args.seed, step, UNCONDITIONAL)
        text = encode_text(tokenizer, text_encoder, captions)
        options = {"told": seen_by(camera, records, np.sort(chosen), text, step), "high_noise": args.high_noise}
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        return diffusion_loss(denoise, scheduler.alphas_cumprod, x0, text, generator, **options)

    def grid() -> None:
        with torch.no_grad():
            text = encode_text(tokenizer, text_encoder, [p for p in GRID_PROMPTS for _ in range(4)])
            empty = encode_text(tokenizer, text_encoder, [""])
        x = sample(unet, models.make_scheduler(), text, empty, scale=4, steps=25, seed=0)
        write_grid(F.pixel_shuffle(x, models.PIXEL_PATCH), work / f"samples_{training.step_index:06d}.png")

    def export() -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        parts = {"unet": unet, "scheduler": scheduler, "tokenizer": tokenizer, "text_encoder": text_encoder}
        save_prior(args.out / "pixel", pipeline="IFPipeline", camera=camera, **parts)

    _finish(args, training, loss_step, grid, export)


def train_vae(args: argparse.Namespace) -> None:
    """The 8x autoencoder, on 128-pixel crops of 512x512 renders: L1, edges, noisy latents of even spread."""
    images, _ = data.load_pool(_latent_pool(args))
    torch.manual_seed(args.seed)
    vae = models.make_vae()
    work = args.work / "vae"
    training = Training({"vae": vae}, work, lr=args.lr or 2e-3, steps=args.steps, minutes=args.minutes, weight_decay=0)

    def crops(rng: np.random.Generator, batch: int, side: int = 128) -> Tensor:
        out = np.empty((batch, side, side, 3), np.uint8)
        for b in range(batch):
            picture = images[rng.integers(len(images))]
            for _ in range(6):  # prefer crops that show something
                y, x = rng.integers(0, 512 - side, 2)
                out[b] = picture[y : y + side, x : x + side]
                if out[b][::16, ::16].std() > 4:
                    break
        return to_tensor(out)

    def loss_step(step: int) -> Tensor:
        rng = np.random.default_rng([args.seed, step])
        x = crops(rng, args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encoder(x).float()
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step)) * 0.03
            y = vae.decoder(z + noise).float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        spread = z.var((0, 2, 3))  # keeps the free channel about as wide as the colours, so one scale serves all
        return (y - x).abs().mean() + edges + 0.01 * (spread - 0.25).square().mean()

    def grid() -> None:
        with torch.no_grad():
            x = crops(np.random.default_rng(0), 8)
            y = vae.decoder(vae.encoder(x))
        print({"psnr": round(float(-10 * torch.log10(((x - y) / 2).square().mean())), 2)}, flush=True)
        write_grid(torch.cat([x, y]), work / f"samples_{training.step_index:06d}.png")

    def export() -> None:
        with torch.no_grad():
            z = vae.encoder(crops(np.random.default_rng(1), 64))
        vae.register_to_config(scaling_factor=round(1 / float(z.std()), 3))
        print({"scaling_factor": vae.config.scaling_factor, "std": z.std((0, 2, 3)).tolist()}, flush=True)
        half(vae).save_pretrained(args.work / "vae" / "model")

    _finish(args, training, loss_step, grid, export)


def _latent_pool(args: argparse.Namespace) -> Path:
    """The pool of 512x512 renders that the autoencoder and the latent UNet share, made the first time."""
    count = args.images or 12000
    return data.make_pool(args.data / "latent", size=512, count=count, seed=args.seed + 2, cameras=data.FINE_CAMERAS)


def encode_pool(args: argparse.Namespace, vae) -> np.ndarray:
    """Latents [N, 4, 64, 64] fp16 of the 512x512 pool, written once."""
    path = args.data / "latent" / "latents.npy"
    if not path.exists():
        images, _ = data.load_pool(args.data / "latent")
        out = np.empty((len(images), models.LATENT_CHANNELS, 64, 64), np.float16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for i in range(0, len(images), 8):
                z = vae.encode(to_tensor(images[i : i + 8])).latents.float()
                out[i : i + 8] = (z * vae.config.scaling_factor).numpy()
        np.save(path, out)
    return np.load(path)


def train_latent(args: argparse.Namespace) -> None:
    """The latent UNet for 512x512, its trunk started from the pixel UNet; the text encoder is the pixel one's."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    own, exported = args.work / "vae" / "model", args.out / "latent" / "vae"  # another's latents where none was trained
    vae = AutoencoderTiny.from_pretrained(own if own.is_dir() else exported).float().eval()
    _latent_pool(args)
    latents = encode_pool(args, vae)
    _, records = data.load_pool(args.data / "latent")
    tokenizer = AutoTokenizer.from_pretrained(args.out / "pixel" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.out / "pixel" / "text_encoder").float().eval()
    start = UNet2DConditionModel.from_pretrained(args.out / "pixel" / "unet").float()
    torch.manual_seed(args.seed)
    unet = models.make_unet(models.LATENT_CHANNELS * models.LATENT_PATCH**2)
    trunk = {k: v for k, v in start.state_dict().items() if not k.startswith(("conv_in", "conv_out"))}
    unet.load_state_dict(trunk, strict=False)
    if args.start is not None:
        _start_from(args.start / "unet", unet)
    camera = camera_from(args.out / "pixel")
    unet = unet.to(memory_format=torch.channels_last)
    scheduler = models.make_scheduler()
    work = args.work / "latent"
    modules = {"unet": unet} | ({} if camera is None else learnt(camera))
    training = Training(modules, work, lr=args.lr or 1e-3, steps=args.steps, minutes=args.minutes)
    denoise = torch.compile(unet, dynamic=False) if args.compile else unet

    def loss_step(step: int) -> Tensor:
        chosen = data.batch_indices(args.seed, step, args.batch, len(records))
        x0 = data.shift(torch.from_numpy(latents[chosen]).float(), np.random.default_rng([args.seed, step, 2]))
        captions = data.captions_for(records, chosen, args.seed, step, UNCONDITIONAL)
        with torch.no_grad():
            text = encode_text(tokenizer, text_encoder, captions)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x0 = F.pixel_unshuffle(x0, models.LATENT_PATCH)
        told = seen_by(camera, records, chosen, text, step)
        # evenly noised: the fine stage asks below t = 0.5
        return diffusion_loss(denoise, scheduler.alphas_cumprod, x0, text, generator, told=told, high_noise=0)

    def grid() -> None:
        with torch.no_grad():
            text = encode_text(tokenizer, text_encoder, [p for p in GRID_PROMPTS for _ in range(2)])
            empty = encode_text(tokenizer, text_encoder, [""])
        x = sample(unet, models.make_scheduler(), text, empty, scale=4, steps=25, seed=0)
        with torch.no_grad():
            z = F.pixel_shuffle(x, models.LATENT_PATCH)
            pictures = torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in z.split(4)])
        write_grid(F.avg_pool2d(pictures, 2), work / f"samples_{training.step_index:06d}.png")

    def export() -> None:
        parts = {"unet": unet, "scheduler": scheduler, "tokenizer": tokenizer, "text_encoder": text_encoder}
        parts |= {"vae": vae, "camera": camera, "base": PIXEL_CAMERA}
        save_prior(args.out / "latent", pipeline="StableDiffusionPipeline", **parts)

    _finish(args, training, loss_step, grid, export)


def train_clip(args: argparse.Namespace) -> None:
    """The CLIPModel for scores: symmetric InfoNCE on renders of its own seed, full captions, or shapes for clay."""
    count = args.images or 40000
    pool = data.make_pool(args.data / "clip", size=64, count=count, seed=args.seed + 1, textureless=CLIP_TEXTURELESS)
    images, records = data.load_pool(pool)
    torch.manual_seed(args.seed)
    tokenizer = models.make_tokenizer(models.CLIP_EOS)
    clip = models.make_clip(len(tokenizer))
    if args.start is not None:
        _start_from(args.start, clip)
    work = args.work / "clip"
    training = Training({"clip": clip}, work, lr=args.lr or 1e-3, steps=args.steps, minutes=args.minutes)

    textureless = np.array([record["shading"] == "textureless" for record in records])
    clay, coloured = np.flatnonzero(textureless), np.flatnonzero(~textureless)

    def loss_step(step: int) -> Tensor:
        """A batch is all clay renders, told apart by shape alone, or all coloured ones: as they are scored."""
        turn, bare = divmod(step, 2)
        group = clay if bare else coloured
        chosen = np.sort(group[data.batch_indices(args.seed, turn, args.batch, len(group))])
        rng = np.random.default_rng([args.seed, step, 1])
        captions = [records[i]["caption"] for i in chosen]
        if bare:
            captions = [world.geometry_caption(world.parse(text)) for text in captions]
        x = to_tensor(images[chosen])
        x = x + torch.from_numpy(rng.normal(0, rng.choice([0, 0.03, 0.1]), x.shape)).float()
        ids = tokenizer(captions, padding="max_length", max_length=models.TOKENS, return_tensors="pt").input_ids
        with torch.autocast("cpu", torch.bfloat16):
            out = clip(input_ids=ids, pixel_values=x)
        image = F.normalize(out.image_embeds.float(), dim=-1)
        text = F.normalize(out.text_embeds.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        same = torch.tensor([[a == b for b in captions] for a in captions]).float()  # equal captions share the mass
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

    _finish(args, training, loss_step, lambda: None, export)


def _start_from(folder: Path, module: torch.nn.Module) -> None:
    """Load an exported folder's weights into a module of the same architecture."""
    (file,) = folder.glob("*.safetensors")
    module.load_state_dict({k: v.float() for k, v in load_file(file).items()})


def _finish(args, training: Training, loss_step, grid, export) -> None:
    if not args.export:
        training.run(loss_step, sample=grid)
    with training.averaged():
        grid()
        export()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trainers = {"pixel": train_pixel, "vae": train_vae, "latent": train_latent, "clip": train_clip}
    trainers["camera"] = train_camera
    parser.add_argument("model", choices=list(trainers))
    parser.add_argument("--steps", type=int, help="length of the schedule in steps")
    parser.add_argument("--minutes", type=float, help="length of the schedule in minutes of training time instead")
    parser.add_argument("--images", type=int, help="size of the pool of renders")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data/pools"), help="where renders are kept")
    parser.add_argument("--work", type=Path, default=Path("data/training"), help="where training state is kept")
    parser.add_argument("--out", type=Path, default=models.WEIGHTS, help="where the model folders go")
    parser.add_argument("--high-noise", type=float, default=HIGH_NOISE, help="pixel: where its noisier half begins")
    parser.add_argument("--start", type=Path, help="begin from this exported folder, not from nothing")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: a sixth faster, a C++ compiler")
    parser.add_argument("--export", action="store_true", help="write the folder from the saved state, no training")
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        args.steps = {"pixel": 8000, "camera": 4000, "vae": 3000, "latent": 5000, "clip": 4000}[args.model]
    trainers[args.model](args)


if __name__ == "__main__":
    main()
