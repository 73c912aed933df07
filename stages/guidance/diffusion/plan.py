"""The plan of a diffusers folder: all facts and all refusals that need no weight to be loaded.

A plan is made when a run is checked, so that a wrong folder or a prompt too long is answered before any work, and
handed on to whoever loads its prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.errors import UserError
from stages.guidance.diffusion.autoencoder import downsampling
from stages.guidance.diffusion.denoisers import Geometry
from stages.guidance.diffusion.families import (
    SDXL,
    Configs,
    Family,
    check_folder,
    check_sizes,
    components,
    encoder_specs,
    read_configs,
    with_autoencoder,
)
from stages.guidance.diffusion.hub import locate_autoencoder
from stages.guidance.diffusion.noise_schedule import NoiseSchedule, load_schedule
from stages.guidance.diffusion.text import EncoderSpec, load_tokenizer, token_limit
from stages.guidance.diffusion.weights import Header, check_files, read_headers
from stages.prompts import check_length

if TYPE_CHECKING:
    from stages.guidance.diffusion.lora import Lora
    from stages.guidance.diffusion.settings import DiffusionSettings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """A folder's family, its tokenizers, sizes and noise; of each part it uses class, config, directory and the variant
    of its weights."""

    folder: Path
    family: Family
    classes: dict[str, str]
    configs: Configs
    directories: dict[str, Path]
    tokenizers: dict[str, Any]
    geometry: Geometry
    schedule: NoiseSchedule
    variants: dict[str, str | None]

    @property
    def encoders(self) -> list[EncoderSpec]:
        """The text encoders that the folder has."""
        return encoder_specs(self.family, self.classes)

    def headers(self, part: str, stem: str) -> dict[str, Header]:
        """Read the tensors' headers of a part's weight files."""
        files = check_files(self.directories[part], stem, self.variants[part], f"Cannot load the prior {self.folder}")
        return read_headers(files)

    def stems(self) -> dict[str, str]:
        """Return the stem of the weight files by part."""
        return {c.part: c.stem for c in components(self.family, self.classes) if c.stem is not None}

    def check_prompts(self, prompts: list[str]) -> None:
        """Refuse prompts that any of the text encoders would cut; see stages.prompts.check_length."""
        for spec in self.encoders:
            tokenizer = self.tokenizers[spec.part]
            limit = token_limit(spec, tokenizer, self.configs[spec.part])
            check_length(prompts, lambda text, r=spec, t=tokenizer: r.count(t, text), limit)


def make_plan(
    folder: Path,
    settings: DiffusionSettings,
    prompts: list[str] | None = None,
    lora: Lora | None = None,
    *,
    device: torch.device | str = "cpu",
    weights: bool = True,
) -> Plan:
    """Plan how a folder is loaded under these settings, after checking that prompts and LoRA fit it.

    Args:
        folder: the model's.
        settings: how it is loaded.
        prompts: what it will be asked; None for not known.
        lora: weights that change it; None for none.
        device: where it will run, which says how precisely.
        weights: whether they must be there; without them a plan serves to check all else.
    Raises: UserError for anything missing, damaged, unsupported or not belonging together.
    """
    half = network_dtype(settings, None, torch.device(device)).itemsize == 2
    family, classes, variants = check_folder(folder, settings.variant, half, weights)
    if settings.attention_slicing and family.part != "unet":
        raise UserError(
            f"Cannot load the prior {folder}",
            f"prior.diffusion.attention_slicing is for UNets; its {classes[family.part]} has no slices to take",
            "leave it false; prior.diffusion.offload=blocks and max_batch=1 save memory with any model",
        )
    configs, vae_folder = read_configs(folder, family, classes), folder
    if settings.autoencoder is not None and "vae" in classes:
        vae_folder = locate_autoencoder(settings.autoencoder)
        configs, classes = with_autoencoder(vae_folder, configs, classes)
    geometry = check_sizes(family, configs, folder, settings.resolution)
    _check_gradient_side(settings.vae_gradient, configs, geometry, folder)
    schedule = load_schedule(folder, classes["scheduler"], geometry.image_tokens)
    directories = {part: folder / part for part in classes}
    if vae_folder is not folder:
        directories["vae"] = vae_folder / "vae" if (vae_folder / "vae").is_dir() else vae_folder
        variants["vae"] = None
    tokenizers = {r.part: load_tokenizer(folder, r.tokenizer) for r in encoder_specs(family, classes)}
    plan = Plan(folder, family, classes, configs, directories, tokenizers, geometry, schedule, variants)
    if prompts is not None:
        plan.check_prompts(prompts)
    if lora is not None:
        lora.check(plan)
    return plan


def _check_gradient_side(side: int | None, configs: Configs, geometry: Geometry, folder: Path) -> None:
    """Refuse a side for gradients that the autoencoder cannot halve as often as it does, or that is no smaller one."""
    if side is None:
        return
    what, resolution = f"Cannot load the prior {folder} with prior.diffusion.vae_gradient={side}", geometry.resolution
    if "vae" not in configs:
        raise UserError(what, "it works on pixels, without an autoencoder", "leave it null")
    factor = downsampling(configs["vae"])
    if side % factor or side >= resolution:
        why = f"wanted a multiple of {factor} below the {resolution} pixels that it works at"
        raise UserError(what, why, f"set it to {resolution // 2 // factor * factor}")


def network_dtype(settings: DiffusionSettings, family: Family | None, device: torch.device) -> torch.dtype:
    """Return the precision that a family's networks run in on a device; None for a family that is not known yet."""
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if family is not None and family.wants_bfloat16 else torch.float16


def cores_have_bfloat16() -> bool:
    """Return whether this machine's cores multiply bfloat16 themselves (AVX512-BF16 or AMX)."""
    asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(supported is not None and supported() for supported in asked)


def vae_dtype(family: Family, config: Any, dtype: torch.dtype) -> torch.dtype:
    """Return the autoencoder's precision: float32 for SDXL's, which overflows in float16, else `dtype`."""
    upcast = family is SDXL and dtype == torch.float16 and getattr(config, "force_upcast", False)
    return torch.float32 if upcast else dtype
