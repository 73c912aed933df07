"""Settings of loading and running a diffusers folder, below `prior.diffusion`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

AUTO = "auto"


class DiffusionSettings(BaseModel):
    """Settings of loading and running a diffusers folder."""

    model_config = ConfigDict(extra="forbid")

    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    variant: str | None = Field(
        AUTO,
        description="weight files' variant, such as fp16, where a part has it; auto: fp16 for networks in half "
        "precision; null: the plain files",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="auto: on cuda float16 (SD3, Flux: bfloat16), else float32 (pocket: bfloat16 if cores have it)",
    )
    resolution: int | None = Field(None, ge=8, le=4096, description="side in pixels that it works at; null: as trained")
    autoencoder: str | None = Field(
        None, description="another autoencoder of the same latents, folder or hub id: madebyollin/taesd is a tiny one"
    )
    vae_sample: Literal["sample", "mode"] = Field("sample", description="latents drawn from the posterior, or its mean")
    embedded_guidance: float = Field(3.5, ge=0, description="guidance told to a distilled Flux; others have none")
    max_batch: int = Field(0, ge=0, description="most images in a denoiser call; 0: no limit")
    attention_slicing: bool = Field(False, description="attention by slices, UNets only: less memory, slower")
    vae_gradient: int | None = Field(
        None,
        ge=8,
        description="side in pixels that gradients pass the VAE at, for coarse stages half or a quarter of the "
        "resolution: a quarter or nearly half of its work less; null: the resolution",
    )
    vae_checkpointing: bool = Field(False, description="recompute VAE activations in the backward pass: less memory")
    vae_slicing: bool = Field(False, description="one image at a time through the VAE, recomputed in the backward pass")
    vae_tiling: bool = Field(False, description="VAE in overlapping tiles beyond its own size")
    camera: bool = Field(True, description="tell a prior that was taught them each view's camera, light and backdrop")
    offload: Literal["none", "blocks"] = Field(
        "none", description="blocks: the denoiser's weights visit the device block by block"
    )
    text_device: Literal["prior", "cpu"] = Field(
        "prior", description="where prompts are embedded; cpu: slowly, in main memory"
    )
    keep_embeddings: bool = Field(
        True, description="keep on disk what a T5 makes of a run's prompts, so that the same prompts need it only once"
    )
    channels_last: bool | None = Field(None, description="channels-last networks; null: on cuda")
    compile: Literal["none", "graph", "inductor"] = Field(
        "none",
        description="denoiser calls: plain, a CUDA graph, torch's compiler",
    )

    def with_changes(self, changes: dict[str, Any]) -> DiffusionSettings:
        """Return these settings with other values for some of them."""
        return DiffusionSettings.model_validate(self.model_dump() | changes)


def _known(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, checked. Raises: ValueError for a name or a value that DiffusionSettings does not have."""
    unknown = [name for name in changes if name not in DiffusionSettings.model_fields]
    if unknown:
        known = ", ".join(DiffusionSettings.model_fields)
        raise ValueError(f"no setting is called {', '.join(unknown)}; there are {known}")
    try:
        DiffusionSettings.model_validate(changes, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{problem['loc'][0]}: {problem['msg']}, got {problem['input']!r}") from None
    return changes


# Settings of prior.diffusion in which one stage's prior differs.
DiffusionChanges = Annotated[dict[str, Any], AfterValidator(_known)]
