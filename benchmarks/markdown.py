"""The pieces that Markdown tables are made of."""

from __future__ import annotations


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(dates: list[str], revisions: list[str]) -> str:
    """Where numbers come from, in a few words; a revision is ten digits of it, and whether the tree differed."""
    short = sorted({r[:10] + ("-dirty" if r.endswith("-dirty") else "") for r in revisions})
    return f"{', '.join(dates)}, revision {', '.join(short)}"
