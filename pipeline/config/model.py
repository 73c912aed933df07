"""The whole configuration: settings that lie beside the code they set, composed, read from YAML and checked.

Layers, each over the one before: the defaults in the code, the run named by `--from`, one YAML file of differences
(`--config`, else the recipe of what the run starts from), `key.sub=value` overrides, the command's own flags. Every
value remembers where it came from, so that a mistake is answered with its file and line, the value, what is allowed
and the nearest name, before any work is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, field_validator

from pipeline.config.layers import (
    Layer,
    from_file,
    from_flags,
    from_mapping,
    from_overrides,
    from_recipe,
    merge,
    validate,
)
from pipeline.config.recipes import find_recipe
from pipeline.output.settings import ExportSettings, split_commas
from pipeline.priors.sources import forms, parse_source
from stages.errors import UserError
from stages.guidance.clip_guidance import ClipGuidanceSettings
from stages.guidance.diffusion.settings import DiffusionChanges, DiffusionSettings
from stages.guidance.exact import ReferenceSettings
from stages.guidance.guidance import GuidanceSettings
from stages.kernels.backend import KernelSettings
from stages.kinds import STAGES, StageKind, chains
from stages.mesh.place import PlaceSettings
from stages.paths import from_home
from stages.picture import PictureSettings
from stages.prompts import PromptSettings


def _known_stages(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ValueError(f"no stage is called {', '.join(unknown)}; stages: {', '.join(STAGES)}")
    return names


StageNames = Annotated[list[str], BeforeValidator(split_commas), AfterValidator(_known_stages)]


class _PriorSettings(BaseModel):
    """The diffusion prior or CLIP that guides each stage."""

    model_config = ConfigDict(extra="forbid")

    lora: str | None = Field(None, min_length=1, description="LoRA or DreamBooth weights: safetensors file or folder")
    lora_scale: float = Field(1.0, description="strength of the LoRA; 1 as it was trained")
    lora_stages: StageNames = Field(
        default_factory=lambda: chains()[0], description="stages whose prior takes the LoRA"
    )
    diffusion: DiffusionSettings = Field(default_factory=DiffusionSettings)

    def changes(self, stage: str) -> dict[str, Any]:
        """Return what of `diffusion` is another for a stage; empty for one whose prior can only be a CLIP."""
        return getattr(self, f"{stage}_diffusion", {})


class _StageGuidance(BaseModel):
    """The guidance of each stage."""

    model_config = ConfigDict(extra="forbid")

    clip: ClipGuidanceSettings = Field(
        default_factory=ClipGuidanceSettings, description="in place of the above for a stage whose prior is a CLIP"
    )


class _RunSettings(BaseModel):
    """The settings of the run as a whole."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    prompt: str = Field("a red mug", description="what to make")
    negative: str = Field("", description="what to move away from; empty: the unconditional model")
    seed: int = Field(0, ge=0, lt=2**31, description="same seed, same device: same bytes")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where torch finds it")
    deterministic: bool = Field(True, description="false: faster on CUDA")
    stages: StageNames = Field(
        default_factory=lambda: chains()[0], min_length=1, description="stages to run, in their order"
    )
    from_run: str | None = Field(None, description="run folder whose finished stage this run starts from")
    init_mesh: str | None = Field(None, description="mesh file that the fine or clipmesh stage starts from")
    place: PlaceSettings = Field(default_factory=PlaceSettings, description="how init_mesh comes into the scene")
    force: bool = Field(False, description="run a prompt whose words the prior does not know")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    preview_every: int = Field(200, ge=1, description="steps between preview pictures")

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return " ".join(prompt.split())

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[str]) -> list[str]:
        if any(not STAGES[stage].takes(before) for before, stage in pairwise(stages)):
            raise ValueError(f"each stage once, in the order {'; or '.join(map(','.join, chains()))}")
        return stages


class _OutputSettings(BaseModel):
    """The settings of a run's end: the exported mesh, and the kernels."""

    image: PictureSettings = Field(default_factory=PictureSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)
    kernels: KernelSettings = Field(default_factory=KernelSettings)


def config_model() -> type[Config]:
    """Return the configuration with a group, a prior and a guidance for each stage, by the tables as they now stand."""
    return _model_of(tuple(STAGES.items()), forms())


@lru_cache
def _model_of(kinds: tuple[tuple[str, StageKind], ...], sources: tuple[str, ...]) -> type[BaseModel]:
    # Fields come in the order of the last base first.
    about = f"{', '.join(sources[:-1])}, {sources[-1]}"
    fields = {name: (str, Field(kind.prior, min_length=1, description=about)) for name, kind in kinds}
    changes = "what of prior.diffusion is another for this stage, as {vae_checkpointing: true}"
    for name, kind in kinds:
        if kind.prior == "pocket":  # others can only be a CLIP
            fields[f"{name}_diffusion"] = (DiffusionChanges, Field(default_factory=dict, description=changes))
    prior = _composed("PriorSettings", _PriorSettings, fields)
    guidances = {name: (GuidanceSettings, Field(default_factory=kind.guidance)) for name, kind in kinds}
    guidance = _composed("StageGuidance", _StageGuidance, guidances)
    shared = {"prior": prior, "reference": ReferenceSettings, "guidance": guidance, "prompts": PromptSettings}
    groups = shared | {name: kind.settings for name, kind in kinds}
    fields = {name: (group, Field(default_factory=group)) for name, group in groups.items()}
    config = _composed("Config", _OutputSettings, fields, _RunSettings)
    config.__doc__ = """The configuration of a run, checked: everything that its bytes depend on."""
    return config


def _composed(name: str, last: type[BaseModel], fields: dict[str, Any], *first: type[BaseModel]) -> type[BaseModel]:
    middle = create_model(f"_{name}OfStages", **fields)
    return create_model(name, __base__=(last, middle, *first), __module__=__name__, __doc__=last.__doc__)


# Everything a run depends on; what it reads of it is written to its folder (see written.py).
Config = config_model()


def load_config(
    name: str | Path | Sequence[str | Path] | Config | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Compose and check the configuration of a new run.

    Args:
        name: a recipe's name or a YAML file, over the code's defaults or over the recipe it `extends`; several of
            these, later ones over earlier ones, which then stand in the place of what the later ones extend; a whole
            configuration; or None for the recipe of what the run starts from, which is configs/default.yaml for
            nothing (see _default_recipe).
        overrides: `key.sub=value` words, or values by key.
        flags: the command's own options that were given, or a function's arguments, by key.
    Returns: the configuration, its paths made absolute.
    Raises: UserError for anything that cannot be used, naming where it comes from.

    Example:
        >>> load_config("reference", {"coarse.steps": 100}, {"seed": 3}).coarse.steps
        100
    """
    words = not isinstance(overrides, Mapping)
    upper = [from_overrides(overrides) if words else from_mapping(overrides), from_flags(flags or {}, dashes=words)]
    if isinstance(name, BaseModel):
        return _anchored(validate(config_model(), [Layer(name.model_dump(mode="json")), *upper]))
    if name is not None:
        upper = [*_recipe_layers([name] if isinstance(name, str | Path) else name), *upper]
    values = merge(upper).values
    recipe = _default_recipe(values) if name is None else None
    if recipe is not None:
        upper = [*from_recipe(find_recipe(recipe), find_recipe), *upper]
    source = values.get("from_run")
    layers = [_inherited(from_home(source)), *upper] if isinstance(source, str) else upper
    return _anchored(validate(config_model(), layers))


def _recipe_layers(names: Sequence[str | Path]) -> list[Layer]:
    """The layers of several recipes, lowest first: the first with what it extends, the others without."""
    layers: list[Layer] = []
    for name in names:
        layers += from_recipe(find_recipe(str(name)), find_recipe, layers)
    return layers


def _default_recipe(values: dict[str, Any]) -> str | None:
    """The recipe that a run without --config takes, by what it starts from; None for that run's own settings."""
    stages = values.get("stages")
    first = split_commas(stages)[0] if isinstance(stages, str | list) and stages else next(iter(STAGES))
    kind, settings = STAGES.get(first), values.get(first)
    if kind is None:
        return "default"  # and the check of the whole says what is wrong
    has = {key for key, value in values.items() if value is not None}
    start = "run" if "from_run" in has else "mesh" if "init_mesh" in has else "nothing"
    return kind.recipe(start, settings if isinstance(settings, dict) else {})


def read_config(folder: Path) -> Config:
    """Read the configuration of a run folder."""
    return validate(config_model(), [from_file(folder / "config.yaml")])


def _inherited(folder: Path) -> Layer:
    """The settings of the run that this one starts from, but for which stages it took and where it began itself."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--from {folder} is not a run", f"there is no {path}", "give the folder of a run")
    layer = from_file(path)
    for key in ("stages", "from_run", "init_mesh", "image", "force"):
        layer.values.pop(key, None)
    return layer


def _anchored_folder(path_or_id: str | None) -> str | None:
    """A folder's path made absolute; what is no folder is a hub id."""
    if path_or_id is None or not from_home(path_or_id).is_dir():
        return path_or_id
    return str(from_home(path_or_id).absolute())


def _anchored(config: Config) -> Config:
    """Paths made absolute, so that the run can be resumed and its config.yaml fed back from anywhere."""
    folders: dict[str, Any] = {name: parse_source(getattr(config.prior, name)).anchored() for name in STAGES}
    if config.prior.lora is not None:
        folders["lora"] = str(from_home(config.prior.lora).absolute())
    vae = _anchored_folder(config.prior.diffusion.autoencoder)
    folders["diffusion"] = config.prior.diffusion.model_copy(update={"autoencoder": vae})
    for name in STAGES:
        changes = config.prior.changes(name)
        if "autoencoder" in changes:
            folders[f"{name}_diffusion"] = changes | {"autoencoder": _anchored_folder(changes["autoencoder"])}
    mesh, source = config.reference.mesh, config.from_run
    pictures = {name: getattr(config.image, name) for name in ("file", "depth_file")}
    pictures = {name: path and str(from_home(path).absolute()) for name, path in pictures.items()}
    return config.model_copy(
        update={
            "prior": config.prior.model_copy(update=folders),
            "reference": config.reference.model_copy(update={"mesh": mesh and str(from_home(mesh).absolute())}),
            "image": config.image.model_copy(update=pictures),
            "from_run": source and str(from_home(source).absolute()),
            "init_mesh": config.init_mesh and str(from_home(config.init_mesh).absolute()),
        }
    )
