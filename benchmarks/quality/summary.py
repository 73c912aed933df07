"""From the cells' results to the numbers that are reported: scores under every CLIP, intervals, comparisons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import metrics
from benchmarks.quality.distribution import distance
from benchmarks.quality.statistics import bootstrap, compare
from benchmarks.quality.suite import Suite

LOOKS = ("colour", "textureless")
Line = dict[str, Any]
CellValues = dict[tuple[str, int], float]  # by prompt and seed


@dataclass(frozen=True)
class Metric:
    """One column of the tables.

    better: +1 more is better, -1 less is better, 0 neither. scale: what the value is multiplied by for display.
    value: of a cell's line and its scores under the first CLIP; None where it was not measured.
    failed: what a run without an object counts as; None leaves it out.
    """

    label: str
    better: int
    value: Callable[[Line, dict], float | None]
    failed: float | None = None
    digits: int = 1


def _score(look: str, name: str) -> Callable[[Line, dict], float | None]:
    return lambda line, scores: scores.get(look, {}).get(name)


def _at(*keys: str, scale: float = 1.0) -> Callable[[Line, dict], float | None]:
    def value(line: Line, scores: dict) -> float | None:
        entry: Any = line
        for key in keys:
            entry = None if entry is None else entry.get(key)
        return None if entry is None else scale * float(entry)

    return value


def _size(*keys: str) -> Callable[[Line, dict], float | None]:
    get = _at(*keys)
    return lambda line, scores: None if (v := get(line, scores)) is None else abs(v)


def _energy_kj(line: Line, scores: dict) -> float | None:
    """What a run took by the machine's counters, processors and GPUs together."""
    joules = line.get("cost", {}).get("energy_j")
    return sum(joules.values()) / 1000 if joules else None


def _wall_s(line: Line, scores: dict) -> float | None:
    """Seconds of a run from command to files; not of one that was interrupted, whose earlier sessions are not in it."""
    cost = line.get("cost", {})
    return None if cost.get("interrupted") else cost.get("wall_s")


METRICS: dict[str, Metric] = {
    "r_precision_colour": Metric("R-Precision, colour, %", 1, _score("colour", "hit"), 0.0),
    "r_precision_textureless": Metric("R-Precision, textureless, %", 1, _score("textureless", "hit"), 0.0),
    "clip_colour": Metric("CLIP score, colour", 1, _score("colour", "score")),
    "clip_textureless": Metric("CLIP score, textureless", 1, _score("textureless", "score")),
    "janus": Metric("two-faced, %", -1, _at("janus", "two_faced", scale=100.0), digits=0),
    "saturation_error": Metric("saturation error", -1, _size("colour", "saturation_error"), digits=3),
    "brightness_error": Metric("brightness error", -1, _size("colour", "brightness_error"), digits=3),
    "colour_difference": Metric("colour difference, Delta E", -1, _at("colour", "colour_difference")),
    "detail_ratio": Metric("detail / truth", 0, _at("colour", "detail_ratio"), digits=2),
    "picture_psnr": Metric("picture error, PSNR, dB", 1, _at("picture", "psnr")),
    "picture_edges": Metric("edges as the truth's, %", 1, _at("picture", "edges", scale=100.0), 0.0),
    "picture_normals": Metric("normals' error, degrees", -1, _at("picture", "normal_deg")),
    "chamfer": Metric("Chamfer, % of diagonal", -1, _at("geometry", "chamfer", scale=100.0), digits=2),
    "normal_consistency": Metric("normal consistency", 1, _at("geometry", "normal_consistency"), 0.0, 3),
    "f_score": Metric("F-score at 2 %", 1, _at("geometry", "f_score", scale=100.0), 0.0),
    "volume_iou": Metric("volume IoU", 1, _at("geometry", "volume_iou"), 0.0, 3),
    "solid": Metric("closed and manifold, %", 1, _at("mesh", "solid", scale=100.0), 0.0, 0),
    "components": Metric("components", 0, _at("mesh", "components")),
    "faces": Metric("faces", 0, _at("mesh", "faces"), digits=0),
    "self_intersections": Metric("self-intersections", -1, _at("mesh", "self_intersections")),
    "uv_stretch": Metric("UV stretch", -1, _at("mesh", "uv_stretch"), digits=2),
    "uv_collapsed": Metric("surface without texture, %", -1, _at("mesh", "uv_collapsed", scale=100.0), digits=2),
    "wall_s": Metric("time, s", -1, _wall_s, digits=0),
    "energy_kj": Metric("energy, kJ", -1, _energy_kj),
    "memory_mb": Metric("peak memory, MB", -1, _at("cost", "peak_memory_mb"), digits=0),
}
COMPARED = (
    "r_precision_colour",
    "r_precision_textureless",
    "clip_colour",
    "clip_textureless",
    "picture_psnr",
    "picture_edges",
    "picture_normals",
    "chamfer",
    "normal_consistency",
    "f_score",
    "volume_iou",
    "saturation_error",
    "brightness_error",
    "colour_difference",
    "wall_s",
)


def key_of(line: Line) -> str:
    return f"{line['system']}|{line['prompt']}|{line['seed']}"


def score_lines(
    lines: list[Line], suite: Suite, clips: list[Path]
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By cell, CLIP and look: score (100 cos with the own caption), hit (percent, ties shared) and rank."""
    from stages.guidance.clip import ClipScorer

    scores: dict[str, dict] = {key_of(line): {} for line in lines}
    present = [line for line in lines if "clip" in line]
    for clip in clips:
        scorer = ClipScorer(clip)
        for look in LOOKS:
            texts = suite.candidates(look)
            embedded = scorer.embed_texts(texts).cpu()
            known = [line for line in present if scorer.name in line["clip"]]
            if not known:
                continue
            images = torch.tensor([line["clip"][scorer.name][look] for line in known])
            truth = metrics.truth_of([line["prompt"] for line in known], texts, look == "textureless")
            cosines = images @ embedded.T
            hit, rank = metrics.hits(cosines, truth), metrics.ranks(cosines, truth)
            for k, line in enumerate(known):
                scores[key_of(line)].setdefault(scorer.name, {})[look] = {
                    "score": round(100 * float(cosines[k, truth[k]]), 3),
                    "hit": round(100 * float(hit[k]), 2),
                    "rank": float(rank[k]),
                }
    return scores


def cell_values(lines: list[Line], scores: dict[str, dict], name: str, clip: str = "") -> CellValues:
    """One metric of one system's lines: by prompt and seed, nan where it has none.

    Args:
        scores: of each cell under the CLIP of that name. A run that it guided has none, not even for having failed.
    """
    metric, values = METRICS[name], {}
    for line in lines:
        value = metric.failed if "failed" in line else metric.value(line, scores.get(key_of(line), {}))
        if "failed" in line and clip in line.get("guided_by", ()):
            value = None
        values[line["prompt"], line["seed"]] = math.nan if value is None else value
    return values


def values_of(lines: list[Line], scores: dict[str, dict], name: str, clip: str = "") -> dict[str, list[float]]:
    """Return one metric of one system's lines by prompt, a number a seed."""
    return _by_prompt(cell_values(lines, scores, name, clip))


def paired_values(a: CellValues, b: CellValues) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Both sides by prompt, a number a seed, without the cells that only one of them has a finite number for.

    A system that fails on its hard seeds would else be compared by its easy ones. Seeds that one side never ran stay.
    """
    one_sided = {key for key in a.keys() & b.keys() if math.isfinite(a[key]) != math.isfinite(b[key])}
    return tuple(_by_prompt({key: v for key, v in side.items() if key not in one_sided}) for side in (a, b))


def _by_prompt(values: CellValues) -> dict[str, list[float]]:
    by_prompt: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        by_prompt.setdefault(prompt, []).append(value)
    return by_prompt


def summarise(lines: list[Line], suite: Suite, clips: list[Path]) -> dict[str, Any]:
    """Return the whole summary, JSON-ready.

    Returns: suite facts, where it ran, `systems` with an interval for every metric and group of prompts, `clips` with
        R-Precision under every CLIP, `comparisons` of every pair of systems, `distribution` of every system's objects
        together against the truth's, and `scores` by cell.
    """
    by_clip = score_lines(lines, suite, clips)
    names = [clip.name for clip in clips]
    first = {key: by_name.get(names[0], {}) for key, by_name in by_clip.items()}
    systems = list(dict.fromkeys(line["system"] for line in lines))
    of = {s: [line for line in lines if line["system"] == s] for s in systems}
    summary: dict[str, Any] = {
        "suite": suite.name,
        "prompts": {name: len(group) for name, group in suite.groups.items()},
        "candidates": {look: len(suite.candidates(look)) for look in LOOKS},
        "clips": names,
        "dates": sorted({line["date"][:10] for line in lines}),
        "revisions": sorted({str(line["git"]) for line in lines}),
        "machines": sorted({f"{line['cores']} cores, {line['cpu']}, {line['device']}" for line in lines}),
        "versions": lines[0]["versions"] if lines else {},
        "options": [o for o in lines[0]["options"] if all(o in line["options"] for line in lines)] if lines else [],
        "systems": {},
        "by_clip": {},
        "comparisons": [],
        "distribution": {} if "truth" not in of else _distances(of, names[0]),
        "scores": by_clip,
    }
    groups = {"all": suite.prompts} | (suite.groups if len(suite.groups) > 1 else {})
    for system in systems:
        facts: dict[str, Any] = {
            "cells": len(of[system]),
            "seeds": len({line["seed"] for line in of[system]}),
            "failed": sum("failed" in line for line in of[system]),
            "steps": _steps_of(of[system]),
            "times": _times_of(of[system]),
        }
        for group, prompts in groups.items():
            chosen = [line for line in of[system] if line["prompt"] in prompts]
            intervals = {name: _interval(values_of(chosen, first, name, names[0])) for name in METRICS}
            facts[group] = {name: interval for name, interval in intervals.items() if interval is not None}
        summary["systems"][system] = facts
        for clip in names:
            scores = {key: by_name.get(clip, {}) for key, by_name in by_clip.items()}
            summary["by_clip"].setdefault(clip, {})[system] = {
                name: _interval(values_of(of[system], scores, name, clip)) for name in list(METRICS)[:4]
            }
    for a, b in itertools.combinations(systems, 2):
        for name in COMPARED:
            result = _compare(of[a], of[b], first, name, names[0])
            if result is not None:
                summary["comparisons"].append({"a": a, "b": b, "metric": name, **result})
    return summary


def _distances(of: dict[str, list[Line]], clip: str) -> dict[str, dict[str, dict[str, float]]]:
    """By system and look: how far its objects together are from the truth's, as one CLIP sees them."""
    facts: dict[str, dict[str, dict[str, float]]] = {}
    for system in (name for name in of if name != "truth"):
        for look in LOOKS:
            interval = distance(*(_embeddings(of[name], clip, look) for name in (system, "truth")))
            if interval.prompts >= 3:
                facts.setdefault(system, {})[look] = {k: round(v, 3) for k, v in interval.as_dict().items()}
    return facts


def _embeddings(lines: list[Line], clip: str, look: str) -> dict[str, np.ndarray]:
    """Unit embeddings [seeds, D] by prompt, of the cells that a CLIP has seen."""
    rows: dict[str, list[list[float]]] = {}
    for line in lines:
        if clip in line.get("clip", {}):
            rows.setdefault(line["prompt"], []).append(line["clip"][clip][look])
    return {prompt: np.array(row) for prompt, row in rows.items()}


def _steps_of(lines: list[Line]) -> dict[str, int]:
    """A system's steps by stage, of its first run that ended with an object."""
    stages = next((line["cost"]["stages"] for line in lines if line.get("cost", {}).get("stages")), {})
    return {name: facts["steps"] for name, facts in stages.items()}


def _times_of(lines: list[Line]) -> dict[str, dict[str, Any]]:
    """By stage, means over a system's runs: seconds, steps a second, and seconds by phase; `export` has only phases."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        cost = line.get("cost", {})
        for name, facts in (cost.get("stages") or {}).items():
            stages.setdefault(name, []).append(facts)
        if cost.get("export"):
            stages.setdefault("export", []).append({"phases": cost["export"]})
    times = {}
    for name, runs in stages.items():
        phases = list(dict.fromkeys(phase for facts in runs for phase in facts["phases"]))
        times[name] = {
            "seconds": _mean(facts.get("seconds", sum(facts["phases"].values())) for facts in runs),
            "steps_per_s": _mean(facts["steps_per_s"] for facts in runs if facts.get("steps_per_s")),
            "phases": {phase: _mean(facts["phases"].get(phase, 0.0) for facts in runs) for phase in phases},
        }
    return times


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return round(sum(numbers) / len(numbers), 3) if numbers else None


def _interval(values: dict[str, list[float]]) -> dict[str, float] | None:
    interval = bootstrap(values)
    return {k: round(v, 5) for k, v in interval.as_dict().items()} if interval.prompts else None


def _compare(a: list[Line], b: list[Line], scores: dict, name: str, clip: str) -> dict[str, Any] | None:
    """a against b, a win being the better value."""
    values = paired_values(*(cell_values(lines, scores, name, clip) for lines in (a, b)))
    sign = METRICS[name].better
    signed = [{p: [sign * v for v in row] for p, row in v.items()} for v in values]
    comparison = compare(*signed)
    if not comparison.difference.prompts:
        return None
    facts = asdict(comparison)
    d = comparison.difference
    low, high = sorted((sign * d.low, sign * d.high))
    facts["difference"] = {"mean": round(sign * d.mean, 5), "low": round(low, 5), "high": round(high, 5)}
    facts["prompts"] = d.prompts
    facts["p_value"], facts["p_sign"] = round(comparison.p_value, 5), round(comparison.p_sign, 5)
    return facts


def interval_text(interval: dict[str, float] | None, digits: int) -> str:
    """mean [low, high], or the mean alone where all resamples agree, or a dash."""
    if interval is None:
        return "-"
    mean, low, high = (f"{interval[k]:.{digits}f}" for k in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def as_text(summary: dict[str, Any], chosen: tuple[str, ...] = (*tuple(METRICS)[:4], "chamfer", "wall_s")) -> str:
    """Return a small table for the terminal."""
    rows = [["system", "cells", *(METRICS[name].label for name in chosen)]]
    for system, facts in summary["systems"].items():
        cells = f"{facts['cells']}" + (f" ({facts['failed']} failed)" if facts["failed"] else "")
        rows.append([system, cells, *(interval_text(facts["all"].get(n), METRICS[n].digits) for n in chosen)])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)
