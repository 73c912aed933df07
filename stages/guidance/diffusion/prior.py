"""Priors from diffusers folders: latent and pixel models, UNets and transformers, epsilon, v, sample or flow.

Space: a folder with a vae works on its latents, one without on pixels in [-1, 1]; x of families.py's geometry.
Noise: every model's path is scaled to be variance preserving (see prior.py), so rules and schedules see one form;
prediction type and noise levels are read from scheduler/, classes from model_index.json.
Memory: prompts given to load_prior are embedded before the denoiser is loaded, one text encoder at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.guidance.diffusion.autoencoder import Autoencoder, no_autocast
from stages.guidance.diffusion.denoisers import Denoiser
from stages.guidance.diffusion.families import SDXL, T5, Family
from stages.guidance.diffusion.folder import load_part, read_json
from stages.guidance.diffusion.hub import locate
from stages.guidance.diffusion.layout_condition import LayoutCondition
from stages.guidance.diffusion.noise_schedule import NoiseSchedule
from stages.guidance.diffusion.offload import offload_blocks
from stages.guidance.diffusion.plan import Plan, make_plan, network_dtype, vae_dtype
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.diffusion.text import EncoderSpec, PromptEncoder, TextEncoder
from stages.guidance.diffusion.text_store import TextStore, text_store
from stages.guidance.prior import ViewContext, eps_from_prediction, flow_scale, per_sample, resized
from stages.phases import backward_phase, phase

if TYPE_CHECKING:
    from stages.guidance.diffusion.lora import Lora
    from stages.render.volume import Radiance


class DiffusionPrior:
    """A diffusers folder behind the protocols Prior, FreesText and TrainablePrior; made by :func:`load_prior`.

    Beyond them: `latent`, whether it has an autoencoder; `family`.
    """

    reads_prompts = True
    reads_t_anywhere = True

    def __init__(
        self,
        name: str,
        family: Family,
        denoiser: Denoiser,
        vae: Autoencoder | None,
        text: PromptEncoder,
        schedule: NoiseSchedule,
        settings: DiffusionSettings,
    ) -> None:
        self.name, self.family, self.denoiser, self.text = name, family, denoiser, text
        self.autoencoder, self.schedule, self.settings = vae, schedule, settings
        self.alphas_cumprod, self.prediction = schedule.alphas_cumprod, schedule.prediction
        self.resolution, self.patch = denoiser.resolution, denoiser.patch
        self._there: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.layout: LayoutCondition | None = None
        self.latent = vae is not None
        self.data_range = None if self.latent else (-1.0, 1.0)
        self.channels = vae.channels if self.latent else 3
        self.device, self.dtype, self.offload = denoiser.device, denoiser.dtype, settings.offload

    @property
    def unet(self) -> torch.nn.Module:
        """The denoising network, UNet or transformer."""
        return self.denoiser.network

    @property
    def vae(self) -> torch.nn.Module | None:
        """The autoencoder's module, None for a pixel model."""
        return None if self.autoencoder is None else self.autoencoder.module

    def embed(self, prompts: list[str]) -> Tensor:
        """Embed prompts, [P, L, D] (see denoisers.join_pooled). Raises: UserError for one that is too long."""
        return self.text.embed(prompts)

    def release_text_encoder(self) -> None:
        """Free the text encoders' memory; what was embedded stays."""
        self.text.release()

    def embed_anew(self, prompts: list[str]) -> None:
        """Embed the prompts of another run, as `load_prior(prompts=...)` does, and forget the earlier ones.

        The prior then gives the bytes of one loaded for these prompts: a text encoder may give a text other last bits
        in another batch, so that what two runs share is embedded twice.
        """
        self.text.forget()
        self.text.embed(prompts, keep=False)

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Encode sRGB images [B, H, W, 3] in [0, 1] to x [B, C, h, w] float32; images of another size are resized."""
        check_shape("images", images, (None, None, None, 3))
        x = resized(images.permute(0, 3, 1, 2) * 2 - 1, self.resolution)
        if self.autoencoder is None:
            return x.float()
        with phase("networks"):
            latents = self.autoencoder.encode(x, generator)
        backward_phase("networks", x, latents)
        return latents

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode x [B, C, h, w] to sRGB images [B, resolution, resolution, 3] clamped to [0, 1]."""
        if self.autoencoder is not None:
            x = self.autoencoder.decode(x)
        return (x.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Tensor, context: ViewContext | None = None) -> Tensor:
        """Return eps [B, C, h, w] in the dtype of z_t; one denoiser call, or several of at most `max_batch`."""
        return self.noise(self.unet, z_t, t, embedding, **self.conditions(embedding, context))

    @torch.no_grad()
    def conditions(self, embedding: Tensor, context: ViewContext | None) -> dict[str, Any]:
        """Return the denoiser's further inputs for these views, as :meth:`noise` takes them: those of a layout.

        None for a prior without a layout, or where the views are not known.
        """
        if self.layout is None or context is None:
            return {}
        with phase("networks"):
            return self.layout.of(embedding, context)

    @torch.no_grad()
    def shape(self, embedding: Tensor) -> Radiance | None:
        """Return the objects of its layout as density and linear colour at points; None for a prior without one."""
        return None if self.layout is None else self.layout.shape(embedding)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Noise levels and what the network is told of them, on a device; brought there once."""
        if device.type == "cpu":
            return self.alphas_cumprod, self.schedule.timesteps
        if device not in self._there:
            self._there[device] = self.alphas_cumprod.to(device), self.schedule.timesteps.to(device)
        return self._there[device]

    def noise(self, network: torch.nn.Module, z_t: Tensor, t: Tensor, embedding: Tensor, **conditions: Any) -> Tensor:
        """Predict noise by this network or one like it, with gradients in its weights that require them.

        conditions: what else its family's diffusers module takes, such as a ControlNet's residuals: a tensor, or a
            tuple of them, with a row for every sample (or without any axis). `mean` is ours: the mean mu [B, C, h, w]
            of x that was subtracted in training; the network's input is z_t - sqrt(alpha_bar) mu, of the same noise.
        """
        alphas_cumprod, timesteps = self._tables(z_t.device)
        t = t.to(z_t.device)
        alpha_bar = alphas_cumprod[t]
        mean = conditions.pop("mean", None)
        if mean is not None:
            z_t = z_t - per_sample(alpha_bar.sqrt(), z_t) * mean.to(z_t)
        z = z_t * per_sample(flow_scale(alpha_bar), z_t) if self.schedule.flow else z_t
        z, timesteps = z.to(self.device, self.dtype), timesteps[t].to(self.device)
        limit = self.settings.max_batch or len(z)
        with no_autocast(self.device), phase("networks"):
            outputs = [
                self.denoiser(
                    *(rows[k : k + limit] for rows in (z, timesteps, embedding)),
                    network=network,
                    **{name: _rows(condition, k, limit, z.dtype) for name, condition in conditions.items()},
                )
                for k in range(0, len(z), limit)
            ]
        return eps_from_prediction(torch.cat(outputs).to(z_t), z_t, alpha_bar, self.prediction)


def _rows(condition: Any, first: int, count: int, dtype: torch.dtype) -> Any:
    """Rows first .. first + count of a condition: of a tensor, of each tensor of a tuple; other things stay whole."""
    if isinstance(condition, tuple):
        return tuple(_rows(part, first, count, dtype) for part in condition)
    if not isinstance(condition, Tensor):
        return condition
    return (condition[first : first + count] if condition.dim() else condition).to(dtype)


def load_prior(
    path_or_id: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    settings: DiffusionSettings | None = None,
    prompts: list[str] | None = None,
    lora: Lora | None = None,
    plan: Plan | None = None,
) -> DiffusionPrior:
    """Load a diffusers folder (local first, hub id second) as a prior with frozen weights.

    Args:
        path_or_id: a folder with model_index.json, or owner/name on the hub.
        device: where the networks live.
        dtype: of the networks; None leaves it to `settings`.
        settings: precision, resolution and memory; None: the defaults.
        prompts: embedded before the denoiser is loaded, each text encoder freed before the next, so that the memory
            needed is that of the largest part; None keeps the encoders until release_text_encoder.
        lora: weights merged into the networks as they are loaded.
        plan: of that folder for these settings and prompts, where it was made before; None makes it.
    Returns: the prior, its text encoders kept unless `prompts` are given.
    Raises: UserError for anything missing, damaged or unsupported.

    Example:
        >>> prior = load_prior("stable-diffusion-v1-5/stable-diffusion-v1-5", "cuda")
    """
    settings, device = settings or DiffusionSettings(), torch.device(device)
    if plan is None:
        half = network_dtype(settings, None, device).itemsize == 2
        folder = locate(str(path_or_id), settings.revision, settings.variant, half)
        plan = make_plan(folder, settings, prompts, lora, device=device)
    elif lora is not None:
        lora.check(plan)  # which reads its tensors: a plan that is kept through a stage holds none
    folder = plan.folder
    family, dtype = plan.family, dtype or network_dtype(settings, plan.family, device)

    loader = _Loader(plan, settings, lora, device)
    text = loader.text(torch.device("cpu") if settings.text_device == "cpu" else device, device, dtype)
    if prompts is None:
        for encoder in text.encoders:
            encoder.load()
    else:
        text.embed(prompts, keep=False)

    network = loader.network(family.part, dtype)
    if settings.offload == "blocks":
        offload_blocks(network, device)
    else:
        network.to(device)
    denoiser = Denoiser(
        network, family.call, plan.geometry, device, dtype, settings.embedded_guidance, settings.compile
    )
    vae = loader.autoencoder(device, dtype) if "vae" in plan.classes else None
    name = Path(path_or_id).name or str(path_or_id)
    prior = DiffusionPrior(name, family, denoiser, vae, text, plan.schedule, settings)
    if settings.camera and (folder / "layout").is_dir():
        prior.layout = LayoutCondition.load(folder / "layout").to(device)
    return prior


class _Loader:
    """Loads the parts of one plan, all alike."""

    def __init__(self, plan: Plan, settings: DiffusionSettings, lora: Lora | None, device: torch.device) -> None:
        self.plan, self.settings, self.lora = plan, settings, lora
        chosen = settings.channels_last
        self.channels_last = device.type == "cuda" if chosen is None else chosen

    def network(self, part: str, dtype: torch.dtype) -> torch.nn.Module:
        """The denoiser or the autoencoder."""
        import diffusers
        from diffusers.utils import is_accelerate_available

        plan, directory = self.plan, self.plan.directories[part]

        def load() -> Any:
            return getattr(diffusers, plan.classes[part]).from_pretrained(
                directory,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                variant=plan.variants[part],
                low_cpu_mem_usage=is_accelerate_available(),
                output_loading_info=True,
            )

        network = load_part(plan.folder, part, load)
        torch.nn.Module.to(network, dtype)  # torch_dtype leaves some models in float32; diffusers' own to() complains
        self._finish(part, network)
        if self.settings.attention_slicing and part == plan.family.part:
            network.set_attention_slice("auto")
        return network

    def autoencoder(self, device: torch.device, dtype: torch.dtype) -> Autoencoder:
        s = self.settings
        vae = self.network("vae", vae_dtype(self.plan.family, self.plan.configs["vae"], dtype)).to(device)
        if device.type == "cuda" and hasattr(vae, "set_attn_processor"):
            # The fused kernels' gradients differ from run to run, and this is the one attention that needs them. Spelt
            # out it takes 32 MB a picture of 512 pixels.
            from diffusers.models.attention_processor import AttnProcessor

            vae.set_attn_processor(AttnProcessor())
        if s.vae_checkpointing:
            vae.enable_gradient_checkpointing()
            vae.train()  # checkpointing is active in training mode only; no dropout or batch statistics in there
        if s.vae_tiling:
            vae.enable_tiling()
        return Autoencoder(vae, s.vae_sample == "sample", s.vae_slicing, s.vae_gradient)

    def text(self, text_device: torch.device, device: torch.device, dtype: torch.dtype) -> PromptEncoder:
        plan, family = self.plan, self.plan.family
        encoders = [
            TextEncoder(r, plan.tokenizers[r.part], self._encoder(r, text_device, dtype), plan.configs[r.part])
            for r in plan.encoders
        ]
        index = read_json(plan.folder / "model_index.json", f"Cannot load the prior {plan.folder}")
        return PromptEncoder(
            encoders,
            lambda encoded: family.join(encoded, plan.configs[family.part]).to(dtype),
            device,
            empty_is_zero=family is SDXL and bool(index.get("force_zeros_for_empty_prompt", True)),
            store=self._store(text_device, dtype),
        )

    def _store(self, device: torch.device, dtype: torch.dtype) -> TextStore | None:
        """Return the store of embeddings, for an unchanged T5 alone: other encoders take no time."""
        large = any(self.plan.classes[spec.part] in T5 for spec in self.plan.encoders)
        if not (large and self.settings.keep_embeddings and self.lora is None):
            return None
        parts = [part for spec in self.plan.encoders for part in (spec.part, spec.tokenizer)]
        return text_store(self.plan.folder, parts, dtype, device)

    def _encoder(self, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Callable[[], torch.nn.Module]:
        import transformers

        plan = self.plan

        def load() -> torch.nn.Module:
            model = load_part(
                plan.folder,
                spec.part,
                lambda: getattr(transformers, plan.classes[spec.part]).from_pretrained(
                    plan.directories[spec.part],
                    dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    variant=plan.variants[spec.part],
                    output_loading_info=True,
                ),
            )
            return self._finish(spec.part, model).to(device)

        return load

    def _finish(self, part: str, network: torch.nn.Module) -> torch.nn.Module:
        network.eval().requires_grad_(False)
        if self.lora is not None:
            self.lora.merge(part, network)
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        return network
