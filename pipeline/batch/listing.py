"""The runs of a folder as rows: of a batch, or of any folder that holds runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.batch.plan import FILE, STATES, BatchRun, read_plan, state_of
from pipeline.runs.log import read_record
from pipeline.runs.progress import Progress, duration
from stages.errors import UserError


@dataclass(frozen=True)
class Row:
    """A run and how far it is; see plan.State."""

    run: BatchRun
    folder: Path
    state: str
    seconds: float
    error: str


def rows_of(out: Path, runs: Sequence[BatchRun] | None = None) -> list[Row]:
    """Return a row for each run of a folder.

    Args:
        out: folder of runs.
        runs: those to tell of; None: all that lie there, and those that its batch has not begun.
    Raises: UserError where there is no such folder.
    """
    plan = {run["name"]: run for run in read_plan(out)["runs"]} if (out / FILE).is_file() else {}
    if runs is None:
        if not out.is_dir():
            raise UserError(f"no folder {out}", "nothing is there", "give a folder that holds runs")
        runs = [BatchRun(run["prompt"], run["seed"], name) for name, run in plan.items()]
        others = sorted(path.parent for path in out.glob("*/config.yaml") if path.parent.name not in plan)
        runs += [_found(folder) for folder in others]
    rows = []
    for run in runs:
        state = state_of(out / run.name)
        error = plan.get(run.name, {}).get("error", "")
        failed = state.state == "failed" or (state.state == "waiting" and error)
        name = "failed" if failed else state.state
        rows.append(Row(run, out / run.name, name, state.seconds, (error or state.error) if failed else ""))
    return rows


def _found(folder: Path) -> BatchRun:
    try:
        record = read_record(folder / "run.json")
    except (UserError, OSError):
        record = {}
    return BatchRun(str(record.get("prompt", "?")), record.get("seed", 0), folder.name)


def print_rows(rows: Sequence[Row], progress: Progress) -> None:
    """Print a table of runs: state, time, seed, prompt, folder or reason; then how many are in which state."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("state", "time", "seed", "prompt", "run, or what it failed of"):
        table.add_column(heading, justify="right" if heading in ("time", "seed") else "left", overflow="fold")
    for row in rows:
        last = row.error.partition("\n")[0] if row.error else row.folder.name
        time = duration(row.seconds) if row.seconds else ""
        table.add_row(row.state, time, str(row.run.seed), escape(row.run.prompt), escape(last))
    progress.console.print(table)
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    progress.note(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no runs")


def print_runs(out: Path) -> None:
    """Print the runs of a folder: `pipeline runs`."""
    print_rows(rows_of(out), Progress())
