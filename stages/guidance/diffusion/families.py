"""The model families we know: which parts a folder must have, how they are read, joined and called, and how they fit.

A family is recognised by its folder's classes and configs, never by its name. Adding one is an entry in FAMILIES: the
denoiser's class, an EncoderSpec for each text encoder, a call in denoisers.py and the functions below that say how
wide its text is and how many channels it wants.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import UserError
from stages.guidance.diffusion.autoencoder import AUTOENCODERS, downsampling
from stages.guidance.diffusion.denoisers import Call, Geometry, call_flux, call_sd3, call_sdxl, call_unet, join_pooled
from stages.guidance.diffusion.folder import Component, check_component, load_part, names_in, read_index, read_json
from stages.guidance.diffusion.settings import AUTO
from stages.guidance.diffusion.text import Encoded, EncoderSpec
from stages.guidance.diffusion.weights import check_files, chosen_variant

FLUX_LATENTS = 128  # side in latents; a Flux folder does not say its size, this is its pipeline's default
CLIP, CLIP_PROJECTED, T5 = ("CLIPTextModel",), ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
Widths = tuple[int, int]  # numbers a text token, numbers in the pooled embedding

Configs = dict[str, Any]  # by part


@dataclass(frozen=True)
class Family:
    """One kind of folder.

    Args:
        name: as messages call it.
        part: the denoiser's folder.
        network: the denoiser's class.
        encoders: its text encoders in order.
        call: see denoisers.py.
        join: one tensor of the encoders' outputs and the network's config.
        text_widths: of the encoders' configs.
        network_widths: what the network's config asks for.
        vae_required: whether it needs an autoencoder; else it may work on pixels.
        wants_bfloat16: whether its activations leave float16's range.
    """

    name: str
    part: str
    network: str
    encoders: tuple[EncoderSpec, ...]
    call: Call
    join: Callable[[list[Encoded], Any], Tensor]
    text_widths: Callable[[list[Any], Any], Widths]
    network_widths: Callable[[Any], Widths]
    vae_required: bool = True
    wants_bfloat16: bool = False


def _join_one(encoded: list[Encoded], config: Any) -> Tensor:
    return encoded[0][0]


def _join_sdxl(encoded: list[Encoded], config: Any) -> Tensor:
    (first, _), (second, pooled) = encoded
    return join_pooled(torch.cat([first, second], -1), pooled)


def _join_sd3(encoded: list[Encoded], config: Any) -> Tensor:
    """CLIP tokens side by side, filled up to T5's width, before T5's; zeros for a T5 that the folder leaves out."""
    (first, pooled), (second, pooled_2) = encoded[:2]
    clip = torch.cat([first, second], -1)
    width = config.joint_attention_dim
    t5 = encoded[2][0] if len(encoded) == 3 else clip.new_zeros(len(clip), SD3_T5_LENGTH, width)
    clip = F.pad(clip, (0, width - clip.shape[-1]))
    return join_pooled(torch.cat([clip, t5.to(clip)], 1), torch.cat([pooled, pooled_2], -1))


def _join_flux(encoded: list[Encoded], config: Any) -> Tensor:
    return join_pooled(encoded[1][0], encoded[0][1])


def _unet_width(config: Any) -> Widths:
    width = config.encoder_hid_dim or config.cross_attention_dim
    return (width if isinstance(width, int) else width[0]), 0


def _sdxl_network(config: Any) -> Widths:
    """The pooled embedding shares its layer with six sizes (the refiner's and others' have five)."""
    sizes = 6 * (config.addition_time_embed_dim or 0)
    return _unet_width(config)[0], (config.projection_class_embeddings_input_dim or 0) - sizes


def _sd3_text(configs: list[Any], network: Any) -> Widths:
    """CLIP is filled up to the width of T5, so only a wider one fails."""
    clip = configs[0].hidden_size + configs[1].hidden_size
    tokens = configs[2].d_model if len(configs) == 3 else network.joint_attention_dim
    return max(clip, tokens), configs[0].projection_dim + configs[1].projection_dim


SD3_T5_LENGTH = 256
_JOINT = {"network_widths": lambda c: (c.joint_attention_dim, c.pooled_projection_dim), "wants_bfloat16": True}
_UNET = {"part": "unet", "network": "UNet2DConditionModel"}
_ONE = {"call": call_unet, "join": _join_one, "network_widths": _unet_width, "vae_required": False}

STABLE_DIFFUSION = Family(
    "Stable Diffusion 1.x / 2.x",
    encoders=(EncoderSpec("text_encoder", "tokenizer", CLIP, mask="config"),),
    text_widths=lambda configs, network: (configs[0].hidden_size, 0),
    **_UNET,
    **_ONE,
)
DEEPFLOYD = Family(
    "DeepFloyd IF",
    encoders=(EncoderSpec("text_encoder", "tokenizer", T5, limit=77, mask="always", clean=True),),
    text_widths=lambda configs, network: (configs[0].d_model, 0),
    **_UNET,
    **_ONE,
)
SDXL = Family(
    "SDXL",
    encoders=(
        EncoderSpec("text_encoder", "tokenizer", CLIP, "penultimate"),
        EncoderSpec("text_encoder_2", "tokenizer_2", CLIP_PROJECTED, "penultimate", "text_embeds"),
    ),
    call=call_sdxl,
    join=_join_sdxl,
    text_widths=lambda configs, network: (
        configs[0].hidden_size + configs[1].hidden_size,
        configs[1].projection_dim,
    ),
    network_widths=_sdxl_network,
    **_UNET,
)
SD3 = Family(
    "Stable Diffusion 3",
    part="transformer",
    network="SD3Transformer2DModel",
    encoders=(
        EncoderSpec("text_encoder", "tokenizer", CLIP_PROJECTED, "penultimate", "text_embeds"),
        EncoderSpec("text_encoder_2", "tokenizer_2", CLIP_PROJECTED, "penultimate", "text_embeds"),
        EncoderSpec("text_encoder_3", "tokenizer_3", T5, limit=SD3_T5_LENGTH, optional=True),
    ),
    call=call_sd3,
    join=_join_sd3,
    text_widths=_sd3_text,
    **_JOINT,
)
FLUX = Family(
    "Flux",
    part="transformer",
    network="FluxTransformer2DModel",
    encoders=(
        EncoderSpec("text_encoder", "tokenizer", CLIP, "none", "pooler_output"),
        EncoderSpec("text_encoder_2", "tokenizer_2", T5, limit=512),
    ),
    call=call_flux,
    join=_join_flux,
    text_widths=lambda configs, network: (configs[1].d_model, configs[0].hidden_size),
    **_JOINT,
)
FAMILIES = (STABLE_DIFFUSION, DEEPFLOYD, SDXL, SD3, FLUX)


def family_of(folder: Path) -> tuple[Family, dict[str, str]]:
    """Return the family of a folder and the class of each part that the family uses.

    Raises: UserError where the index is missing or damaged, or lists what no family here has.
    """
    what = f"Cannot load the prior {folder}"
    classes = read_index(folder)
    if "unet" in classes and "transformer" not in classes:
        family = _unet_family(folder, classes)
    else:
        networks = {family.network: family for family in FAMILIES if family.part == "transformer"}
        if "transformer" not in classes:
            raise UserError(
                what, "model_index.json lists neither a unet nor a transformer", "use a complete diffusers folder"
            )
        if classes["transformer"] not in networks:
            raise unsupported(what, "transformer", classes["transformer"], tuple(networks))
        family = networks[classes["transformer"]]
    parts = [family.part, "scheduler", *(["vae"] if family.vae_required or "vae" in classes else [])]
    for spec in family.encoders:
        if not (spec.optional and spec.part not in classes):
            parts += [spec.part, spec.tokenizer]
    for part in parts:
        if part not in classes:
            raise UserError(
                what, f"model_index.json lists no {part}, which {family.name} needs", "use a complete diffusers folder"
            )
    allowed = {family.part: (family.network,), "vae": AUTOENCODERS}
    allowed |= {spec.part: spec.classes for spec in family.encoders}
    for part in parts:
        if classes[part] not in allowed.get(part, (classes[part],)):
            raise unsupported(what, part, classes[part], allowed[part])
    return family, {part: classes[part] for part in parts}


def _unet_family(folder: Path, classes: dict[str, str]) -> Family:
    config = folder / "unet" / "config.json"
    extra = read_json(config, f"Cannot load the unet of {folder}") if config.is_file() else {}
    if "text_encoder_2" in classes or extra.get("addition_embed_type") == "text_time":
        return SDXL
    text = classes.get("text_encoder", CLIP[0])
    if text not in CLIP + T5:
        raise unsupported(f"Cannot load the prior {folder}", "text_encoder", text, CLIP + T5)
    return DEEPFLOYD if text in T5 else STABLE_DIFFUSION


def check_folder(
    folder: Path, variant: str | None = None, half: bool = False, weights: bool = True
) -> tuple[Family, dict[str, str], dict[str, str | None]]:
    """Return family_of and the variant of each part's weights, after checking that every part's files are there.

    Args:
        folder: the model's.
        variant: see chosen_variant.
        half: see chosen_variant.
        weights: whether they must be there; all else must.
    Raises: UserError naming the first file that is not there.
    """
    family, classes = family_of(folder)
    parts = components(family, classes)
    variants = part_variants(parts, lambda part: names_in(folder / part), variant, half)
    for component in parts:
        check_component(folder, component if weights else replace(component, stem=None), variants.get(component.part))
        if not weights and component.stem is not None:
            read_json(folder / component.part / "config.json", f"Cannot load the prior {folder}")
    return family, classes, variants


def part_variants(
    parts: Iterable[Component], names: Callable[[str], Collection[str]], variant: str | None, half: bool
) -> dict[str, str | None]:
    """Return chosen_variant of every part with weights; where none has the variant that is named, that one for all.

    Args:
        parts: of a folder.
        names: the files in a part's directory.
        variant: see chosen_variant.
        half: see chosen_variant.
    """
    stems = {component.part: component.stem for component in parts if component.stem is not None}
    chosen = {part: chosen_variant(names(part), stem, variant, half) for part, stem in stems.items()}
    if variant not in (None, AUTO) and not any(chosen.values()):
        return dict.fromkeys(chosen, variant)
    return chosen


def components(family: Family, classes: dict[str, str]) -> list[Component]:
    """Return the parts of a folder of that family."""
    weights = {family.part: "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    weights |= {spec.part: "model" for spec in family.encoders}
    return [Component(part, name, weights.get(part)) for part, name in classes.items()]


def encoder_specs(family: Family, classes: dict[str, str]) -> list[EncoderSpec]:
    """Return the family's text encoders that the folder has."""
    return [spec for spec in family.encoders if spec.part in classes]


def read_configs(folder: Path, family: Family, classes: dict[str, str]) -> Configs:
    """Read the configs of the networks and text encoders by part, with their classes' defaults filled in."""
    import diffusers
    import transformers

    configs: Configs = {}
    for part in (family.part, "vae"):
        if part in classes:
            kind = getattr(diffusers, classes[part])
            overrides = read_json(folder / part / "config.json", f"Cannot load the {part} of {folder}")
            configs[part] = SimpleNamespace(**(_defaults(kind) | overrides))
    for spec in encoder_specs(family, classes):
        kind = getattr(transformers, classes[spec.part]).config_class
        configs[spec.part] = load_part(
            folder, spec.part, lambda k=kind, r=spec: k.from_pretrained(folder / r.part, local_files_only=True)
        )
    return configs


def with_autoencoder(folder: Path, configs: Configs, classes: dict[str, str]) -> tuple[Configs, dict[str, str]]:
    """Return configs and classes with the autoencoder replaced by that of another folder."""
    import diffusers

    what = f"Cannot load the autoencoder {folder}"
    directory = folder if (folder / "config.json").is_file() else folder / "vae"
    overrides = read_json(directory / "config.json", what)
    name = str(overrides.get("_class_name"))
    if name not in AUTOENCODERS:
        raise unsupported(what, "class", name, AUTOENCODERS)
    check_files(directory, "diffusion_pytorch_model", None, what)
    config = SimpleNamespace(**(_defaults(getattr(diffusers, name)) | overrides))
    if config.latent_channels != configs["vae"].latent_channels:
        raise UserError(
            what,
            f"its latents have {config.latent_channels} channels, the model's {configs['vae'].latent_channels}",
            "take one made for this family: taesd for SD 1.x / 2.x, taesdxl, taesd3, taef1",
        )
    scale, other = (getattr(c, "scaling_factor", None) for c in (configs["vae"], config))
    if classes["vae"] == name == "AutoencoderKL" and scale != other:
        raise UserError(
            what, f"its latents are scaled by {other:g}, the model's by {scale:g}", "take one made for this family"
        )
    return configs | {"vae": config}, classes | {"vae": name}


def _defaults(kind: type) -> dict[str, Any]:
    """Keyword defaults of a diffusers class, which its config.json may leave out."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def check_sizes(family: Family, configs: Configs, folder: Path, resolution: int | None = None) -> Geometry:
    """Check that the parts belong together, and return the sizes that follow.

    Args:
        resolution: side in pixels to work at; None for what the folder was trained at.
    Raises: UserError where text, network and autoencoder are not of one model or the resolution does not divide.
    """
    what, network = f"Cannot load the prior {folder}", configs[family.part]
    if family.part == "unet":
        _check_unet(network, what)
    texts = [configs[spec.part] for spec in family.encoders if spec.part in configs]
    widths, expected_widths = family.text_widths(texts, network), family.network_widths(network)
    places = ("a token", "in the pooled embedding")
    for width, expected_width, where in zip(widths, expected_widths, places, strict=True):
        if width != expected_width:
            why = f"its text encoder gives {width} numbers {where} and its {family.part} wants {expected_width}"
            raise UserError(what, why, "use the parts of one model (SDXL's refiner is none for this)")
    vae = configs.get("vae")
    channels, factor = (3, 1) if vae is None else (vae.latent_channels, downsampling(vae))
    patch = _patch(family, network, channels, what)
    size = getattr(network, "sample_size", None) or FLUX_LATENTS
    unshuffled = patch if family.part == "unet" else 1  # a UNet's sample_size is the side that is left after patching
    sides = size if isinstance(size, list | tuple) else [size]
    if not sides or not all(isinstance(n, int) and n > 0 for n in sides):
        why = f"{family.part}/config.json says sample_size is {size!r}, which is no number of cells"
        raise UserError(what, why, "the file is damaged or of another model: get it again")
    trained = min(sides) * factor * unshuffled
    side, step = resolution or trained, factor * patch
    largest = getattr(network, "pos_embed_max_size", None)
    if side % step or (largest is not None and side // step > largest):
        limit = "" if largest is None else f" up to {largest * step}"
        raise UserError(
            what,
            f"it cannot work at {side} pixels a side",
            f"set prior.diffusion.resolution to a multiple of {step}{limit}; it was trained at {trained}",
        )
    return Geometry(side, side // factor, channels, unshuffled, (side // step) ** 2, expected_widths[1])


def _patch(family: Family, network: Any, channels: int, what: str) -> int:
    """Latents a side of a patch: 2 for the transformers, p with in_channels = channels p p for UNets."""
    if family.network == "SD3Transformer2DModel":
        fits, patch = network.in_channels == channels, network.patch_size
    elif family.network == "FluxTransformer2DModel":
        fits, patch = network.in_channels == 4 * channels, 2
    else:
        patch = math.isqrt(max(network.in_channels // channels, 1))
        fits = channels * patch * patch == network.in_channels
    if not fits:
        times = {"unet": f"{channels} times a square"}.get(family.part, f"what {channels} latent channels need")
        raise UserError(
            what,
            f"its {family.part} has {network.in_channels} input channels, which is not {times}",
            "use a text-to-image model and its own vae (inpainting, depth and control models have extra channels)",
        )
    return patch


def _check_unet(config: Any, what: str) -> None:
    plain = "use a plain text-to-image model"
    if config.addition_embed_type not in (None, "text", "text_time"):
        raise UserError(what, f"its UNet wants extra conditioning ({config.addition_embed_type})", plain)
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise UserError(what, "its UNet wants class labels (an upscaler?)", plain)
    if config.time_cond_proj_dim is not None:
        raise UserError(what, "its UNet wants the guidance as an input (a latent consistency model)", plain)
    if config.sample_size is None:
        raise UserError(what, "unet/config.json gives no sample_size", "write the side the UNet was trained at there")


def unsupported(what: str, part: str, got: str, supported: tuple[str, ...]) -> UserError:
    """Return the error for a part whose class no family has."""
    return UserError(what, f"its {part} is a {got}, which is not supported", f"supported: {', '.join(supported)}")
