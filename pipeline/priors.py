"""Which prior each stage listens to, checked at once and built only when its stage begins.

A name in `prior.coarse` / `prior.fine` means: `pocket` the weights that come with the toolkit (64x64 pixels for
coarse, 512x512 latents for fine), `reference` the exact prior of a given mesh, `clip:...` a CLIP (see clips.py),
anything else a diffusers folder or a hub id. Checks need neither torch nor diffusers' five seconds of import: a prompt
of unknown words is answered at once.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from pipeline.clips import build_clip_guidance, check_clip, clip_folder
from stages.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from stages.guidance.clip_guidance import ClipGuidance
    from stages.guidance.guidance import Guidance
    from stages.guidance.lora import Lora
    from stages.guidance.plan import Plan
    from stages.guidance.prior import Prior

POCKET = Path(__file__).resolve().parent.parent / "stages" / "pocket" / "weights"
POCKET_FOLDERS = {"coarse": POCKET / "pixel", "fine": POCKET / "latent", "clipmesh": POCKET / "pixel"}
_ANOTHER_PRIOR = "Stable Diffusion: --config stable-diffusion prior.coarse=FOLDER_OR_ID prior.fine=FOLDER_OR_ID"


def check_priors(config: Config) -> None:
    """Refuse, before any work, priors that cannot be built and prompts that the pocket prior cannot read."""
    for stage in config.stages:
        source = getattr(config.prior, stage)
        clip = clip_folder(source)
        if clip is not None:
            check_clip(config, stage, clip)
        elif source == "reference":
            _check_reference(config.reference.mesh)
            _check_rule(config, stage)
        elif source == "pocket":
            words = pocket_words(POCKET_FOLDERS[stage])
            if not config.force:
                check_words(config.prompt, words)
        else:
            _check_folder(config, stage, source)
        _check_lora(config, stage, source)


def pocket_words(folder: Path) -> list[str]:
    """The words that the pocket prior in `folder` was trained on."""
    try:
        return json.loads((folder / "pocket.json").read_text(encoding="utf-8"))["words"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the pocket prior {folder} is not there",
            f"{type(error).__name__}: {error}",
            f"install the toolkit again, make it with `python -m stages.pocket.train`, or take {_ANOTHER_PRIOR}",
        ) from None


def unknown_words(prompt: str, known: list[str]) -> list[str]:
    """Words of the prompt outside `known`, in order, each once."""
    words = re.findall(r"\w+", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in known))


def check_words(prompt: str, known: list[str]) -> None:
    """Raise UserError for words the pocket prior has never seen, with the known ones and the way out."""
    unknown = unknown_words(prompt, known)
    if not unknown:
        return
    shown = ", ".join(repr(word) for word in unknown)
    near = {word: difflib.get_close_matches(word, known, 1, 0.66) for word in unknown}
    meant = ", ".join(f"{word} -> {match[0]}" for word, match in near.items() if match)
    raise UserError(
        f'the pocket prior cannot read "{prompt}"',
        f"it does not know {shown}; its {len(known)} words are:\n" + textwrap.fill(" ".join(sorted(known)), 100),
        (f"did you mean {meant}? " if meant else "")
        + f"use its words, or {_ANOTHER_PRIOR}; --force runs anyway, without the unknown words meaning anything",
    )


def _check_reference(mesh: str) -> None:
    if not mesh:
        raise UserError(
            "the reference prior has no mesh",
            "reference.mesh is not set",
            "pipeline run --config reference reference.mesh=FILE.glb --stages coarse,fine",
        )
    from stages.mesh.read import read_mesh

    read_mesh(mesh)


def _check_rule(config: Config, stage: str) -> None:
    """What has no meaning with the reference prior; other priors are asked when they are loaded."""
    from stages.guidance.fit import check_wordless
    from stages.prompts import ViewPrompts

    prompts = ViewPrompts(config.prompt, config.negative, config.prompts)
    check_wordless(getattr(config.guidance, stage), prompts, "reference")


def _check_folder(config: Config, stage: str, source: str) -> None:
    """A folder must be whole, read the prompts without cutting them and fit the LoRA; so must a hub id's, once it is
    on this machine. What is still to be fetched must be had."""
    from stages.guidance.folder import cached, check_hub
    from stages.guidance.plan import make_plan

    path, settings = Path(source).expanduser(), config.prior.diffusion
    folder = path if path.is_dir() else None if path.exists() else cached(source, settings.revision, settings.variant)
    if folder is not None:
        _check_guidance(config, stage, make_plan(folder, settings, prior_texts(config), stage_lora(config, stage)))
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        near = difflib.get_close_matches(source, ["pocket", "reference"], 1)
        raise UserError(
            f"prior.{stage} = {source}",
            "it is neither pocket, reference, a folder nor a hub id of the form owner/name",
            f"did you mean {near[0]}?" if near else "check the path, relative to where you stand",
        )
    else:
        check_hub(source)


def _check_guidance(config: Config, stage: str, plan: Plan) -> None:
    """What a stage's guidance asks of a prior, as far as its folder says; VSD looks at the network once it is there."""
    from stages.guidance.fit import check_fit
    from stages.prompts import ViewPrompts

    settings = getattr(config.guidance, stage)
    known = SimpleNamespace(
        name=plan.folder.name,
        prediction=plan.schedule.prediction,
        data_range=None if "vae" in plan.classes else (-1.0, 1.0),
    )
    if settings.rule == "vsd":
        settings = settings.model_copy(update={"rule": "sds"})
    check_fit(known, settings, ViewPrompts(config.prompt, config.negative, config.prompts))


def _check_lora(config: Config, stage: str, source: str) -> None:
    """A LoRA changes the networks of a folder, a hub id or the pocket prior; nothing else has any."""
    lora = stage_lora(config, stage)
    if lora is not None and (source == "reference" or source.startswith("clip:")):
        raise UserError(
            f"prior.lora does not go with prior.{stage}={source}",
            "only diffusion priors with weights can be changed by a LoRA",
            "name the stages it is for: prior.lora_stages=fine",
        )
    if lora is not None and source == "pocket":
        from stages.guidance.plan import make_plan

        make_plan(POCKET_FOLDERS[stage], config.prior.diffusion, lora=lora)


def stage_lora(config: Config, stage: str) -> Lora | None:
    """The LoRA that a stage's prior is loaded with. Raises: UserError for a file that is none."""
    if config.prior.lora is None or stage not in config.prior.lora_stages:
        return None
    from stages.guidance.lora import Lora

    return Lora(config.prior.lora, config.prior.lora_scale)


def prior_texts(config: Config) -> list[str]:
    """Every text that a run asks its priors about, the empty one included."""
    from stages.prompts import ViewPrompts

    prompts = ViewPrompts(config.prompt, config.negative, config.prompts)
    return list(dict.fromkeys([*prompts.all_texts(), ""]))


def build_prior(config: Config, stage: str, device: torch.device) -> Prior:
    """The prior of one stage, loaded."""
    source = getattr(config.prior, stage)
    if source == "reference":
        return _reference_prior(config, stage)
    from stages.guidance.diffusion import load_prior

    return load_prior(
        POCKET_FOLDERS[stage] if source == "pocket" else source,
        device,
        settings=config.prior.diffusion,
        prompts=prior_texts(config),
        lora=stage_lora(config, stage),
    )


def _reference_prior(config: Config, stage: str) -> Prior:
    """Its images have the size that the stage renders at unless another is asked for, so nothing is resized."""
    from stages.guidance.reference import load_reference

    resolution = config.reference.resolution or getattr(config, stage).resolution
    return load_reference(config.reference.model_copy(update={"resolution": resolution}), config.prompts)


def build_guidance(config: Config, stage: str, device: torch.device) -> Guidance | ClipGuidance:
    """Prior, rule and prompts of one stage; its generator is the stage's own, seeded from the run's seed."""
    clip = clip_folder(getattr(config.prior, stage))
    if clip is not None:
        return build_clip_guidance(config, stage, clip, device)
    import torch

    from stages.guidance.guidance import Guidance
    from stages.prompts import ViewPrompts

    settings = getattr(config.guidance, stage)
    prompts = ViewPrompts(config.prompt, config.negative, config.prompts)
    generator = torch.Generator().manual_seed(config.seed)
    return Guidance(build_prior(config, stage, device), settings, prompts, generator)
