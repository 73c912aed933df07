"""Priors from diffusers folders: Stable-Diffusion-like latent models and pixel-space UNets, epsilon, v or sample.

Space: a folder with a vae works on its latents (AutoencoderKL or AutoencoderTiny), one without on pixels in [-1, 1].
Patches: a UNet with in_channels = c p p, c the channels of that space, sees it pixel-unshuffled by p; its sample_size
is the side after that. Output channels beyond in_channels (a learned variance, DeepFloyd IF) are dropped.
Prediction type and noise schedule are read from scheduler/, classes from model_index.json.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stages.errors import UserError, check_shape
from stages.guidance.folder import check_folder, load_part, locate, read_json
from stages.guidance.prior import PREDICTIONS, ViewContext, eps_from_prediction, resized
from stages.guidance.text import TextEncoder
from stages.phases import backward_phase, phase

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TEXT_FAMILIES = {"CLIPTextModel": "clip", "T5EncoderModel": "t5"}
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


class DiffusionSettings(BaseModel):
    """How a diffusers folder is loaded and run."""

    model_config = ConfigDict(extra="forbid")

    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    variant: str | None = Field(None, description="weight files' variant, such as fp16")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="of the networks; auto: float16 on cuda, float32 elsewhere"
    )
    vae_sample: Literal["sample", "mode"] = Field("sample", description="latents drawn from the posterior, or its mean")
    max_batch: int = Field(0, ge=0, description="most images in one UNet call, to save memory; 0: no limit")
    attention_slicing: bool = Field(False, description="attention one slice at a time: less memory, slower")
    vae_checkpointing: bool = Field(False, description="recompute VAE activations in the backward pass: less memory")
    channels_last: bool = Field(False, description="channels-last memory layout of the networks")


class DiffusionPrior:
    """A diffusers folder behind the Prior protocol; made by :func:`load_prior`.

    Beyond the protocol: `unknown_words`, `known_words`, `check_prompts`, `release_text_encoder`, `latent`, `patch`.
    """

    def __init__(
        self,
        name: str,
        unet: torch.nn.Module,
        vae: torch.nn.Module | None,
        text: TextEncoder,
        schedule: tuple[Tensor, str],
        settings: DiffusionSettings,
    ) -> None:
        self.name, self.unet, self.vae, self.text, self.settings = name, unet, vae, text, settings
        self.alphas_cumprod, self.prediction = schedule
        self.known_words: list[str] | None = None
        self.latent = vae is not None
        self.data_range = None if self.latent else (-1.0, 1.0)
        self.channels = vae.config.latent_channels if self.latent else 3
        self.patch = _patch_size(unet.config.in_channels, self.channels, name)
        size = unet.config.sample_size
        size = size if isinstance(size, int) else min(size)
        self._vae_factor = _vae_factor(vae) if self.latent else 1
        self.resolution = size * self.patch * self._vae_factor
        self._parameter = next(unet.parameters())

    def embed(self, prompts: list[str]) -> Tensor:
        """Last hidden states [P, L, D]; UserError for a prompt longer than the encoder reads."""
        return self.text.embed(prompts)

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory; what was embedded stays."""
        self.text.release()

    def unknown_words(self, prompt: str) -> list[str]:
        """Words that the tokenizer does not know (word-level tokenizers only)."""
        return self.text.unknown_words(prompt)

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """sRGB images [B, H, W, 3] in [0, 1] to x [B, C, h, w] float32; images of another size are resized."""
        check_shape("images", images, (None, None, None, 3))
        x = resized(images.permute(0, 3, 1, 2) * 2 - 1, self.resolution)
        if self.vae is None:
            return x.float()
        with _no_autocast(x.device), phase("networks"):
            output = self.vae.encode(x.to(self._parameter.dtype))
        if hasattr(output, "latents"):
            latents = output.latents.float()
        elif self.settings.vae_sample == "mode":
            latents = output.latent_dist.mean.float()
        else:
            posterior = output.latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean.device)
            latents = posterior.mean.float() + posterior.std.float() * noise
        backward_phase("networks", x, latents)
        return (latents - _shift(self.vae)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] to sRGB images [B, resolution, resolution, 3] clamped to [0, 1]."""
        if self.vae is not None:
            with _no_autocast(x.device):
                latents = x / self.vae.config.scaling_factor + _shift(self.vae)
                x = self.vae.decode(latents.to(self._parameter.dtype)).sample.float()
        return (x.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Tensor, context: ViewContext | None = None) -> Tensor:
        """eps [B, C, h, w] in the dtype of z_t; one UNet call, or several of at most `max_batch`."""
        return self.noise(self.unet, z_t, t, embedding)

    def noise(self, unet: torch.nn.Module, z_t: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        """predict_noise by this UNet or one like it, with gradients in those of its weights that ask for them."""
        patched = F.pixel_unshuffle(z_t, self.patch).to(self._parameter)
        t_device, limit = t.to(patched.device), self.settings.max_batch or len(patched)
        with _no_autocast(patched.device), phase("networks"):
            outputs = [
                unet(
                    patched[k : k + limit], t_device[k : k + limit], encoder_hidden_states=embedding[k : k + limit]
                ).sample
                for k in range(0, len(patched), limit)
            ]
        prediction = torch.cat(outputs)[:, : patched.shape[1]].to(z_t.dtype)
        prediction = F.pixel_shuffle(prediction, self.patch)
        return eps_from_prediction(prediction, z_t, self.alphas_cumprod[t.cpu()], self.prediction)


def load_prior(
    path_or_id: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    settings: DiffusionSettings | None = None,
) -> DiffusionPrior:
    """Load a diffusers folder (local first, hub id second) as a prior with frozen weights.

    Args:
        path_or_id: a folder with model_index.json, or owner/name on the hub. device: where the networks live.
        dtype: of the networks; None leaves it to `settings`.
    Raises: UserError for anything missing, damaged or unsupported.
    """
    settings, device = settings or DiffusionSettings(), torch.device(device)
    if dtype is None:
        automatic = torch.float16 if device.type == "cuda" else torch.float32
        dtype = automatic if settings.dtype == "auto" else DTYPES[settings.dtype]
    folder = locate(str(path_or_id), settings.revision, settings.variant)
    classes = check_folder(folder, settings.variant)
    what = f"Cannot load the prior {folder}"
    if classes["text_encoder"] not in TEXT_FAMILIES:
        raise _unsupported(what, "text_encoder", classes["text_encoder"], tuple(TEXT_FAMILIES))
    if classes["unet"] != "UNet2DConditionModel":
        raise _unsupported(what, "unet", classes["unet"], ("UNet2DConditionModel",))
    if classes.get("vae", VAE_CLASSES[0]) not in VAE_CLASSES:
        raise _unsupported(what, "vae", classes["vae"], VAE_CLASSES)

    schedule = _load_schedule(folder, classes["scheduler"])
    unet = _load_network(folder, "unet", classes["unet"], dtype, settings).to(device)
    _check_unet(unet.config, what)
    vae = _load_network(folder, "vae", classes["vae"], dtype, settings).to(device) if "vae" in classes else None
    text = _load_text(folder, classes["text_encoder"], device, dtype, settings)
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    if text.width not in (width if isinstance(width, (list, tuple)) else [width]):
        raise UserError(
            what, f"its text encoder gives {text.width} numbers a token and its UNet wants {width}", "use one model's"
        )
    if settings.attention_slicing:
        unet.set_attention_slice("auto")
    if settings.vae_checkpointing and vae is not None:
        vae.enable_gradient_checkpointing()
        vae.train()  # checkpointing is active in training mode only; these networks have no dropout or batch statistics
    if settings.channels_last:
        for network in (unet, vae):
            if network is not None:
                network.to(memory_format=torch.channels_last)
    prior = DiffusionPrior(Path(path_or_id).name or str(path_or_id), unet, vae, text, schedule, settings)
    if (folder / "pocket.json").is_file():
        words = read_json(folder / "pocket.json", what).get("words")
        if not isinstance(words, list):
            raise UserError(what, 'its pocket.json has no list "words"', "get the folder again")
        prior.known_words = sorted(str(word) for word in words)
    return prior


def _load_network(
    folder: Path, part: str, class_name: str, dtype: torch.dtype, settings: DiffusionSettings
) -> torch.nn.Module:
    import diffusers
    from diffusers.utils import is_accelerate_available

    def load() -> Any:
        return getattr(diffusers, class_name).from_pretrained(
            folder,
            subfolder=part,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=settings.variant,
            low_cpu_mem_usage=is_accelerate_available(),
            output_loading_info=True,
        )

    return load_part(folder, part, load).eval().requires_grad_(False)


def _load_text(
    folder: Path, class_name: str, device: torch.device, dtype: torch.dtype, settings: DiffusionSettings
) -> TextEncoder:
    import transformers

    def load_encoder() -> torch.nn.Module:
        model = load_part(
            folder,
            "text_encoder",
            lambda: getattr(transformers, class_name).from_pretrained(
                folder / "text_encoder",
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                variant=settings.variant,
                output_loading_info=True,
            ),
        )
        return model.eval().requires_grad_(False).to(device)

    tokenizer = load_part(
        folder,
        "tokenizer",
        lambda: transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
    )
    if tokenizer.pad_token is None:
        raise UserError(f"Cannot load the tokenizer of {folder}", "it has no padding token", "get the folder again")
    return TextEncoder(tokenizer, load_encoder, TEXT_FAMILIES[class_name])


def _load_schedule(folder: Path, class_name: str) -> tuple[Tensor, str]:
    """(alphas_cumprod [T] float32 on the CPU, prediction type) as the folder's own scheduler class reads its config."""
    import diffusers

    what = f"Cannot load the scheduler of {folder}"
    kind = getattr(diffusers, class_name, None)
    if kind is None:
        raise UserError(what, f"this diffusers has no {class_name}", "update diffusers")
    scheduler = load_part(
        folder, "scheduler", lambda: kind.from_pretrained(folder / "scheduler", local_files_only=True)
    )
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    prediction = scheduler.config.get("prediction_type")
    if alphas_cumprod is None or prediction not in PREDICTIONS:
        raise UserError(
            what,
            f"{class_name} with prediction type {prediction!r} is not a discrete variance-preserving schedule",
            f"use a model with one of {', '.join(PREDICTIONS)} (flow models are not supported yet)",
        )
    return torch.as_tensor(alphas_cumprod).detach().float().cpu().clone(), prediction


def _check_unet(config: Any, what: str) -> None:
    if config.addition_embed_type not in (None, "text"):
        raise UserError(
            what, f"its UNet wants extra conditioning ({config.addition_embed_type})", "use a plain text-to-image model"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise UserError(what, "its UNet wants class labels (an upscaler?)", "use a plain text-to-image model")
    if config.sample_size is None:
        raise UserError(what, "unet/config.json gives no sample_size", "write the side the UNet was trained at there")


def _patch_size(in_channels: int, channels: int, name: str) -> int:
    """p with in_channels = channels p p."""
    p = math.isqrt(max(in_channels // channels, 1))
    if channels * p * p != in_channels:
        raise UserError(
            f"Cannot use the prior {name}",
            f"its UNet has {in_channels} input channels, which is not {channels} times a square",
            "use a text-to-image model (inpainting and depth models have extra channels)",
        )
    return p


def _vae_factor(vae: torch.nn.Module) -> int:
    blocks = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(blocks) - 1)


def _shift(vae: torch.nn.Module) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def _no_autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, enabled=False)


def _unsupported(what: str, part: str, got: str, wanted: tuple[str, ...]) -> UserError:
    return UserError(what, f"its {part} is a {got}, which is not supported", f"supported: {', '.join(wanted)}")
