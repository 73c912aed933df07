"""What the results say, in sentences and Markdown tables; those of the READMEs are made here, never typed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.device_check import device_markdown
from benchmarks.environment import RESULTS, read_lines
from benchmarks.kernels.kernel_tables import goals_markdown, kernels_markdown
from benchmarks.markdown import markdown_table, origin, origin_of
from benchmarks.quality.compare import compare_markdown
from benchmarks.quality.guidance import as_markdown
from benchmarks.quality.summary import METRICS, interval_text
from benchmarks.report.listings import models_markdown, recipes_markdown
from benchmarks.speed.speed_tables import speed_markdown
from pipeline.output.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("benchmarks", "configs", "pipeline", "stages")
MARKS = re.compile(r"<!-- benchmarks:([\w-]+) -->.*?<!-- /benchmarks -->", re.DOTALL)
PLAIN = {
    "coarse": "coarse only",
    "magic3d": "coarse + fine",
    "sphere": "fine only, from a sphere",
    "reference": "upper bound (exact prior)",
    "texture": "the shape given, painted by the prompt",
    "dreamfields": "Dream Fields",
    "clip-mesh": "CLIP-Mesh",
    "points+fine": "points + fine",
    "triplane+fine": "triplane + fine",
    "gan+fine": "gan + fine",
    "truth": "ground truth",
    "floor": "random blob",
}
PAPERS = {
    "coarse": "DreamFusion",
    "magic3d": "Magic3D",
    "points": "Point-E",
    "triplane": "Rodin",
    "gan": "GET3D",
}  # whose method a system is built after, where its name does not say so
ANSWERED = (
    "r_precision_colour", "clip_colour", "colour_difference", "brightness_error",
    "r_precision_textureless", "chamfer", "normal_consistency",
)  # fmt: skip
REFINED = (("magic3d", "coarse"), ("points+fine", "points"), ("triplane+fine", "triplane"), ("gan+fine", "gan"))
BESIDE = {"coarse": "coarse alone"}  # how a system is called beside its refined one, where not as always
COLUMNS = (
    "r_precision_colour", "r_precision_textureless", "clip_colour", "janus",
    "chamfer", "volume_iou", "solid", "wall_s", "memory_mb",
)  # fmt: skip
HEADLINE = "quality_main_job_prompts"  # the suite of the README's one table: the prompts of its picture
HEADLINE_COLUMNS = ("r_precision_colour", "r_precision_textureless", "janus", "chamfer", "solid", "wall_s")
SURE = 0.05  # p-value below which a difference is told by itself
CEILINGS = ("r_precision_colour", "clip_colour", "volume_iou")  # how far from the ground truth each system is


def name_of(system: str) -> str:
    return PLAIN.get(system, system)


def answers(summary: dict[str, Any]) -> list[str]:
    """Does fine beat what it begins with, by how much, at what price; how far is each system from the ceiling?

    In sentences. Where one object matters less than all of them, as for the drafts, how far those are from the truth's.
    """
    comparisons = {(c["a"], c["b"], c["metric"]): c for c in summary["comparisons"]}
    sentences = [text for better, plain in REFINED for text in _refinement(comparisons, better, plain)]
    for system in summary["systems"]:
        if system in ("truth", "floor"):
            continue
        gaps = {name: _directed(comparisons, system, "truth", name) for name in CEILINGS}
        parts = [_gap(gap["difference"], name) for name, gap in gaps.items() if gap is not None]
        if parts:
            sentences.append(f"{_capital(name_of(system))} against the ground truth: {'; '.join(parts)}.")
    if distances := summary.get("distribution"):
        parts = [f"{name_of(system)} {interval_text(looks['colour'], 1)}" for system, looks in distances.items()]
        sentences.append(f"All objects together against the ground truth's, kernel distance: {'; '.join(parts)}.")
    return sentences


def _refinement(comparisons: dict, better: str, plain: str) -> list[str]:
    """What a system with a fine stage gains over the same without, in sentences; none where one was not run."""
    compared = {name: _directed(comparisons, better, plain, name) for name in ANSWERED}
    compared = {name: comparison for name, comparison in compared.items() if comparison is not None}
    pair = f"{name_of(better)} against {BESIDE.get(plain, name_of(plain))}"
    sure = [name for name, comparison in compared.items() if comparison["p_value"] < SURE]
    sentences = [_sentence(compared[name], pair, METRICS[name].label, METRICS[name].digits) for name in sure]
    if unsure := [_gap(compared[name]["difference"], name) for name in compared if name not in sure]:
        sentences.append(f"{_capital(pair)}, within chance: {'; '.join(unsure)}.")
    time = _directed(comparisons, better, plain, "wall_s")
    if time is not None:
        d, after = time["difference"], "" if plain == "coarse" else f" after {name_of(plain)}"
        price = f"{d['mean']:.0f} s more [{d['low']:.0f}, {d['high']:.0f}]"
        sentences.append(f"The price of the fine stage{after}: {price}.")
    return sentences


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _gap(d: dict[str, float], name: str) -> str:
    label, n = METRICS[name].label, METRICS[name].digits
    return f"{label} {d['mean']:+z.{n}f} [{d['low']:+z.{n}f}, {d['high']:+z.{n}f}]"


def _directed(comparisons: dict, a: str, b: str, metric: str) -> dict[str, Any] | None:
    """The comparison of a with b, whichever way round it was stored."""
    if (a, b, metric) in comparisons:
        return comparisons[a, b, metric]
    back = comparisons.get((b, a, metric))
    if back is None:
        return None
    d = back["difference"]
    turned = {"mean": -d["mean"], "low": -d["high"], "high": -d["low"]}
    return back | {"a": a, "b": b, "wins": back["losses"], "losses": back["wins"], "difference": turned}


def _sentence(c: dict[str, Any], pair: str, label: str, digits: int) -> str:
    d = c["difference"]
    p = "p < 0.001" if c["p_value"] < 0.001 else f"p = {c['p_value']:.3f}"
    return (
        f"{label}: {pair} {d['mean']:+z.{digits}f} [{d['low']:+z.{digits}f}, "
        f"{d['high']:+z.{digits}f}], better on {c['wins']} and worse on {c['losses']} of {c['prompts']} prompts "
        f"({p})."
    )


def pocket_markdown(line: dict[str, Any]) -> str:
    """Return the pocket models' table from one line of pocket.jsonl."""
    rows = []
    if "truth" in line:
        for look, facts in line["truth"].items():
            views = next(k for k in facts if k.endswith("_views"))
            rows.append(
                [
                    f"renders of held-out captions, {look}",
                    f"{facts[views]:.1f} %",
                    f"{facts['one_view']:.1f} %",
                    str(facts["candidates"]),
                ]
            )
    for name in ("pixel", "latent"):
        if name in line:
            facts = line[name]
            rows.append(
                [
                    f"{name} prior, DDIM samples",
                    "-",
                    f"{facts['r_precision']:.1f} %",
                    str(line["settings"]["candidates"]),
                ]
            )
    s = line["settings"]
    note = (
        f"R-Precision at 1 under the pocket CLIP; {s['captions']} held-out captions, guidance {s['scale']:g}, "
        f"{s['steps']} steps. {origin_of([line])}, {line['cores']} cores."
    )
    return markdown_table(["what", "8 views", "1 view", "candidates"], rows) + f"\n\n{note}"


def reference_markdown(lines: list[dict[str, Any]]) -> str:
    """Return the table of the reference benchmark: the latest line of each mesh and stage, below them the targets."""
    latest = {(line["mesh"], line["stage"]): line for line in lines}
    meshes = list(dict.fromkeys(mesh for mesh, _ in latest))
    rows = []
    for mesh in meshes:
        coarse, fine = latest.get((mesh, "coarse")), latest.get((mesh, "fine"))
        pictures = [_marked(line, name) for line in (coarse, fine) for name in ("iou", "psnr_db")]
        seconds = [f"{line['seconds']:.0f} s" for line in (coarse, fine) if line is not None]
        rows.append([mesh, *pictures, _marked(fine, "chamfer"), _solid(fine), " + ".join(seconds)])
    targets = {stage: line["targets"] for (_, stage), line in latest.items()}
    bounds = [_bound(targets.get(stage, {}), name) for stage in ("coarse", "fine") for name in ("iou", "psnr_db")]
    rows.append(["wanted", *bounds, _bound(targets.get("fine", {}), "chamfer"), "closed, manifold, 1 part", ""])
    head = ["mesh", "coarse IoU", "coarse PSNR", "fine IoU", "fine PSNR", "Chamfer", "surface", "time"]
    chosen = list(latest.values())
    floors = [line["chamfer_floor"] for line in chosen if "chamfer_floor" in line]
    note = "Silhouettes and unshaded pictures on views that training has not seen; Chamfer over the box's diagonal"
    note += f" (the truth against itself: {max(floors):.4f})" if floors else ""
    bold = "; bold misses its target" if any(line["missed"] for line in chosen) else ""
    return markdown_table(head, rows) + f"\n\n{note}{bold}. {origin_of(chosen)}, {chosen[-1]['cores']} cores."


_DIGITS = {"iou": "{:.3f}", "psnr_db": "{:.1f} dB", "chamfer": "{:.4f}"}


BATCH_KILLS = ("worker", "batch", "batch and worker")


def kills_markdown(lines: list[dict[str, Any]]) -> str:
    """Return what the lines of kills.jsonl say, in sentences: all those of the last one's revision together."""
    lines = [line for line in lines if line["git"] == lines[-1]["git"]]
    counts = Counter(entry["killed"] for line in lines for entry in line["each"])
    same, kills, anew = (sum(line[name] for line in lines) for name in ("same_bytes", "kills", "begun_anew"))
    return (
        f"{same} of {kills} processes, killed at random moments and taken up again, ended with the bytes of one left "
        f"alone: {counts['run']} runs, {counts['run and resume']} runs killed once more while they resumed, "
        f"{counts['export']} exports, and {sum(counts[name] for name in BATCH_KILLS)} batches, of which "
        f"{counts['worker']} lost their worker, {counts['batch']} their parent and {counts['batch and worker']} both. "
        f"{anew} more kills came before a run had written anything to take up; it began anew."
        f"\n\n{origin_of(lines)}, {lines[-1]['cores']} cores of {lines[-1]['cpu']}."
    )


def view_markdown(line: dict[str, Any]) -> str:
    """Return what a page costs a run, in sentences, from a line of view.jsonl."""
    same = all(took["same_bytes"] for took in line["each"])
    return (
        f"While somebody orbits all the time, answers took {100 * line['answers_cpu_share']:.1f} % of the run's "
        f"processor time and {100 * line['answers_share']:.1f} % of its stages' time; all of its processor time was "
        f"{line['watched_cpu_ratio']:.2f} times that of the same run with nobody there. While nobody looks, a step "
        f"looks for a letter in {1e6 * line['look_s']:.0f} µs, and the page, a process of its own, takes "
        f"{100 * line['idle_page_share']:.1f} % of a core. "
        f"{'Both runs have the same bytes.' if same else 'Their bytes differ.'}"
        f"\n\nMedians of rounds: {len(line['each'])}; `{' '.join(line['settings'])}`; {origin_of([line])}, "
        f"{line['cores']} cores of {line['cpu']}."
    )


def _marked(line: dict[str, Any] | None, name: str) -> str:
    """A score, bold where it misses its target, a dash where there is none."""
    if line is None or name not in line:
        return "-"
    text = _DIGITS[name].format(line[name])
    return f"**{text}**" if name in line["missed"] else text


def _bound(targets: dict[str, Any], name: str) -> str:
    if name not in targets:
        return "-"
    return ("<= " if name == "chamfer" else ">= ") + _DIGITS[name].format(targets[name])


def _solid(line: dict[str, Any] | None) -> str:
    if line is None:
        return "-"
    parts = line["components"]
    words = [
        "closed" if line["watertight"] else "**open**",
        "manifold" if line["manifold"] else "**not manifold**",
        "1 part" if parts == 1 else f"**{parts} parts**",
    ]
    return ", ".join(words)


def quality_markdown(summary: dict[str, Any]) -> str:
    """A suite's table from its summary, and what it answers."""
    sentences = "\n".join(f"- {text}" for text in answers(summary))
    return f"{quality_table(summary, COLUMNS)}\n\n{sentences}".rstrip()


def quality_table(summary: dict[str, Any], chosen: tuple[str, ...]) -> str:
    """Systems by the chosen measures, those of them that there are, and where the numbers are from."""
    names = [n for n in chosen if any(n in facts["all"] for facts in summary["systems"].values())]
    rows = []
    for system, facts in summary["systems"].items():
        fails = f" ({facts['failed']} of {facts['cells']} without an object)" if facts["failed"] else ""
        name = name_of(system) + (f" ({PAPERS[system]})" if system in PAPERS else "")
        rows.append([name + fails, *(interval_text(facts["all"].get(n), METRICS[n].digits) for n in names)])
    table = markdown_table(["system", *(METRICS[n].label for n in names)], rows)
    prompts, seeds = sum(summary["prompts"].values()), max(f["seeds"] for f in summary["systems"].values())
    note = (
        f"{prompts} prompts, {seeds} seed{'s' if seeds > 1 else ''}, pocket world; 95 % bootstrap intervals. "
        f"{origin(summary['dates'], summary['revisions'])}, {'; '.join(summary['machines'])}."
    )
    return f"{table}\n\n{note}"


def guidance_markdown(lines: list[dict[str, Any]]) -> str:
    """Return the table of rules and cures against plain SDS, and where it was made."""
    prompts, seeds = max(line["prompts"] for line in lines), max(line["seeds"] for line in lines)
    note = (
        f"{prompts} prompts with a true front, up to {seeds} seed{'s' if seeds > 1 else ''}, coarse + fine, pocket "
        "world; `sds` is DreamFusion's recipe as published, `sds+X` the same with one rule or cure "
        f"(benchmarks/cures). {origin_of(lines)}, {lines[-1]['cores']} cores of {lines[-1]['cpu']}."
    )
    return f"{as_markdown(lines)}\n\n{note}"


def markdown_blocks(results: Path = RESULTS) -> dict[str, str]:
    """Every table there are results for, by name: pocket, reference, kernels, kernels_goals, speed, guidance, kills,
    view, quality_<suite>, compare_<name>, headline, device, recipes and models."""
    blocks = {"recipes": recipes_markdown(), "models": models_markdown()}
    blocks["device"] = device_markdown(results / "device_check.json")
    lines = read_lines(results / "pocket.jsonl")
    if lines:
        blocks["pocket"] = pocket_markdown(lines[-1])
    lines = read_lines(results / "reference.jsonl")
    if lines:
        blocks["reference"] = reference_markdown(lines)
    lines = read_lines(results / "kernels.jsonl")
    if lines:
        blocks["kernels"] = kernels_markdown(lines)
        blocks["kernels_goals"] = goals_markdown(lines)
    lines = read_lines(results / "speed.jsonl")
    if lines:
        blocks["speed"] = speed_markdown(lines)
    lines = read_lines(results / "guidance.jsonl")
    if lines:
        blocks["guidance"] = guidance_markdown(lines)
    lines = read_lines(results / "view.jsonl")
    if lines:
        blocks["view"] = view_markdown(lines[-1])
    lines = read_lines(results / "kills.jsonl")
    if lines:
        blocks["kills"] = kills_markdown(lines)
    for path in sorted(results.glob("compare_*.json")):
        blocks[path.stem] = compare_markdown(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(results.glob("quality_*.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        blocks[path.stem] = quality_markdown(summary)
        if path.stem == HEADLINE:
            blocks["headline"] = quality_table(summary, HEADLINE_COLUMNS)
    return blocks


def readmes(root: Path = ROOT) -> list[Path]:
    """The pages of a checkout that have tables between marks."""
    pages = [root / "README.md", *(page for top in TOPS for page in sorted((root / top).rglob("README.md")))]
    return [page for page in pages if MARKS.search(page.read_text(encoding="utf-8"))]


def put_into(path: Path, blocks: dict[str, str]) -> list[str]:
    """Fill a file between <!-- benchmarks:NAME --> and <!-- /benchmarks -->; returns the names that were found."""
    text, names = path.read_text(encoding="utf-8"), []

    def fill(match: re.Match) -> str:
        name = match[1]
        if name not in blocks:
            return match[0]
        names.append(name)
        return f"<!-- benchmarks:{name} -->\n{blocks[name]}\n<!-- /benchmarks -->"

    filled = MARKS.sub(fill, text)
    if filled != text:
        write_whole(path, filled.encode())
    return names
