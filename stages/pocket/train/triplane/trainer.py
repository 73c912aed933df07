"""The trainer of the tri-plane system: its phases one after another, each for its share of the schedule."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from stages.guidance.clip import ClipScorer
from stages.pocket.models import WEIGHTS
from stages.pocket.train.triplane.diffusion import PlaneBank, draw_planes, train_base, train_up
from stages.pocket.train.triplane.fit import fit_decoder, fit_objects
from stages.triplane.model import TriplaneModel, make_sizes

PHASES = {"fit": 0.35, "base": 0.5, "up": 0.15}  # with their shares of --minutes
OBJECTS = 6000  # where --images says nothing
LARGEST = 16  # objects of a step
SHARED = 0.12  # share of the first phase that the decoder has
DECODER_STEPS = 1000  # of a schedule in steps


def train_triplane(args: argparse.Namespace) -> None:
    """Decoder and planes, base diffusion, upsampling diffusion; then the folder, fp16 safetensors.

    With --phase one of them, for all of --minutes; else all that are not done.
    """
    folder = args.work / "triplane"
    folder.mkdir(parents=True, exist_ok=True)
    scorer = ClipScorer(args.out / "clip" if (args.out / "clip").is_dir() else WEIGHTS / "clip")
    shape = scorer.model.config
    sizes = make_sizes(vector=shape.projection_dim, words=shape.text_config.hidden_size)
    torch.manual_seed(args.seed)
    model = TriplaneModel(sizes)
    batch = min(args.batch, LARGEST)
    phases = [args.phase] if args.phase else list(PHASES)
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise SystemExit(f"triplane has no phase {unknown[0]}: {', '.join(PHASES)}")
    bank = None
    for phase in [] if args.export else phases:
        minutes = args.minutes and args.minutes * (1 if args.phase else PHASES[phase])
        if phase == "fit":
            first = {"steps": None if minutes else min(args.steps, DECODER_STEPS)}
            first["minutes"] = minutes and SHARED * minutes
            decoder, start = fit_decoder(folder, sizes, args.seed, **first)
            rest = {"count": args.images or OBJECTS, "minutes": minutes and (1 - SHARED) * minutes}
            fit_objects(folder, sizes, decoder, start, args.seed, **rest)
            continue
        schedule = {"steps": None if minutes else args.steps, "minutes": minutes} | ({"lr": args.lr} if args.lr else {})
        load_parts(model, folder, ("decoder", "base") if phase == "up" else ("decoder",))
        bank = bank or PlaneBank(folder, model, scorer)
        if phase == "base":
            draw_planes(model, model.normalised(bank.low[:8]), folder / "truth.png")
            train_base(model, bank, scorer, folder, args.seed, batch, **schedule)
        else:
            train_up(model, bank, scorer, folder, args.seed, max(1, batch // 4), **schedule)
    if args.export or "up" in phases:
        load_parts(model, folder, ("decoder", "base", "up"))
        model.save(args.out / "triplane")


def load_parts(model: TriplaneModel, folder: Path, names: tuple[str, ...]) -> None:
    """Take over the networks that earlier phases left."""
    for name in names:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            raise SystemExit(f"there is no {path}: its phase comes first, {' -> '.join(PHASES)}")
        tensors = load_file(path)
        tensors.pop("start", None)
        getattr(model, name).load_state_dict(tensors)
    if (statistics := folder / "statistics.safetensors").exists():
        for name, value in load_file(statistics).items():
            getattr(model, name).copy_(value)
    model.decoder.requires_grad_(False)
