"""Make the pocket weights from nothing: `python -m stages.pocket.train text|layout|pixel|vae|latent|clip|...`.

Order: text (the encoder that all share), layout (what is where), pixel (the 64x64 UNet that draws by it), vae, latent
(the 512x512 UNet), clip (on its own renders); triplane and points (stages' own networks, each in
three phases) read the CLIP; gan (a stage's own networks as well, one class of objects after another) reads nothing.
Each resumes where it stopped, logs to log.jsonl, writes sample grids beside its state, and at the end writes an
ordinary model folder, fp16 safetensors, below --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.pocket import models
from stages.pocket.train.autoencoder import train_vae
from stages.pocket.train.clip import train_clip
from stages.pocket.train.denoisers import train_latent, train_pixel
from stages.pocket.train.gan.trainer import CLASSES, train_gan
from stages.pocket.train.layout import train_layout
from stages.pocket.train.points.trainer import PHASES as POINT_PHASES
from stages.pocket.train.points.trainer import train_points
from stages.pocket.train.text import train_text
from stages.pocket.train.triplane.trainer import PHASES, train_triplane

TRAINERS = {
    "text": (train_text, 1500),
    "layout": (train_layout, 4000),
    "pixel": (train_pixel, 8000),
    "vae": (train_vae, 3000),
    "latent": (train_latent, 8000),
    "clip": (train_clip, 4000),
    "triplane": (train_triplane, 6000),
    "points": (train_points, 6000),
    "gan": (train_gan, 8000),
}  # with their steps, where nothing else is said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(TRAINERS))
    parser.add_argument("--steps", type=int, help="length of the schedule in steps")
    parser.add_argument("--minutes", type=float, help="length of the schedule in minutes of training time instead")
    parser.add_argument("--images", type=int, help="size of the pool of renders")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data/pools"), help="where renders are kept")
    parser.add_argument("--work", type=Path, default=Path("data/training"), help="where training state is kept")
    parser.add_argument("--out", type=Path, default=models.WEIGHTS, help="where the model folders go")
    parser.add_argument("--start", type=Path, help="begin from this exported folder, not from nothing")
    parser.add_argument(
        "--init", type=Path, help="layout: begin from this one, a folder or a state, also a coarser one"
    )
    parser.add_argument("--side", type=int, default=128, help="layout: size in pixels of the renders that it learns by")
    parser.add_argument(
        "--solid",
        type=float,
        default=0.5,
        help="layout: share of the schedule, at its start, that learns points",
    )
    parser.add_argument("--fine", action="store_true", help="layout: with the level of 64^3 cells")
    parser.add_argument("--half", action="store_true", help="layout: bfloat16 volumes, for cores that have it")
    parser.add_argument(
        "--phase",
        choices=[*PHASES, *(name for name in POINT_PHASES if name not in PHASES)],
        help="triplane, points: this one alone, for all of the schedule",
    )
    parser.add_argument("--classes", help=f"gan: classes of objects, by commas; {','.join(CLASSES)} without it")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: a sixth faster, a C++ compiler")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where it is trained; auto takes CUDA if there",
    )
    parser.add_argument("--export", action="store_true", help="write the folder from the saved state, no training")
    args = parser.parse_args()
    train, steps = TRAINERS[args.model]
    if args.steps is None and args.minutes is None:
        args.steps = steps
    train(args)


if __name__ == "__main__":
    main()
