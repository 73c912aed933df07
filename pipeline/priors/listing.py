"""`pipeline models list` and `pipeline models check`: which priors there are, and whether a folder is a whole one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import EXIT_USER_ERROR
from stages.errors import UserError
from stages.guidance.diffusion.presets import PRESETS, find_preset
from stages.paths import from_home

if TYPE_CHECKING:
    from stages.guidance.diffusion.audit import Finding


def print_presets(as_json: bool) -> None:
    """Print the built-in priors and the models worth naming: id, family, stage, size, memory, licence, status."""
    if as_json:
        print(json.dumps([asdict(preset) for preset in PRESETS], indent=2))
        return
    from pipeline.priors.sources import SOURCES

    table = _table("id, for prior.coarse or prior.fine", "family", "stage", "pixels", "memory GB", "licence", "status")
    colours = {"here": "green", "open": "green", "gated": "yellow", "withdrawn": "red"}
    for offer in [offer for source in SOURCES.values() for offer in source.offers()]:
        colour = colours.get(offer.status, "yellow")
        status = f"[{colour}]{offer.status}[/]" + (f": use {offer.instead}" if offer.instead else "")
        table.add_row(offer.text, offer.family, offer.stages, offer.pixels, offer.memory, offer.licence, status)
    _show(table)
    print("memory: weights in half precision; denoiser and autoencoder + the largest text encoder, which is freed")
    print("before they are loaded. A step's images and gradients come on top: `pipeline models check` estimates them.")
    print("gated: accept the licence on huggingface.co/ID, then `hf auth login`. A run downloads what is not here yet.")


def check_model(
    source: str, variant: str | None, resolution: int | None, as_json: bool, revision: str | None = None
) -> None:
    """Print what is in a model's folder and what is missing or wrong; exits with code 2 where anything is.

    Args:
        source: a diffusers folder, or a hub id that this machine has in its cache.
        variant, resolution, revision: as prior.diffusion has them.
    """
    from stages.guidance.diffusion.audit import audit

    folder = _folder(source, revision)
    findings = audit(folder, variant, resolution)
    fit = all(finding.ok for finding in findings)
    memory = _memory(folder, variant, resolution) if fit else None
    if as_json:
        facts = {"folder": str(folder), "fit": fit, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(facts | ({"memory": memory} if memory else {}), indent=2))
    else:
        _print_findings(folder, findings, fit, memory, variant)
    if not fit:
        sys.exit(EXIT_USER_ERROR)


def _print_findings(folder: Path, findings: list[Finding], fit: bool, memory: str | None, variant: str | None) -> None:
    print(folder)
    table = _table("part", "state", "what it is, or what is wrong")
    for finding in findings:
        state = "[green]ok[/]" if finding.ok else "[red]wrong[/]"
        detail = finding.detail if finding.ok else f"{finding.detail}\n{finding.fix}"
        table.add_row(finding.part, state, detail)
    _show(table)
    if memory:
        print(f"memory on a GPU, one view a step, {memory}")
    if fit:
        also = f", and prior.diffusion.variant={variant}" if variant else ""
        print(f"all there; use it with prior.coarse={folder} or prior.fine={folder}{also}")
    else:
        print("cannot be used: see above")


def _folder(source: str, revision: str | None) -> Path:
    """The folder that a run would load, whole or not."""
    from stages.guidance.diffusion.hub import snapshot

    path = from_home(source)
    if path.is_dir() and revision is not None:
        raise UserError(f"cannot check revision {revision} of {source}", "a folder has no revisions", "leave it out")
    folder = path if path.is_dir() else None if path.exists() else snapshot(source, revision)
    if folder is not None:
        return folder
    preset = find_preset(source)
    if preset is not None and preset.status == "withdrawn":
        raise UserError(f"cannot check {source}", "it was withdrawn by its makers", f"use {preset.instead}")
    raise UserError(
        f"cannot check {source}",
        "it is neither a folder nor a hub id that is in this machine's cache",
        "give the path of a diffusers folder; a run with prior.coarse=OWNER/NAME downloads one",
    )


def _memory(folder: Path, variant: str | None, resolution: int | None) -> str:
    import torch

    from stages.guidance.diffusion.footprint import footprint
    from stages.guidance.diffusion.plan import make_plan
    from stages.guidance.diffusion.settings import DiffusionSettings

    settings, device = DiffusionSettings(variant=variant, resolution=resolution), torch.device("cuda")
    need = footprint(make_plan(folder, settings, device=device), settings, device, images=1, predictions=2)
    return need.describe()


def _table(*headings: str):
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _show(table: object) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)
