"""What a change did, cell by cell: `python -m benchmarks.quality.compare BEFORE AFTER`.

    python -m benchmarks.quality.compare git:HEAD~3 runs/quality       a published suite against a new run of it
    python -m benchmarks.quality.compare git:a1b2c3d git:HEAD --suite main_job_prompts --publish speed

BEFORE and AFTER are a suite's folder, a file of result lines, or git:REVISION for what was published then. Only cells
that both have count; a difference is after minus before, its interval and p-value from the prompts as everywhere
(benchmarks/quality/statistics.py). `--publish NAME` keeps the table in results/compare_NAME.json, for the README.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, read_lines
from benchmarks.markdown import markdown_table, origin_of
from benchmarks.quality.statistics import bootstrap, compare
from benchmarks.quality.summary import METRICS, cell_values, interval_text, key_of, paired_values
from pipeline.output.files import write_whole
from stages.errors import UserError

SHOWN = (
    "r_precision_colour", "r_precision_textureless", "clip_colour", "colour_difference", "chamfer", "volume_iou",
    "janus", "solid", "wall_s", "memory_mb",
)  # fmt: skip
SCORES = ("r_precision_colour", "r_precision_textureless", "clip_colour")
Line = dict[str, Any]


def read_cells(source: str, suite: str | None = None) -> list[Line]:
    """Return result lines with their `scores`. Raises UserError where there are none."""
    path = Path(source)
    if source.startswith("git:"):
        lines = _published(source.removeprefix("git:"))
    elif path.is_dir():
        summary = path / "summary.json"
        scores = json.loads(summary.read_text())["scores"] if summary.exists() else {}
        lines = [line | {"scores": scores.get(key_of(line), {})} for line in read_lines(path / "results.jsonl")]
    else:
        lines = read_lines(path)
    lines = [line for line in lines if suite in (None, line["suite"])]
    if not lines:
        which = f"of the suite {suite}" if suite else "of a suite"
        fix = "name a suite's folder, a file of lines or git:REVISION"
        raise UserError(f"no results in {source}", f"there are no lines {which}", fix)
    return lines


def _published(revision: str) -> list[Line]:
    name = f"{revision}:benchmarks/results/quality.jsonl"
    process = subprocess.run(["git", "show", name], cwd=RESULTS, capture_output=True, text=True)
    if process.returncode:
        why = (process.stderr.strip().splitlines()[-1:] or ["git said nothing"])[0]
        raise UserError(f"cannot read {name}", why, "name a revision that has it; git log -- benchmarks/results")
    return [json.loads(line) for line in process.stdout.splitlines() if line.strip()]


def compare_cells(before: list[Line], after: list[Line], systems: list[str] | None = None) -> dict[str, Any]:
    """By system and metric: means with intervals before and after, and the paired difference; JSON-ready."""
    systems_found: dict[str, Any] = {}
    shared: tuple[list[Line], list[Line]] = ([], [])
    for system in dict.fromkeys(line["system"] for line in after):
        if systems and system not in systems:
            continue
        sides = [[line for line in lines if line["system"] == system] for lines in (before, after)]
        common = {key_of(line) for line in sides[0]} & {key_of(line) for line in sides[1]}
        sides = [[line for line in side if key_of(line) in common] for side in sides]
        if common:
            systems_found[system] = {"cells": len(common), "metrics": _metrics(*sides)}
            for total, lines in zip(shared, sides, strict=True):
                total.extend(lines)
    origins = {name: origin_of(lines) for name, lines in zip(("before", "after"), shared, strict=True) if lines}
    return origins | {"systems": systems_found}


def _of_one_suite(before: list[Line], after: list[Line]) -> list[list[Line]]:
    """Both sides' lines of the suite that both have. Raises UserError where there are more, which may share prompts."""
    common = sorted({line["suite"] for line in before} & {line["suite"] for line in after})
    if len(common) > 1:
        raise UserError("more than one suite to compare", f"both sides have {', '.join(common)}", "add --suite NAME")
    return [[line for line in lines if line["suite"] in common] for lines in (before, after)]


def _metrics(before: list[Line], after: list[Line]) -> dict[str, Any]:
    # The first CLIP that judged every object of both sides; without one, there are no scores to compare.
    judged = [line.get("scores", {}) for line in (*before, *after) if "failed" not in line]
    clip = next((name for name in judged[0] if all(name in other for other in judged)), None) if judged else None
    rows = {}
    for name in SHOWN:
        if clip is None and name in SCORES:
            continue
        values = []
        for lines in (before, after):
            scores = {key_of(line): line.get("scores", {}).get(clip, {}) for line in lines}
            values.append(cell_values(lines, scores, name))
        old, new = paired_values(*values)
        change = compare(new, old)
        if change.difference.prompts:
            rows[name] = {
                "before": bootstrap(old).as_dict(),
                "after": bootstrap(new).as_dict(),
                "difference": change.difference.as_dict(),
                "p_value": round(change.p_value, 5),
            }
    return rows


def compare_markdown(comparison: dict[str, Any]) -> str:
    """Return the table, and where its two sides come from."""
    rows = []
    for system, facts in comparison["systems"].items():
        for name, row in facts["metrics"].items():
            digits = METRICS[name].digits
            sides = [interval_text(row[side], digits) for side in ("before", "after", "difference")]
            rows.append([system, METRICS[name].label, *sides, f"{row['p_value']:.3f}"])
    cells = ", ".join(f"{name} {facts['cells']}" for name, facts in comparison["systems"].items())
    head = ["system", "measure", "before", "after", "difference", "p"]
    return (
        f"{markdown_table(head, rows)}\n\nThe same cells on both sides ({cells}); differences are paired, with 95 % "
        "bootstrap intervals. The sides were run at different times: interval and p of times do not hold "
        f"what else the machine did. Before: {comparison['before']}. After: {comparison['after']}."
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--suite", help="only lines of this suite")
    parser.add_argument("--systems", help="by commas (default: all of them)")
    parser.add_argument("--publish", metavar="NAME", help=f"also keep it in {RESULTS.name}/compare_NAME.json")
    args = parser.parse_args(arguments)
    try:
        sides = _of_one_suite(*(read_cells(source, args.suite) for source in (args.before, args.after)))
        comparison = compare_cells(*sides, args.systems.split(",") if args.systems else None)
        if not comparison["systems"]:
            raise UserError("nothing to compare", "no cell is in both", "give two runs of the same prompts and seeds")
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}", file=sys.stderr)
        return 2
    if args.publish:
        write_whole(RESULTS / f"compare_{args.publish}.json", (json.dumps(comparison, indent=1) + "\n").encode())
    print(compare_markdown(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())
