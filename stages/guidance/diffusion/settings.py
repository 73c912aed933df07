"""How a prior is loaded from a diffusers folder and run: the settings below `prior.diffusion`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DiffusionSettings(BaseModel):
    """How a diffusers folder is loaded and run."""

    model_config = ConfigDict(extra="forbid")

    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    variant: str | None = Field(None, description="weight files' variant, such as fp16")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="of the networks; auto: on cuda float16 (bfloat16 for SD3 and Flux), float32 elsewhere"
    )
    resolution: int | None = Field(
        None, ge=8, le=4096, description="side in pixels that the prior works at; null: what it was trained at"
    )
    autoencoder: str | None = Field(
        None, description="another autoencoder of the same latents, folder or hub id: madebyollin/taesd is a tiny one"
    )
    vae_sample: Literal["sample", "mode"] = Field("sample", description="latents drawn from the posterior, or its mean")
    embedded_guidance: float = Field(3.5, ge=0, description="guidance told to a distilled Flux; others have none")
    max_batch: int = Field(0, ge=0, description="most images in one denoiser call, to save memory; 0: no limit")
    attention_slicing: bool = Field(False, description="attention one slice at a time, UNets only: less memory, slower")
    vae_checkpointing: bool = Field(False, description="recompute VAE activations in the backward pass: less memory")
    vae_slicing: bool = Field(False, description="one image at a time through the VAE, recomputed in the backward pass")
    vae_tiling: bool = Field(False, description="VAE in overlapping tiles beyond its own size: seams differ slightly")
    camera: bool = Field(
        True, description="tell a prior that was taught them camera, light and backdrop of each view (a layout/ part)"
    )
    offload: Literal["none", "blocks"] = Field(
        "none", description="blocks: the denoiser's weights wait in main memory and visit the device block by block"
    )
    text_device: Literal["prior", "cpu"] = Field(
        "prior", description="where prompts are embedded; cpu: slowly, in main memory"
    )
    channels_last: bool = Field(False, description="channels-last memory layout of the networks")
