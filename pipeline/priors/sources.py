"""Which prior each stage listens to, checked at once and built only when its stage begins.

A name in `prior.coarse` / `prior.fine` means: `pocket` the weights that come with the toolkit (64x64 pixels for
coarse, 512x512 latents for fine), `reference` the exact prior of a given mesh, `clip:...` a CLIP (see clips.py),
`python:...` an object that the calling program hands in (see objects.py), anything else a diffusers folder or a hub id.
Checks need neither torch nor diffusers' five seconds of import: a prompt of unknown words is answered at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.priors.clips import POCKET, build_clip_guidance, check_clip, clip_folder, clip_words
from pipeline.priors.objects import check_no_object, check_object, is_object_source
from pipeline.priors.words import check_words
from stages.errors import UserError
from stages.kinds import STAGES

if TYPE_CHECKING:
    import torch

    from pipeline.config.model import Config
    from stages.guidance.clip_guidance import ClipGuidance
    from stages.guidance.compatibility import Described
    from stages.guidance.diffusion.lora import Lora
    from stages.guidance.guidance import Guidance
    from stages.guidance.prior import Prior
    from stages.prompts import ViewPrompts

_ANOTHER_PRIOR = "Stable Diffusion: --config stable-diffusion prior.coarse=FOLDER_OR_ID prior.fine=FOLDER_OR_ID"
_POCKET_READER = (  # what check_words says of it
    "the pocket prior",
    f"{_ANOTHER_PRIOR}; --force runs anyway, without the unknown words meaning anything",
)


def check_priors(
    config: Config, stages: Sequence[str] | None = None, priors: Mapping[str, Prior] | None = None
) -> None:
    """Refuse, before any work, priors that cannot be built and prompts that the pocket prior cannot read.

    Args:
        stages: those still to be taken; None: all of the run's. priors: objects that were handed in, by stage.
    """
    priors = priors or {}
    made_for: dict[str, str] = {}
    for stage in config.stages if stages is None else stages:
        source = getattr(config.prior, stage)
        clip = clip_folder(source)
        if is_object_source(source):
            check_object(config, stage, priors)
        else:
            check_no_object(config, stage, priors)
        if clip is not None:
            check_clip(config, stage, clip)
        elif is_object_source(source):
            pass
        elif source == "reference":
            _check_reference(config.reference.mesh)
            _check_rule(config, stage)
        elif source == "pocket":
            _check_pocket(config, stage, pocket_folder(stage))
        else:
            made_for[stage] = _check_folder(config, stage, source)
        _check_lora(config, stage, source)
    _check_autoencoder(config, made_for)
    _check_use(config)


def notices(config: Config) -> list[str]:
    """What a stage of the run leaves aside that another one uses, a line each; see :func:`_check_use` for the rest."""
    return [
        f"{stage}: the negative prompt is not used at guidance.{stage}.scale=1" for stage in _without_negative(config)
    ]


def _check_use(config: Config) -> None:
    """Refuse what was asked for and no stage of the run would use."""
    unused = _without_negative(config)
    if unused and len(unused) == len(config.stages):
        scales = ", ".join(f"guidance.{stage}.scale" for stage in unused)
        raise UserError(
            f'the negative prompt "{next(filter(None, _view_prompts(config).negatives()))}" has no use here',
            "at guidance scale 1 a prior is asked for the prompt alone",
            f"raise {scales} above 1, or leave the negative prompt out",
        )
    if config.prior.lora is not None and not set(config.prior.lora_stages) & set(config.stages):
        mine, theirs = ",".join(config.stages), ",".join(config.prior.lora_stages) or "none"
        raise UserError(
            f"prior.lora has no use here: {config.prior.lora}",
            f"it is for the stages {theirs} and the run takes {mine}",
            f"leave it out, or name a stage that runs: prior.lora_stages={config.stages[0]}",
        )


def _without_negative(config: Config) -> list[str]:
    """Stages that would not look at the negative prompt; none where there is no such prompt."""
    from stages.guidance.compatibility import uses_negative

    if not any(_view_prompts(config).negatives()):
        return []
    return [stage for stage in config.stages if not uses_negative(getattr(config.guidance, stage))]


def _check_pocket(config: Config, stage: str, folder: Path) -> None:
    """Words first, which is what users get wrong; then what the folder's small files say."""
    from stages.guidance.compatibility import PIXELS, Described

    words = pocket_words(folder)
    index, scheduler = _pocket_json(folder, "model_index.json"), _pocket_json(folder, "scheduler/scheduler_config.json")
    if not config.force:
        check_words(config.prompt, words, *_POCKET_READER)
        more = [*words, *(clip_words(folder / "tokenizer") or [])]  # the view's words, too
        for text in (*config.prompts.per_view.values(), config.prompts.textureless_suffix):
            check_words(text, more, *_POCKET_READER)
    _check_pocket_length(config, folder)
    prediction = str(scheduler.get("prediction_type"))
    _check_guidance(config, stage, Described("pocket", prediction, None if "vae" in index else PIXELS))


def _check_pocket_length(config: Config, folder: Path) -> None:
    """By the tokenizer's own file: transformers would take a second to import."""
    from tokenizers import Tokenizer

    from stages.prompts import check_length

    limit = _pocket_json(folder, "tokenizer/tokenizer_config.json").get("model_max_length")
    if not isinstance(limit, int):
        raise _no_pocket(folder, "its tokenizer_config.json has no model_max_length")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise _no_pocket(folder, f"tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check_length(prior_texts(config), lambda text: len(tokenizer.encode(text).ids), limit)


def pocket_folder(stage: str) -> Path:
    """The pocket prior that a stage listens to."""
    return POCKET / STAGES[stage].prior_space


def pocket_words(folder: Path) -> list[str]:
    """The words that the pocket prior in `folder` was trained on."""
    found = _pocket_json(folder, "pocket.json")
    if not isinstance(found.get("words"), list):
        raise _no_pocket(folder, "its pocket.json lists no words")
    return found["words"]


def _pocket_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_pocket(folder, f"{type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise _no_pocket(folder, f"{name} holds no JSON object")
    return found


def _no_pocket(folder: Path, why: str) -> UserError:
    return UserError(
        f"the pocket prior {folder} is not there",
        why,
        f"install the toolkit again, make it with `python -m stages.pocket.train`, or take {_ANOTHER_PRIOR}",
    )


def _check_reference(mesh: str) -> None:
    if not mesh:
        raise UserError(
            "the reference prior has no mesh",
            "reference.mesh is not set",
            "pipeline run --config reference reference.mesh=FILE.glb --stages coarse,fine",
        )
    from stages.mesh.files.read import read_mesh

    read_mesh(mesh)


def _check_rule(config: Config, stage: str) -> None:
    """What has no meaning with the reference prior."""
    from stages.guidance.compatibility import Described

    _check_guidance(config, stage, Described("reference", reads_prompts=False))


def _check_autoencoder(config: Config, made_for: dict[str, str]) -> None:
    """Another autoencoder, which every stage takes, must not meet the latents of two kinds of model: SDXL's are of SD
    1.5's shape.

    made_for: by stage, what kind of model its latents are of.
    """
    chosen, kinds = config.prior.diffusion.autoencoder, {kind for kind in made_for.values() if kind}
    if chosen is not None and len(kinds) > 1:
        shown = ", ".join(f"{stage}: {kind}" for stage, kind in made_for.items() if kind)
        raise UserError(
            f"prior.diffusion.autoencoder = {chosen}",
            f"both stages would decode with it, and their latents differ ({shown})",
            "leave it out, or take the stages one by one: --stages coarse without it, then --stages fine --from RUN "
            "with it",
        )


def _check_folder(config: Config, stage: str, source: str) -> str:
    """A folder must be whole, read the prompts without cutting them and fit the LoRA; so must a hub id's, once it is
    on this machine. What is still to be fetched must be had.

    Returns: the kind of model whose latents it has; nothing for pixels.
    """
    from stages.guidance.compatibility import PIXELS, Described
    from stages.guidance.diffusion.families import family_of
    from stages.guidance.diffusion.folder import cached, check_hub
    from stages.guidance.diffusion.plan import make_plan

    path, settings = Path(source).expanduser(), config.prior.diffusion
    folder = path if path.is_dir() else None if path.exists() else cached(source, settings.revision, settings.variant)
    if folder is not None:
        plan = make_plan(folder, settings, prior_texts(config), stage_lora(config, stage))
        space = None if "vae" in plan.classes else PIXELS
        _check_guidance(config, stage, Described(path.name or source, plan.schedule.prediction, space))
        return plan.family.name if "vae" in plan.classes else ""
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        near = difflib.get_close_matches(source, ["pocket", "reference"], 1)
        raise UserError(
            f"prior.{stage} = {source}",
            "it is neither pocket, reference, a folder nor a hub id of the form owner/name",
            f"did you mean {near[0]}?" if near else "check the path, relative to where you stand",
        )
    family, parts = family_of(check_hub(source, settings.revision))
    latent = "vae" in parts
    _check_guidance(config, stage, Described(path.name, data_range=None if latent else PIXELS))
    return family.name if latent else ""


def _check_guidance(config: Config, stage: str, prior: Described) -> None:
    """What a stage's guidance asks of a prior, as far as is known of it; VSD looks at the network once it is there."""
    import torch

    from stages.guidance.compatibility import check_described
    from stages.guidance.diffusion.plan import network_dtype
    from stages.guidance.residuals import RULES
    from stages.guidance.vsd import check_loading

    settings, loading = getattr(config.guidance, stage), config.prior.diffusion
    check_described(prior, settings, _view_prompts(config))
    if "trainable" in RULES[settings.rule.name].needs:
        device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
        check_loading(prior.name, settings.rule, loading.offload, network_dtype(loading, None, device))


def _check_lora(config: Config, stage: str, source: str) -> None:
    """A LoRA changes the networks of a folder, a hub id or the pocket prior; nothing else has any."""
    lora = stage_lora(config, stage)
    if lora is not None and (source == "reference" or source.startswith("clip:") or is_object_source(source)):
        raise UserError(
            f"prior.lora does not go with prior.{stage}={source}",
            "only diffusion priors that the run loads can be changed by a LoRA",
            "name the stages it is for: prior.lora_stages=fine",
        )
    if lora is not None and source == "pocket":
        from stages.guidance.diffusion.plan import make_plan

        make_plan(pocket_folder(stage), config.prior.diffusion, lora=lora)


def stage_lora(config: Config, stage: str) -> Lora | None:
    """The LoRA that a stage's prior is loaded with. Raises: UserError for a file that is none."""
    if config.prior.lora is None or stage not in config.prior.lora_stages:
        return None
    from stages.guidance.diffusion.lora import Lora

    return Lora(config.prior.lora, config.prior.lora_scale)


def prior_texts(config: Config) -> list[str]:
    """Every text that a run asks its priors about, the empty one included."""
    return list(dict.fromkeys([*_view_prompts(config).all_texts(), ""]))


def _view_prompts(config: Config) -> ViewPrompts:
    from stages.prompts import ViewPrompts

    return ViewPrompts(config.prompt, config.negative, config.prompts)


def build_prior(config: Config, stage: str, device: torch.device) -> Prior:
    """The prior of one stage, loaded."""
    source = getattr(config.prior, stage)
    if source == "reference":
        return _reference_prior(config, stage)
    from stages.guidance.diffusion.prior import load_prior

    return load_prior(
        pocket_folder(stage) if source == "pocket" else source,
        device,
        settings=config.prior.diffusion,
        prompts=prior_texts(config),
        lora=stage_lora(config, stage),
    )


def _reference_prior(config: Config, stage: str) -> Prior:
    """Its images have the size that the stage renders at unless another is asked for, so nothing is resized."""
    from stages.guidance.exact import load_reference

    resolution = config.reference.resolution or getattr(config, stage).resolution
    return load_reference(config.reference.model_copy(update={"resolution": resolution}), config.prompts)


def build_guidance(
    config: Config, stage: str, device: torch.device, prior: Prior | None = None
) -> Guidance | ClipGuidance:
    """Prior, rule and prompts of one stage; its generator is the stage's own, seeded from the run's seed.

    prior: an object that was handed in, which keeps its text encoder; None builds what the configuration names.
    """
    clip = clip_folder(getattr(config.prior, stage))
    if clip is not None:
        return build_clip_guidance(config, stage, clip, device)
    import torch

    from stages.guidance.guidance import Guidance

    settings = getattr(config.guidance, stage)
    generator = torch.Generator().manual_seed(config.seed)
    if prior is not None:
        return Guidance(prior, settings, _view_prompts(config), generator, release_text=False)
    return Guidance(build_prior(config, stage, device), settings, _view_prompts(config), generator)
