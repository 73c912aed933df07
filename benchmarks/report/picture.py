"""A README's picture of a suite: prompts by systems, from the cells' gallery strips.

python -m benchmarks.report.picture OUT --systems coarse,magic3d,truth --to benchmarks/results/main_job.png
python -m benchmarks.report.picture OUT --views front,clay --prompts "a red car,a red boat" --to PICTURE.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.environment import read_lines
from benchmarks.quality.assess import GALLERY
from benchmarks.quality.cells import Cell
from benchmarks.report.tables import name_of
from stages.paths import from_home

STRIP_HEIGHT, LABEL, GAP = 96, 16, 6
VIEWS = (*GALLERY, "clay")  # of a strip, from the left


def compose(
    out: Path, systems: list[str], prompts: list[str], seed: int = 0, views: tuple[str, ...] = VIEWS
) -> Image.Image:
    """Return one picture: a column a system, a row a prompt; grey where a cell failed or is unfinished."""
    width, height = STRIP_HEIGHT * len(views) + GAP, STRIP_HEIGHT + LABEL
    sheet = Image.new("RGB", (width * len(systems) - GAP, LABEL + height * len(prompts)), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, system in enumerate(systems):
        draw.text((column * width + 2, 1), name_of(system), fill=(40, 40, 40), font=font)
        for row, prompt in enumerate(prompts):
            path = Cell(system, prompt, 0 if system == "truth" else seed).folder(out) / "gallery.jpg"
            sheet.paste(strip_of(path, views), (column * width, LABEL + row * height + LABEL))
    for row, prompt in enumerate(prompts):
        draw.text((2, LABEL + row * height + 1), prompt, fill=(110, 110, 110), font=font)
    return sheet


def strip_of(path: Path, views: tuple[str, ...]) -> Image.Image:
    """Return some views of a cell's strip beside each other; grey where there is none."""
    chosen = Image.new("RGB", (STRIP_HEIGHT * len(views), STRIP_HEIGHT), (200, 200, 200))
    if path.is_file():
        strip = Image.open(path).convert("RGB").resize((STRIP_HEIGHT * len(VIEWS), STRIP_HEIGHT))
        for k, view in enumerate(views):
            left = STRIP_HEIGHT * VIEWS.index(view)
            chosen.paste(strip.crop((left, 0, left + STRIP_HEIGHT, STRIP_HEIGHT)), (STRIP_HEIGHT * k, 0))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=from_home, help="the suite's folder")
    parser.add_argument("--systems", default="coarse,magic3d,truth")
    parser.add_argument("--prompts", help="some of the suite's, by commas (all of them)")
    parser.add_argument("--views", default=",".join(VIEWS), help=f"by commas, of {', '.join(VIEWS)}")
    parser.add_argument("--to", type=from_home, required=True, help="a JPG, or a PNG of 128 colours")
    args = parser.parse_args()
    known = list(dict.fromkeys(line["prompt"] for line in read_lines(args.out / "results.jsonl")))
    prompts, views = args.prompts.split(",") if args.prompts else known, tuple(args.views.split(","))
    if strange := [text for text in (*prompts, *views) if text not in (*known, *VIEWS)]:
        parser.error(f"{args.out} has no {strange[0]!r}")
    sheet = compose(args.out, args.systems.split(","), prompts, views=views)
    if args.to.suffix == ".png":
        sheet.quantize(128).save(args.to, optimize=True)
    else:
        sheet.save(args.to, quality=88)


if __name__ == "__main__":
    main()
