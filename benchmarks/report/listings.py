"""Tables that need no results: the recipes of configs/README.md, the models of pipeline/README.md."""

from __future__ import annotations

import re

from benchmarks.markdown import markdown_table
from pipeline.config.layers import from_file
from pipeline.config.model import load_config
from pipeline.config.recipes import recipes
from stages.guidance.diffusion.presets import PRESETS


def recipes_markdown() -> str:
    """Return a row for each recipe: name, what it extends, stages and priors of a run, and its first sentence."""
    rows = []
    for name, path in recipes().items():
        base = from_file(path).values.get("extends")
        config = load_config(name)
        priors = list(dict.fromkeys(str(getattr(config.prior, stage)).split("/")[-1] for stage in config.stages))
        link = f"[`{name}`]({path.name})"
        rows.append([link, f"`{base}`" if base else "-", ", ".join(config.stages), ", ".join(priors)])
        rows[-1].append(first_sentence(path.read_text(encoding="utf-8")))
    table = markdown_table(["recipe", "extends", "stages", "prior", "what it is"], rows)
    return table.replace("---:", "---", len(rows[0]) - 1)  # words, not numbers


def models_markdown() -> str:
    """Return a row for each known model that can still be had: memory in GB, licence, and whether it is gated."""
    rows = [
        [f"`{p.id}`", p.stages, str(p.resolution), f"{p.stay_gb:g}", f"{p.text_gb:g}", p.licence, p.status]
        for p in PRESETS
        if p.status != "withdrawn"
    ]
    head = ["model", "stage", "pixels", "denoiser + autoencoder, GB", "text encoder, GB", "licence", "status"]
    return markdown_table(head, rows)


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    sentence = re.split(r"(?<!\bsec)\. ", " ".join(lines), maxsplit=1)[0]
    return sentence.rstrip(".") + "."
