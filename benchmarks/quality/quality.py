"""Compare systems on the same prompts and seeds: `python -m benchmarks.quality --help`.

    python -m benchmarks.quality                                   the pocket suite, every system, two seeds
    python -m benchmarks.quality --quick                           four prompts, one seed, shortened runs
    python -m benchmarks.quality --prompts benchmarks/main_job_prompts.txt --systems coarse,magic3d --seeds 1
    python -m benchmarks.quality --budget seconds=60               every system gets a minute a mesh
    python -m benchmarks.quality --prompts coco.txt --prior SD15 --clip CLIP-B32,CLIP-L14

A cell is one system's mesh of one prompt and seed: OUT/cells/<system>/<prompt>-s<seed>/ with the run, mesh.glb's
pictures and result.json, written last and whole. A stopped suite started again keeps its finished cells and resumes
the pipeline runs of the others; `--workers N` makes N prompts' cells at once, in N processes,
with `--engine ray` those of a Ray cluster.
At the end OUT/results.jsonl holds a line for every cell and OUT/summary.json what benchmarks.report shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, read_lines
from benchmarks.quality.budget import as_options, options_by_system, own_steps, read_budget, shortened
from benchmarks.quality.cells import cells_of, load_result
from benchmarks.quality.judges import check_judges, fingerprint
from benchmarks.quality.suite import Suite, load_suite, spec_of
from benchmarks.quality.systems import SYSTEMS, find_system
from benchmarks.quality.workers import run_cells
from pipeline.batch.engine import ENGINES
from pipeline.config.model import load_config
from pipeline.output.files import write_whole
from pipeline.priors.sources import parse_source
from stages.errors import UserError
from stages.paths import from_home
from stages.pocket import world

POCKET_CLIP = Path(world.__file__).parent / "weights" / "clip"
DEFAULT_SYSTEMS = ("coarse", "magic3d", "sphere", "reference", "truth", "floor")
REAL_SYSTEMS = ("stable-diffusion:coarse", "stable-diffusion", "floor")  # with --prior
QUICK_SHARE = 0.6  # of every recipe's steps in --quick; at 0.3 the reference recipe has no object yet


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = "; ".join(f"{name}: {system.meaning}" for name, system in SYSTEMS.items())
    parser.add_argument(
        "--systems",
        help=f"by commas. {names}; or a recipe or YAML file, RECIPE:coarse for its coarse stage alone "
        f"(default {','.join(DEFAULT_SYSTEMS)}; with --prior {','.join(REAL_SYSTEMS)})",
    )
    parser.add_argument("--prompts", default="pocket", help="pocket, or a file with one caption a line")
    parser.add_argument("--distractors", type=from_home, help="file of further candidate captions")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default 2; quick 1)")
    parser.add_argument("--clip", default="pocket", help="CLIPModel folders by commas; pocket is the built-in one")
    parser.add_argument("--prior", help="diffusers folder or hub id for both stages, or COARSE,FINE (pocket)")
    parser.add_argument(
        "--set",
        dest="options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of every pipeline run, repeatable",
    )
    parser.add_argument("--budget", help="steps=N or seconds=S, the same for every system (default: each its recipe's)")
    parser.add_argument("--quick", action="store_true", help=f"four prompts, one seed, {QUICK_SHARE:g} of the steps")
    parser.add_argument("--limit", type=int, help="only the first N prompts")
    parser.add_argument("--workers", type=int, default=1, help="cells at once; more than one: a single thread each")
    parser.add_argument("--engine", default="local", choices=ENGINES, help="processes here, or a Ray cluster's")
    parser.add_argument("--address", help="of a Ray cluster (default: $RAY_ADDRESS, else one on this machine)")
    parser.add_argument(
        "--no-take-over",
        dest="take_over",
        action="store_false",
        help="a two-stage system makes its own coarse stage, although the coarse cell's is the same",
    )
    parser.add_argument("--out", type=from_home, default=Path("runs/quality"), help="folder of the cells")
    parser.add_argument("--publish", action="store_true", help=f"also add the lines to {RESULTS.name}/quality.jsonl")
    parser.add_argument("--name", help="what the results are published as (default: pocket, or the captions' file)")
    args = parser.parse_args(arguments)
    if args.workers < 1 or (args.seeds is not None and args.seeds < 1):
        parser.error("--workers, --seeds: wanted at least 1")
    if args.publish and (args.quick or args.limit):
        parser.error("--publish: a part of a suite would take the place of the whole")
    args.seeds = args.seeds or (1 if args.quick else 2)
    args.threads = 1 if args.workers > 1 else 0
    args.clip = [POCKET_CLIP if c == "pocket" else from_home(c).absolute() for c in args.clip.split(",")]
    args.prior = None if args.prior in (None, "pocket") else args.prior
    args.take_over = args.take_over and not args.budget  # a two-stage system's coarse stage is shorter then
    args.out = args.out.absolute()
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run a suite: 0 all cells have results, 1 some broke, 2 a user's mistake."""
    args = _arguments(arguments)
    try:
        return run_suite(args)
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def run_suite(args: argparse.Namespace) -> int:
    """All cells, then their lines and the summary."""
    from benchmarks.quality.summary import as_text, summarise

    suite = load_suite(args.prompts, args.distractors, args.quick)
    if args.limit:
        groups = {name: [p for p in group if p in suite.prompts[: args.limit]] for name, group in suite.groups.items()}
        others = suite.distractors + suite.prompts[args.limit :]
        suite = Suite(suite.name, {k: g for k, g in groups.items() if g}, others, suite.distractors_textureless)
    suite = replace(suite, name=args.name or suite.name)
    budget = read_budget(args.budget) if args.budget else None
    if budget is not None:
        suite = replace(suite, name=f"{suite.name} {budget}".replace("=", "-").replace(" ", "-"))
    systems = choose_systems(args.systems, suite, args.prior is not None)
    for clip in args.clip:
        if not clip.is_dir():
            raise UserError(f"no such CLIP: {clip}", "--clip names it", "give a CLIPModel folder, or pocket")
    options = {name: (*prior_words(name, args.prior), *args.options) for name in systems}
    check_judges({name: find_system(name).recipe for name in systems}, args.clip, options)
    _check_same(args, suite, options)
    shares: dict[str, tuple[str, ...]] = {}
    if budget is not None:
        shares = options_by_system(budget, options, suite.prompts[0], args.out, args.threads)
    elif args.quick:
        shares = {name: as_options(shortened(own_steps(name, words), QUICK_SHARE)) for name, words in options.items()}
    args.words = {name: (*words, *shares.get(name, ())) for name, words in options.items()}
    cells = cells_of(suite, systems, args.seeds)
    broken = run_cells(cells, args)
    lines = [line | {"suite": suite.name} for cell in cells if (line := load_result(cell, args.out)) is not None]
    write_whole(args.out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    summary = summarise(lines, suite, args.clip)
    write_whole(args.out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    if args.publish:
        _publish(lines, summary)
    print(as_text(summary))
    for cell in broken:
        print(
            f"broken: {cell.system}, {cell.prompt}, seed {cell.seed}: {cell.folder(args.out)}",
            file=sys.stderr,
        )
    return 1 if broken else 0


def choose_systems(names_text: str | None, suite: Suite, foreign: bool) -> list[str]:
    """The systems to run: those asked for by commas, or the default ones that these prompts and this prior allow.

    Args:
        foreign: whether --prior names another prior than pocket.
    Raises: UserError for one unknown, without the ground truth it needs, or with a recipe made for the pocket prior.
    """
    alien = next((prompt for prompt in suite.prompts if spec_of(prompt) is None), None)
    if names_text is None:
        chosen = REAL_SYSTEMS if foreign else DEFAULT_SYSTEMS
        return [name for name in chosen if alien is None or not find_system(name).needs_truth]
    names = list(dict.fromkeys(names_text.split(",")))
    for name in names:
        system = find_system(name)
        if alien is not None and system.needs_truth:
            raise UserError(
                f"no ground truth for {alien!r}, which {name} is made from",
                "only captions of the pocket world have one",
                f"leave {name} out of --systems",
            )
        if foreign and "pocket" in _sources(name).values():
            raise UserError(
                f"{name} runs the recipe {system.recipe}, which --prior cannot take from the pocket prior",
                "its steps, scale and thresholds were chosen for that prior and say nothing of another",
                f"name a recipe for yours: --systems {','.join(REAL_SYSTEMS)}, or a YAML file that sets prior.coarse "
                "and prior.fine",
            )
    return names


def prior_words(system: str, prior: str | None) -> tuple[str, ...]:
    """--prior as settings of a system's runs: of the stages whose recipe asks a diffusion model, which a LoRA could
    change. The exact prior of the upper bound stays, and so does a CLIP that guides."""
    if prior is None:
        return ()
    coarse, _, fine = prior.partition(",")
    chosen = {"coarse": coarse, "points": coarse, "fine": fine or coarse}  # clip-mesh's stage knows no diffusion model
    return tuple(
        f"prior.{stage}={chosen[stage]}"
        for stage, source in _sources(system).items()
        if parse_source(source).takes_lora
    )


def _sources(system: str) -> dict[str, str]:
    """What guides each of a system's stages, by its recipe alone; nothing for a system without one."""
    chosen = find_system(system)
    if chosen.recipe is None:
        return {}
    config = load_config(chosen.recipe, [], {})
    return {stage: getattr(config.prior, stage) for stage in chosen.stages or config.stages}


def _check_same(args: argparse.Namespace, suite: Suite, options: dict[str, tuple[str, ...]]) -> None:
    """Refuse to mix cells of other options, CLIPs or recipes in one folder."""
    path = args.out / "suite.json"
    recipes = {name: digest for name in options if (digest := _recipe_digest(name, options[name]))}
    effort = args.budget or ("quick" if args.quick else None)
    clips = [f"{clip.name} {fingerprint(clip)[:12]}" for clip in args.clip]  # many folders are called clip
    now = {"options": args.options, "prior": args.prior, "budget": effort, "clips": clips}
    if path.is_file():
        before = json.loads(path.read_text())
        if any(before.get(k) != v for k, v in now.items()):
            raise UserError(f"{args.out} holds another suite", f"its settings were {before}", "choose another --out")
        earlier = before.get("recipes", {})
        if changed := [name for name in recipes if earlier.get(name, recipes[name]) != recipes[name]]:
            raise UserError(
                f"{args.out} holds cells of other recipes",
                f"the settings of {', '.join(changed)} have changed since",
                "choose another --out",
            )
        recipes = earlier | recipes
    facts = now | {"suite": suite.name, "prompts": args.prompts, "recipes": recipes}
    write_whole(path, (json.dumps(facts) + "\n").encode())


def _recipe_digest(system: str, options: tuple[str, ...]) -> str | None:
    """A short digest of all settings that a system's runs have; None for one without a run."""
    recipe = find_system(system).recipe
    if recipe is None:
        return None
    return hashlib.sha256(load_config(recipe, list(options), {}).model_dump_json().encode()).hexdigest()[:16]


def _publish(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Replace this suite's lines in results/quality.jsonl and its summary in results/quality_<suite>.json."""
    from benchmarks.quality.summary import key_of

    path = RESULTS / "quality.jsonl"
    others = [line for line in read_lines(path) if line["suite"] != summary["suite"]]
    bare = [
        {k: v for k, v in line.items() if k != "clip"} | {"scores": summary["scores"][key_of(line)]} for line in lines
    ]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in [*others, *bare]).encode())
    short = {k: v for k, v in summary.items() if k != "scores"}
    write_whole(RESULTS / f"quality_{summary['suite']}.json", (json.dumps(short, indent=1) + "\n").encode())
