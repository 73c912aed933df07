"""What each distillation rule and cure does to plain SDS's faults: `python -m benchmarks.quality.guidance --help`.

    python -m benchmarks.quality.guidance --seeds 2 --out runs/guidance every rule and cure, twelve prompts
    python -m benchmarks.quality.guidance --systems sds,default,sds+static  some of them, into the same folder
    python -m benchmarks.quality.guidance --table                       the table of what is there; makes nothing

Cells are benchmarks.quality's: the whole pipeline, fine stage on, resumed where they stopped; further systems and seeds
may be added to a folder later. On top of its scores each mesh is looked at by view_classifier.py. Per system:
    Janus       share of the views from behind in which a front is seen where the ground truth has none, in percent
    saturation  mean |difference| of chroma against the ground truth, in [0, 1]; brightness alike
    colour      Delta E between the mean colours of the same views, which sees a wrong hue
    R-Precision colour and textureless, in percent; step: median seconds of a step by stage, the first left out
`meets` marks what halves plain SDS's Janus and saturation error, or brings them under 5 %, over the cells where both
ended with an object, and loses no R-Precision of either kind, where a run without one scores nothing.
Rules and cures are measured one at a time on plain SDS (benchmarks/cures); recipes of configs/, which put a rule in the
place of the default recipe's, can be named as well.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import FOLDER, RESULTS, environment, read_lines
from benchmarks.markdown import markdown_table
from benchmarks.quality import quality
from benchmarks.quality.cells import Cell, load_result
from benchmarks.quality.statistics import bootstrap
from benchmarks.quality.suite import Suite, load_suite, spec_of
from benchmarks.quality.summary import interval_text, key_of, score_lines
from benchmarks.quality.systems import cures, find_system
from pipeline.output.files import write_whole
from stages.errors import UserError
from stages.paths import from_home

PROMPTS = FOLDER / "guidance_prompts.txt"
BASE = "sds"
WHOLE = (BASE, "default")
GOOD_JANUS, GOOD_SATURATION = 5.0, 0.05  # "under 5 %"
PAIRED = ("janus", "saturation", "r_colour", "r_textureless")  # what `meets` asks of
Line = dict[str, Any]

# name: (heading, digits)
COLUMNS = {
    "janus": ("Janus, % of views", 1),
    "saturation": ("saturation error", 3),
    "brightness": ("brightness error", 3),
    "colour": ("colour difference, Delta E", 1),
    "r_colour": ("R-Precision, colour, %", 1),
    "r_textureless": ("R-Precision, textureless, %", 1),
    "coarse_step": ("coarse step, s", 2),
    "fine_step": ("fine step, s", 2),
}


def measure_views(cell: Cell, out: Path) -> Line | None:
    """The Janus facts of a finished cell, from its views.json or made now; None where it has no mesh or no front.

    The classifier of the prompt's kind is trained the first time it is needed and kept in OUT/classifiers.
    """
    path, result = cell.folder(out) / "views.json", load_result(cell, out)
    if result is None or "failed" in result:
        return None
    from benchmarks.quality.view_classifier import VERSION, janus_views, load_or_train

    if path.is_file() and (known := json.loads(path.read_text())).get("classifier") == VERSION:
        return known
    from benchmarks.quality.render import Subject
    from stages.mesh.files.read import read_mesh
    from stages.pocket import world
    from stages.pocket.build import build

    spec = spec_of(cell.prompt)
    if spec is None or spec.other is not None or not world.true_front(spec.kind):
        return None
    truth = build(spec)
    mesh = truth if cell.system == "truth" else read_mesh(cell.folder(out) / "run" / "mesh.glb")
    classifier = load_or_train(spec.kind, out / "classifiers")
    facts = janus_views(classifier, Subject.of(mesh), Subject.of(truth))
    facts |= {"accuracy": classifier.accuracy, "false_fronts": classifier.false_fronts, "classifier": VERSION}
    write_whole(path, (json.dumps(facts) + "\n").encode())
    return facts


def step_seconds(run: Path) -> dict[str, float]:
    """Median seconds of a step by stage, from a run's metrics; a stage's first step may compile and is left out."""
    seconds: dict[str, list[float]] = {}
    for line in read_lines(run / "metrics.jsonl"):
        if line["step"] > 1:
            seconds.setdefault(line["stage"], []).append(line["seconds"])
    return {stage: statistics.median(values) for stage, values in seconds.items()}


def values_of(cell: Cell, out: Path, scores: dict[str, Any]) -> dict[str, float]:
    """Return a finished cell's numbers by column; nan for what it does not have. A run without an object hits nothing.

    scores: of the cell by look, as summary.score_lines makes them.
    """
    result = load_result(cell, out)
    failed = "failed" in result
    views, colour = measure_views(cell, out), result.get("colour", {})
    steps = step_seconds(cell.folder(out) / "run")

    def size(name: str) -> float:
        return math.nan if colour.get(name) is None else abs(colour[name])

    return {
        "janus": math.nan if views is None or views["share"] is None else 100 * views["share"],
        "saturation": size("saturation_error"),
        "brightness": size("brightness_error"),
        "colour": size("colour_difference"),
        "r_colour": 0.0 if failed else scores.get("colour", {}).get("hit", math.nan),
        "r_textureless": 0.0 if failed else scores.get("textureless", {}).get("hit", math.nan),
        "coarse_step": steps.get("coarse", math.nan),
        "fine_step": steps.get("fine", math.nan),
    }


def tabulate(cells: list[Cell], out: Path, suite: Suite, clip: Path) -> list[Line]:
    """One line a system: what it is, how many cells, an interval for every column, and whether it meets the goal.

    Scores are made anew from the cells' embeddings, so systems that were made on different days stand together.
    """
    cells = [cell for cell in cells if load_result(cell, out) is not None]
    scores, lines = score_lines([load_result(cell, out) for cell in cells], suite, [clip]), []
    numbers_of: dict[str, dict[tuple[str, int], dict[str, float]]] = {}
    for system in dict.fromkeys(cell.system for cell in cells):
        its_cells = [cell for cell in cells if cell.system == system]
        of = {cell: scores[key_of(load_result(cell, out))].get(clip.name, {}) for cell in its_cells}
        values = [(cell, values_of(cell, out, of[cell])) for cell in its_cells]
        numbers_of[system] = {(cell.prompt, cell.seed): numbers for cell, numbers in values}
        line: Line = {"system": system, "meaning": find_system(system).meaning, "cells": len(its_cells)}
        line["seeds"], line["prompts"] = len({c.seed for c in its_cells}), len({c.prompt for c in its_cells})
        line["failed"] = sum("failed" in load_result(cell, out) for cell in its_cells)
        for name in COLUMNS:
            by_prompt: dict[str, list[float]] = {}
            for cell, numbers in values:
                by_prompt.setdefault(cell.prompt, []).append(numbers[name])
            interval = bootstrap(by_prompt)
            line[name] = {k: round(v, 4) for k, v in interval.as_dict().items()} if interval.prompts else None
        lines.append(line)
    for line in lines:
        system, base = line["system"], numbers_of.get(BASE)
        pairs = None if base is None or system == BASE else paired(numbers_of[system], base)
        line["paired"], line["meets"] = pairs, None if pairs is None else meets(pairs)
    return lines


def paired(
    mine: dict[tuple[str, int], dict[str, float]], base: dict[tuple[str, int], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """By column, a system's and the base's means over the cells (prompt, seed) where both were measured; only those."""
    means = {}
    for name in PAIRED:
        both = [(mine[key][name], base[key][name]) for key in mine if key in base]
        both = [pair for pair in both if not any(map(math.isnan, pair))]
        if both:
            mean_mine, mean_base = (statistics.fmean(column) for column in zip(*both, strict=True))
            means[name] = {"mine": round(mean_mine, 4), "base": round(mean_base, 4), "cells": len(both)}
    return means


def meets(pairs: dict[str, dict[str, float]]) -> bool | None:
    """Whether a system halves the base's Janus and saturation error, or brings them under 5 %, at no less R-Precision;
    None where something was not measured.

    pairs: of `paired`.
    """
    if len(pairs) < len(PAIRED):
        return None
    bounds = {"janus": GOOD_JANUS, "saturation": GOOD_SATURATION}
    cured = all(pairs[name]["mine"] <= max(pairs[name]["base"] / 2, good) for name, good in bounds.items())
    return cured and all(pairs[name]["mine"] >= pairs[name]["base"] for name in ("r_colour", "r_textureless"))


def as_markdown(lines: list[Line]) -> str:
    """Return the table: mean [95 % interval] of every column."""
    rows = []
    for line in lines:
        cells = f"{line['cells']}" + (f" ({line['failed']} failed)" if line["failed"] else "")
        numbers = [interval_text(line[name], digits) for name, (_, digits) in COLUMNS.items()]
        rows.append([f"`{line['system']}`", cells, *numbers, {True: "yes", False: "no", None: "-"}[line["meets"]]])
    return markdown_table(["system", "cells", *(heading for heading, _ in COLUMNS.values()), "meets"], rows)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join((*WHOLE, *cures()))
    parser.add_argument("--systems", default=names, help=f"by commas, a recipe or YAML file each; default {names}")
    parser.add_argument("--prompts", type=from_home, default=PROMPTS, help="captions of the pocket world, one a line")
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0")
    parser.add_argument("--limit", type=int, help="only the first N prompts")
    parser.add_argument("--workers", type=int, default=1, help="cells at once")
    parser.add_argument("--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--clip", default="pocket", help="CLIPModel folders by commas; the first scores")
    parser.add_argument("--out", type=from_home, default=Path("runs/guidance"), help="folder of the cells")
    parser.add_argument("--table", action="store_true", help="only tabulate the finished cells of OUT")
    parser.add_argument("--publish", action="store_true", help=f"also write {RESULTS.name}/guidance.jsonl")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds, --workers: wanted at least 1")
    return args


def _quality_words(args: argparse.Namespace) -> list[str]:
    words = ["--systems", args.systems, "--prompts", str(args.prompts), "--seeds", str(args.seeds)]
    words += ["--workers", str(args.workers), "--clip", args.clip, "--out", str(args.out)]
    words += ["--limit", str(args.limit)] if args.limit else []
    return words + [word for option in args.options for word in ("--set", option)]


def main(arguments: list[str] | None = None) -> int:
    """Make the cells, look at them, write OUT/guidance.jsonl and OUT/guidance.md: 0 all there, 1 some broke, 2 a
    user's mistake, 130 stopped."""
    args = _arguments(arguments)
    code = 0
    if not args.table:
        code = quality.main(_quality_words(args))
        if code not in (0, 1):
            return code
    try:
        lines = report(args)
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(as_markdown(lines))
    return code


def report(args: argparse.Namespace) -> list[Line]:
    """Return the lines of what is finished in OUT, written there and, when published, to benchmarks/results."""
    suite = load_suite(str(args.prompts))
    prompts = suite.prompts[: args.limit] if args.limit else suite.prompts
    systems = args.systems.split(",")
    cells = [Cell(system, prompt, seed) for system in systems for seed in range(args.seeds) for prompt in prompts]
    clip = args.clip.split(",")[0]
    clip_folder = quality.POCKET_CLIP if clip == "pocket" else from_home(clip).absolute()
    lines = [
        line | {"suite": suite.name, "options": args.options, **environment()}
        for line in tabulate(cells, args.out, suite, clip_folder)
    ]
    if not lines:
        raise UserError(f"{args.out} holds no cell of these systems", args.systems, "run without --table")
    write_whole(args.out / "guidance.jsonl", _text(lines))
    write_whole(args.out / "guidance.md", (as_markdown(lines) + "\n").encode())
    if args.publish:
        target = RESULTS / "guidance.jsonl"
        new = {line["system"] for line in lines}
        others = [line for line in read_lines(target) if line["suite"] != suite.name or line["system"] not in new]
        write_whole(target, _text([*others, *lines]))
    return lines


def _text(lines: list[Line]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()


if __name__ == "__main__":
    raise SystemExit(main())
