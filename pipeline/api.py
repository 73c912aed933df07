"""The public calls: a sentence in, a result out; the `pipeline` command makes the same ones.

Nothing of the calling process is changed for good: torch's random stream and deterministic mode, signal handlers,
environment and numba's settings are afterwards as they were, however a call ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.model import Config, config_model, load_config
from pipeline.priors.objects import ObjectSource, check_protocol, source_of
from pipeline.priors.sources import parse_source, stage_prior
from pipeline.runs import run
from pipeline.runs.caller import Caller
from pipeline.runs.caption import picture_options
from pipeline.runs.export import ExportRequest, export_run
from pipeline.runs.progress import Progress
from pipeline.runs.result import Result
from stages.errors import UserError
from stages.kinds import STAGES
from stages.paths import from_home

if TYPE_CHECKING:
    import torch

    from pipeline.profile.record import Profile
    from stages.guidance.diffusion.settings import DiffusionSettings
    from stages.guidance.prior import Prior

OnStep = Callable[[str, int, dict[str, float]], object]


def generate(
    prompt: str | None = None,
    *,
    seed: int | None = None,
    out: str | Path | None = None,
    stages: str | Sequence[str] | None = None,
    config: str | Path | Sequence[str | Path] | Config | None = None,
    settings: Mapping[str, Any] | None = None,
    prior: str | Prior | Mapping[str, str | Prior] | None = None,
    device: str | None = None,
    from_run: str | Path | None = None,
    init_mesh: str | Path | None = None,
    image: str | Path | None = None,
    force: bool | None = None,
    on_step: OnStep | None = None,
    on_begin: Callable[[Path], object] | None = None,
    quiet: bool = False,
    log: str | Sequence[str] = (),
    profile: Profile | None = None,
) -> Result:
    """Make a textured mesh from a sentence, in a run folder that can be resumed at any moment.

    What is None is left to `config`, and then to the defaults.

    Args:
        prompt: what to make, in words.
        seed: 0 to 2**31 - 1; the same seed on the same device gives the same bytes.
        out: folder of the run, which must be new or empty; None: runs/<prompt>-<seed>.
        stages: names in their order, `("coarse", "fine")` or `"coarse,fine"`.
        config: a recipe's name, a YAML file, several of these (later ones over earlier ones), or a whole Config.
        settings: values by key over those of `config`, {"coarse.steps": 100}; `pipeline settings` lists the keys.
        prior: what every stage listens to, or a mapping from stages to it. A source as in `prior.coarse` ("pocket",
            "reference", a diffusers folder, a hub id, "clip:FOLDER"), or an object that meets the protocol
            stages.guidance.prior.Prior, used as it is and changed in nothing. The run's record holds the object's
            name; to resume the run, hand it in again.
        device: "auto", "cpu" or "cuda".
        from_run: folder of a run whose coarse stage is refined, or with a new prompt edited.
        init_mesh: GLB, OBJ, PLY or STL file that the fine or the clipmesh stage starts from.
        image: picture of the object, which both stages hold on to in its view (settings image.*); without a prompt its
            words are the caption of the pocket world that the pocket CLIP finds nearest.
        force: whether to run a prompt whose words the prior does not know.
        on_step: called after each step with the stage's name, the step from 1 and the step's metrics; what it raises
            ends the run, which can be resumed.
        on_begin: called with the run's folder, once it is there and before any work.
        quiet: whether to print nothing; warnings of the logging module still come.
        log: "tensorboard" writes the metrics as its events, too.
        profile: a listening pipeline.profile.record.Profile, written into the folder.
    Returns: the finished run: its mesh, files, metrics and previews.
    Raises: UserError for anything the caller can mend, before any work where it can be known then; Interrupted when
        Ctrl-C stopped the run, with its state saved.

    Example:
        >>> result = generate("a red mug", seed=1, settings={"coarse.steps": 100})
        >>> result.mesh.save("mug.glb")
    """
    options = {"prompt": prompt, "seed": seed, "stages": stages, "device": device, "from_run": from_run}
    options |= {"init_mesh": init_mesh, "force": force}
    of_picture, line = picture_options(image, prompt)
    options |= of_picture
    if line:
        _progress(quiet).note(line)
    arguments = {key: value for key, value in options.items() if value is not None}
    whole = _config(config, settings or {}, arguments)
    sources, priors = _priors(prior, whole)
    if sources:
        whole = _config(config, {**(settings or {}), **sources}, arguments)
    caller = Caller(priors, on_step, on_begin, log=_names(log))
    folder = run.start_run(whole, None if out is None else from_home(out), _progress(quiet), profile, caller)
    return Result(folder, caller.mesh)


def resume(
    folder: str | Path,
    *,
    prior: Prior | Mapping[str, Prior] | None = None,
    on_step: OnStep | None = None,
    quiet: bool = False,
    log: str | Sequence[str] = (),
) -> Result:
    """Continue an interrupted run from its last checkpoint; ends with the bytes of an uninterrupted one.

    A run that is finished is left as it is.

    Args:
        folder: of the run.
        prior: the prior object that the run was given, or a mapping from stages to such objects; None where it was
            given none.
        on_step: as for generate; steps that were taken before are not told again.
        quiet: whether to print nothing.
        log: as for generate.
    Returns: the finished run.
    Raises: UserError where the folder is no run, or a prior of its caller's own is missing; Interrupted on Ctrl-C.

    Example:
        >>> resume("runs/mug").files["glb"]
    """
    folder = from_home(folder)
    caller = Caller(_priors_again(prior, folder), on_step, log=_names(log))
    run.resume_run(folder, _progress(quiet), caller)
    return Result(folder, caller.mesh)


def export(
    folder: str | Path,
    formats: str | Sequence[str] = ("glb", "obj"),
    out: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | Sequence[str] = (),
    lods: int = 1,
    quiet: bool = False,
) -> Result:
    """Write the mesh of a finished run again, in other formats or detail, without optimising; needs no prior.

    Args:
        folder: of the run.
        formats: any of glb, obj, ply, stl, 3mf and usdz; a sequence, or one text with commas.
        out: folder to write to, which may hold no file of the same name; None: the run's own.
        settings: values by key over the run's `export`, {"faces": 5000, "normal_map": True}, or words as of the
            command.
        lods: levels of detail, each with half the faces of the one before, in files called mesh_lod1 and so on.
        quiet: whether to print nothing.
    Returns: the run, with the files written here as its `files`.
    Raises: UserError for an unknown format or setting, a run that is not finished, or files that would be written over.

    Example:
        >>> export("runs/mug", "stl,3mf", out="printing", settings={"size_mm": 120}).files["stl"]
    """
    folder, target = from_home(folder), None if out is None else from_home(out)
    caller = Caller()
    text = formats if isinstance(formats, str) else ",".join(formats)
    paths = export_run(folder, ExportRequest(text, settings, lods), target, _progress(quiet), caller)
    return Result(folder, caller.mesh, paths)


def load_prior(
    source: str | Path = "pocket",
    *,
    stage: str = "coarse",
    device: str | torch.device = "cpu",
    mesh: str | Path | None = None,
    settings: DiffusionSettings | None = None,
) -> Prior:
    """Load a diffusion prior that outlives a run: for `generate(prior=...)`, or to be asked directly.

    Args:
        source: "pocket", "reference" (the exact prior of `mesh`), a diffusers folder or a hub id.
        stage: whose pocket prior is meant: "coarse" has 64 x 64 pixels, "fine" latents of 512 x 512 pixels.
        device: where the networks live.
        mesh: file that the reference prior knows.
        settings: how a diffusers folder is loaded (precision, offloading, ...); None: the defaults.
    Returns: a stages.guidance.prior.Prior, its text encoder kept.
    Raises: UserError for anything missing, damaged or unsupported.

    Example:
        >>> prior = load_prior("pocket")
        >>> mugs = [generate("a red mug", stages="coarse", seed=seed, prior=prior) for seed in range(3)]
    """
    import torch

    _check_stages([stage])
    overrides: dict[str, Any] = {f"prior.{stage}": str(source), "reference.resolution": 64}
    overrides |= {"reference.mesh": mesh} if mesh is not None else {}
    overrides |= {"prior.diffusion": settings} if settings is not None else {}
    return stage_prior(load_config(config_model()(), overrides), stage).load(torch.device(device), keep_text=True)


def _config(
    base: str | Path | Sequence[str | Path] | Config | None, settings: Mapping[str, Any], arguments: dict[str, Any]
) -> Config:
    if isinstance(base, Config) and not settings and not arguments:
        return base
    return load_config(base, settings, arguments)


def _names(log: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(filter(None, log.split(","))) if isinstance(log, str) else tuple(log)


def _progress(quiet: bool) -> Progress:
    if not quiet:
        return Progress()
    from rich.console import Console

    return Progress(Console(quiet=True, force_terminal=False))


def _priors(prior: str | Prior | Mapping[str, str | Prior] | None, config: Config) -> tuple[dict[str, str], dict]:
    """Split a caller's prior into settings and objects by stage."""
    if prior is None:
        return {}, {}
    by_stage = dict(prior) if isinstance(prior, Mapping) else dict.fromkeys(config.stages, prior)
    _check_stages(by_stage)
    sources: dict[str, str] = {}
    objects: dict[str, Prior] = {}
    for stage, value in by_stage.items():
        if isinstance(value, str | Path):
            sources[f"prior.{stage}"] = str(value)
            continue
        check_protocol(stage, value)
        objects[stage] = value
        sources[f"prior.{stage}"] = source_of(value)
    return sources, objects


def _priors_again(prior: Prior | Mapping[str, Prior] | None, folder: Path) -> dict[str, Prior]:
    """The objects by stage of a run that is resumed; one alone is for every stage that was given an object."""
    if prior is None:
        return {}
    if isinstance(prior, Mapping):
        _check_stages(prior)
        objects = dict(prior)
    else:
        config = run.read_run(folder)
        sources = {stage: parse_source(getattr(config.prior, stage)) for stage in config.stages}
        stages = [stage for stage, source in sources.items() if isinstance(source, ObjectSource)]
        if not stages:
            raise UserError(
                f"a prior was handed in and {folder} listens to none",
                f"its config.yaml names {', '.join(source.text for source in sources.values())}",
                "leave it out",
            )
        objects = dict.fromkeys(stages, prior)
    for stage, value in objects.items():
        check_protocol(stage, value)
    return objects


def _check_stages(names: Sequence[str] | Mapping[str, Any]) -> None:
    unknown = [str(name) for name in names if name not in STAGES]
    if unknown:
        raise UserError(f"no stage is called {', '.join(unknown)}", f"stages: {', '.join(STAGES)}", "choose from these")
