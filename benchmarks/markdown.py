"""The pieces that Markdown tables are made of."""

from __future__ import annotations

from typing import Any


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table with its first column to the left and the others to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(dates: list[str], revisions: list[str]) -> str:
    """Where numbers come from, in a few words; a revision is ten digits of it, and whether the tree differed."""
    short = sorted({r[:10] + ("-dirty" if r.endswith("-dirty") else "") for r in revisions})
    return f"{', '.join(dates)}, revision {', '.join(short)}"


def origin_of(lines: list[dict[str, Any]]) -> str:
    """`origin` of result lines, by their `date` and `git`."""
    return origin(sorted({line["date"][:10] for line in lines}), [str(line["git"]) for line in lines])
