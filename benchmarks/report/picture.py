"""The README's picture of a suite: a row a prompt, systems side by side, from the cells' gallery strips.

python -m benchmarks.report.picture OUT --systems coarse,magic3d,truth --to benchmarks/results/main_job.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.environment import read_lines
from benchmarks.quality.cells import Cell
from benchmarks.report.tables import name_of
from stages.paths import from_home

STRIP_HEIGHT, LABEL = 96, 16


def compose(out: Path, systems: list[str], prompts: list[str], seed: int = 0) -> Image.Image:
    """One picture of all prompts; a missing strip (a failed or unfinished cell) stays grey."""
    strips: dict[tuple[str, str], Image.Image] = {}
    for prompt in prompts:
        for system in systems:
            path = Cell(system, prompt, 0 if system == "truth" else seed).folder(out) / "gallery.jpg"
            if path.is_file():
                strip = Image.open(path).convert("RGB")
                strips[prompt, system] = strip.resize((strip.width * STRIP_HEIGHT // strip.height, STRIP_HEIGHT))
    width = max((s.width for s in strips.values()), default=4 * STRIP_HEIGHT)
    sheet = Image.new("RGB", ((width + 6) * len(systems), (STRIP_HEIGHT + LABEL) * len(prompts)), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, prompt in enumerate(prompts):
        for column, system in enumerate(systems):
            x, y = column * (width + 6), row * (STRIP_HEIGHT + LABEL)
            draw.text((x + 2, y + 2), f"{prompt}: {name_of(system)}", fill=(40, 40, 40), font=font)
            strip = strips.get((prompt, system)) or Image.new("RGB", (width, STRIP_HEIGHT), (200, 200, 200))
            sheet.paste(strip, (x, y + LABEL))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=from_home, help="the suite's folder")
    parser.add_argument("--systems", default="coarse,magic3d,truth")
    parser.add_argument("--to", type=from_home, required=True)
    args = parser.parse_args()
    prompts = list(dict.fromkeys(line["prompt"] for line in read_lines(args.out / "results.jsonl")))
    compose(args.out, args.systems.split(","), prompts).quantize(128).save(args.to, optimize=True)


if __name__ == "__main__":
    main()
