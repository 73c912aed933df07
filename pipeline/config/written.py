"""The configuration that a run writes: all that it can read of the settings, and nothing else.

RUN/config.yaml can be given to --config and is what resuming reads. Left out is what no part of the run asks for: the
settings of stages that neither run nor go on from one that does, what the prior sources and the kinds of its stages do
not read, and what another setting has switched off. `pipeline settings` lists all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel

from pipeline.config.layers import Layer, validate
from pipeline.config.model import Config, config_model
from pipeline.config.yaml_dump import dump
from pipeline.priors.sources import parse_source
from stages.kinds import STAGES, predecessor

_OF_SOURCES = ("reference", "prior.diffusion", "guidance")  # groups of which sources say what they read


def read_part(config: Config) -> Config:
    """Return the configuration with all that the run cannot read at its default, as its config.yaml reads back."""
    return validate(config_model(), [Layer(_without(config.model_dump(mode="json"), unread(config)))])


def dump_read(config: Config) -> str:
    """Return what a run writes of its configuration as YAML; reads back to :func:`read_part` of it."""
    return dump(config, unread(config))


def unread(config: Config) -> set[str]:
    """Return the dotted keys of settings, and of whole groups, that a run of this configuration cannot read."""
    stages = stages_read(config)
    others = [stage for stage in STAGES if stage not in stages]
    keys = {*others, *(f"prior.{stage}" for stage in others)}
    read_keys = {key for stage in stages for key in parse_source(getattr(config.prior, stage)).reads(stage)}
    for group in _OF_SOURCES:
        keys |= set(_outside(config_model(), group, read_keys))
    changes = {f"prior.{stage}_diffusion": config.prior.changes(stage) for stage in STAGES}
    keys |= {name for name, changed in changes.items() if name not in read_keys or not changed}
    for stage in stages:
        switched_off = STAGES[stage].unread(getattr(config, stage), _start(config, stage, stages))
        keys |= {f"{stage}.{name}" for name in switched_off}
        keys |= {f"guidance.{stage}.{name}" for name in getattr(config.guidance, stage).unread()}
    keys |= {f"prompts.{name}" for name in config.prompts.unread()}
    keys |= set() if config.init_mesh is not None else {"place", "export.own_uv"}
    keys |= set() if config.image.file is not None else {"image"}
    keys |= {f"export.{name}" for name in config.export.unread()}
    return keys | (set() if config.prior.lora is not None else {"prior.lora_scale", "prior.lora_stages"})


def stages_read(config: Config) -> list[str]:
    """Return the stages whose settings a run can read: its own, one of another run that it goes on from, and those that
    another run may take after it, whose `--from` finds their settings here."""
    stages = list(config.stages)
    while config.from_run is not None and (before := STAGES[stages[0]].follows) is not None:
        stages.insert(0, before)
    return [*stages, *_after(stages[-1])]


def _after(stage: str) -> Iterator[str]:
    for name, kind in STAGES.items():
        if kind.follows == stage:
            yield name
            yield from _after(name)


def _start(config: Config, stage: str, stages: list[str]) -> str:
    """Return what a stage starts from: the name of the one that it follows, else as StageKind.begins_with has it."""
    before = predecessor(stage, stages)
    if before is not None:
        return before
    if stage not in config.stages:  # the other run's, which began it in its own way
        return "nothing"
    return "mesh" if config.init_mesh is not None else "run" if config.from_run is not None else "nothing"


def _outside(model: type[BaseModel], key: str, read_keys: set[str]) -> Iterator[str]:
    """Return the part of the group at `key` that is in none of the other keys; the whole group where that is all."""
    if key in read_keys:
        return
    if not any(other.startswith(f"{key}.") for other in read_keys):
        yield key
        return
    group = model
    for part in key.split("."):
        group = group.model_fields[part].annotation
    for name in group.model_fields:
        yield from _outside(model, f"{key}.{name}", read_keys)


def _without(values: dict[str, Any], keys: Collection[str], above: str = "") -> dict[str, Any]:
    return {
        name: _without(value, keys, f"{above}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if f"{above}{name}" not in keys
    }
