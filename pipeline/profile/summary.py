"""The summary of a run's recorded phases: the numbers and the table of `--profile`.

What happens once per process, wherever it is first needed (imports, finding, loading and compiling kernels), is taken
out of the phases around it and told apart; so is what a stage does once in its first step. So a step's phases add up
to the step as it is when everything is warm.
"""

from __future__ import annotations

from typing import Any

from stages.phases import Path, Span

ONCE = {"imports": "imports", "kernel cache": "loading compiled kernels", "compilation": "compiling kernels"}
STEP, TRACED, NETWORKS = "step", "traced step", "networks"
AT_FIRST = "initialise"  # a stage's first surface, made within its first step
DEPTH = 5  # levels of the table
LITTLE_S = 0.0005  # rows below this are left out of the table


def split_of(spans: dict[Path, Span], total_s: float) -> dict[str, Any]:
    """Return the split, ready for JSON.

    Args:
        spans: a recorder's.
        total_s: wall time of all that was recorded and of what lay between.
    Returns: total_s and other_s (outside all phases); once: seconds by key of ONCE; stages: for every stage that took
        steps, how many (traced ones, which are slower, apart), step_s, step_ms, networks_s and networks_share, the
        share of step time inside the prior's networks; networks_share over all stages; phases: path, calls, seconds.
    """
    inside: dict[Path, float] = {}
    for path, span in spans.items():
        inside[path[:-1]] = inside.get(path[:-1], 0.0) + span.seconds
    calls: dict[Path, int] = {}
    own_s: dict[Path, float] = {}
    for path, span in spans.items():
        home = _home(path)
        calls[home] = calls.get(home, 0) + span.calls
        own_s[home] = own_s.get(home, 0.0) + max(span.seconds - inside.get(path, 0.0), 0.0)
    once = dict.fromkeys(ONCE, 0.0)
    seconds: dict[Path, float] = {}
    for path, self_seconds in own_s.items():
        kinds = [name for name in path if name in ONCE]
        if kinds:
            once[kinds[-1]] += self_seconds
            continue
        for depth in range(1, len(path) + 1):
            seconds[path[:depth]] = seconds.get(path[:depth], 0.0) + self_seconds
    stages = {path[0]: _stage(path, calls, seconds) for path in seconds if len(path) == 2 and path[1] in (STEP, TRACED)}
    stepping = sum(stage["step_s"] for stage in stages.values())
    networks = sum(stage["networks_s"] for stage in stages.values())
    rank = {path: k for k, path in enumerate(calls)}
    ordered = sorted(seconds, key=lambda path: [rank[path[: k + 1]] for k in range(len(path))])
    return {
        "total_s": round(total_s, 3),
        "other_s": round(total_s - inside.get((), 0.0), 3),
        "once": {name: round(value, 3) for name, value in once.items()},
        "stages": stages,
        "networks_share": round(networks / stepping, 4) if stepping else None,
        "phases": [{"path": [*p], "calls": calls[p], "seconds": round(seconds[p], 4)} for p in ordered],
    }


def _home(path: Path) -> Path:
    """Return the group of a phase: beside the steps, not within one, for what is done once."""
    return (path[0], *path[2:]) if path[1:2] in ((STEP,), (TRACED,)) and AT_FIRST in path[2:3] else path


def _stage(path: Path, calls: dict[Path, int], seconds: dict[Path, float]) -> dict[str, Any]:
    """One stage's steps; where all were traced, the times are theirs."""
    plain, traced = (path[0], STEP), (path[0], TRACED)
    chosen = plain if plain in calls else traced
    step_s = seconds[chosen]
    networks_s = sum(s for p, s in seconds.items() if p[:2] == chosen and p[-1] == NETWORKS and NETWORKS not in p[:-1])
    return {
        "steps": calls.get(plain, 0),
        "traced_steps": calls.get(traced, 0),
        "step_s": round(step_s, 4),
        "step_ms": round(1e3 * step_s / max(calls[chosen], 1), 2),
        "networks_s": round(networks_s, 4),
        "networks_share": round(networks_s / step_s, 4) if step_s else None,
    }


def table_of(facts: dict[str, Any]) -> str:
    """Return the split as lines of text: seconds, share of the run and of its stage's steps, calls, time a call."""
    total = max(facts["total_s"], 1e-9)
    rows = [["", "seconds", "of the run", "of the steps", "calls", "ms a call"]]
    rows += [[ONCE[n], f"{s:.2f}", f"{100 * s / total:.1f} %", "", "", ""] for n, s in facts["once"].items() if s]
    steps = {tuple(row["path"]): row["seconds"] for row in facts["phases"] if len(row["path"]) == 2}
    for row in facts["phases"]:
        path, seconds = tuple(row["path"]), row["seconds"]
        if len(path) > DEPTH or seconds < LITTLE_S or (TRACED in path and path[-1] != TRACED):
            continue
        step = steps.get(path[:2], 0.0) if len(path) > 2 and path[1] == STEP else 0.0
        share = f"{100 * seconds / step:.1f} %" if step else ""
        each = f"{1e3 * seconds / row['calls']:.1f}" if row["calls"] else ""
        name = "  " * (len(path) - 1) + path[-1]
        rows.append([name, f"{seconds:.2f}", f"{100 * seconds / total:.1f} %", share, str(row["calls"]), each])
    rows.append(["everything else", f"{facts['other_s']:.2f}", f"{100 * facts['other_s'] / total:.1f} %", "", "", ""])
    rows.append(["all", f"{total:.2f}", "", "", "", ""])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([*lines, "", *_sentences(facts)])


def _line(row: list[str], widths: list[int]) -> str:
    numbers = (text.rjust(width) for text, width in zip(row[1:], widths[1:]))
    return "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()


def _sentences(facts: dict[str, Any]) -> list[str]:
    """Summarise the table in sentences."""
    stages = facts["stages"]
    if not stages:
        return ["no step was taken"]
    parts = [f"{name} {100 * stage['networks_share']:.0f} %" for name, stage in stages.items()]
    together = f", together {100 * facts['networks_share']:.0f} %" if len(stages) > 1 else ""
    sentences = [f"step time inside the prior's networks: {', '.join(parts)}{together}"]
    for name, stage in stages.items():
        if not stage["steps"]:
            sentences.append(f"{name}: all steps were traced, which slows them")
        elif stage["traced_steps"]:
            traced = f"traced steps, which are slower and left out of the shares: {stage['traced_steps']}"
            sentences.append(f"{name}: {traced}")
    return sentences
