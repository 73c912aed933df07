"""The same effort for every system: `--budget steps=N` or `--budget seconds=S` of benchmarks.quality.quality.

Without a budget each system takes the steps of its own recipe. A budget scales the steps of all of a system's stages by
one factor; schedules are shares of a stage and scale with it.

    steps=N     N optimisation steps in all
    seconds=S   S seconds from command to files on this machine. One run by the recipe, of the suite's first prompt,
                tells what a step costs and what is there whatever the steps (start, conversion, export); what a cell
                really took stays in its own result

The steps are settled once a suite and kept in OUT/budget.json, so that a suite that goes on asks for the same.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.environment import read_lines
from benchmarks.quality.systems import Failed, Job, find_system
from pipeline.config.model import load_config
from pipeline.output.files import write_whole
from stages.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How much of what every run may take."""

    unit: Literal["steps", "seconds"]
    amount: float

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:g}"


@dataclass(frozen=True)
class Cost:
    """What a run takes: seconds whatever its steps, and seconds a step of each stage."""

    fixed_s: float
    step_s: dict[str, float]

    def total_s(self, steps: dict[str, int]) -> float:
        return self.fixed_s + sum(n * self.step_s[stage] for stage, n in steps.items())


def read_budget(text: str) -> Budget:
    """Return a budget as typed. Raises UserError for anything but steps=N and seconds=S of positive numbers."""
    unit, _, amount = text.partition("=")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if unit not in ("steps", "seconds") or not 0 < number < float("inf"):
        raise UserError(
            f"--budget {text}", "wanted steps=N or seconds=S of a positive number", "e.g. --budget seconds=60"
        )
    return Budget(unit, number)


def own_steps(system: str, options: tuple[str, ...]) -> dict[str, int]:
    """Return a system's steps by stage as its recipe has them; empty for one that does not optimise."""
    chosen = find_system(system)
    if chosen.recipe is None:
        return {}
    config = load_config(chosen.recipe, list(options), {})
    return {stage: getattr(config, stage).steps for stage in chosen.stages or config.stages}


def cost_of(run: Path, wall_s: float) -> Cost:
    """What a finished run of `wall_s` seconds cost, by its metrics; a stage's first step counts as a usual one and what
    it took longer, for compiling and loading, as fixed."""
    seconds: dict[str, list[float]] = {}
    for line in read_lines(run / "metrics.jsonl"):
        seconds.setdefault(line["stage"], []).append(line["seconds"])
    step_s, spent = {}, 0.0
    for stage, values in seconds.items():
        first = min(values[0], statistics.median(values))
        step_s[stage] = (first + sum(values[1:])) / len(values)
        spent += first + sum(values[1:])
    return Cost(max(0.0, wall_s - spent), step_s)


def fitted_steps(system: str, steps: dict[str, int], budget: Budget, cost: Cost | None) -> dict[str, int]:
    """Return the steps by stage that use the budget up, in the recipe's proportions, at least one a stage.

    Args:
        steps: of the recipe.
        cost: of a run, asked for where the budget is in seconds.
    Raises: UserError where a run takes longer than its budget without a single step.
    """
    if budget.unit == "steps":
        factor = budget.amount / sum(steps.values())
    else:
        factor = (budget.amount - cost.fixed_s) / (cost.total_s(steps) - cost.fixed_s)
        if factor <= 0:
            raise UserError(
                f"--budget {budget} is too little for {system}",
                f"starting, converting and writing take {cost.fixed_s:.0f} s here whatever the steps",
                f"give at least seconds={cost.fixed_s + max(cost.step_s.values()) * 10:.0f}",
            )
    return shortened(steps, factor)


def shortened(steps: dict[str, int], factor: float) -> dict[str, int]:
    """Return steps by stage times a factor, at least one a stage."""
    return {stage: max(1, round(n * factor)) for stage, n in steps.items()}


def as_options(steps: dict[str, int]) -> tuple[str, ...]:
    """Return steps by stage as words for `pipeline run`."""
    return tuple(f"{stage}.steps={n}" for stage, n in steps.items())


def _trial(system: str, job: Job, steps: dict[str, int]) -> Cost:
    """What a run of a system costs, by one; one of a step before it has the kernels compiled.

    What an interrupted trial left is thrown away: the time of a resumed run is not that of a whole one.
    """
    shutil.rmtree(job.folder, ignore_errors=True)
    short = replace(job, folder=job.folder / "short", options=(*job.options, *as_options(dict.fromkeys(steps, 1))))
    short.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Failed):  # a step may leave no object
        find_system(system).make(short)
    _, facts = find_system(system).make(job)
    return cost_of(job.folder / "run", facts["wall_s"])


def options_by_system(
    budget: Budget, options: dict[str, tuple[str, ...]], prompt: str, out: Path, threads: int
) -> dict[str, tuple[str, ...]]:
    """By system, the settings STAGE.steps=N that make it use up the budget; made once, then read from OUT/budget.json.

    Args:
        options: by system, of its runs.
        prompt: what the trial run of a budget in seconds makes.
        threads: of every run.
    """
    path = out / "budget.json"
    budgets: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for system, words in options.items():
        steps = own_steps(system, words)
        if system in budgets or not steps:
            continue
        cost = None
        if budget.unit == "seconds":
            print(f"{system:>10}  a run by its recipe, to see what its steps take", flush=True)
            cost = _trial(system, Job(prompt, 0, out / "trials" / Path(system).stem, threads, words), steps)
        fitted = fitted_steps(system, steps, budget, cost)
        budgets[system] = {"steps": fitted, "recipe": steps, "budget": str(budget)}
        budgets[system] |= {} if cost is None else {"fixed_s": round(cost.fixed_s, 2), "step_s": cost.step_s}
        write_whole(path, (json.dumps(budgets, indent=1) + "\n").encode())
    return {system: as_options(budgets.get(system, {"steps": {}})["steps"]) for system in options}
