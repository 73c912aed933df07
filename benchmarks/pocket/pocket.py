"""Measure the pocket models: `python -m benchmarks.pocket`.

Every caption of the world's held-out listing, judged by the pocket CLIP among 100 candidates, those captions and
distractors from the whole world (textureless: its 85 kinds and compositions):
    truth    renders of the captions' own meshes, one view at a time and eight views together, colour and textureless
    pixel    DDIM samples of the pixel prior at 64x64      (the stages' guidance scale 1, 50 steps, front and side views
    latent   DDIM samples of the latent prior, decoded      by turns, words as the stages use them)
    fidelity how near layout, priors and autoencoder come to the truth in dB (fidelity.py)
    chain    where a run loses what the layout knows: twelve runs of the default recipe (chain.py); only when asked for
Writes results/pocket_<prior>_samples.png, green frames for hits, and one line to results/pocket.jsonl.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.environment import FOLDER, RESULTS, append_line, environment, quiet_libraries
from benchmarks.pocket.chain import measure_chain
from benchmarks.pocket.fidelity import measure_fidelity
from benchmarks.quality import metrics
from benchmarks.quality.render import CLAY, COLOUR, Subject, ring, shoot
from benchmarks.quality.suite import read_captions
from stages.cameras import Views, orbit_views
from stages.errors import UserError
from stages.guidance.clip import ClipScorer
from stages.guidance.picture import calls, ddim
from stages.guidance.prior import ViewContext
from stages.paths import from_home
from stages.pocket import world
from stages.pocket.build import build

WEIGHTS = Path(world.__file__).parent / "weights"
CANDIDATES, SCALE, STEPS, SEED = 100, 1.0, 50, 0
VIEW_WORDS = (", front view", ", side view")
AZIMUTHS, GREY = (25.0, 75.0), 0.4  # of these views' cameras, degrees; linear grey behind: for priors that take views
MODELS = ("truth", "pixel", "latent", "fidelity", "chain")
LOOKS = {"colour": COLOUR, "textureless": CLAY}
SIZE = 128  # of truth renders in pixels


def held_out_captions(seed: int = SEED) -> list[str]:
    """Every line of the held-out listing as a caption; a composition gets two random colours that are not held out."""
    rng, captions = np.random.default_rng(seed), []
    colours = list(world.COLOURS)
    for line in world.HELDOUT_FILE.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        try:
            captions.append(world.caption(world.parse(line)))
        except ValueError:  # a composition without colours
            captions.append(_coloured(line, colours, rng))
    return captions


def _coloured(composition: str, colours: list[str], rng: np.random.Generator) -> str:
    """A caption of a listed composition whose two objects are themselves in training."""
    relation = next(r for r in world.RELATIONS if f" {r} " in composition)
    kinds = [part.split()[-1] for part in composition.split(f" {relation} ")]
    while True:
        first, second = (world.Spec(kind, colours[int(rng.integers(len(colours)))]) for kind in kinds)
        if not world.held_out(first) and not world.held_out(second):
            return world.caption(world.Spec(first.kind, first.colour, "plain", relation, second))


def with_distractors(captions: list[str], textureless: bool = False, seed: int = SEED) -> list[str]:
    """The candidates: `captions` and random others of the whole world, 100 meanings in all.

    Textureless: every kind and composition there is, which are 85 without colours and patterns.
    """
    if textureless:
        return metrics.candidates(captions, sorted({world.geometry_caption(s) for s in world.all_specs()}), True)
    rng = np.random.default_rng([seed, 1])
    others = [world.caption(world.sample_spec(rng, "all")) for _ in range(2 * CANDIDATES)]
    return metrics.candidates(captions, others, False, most=CANDIDATES)


def judge_truth(
    scorer: ClipScorer, captions: list[str], options: dict[str, list[str]], views: int = 8
) -> dict[str, Any]:
    """R-Precision of the captions' own meshes (not their varied training forms), in percent.

    Args:
        options: the candidates for "colour" and for "textureless".
    """
    cameras, result = ring(views), {}
    for name, shading in LOOKS.items():
        bare, texts = name == "textureless", options[name]
        text_embeddings, truth = scorer.embed_texts(texts), metrics.truth_of(captions, texts, bare)
        each, together, misses = [], [], []
        for caption, number in zip(captions, truth, strict=True):
            images, _ = shoot(Subject.of(build(world.parse(caption))), cameras, SIZE, shading)
            image_embeddings = scorer.embed_images(images)
            each.append(metrics.hits(image_embeddings @ text_embeddings.T, [number] * views))
            together.append(metrics.hits(metrics.mean_embedding(image_embeddings)[None] @ text_embeddings.T, [number]))
            if together[-1] < 1:
                best = texts[int((metrics.mean_embedding(image_embeddings) @ text_embeddings.T).argmax())]
                misses.append([caption, best])
        result[name] = {
            "one_view": round(100 * float(torch.cat(each).mean()), 2),
            f"{views}_views": round(100 * float(torch.cat(together).mean()), 2),
            "candidates": len(texts),
            "missed": misses,
        }
    return result


@torch.no_grad()
def ddim_samples(
    prior, prompts: list[str], *, scale: float, steps: int, seed: int, batch: int = 8, views: Views | None = None
) -> Tensor:
    """DDIM samples (Song et al. 2021, eta 0) under classifier-free guidance, sRGB [N, H, W, 3] in [0, 1].

    views: N cameras, for a prior with a layout (guidance/diffusion/layout.py), before linear grey 0.4.
    """
    embeddings, empty = prior.embed(prompts), prior.embed([""])
    generator, pictures = torch.Generator().manual_seed(seed), []
    shape = prior.encode(torch.zeros(1, prior.resolution, prior.resolution, 3), generator).shape[1:]
    for start in range(0, len(prompts), batch):
        texts = embeddings[start : start + batch]
        n = len(texts)
        z = torch.randn(n, *shape, generator=generator)
        asked = torch.cat([texts, empty.expand_as(texts)][: calls(scale)])
        context = None if views is None else ViewContext(views[start : start + n], torch.full((3,), GREY))
        context = None if context is None else context.repeat(calls(scale))
        predict = partial(prior.predict_noise, embedding=asked, context=context)
        pictures.append(prior.decode(ddim(predict, prior.alphas_cumprod, z, steps, scale)))
    return torch.cat(pictures)


def judge_samples(
    scorer: ClipScorer, prior, captions: list[str], texts: list[str], *, scale: float, steps: int, seed: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """R-Precision of one sample of every caption, in percent; the samples; which were hits."""
    prompts = [caption + VIEW_WORDS[k % len(VIEW_WORDS)] for k, caption in enumerate(captions)]
    start = time.perf_counter()
    views = orbit_views([AZIMUTHS[k % len(AZIMUTHS)] for k in range(len(captions))], 20.0)
    samples = ddim_samples(prior, prompts, scale=scale, steps=steps, seed=seed, views=views)
    seconds = time.perf_counter() - start
    scores = torch.cat([scorer.embed_srgb(part) for part in samples.split(8)]) @ scorer.embed_texts(texts).T
    truth = metrics.truth_of(captions, texts, textureless=False)
    hit = metrics.hits(scores, truth)
    single = torch.tensor([world.parse(caption).other is None for caption in captions])
    misses = [[captions[k], texts[int(scores[k].argmax())]] for k in (hit < 1).nonzero()[:, 0].tolist()]
    facts = {
        "r_precision": round(100 * float(hit.mean()), 2),
        "single": round(100 * float(hit[single].mean()), 2) if single.any() else None,
        "pairs": round(100 * float(hit[~single].mean()), 2) if (~single).any() else None,
        "clip_score": round(100 * float(scores[range(len(captions)), truth].mean()), 2),
        "samples": len(captions),
        "seconds": round(seconds, 1),
        "missed": misses,
    }
    return facts, samples, hit


def draw_grid(samples: Tensor, captions: list[str], hit: Tensor, path: Path, side: int = 96, columns: int = 10) -> None:
    """Samples [N, H, W, 3] with their captions below, framed green for a hit and red for a miss, as one PNG."""
    pad, text = 3, 26
    width, height = side + 2 * pad, side + 2 * pad + text
    sheet = Image.new("RGB", (columns * width, -(-len(samples) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    small = F.interpolate(samples.permute(0, 3, 1, 2), (side, side), mode="bilinear", antialias=True)
    for k, caption in enumerate(captions):
        x, y = k % columns * width, k // columns * height
        colour = (40, 160, 70) if hit[k] == 1 else (210, 50, 40)
        draw.rectangle([x + 1, y + 1, x + width - 2, y + side + 2 * pad - 2], fill=colour)
        picture = (small[k].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
        sheet.paste(Image.fromarray(picture), (x + pad, y + pad))
        for row, line in enumerate(_wrapped(caption.removeprefix("a ").removeprefix("an "), 17)[:2]):
            draw.text((x + pad, y + side + 2 * pad + 12 * row), line, fill="black", font_size=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for and present; returns 2 where something asked for is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="truth,pixel,latent,fidelity", help="which measurements, by commas")
    parser.add_argument("--clip", type=from_home, default=WEIGHTS / "clip", help="CLIPModel folder")
    parser.add_argument("--pixel", type=from_home, default=WEIGHTS / "pixel", help="pixel prior's folder")
    parser.add_argument("--latent", type=from_home, default=WEIGHTS / "latent", help="latent prior's folder")
    parser.add_argument("--scale", type=float, default=SCALE, help="classifier-free guidance s")
    parser.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--limit", type=int, help="only the first N held-out captions (for trials)")
    parser.add_argument("--out", type=from_home, default=RESULTS, help="folder of the pictures and of pocket.jsonl")
    args = parser.parse_args(arguments)
    if args.limit and args.out == RESULTS:
        parser.error("--limit is for trials, which must not end up in the tables: give another --out")
    names = args.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"--models: {', '.join(unknown)}: wanted {', '.join(MODELS)}")
    try:
        measure(args, names)
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}")
        return 2
    return 0


def measure(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Run the measurements, print them, write pictures and the result line; returns the line."""
    from stages.guidance.diffusion.prior import load_prior

    quiet_libraries()
    captions = held_out_captions(args.seed)
    options = {name: with_distractors(captions, name == "textureless", args.seed) for name in LOOKS}
    captions = captions[: args.limit]
    scorer = ClipScorer(args.clip)
    settings = {"captions": len(captions), "candidates": CANDIDATES}
    settings |= {"scale": args.scale, "steps": args.steps, "seed": args.seed}
    line: dict[str, Any] = {"benchmark": "pocket", **environment(), "settings": settings}
    for name in names:
        if name == "truth":
            line[name] = judge_truth(scorer, captions, options)
        elif name == "fidelity":
            priors = (load_prior(folder, "cpu") for folder in (args.pixel, args.latent))
            line[name] = measure_fidelity(*priors, args.out)
        elif name == "chain":
            prompts = read_captions(FOLDER / "main_job_prompts.txt")[: args.limit]
            folders = {"prior.coarse": str(args.pixel), "prior.fine": str(args.latent)}
            line[name] = measure_chain(load_prior(args.pixel, "cpu"), prompts, args.out, settings=folders)
        else:
            prior = load_prior(getattr(args, name), "cpu")
            sampling = {"scale": args.scale, "steps": args.steps, "seed": args.seed}
            line[name], samples, hit = judge_samples(scorer, prior, captions, options["colour"], **sampling)
            draw_grid(samples, captions, hit, args.out / f"pocket_{name}_samples.png")
        print(f"{name}: {_summary(line[name])}", flush=True)
    append_line(args.out / "pocket.jsonl", line)
    return line


def _summary(facts: dict[str, Any]) -> str:
    plain = {k: v for k, v in facts.items() if k != "missed"}
    return str({k: _summary(v) if isinstance(v, dict) else v for k, v in plain.items()})


if __name__ == "__main__":
    raise SystemExit(main())
