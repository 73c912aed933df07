"""What a README holds: links, code blocks, inline code, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = [
    ROOT / name
    for name in (
        "README.md", "pipeline/README.md", "stages/README.md", "stages/pocket/README.md",
        "configs/README.md", "benchmarks/README.md",
    )
]  # fmt: skip
_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MARKS = re.compile(r"<!-- benchmarks:[\w-]+ -->.*?<!-- /benchmarks -->", re.DOTALL)


def written(page: Path) -> str:
    """The text of a page without its generated tables."""
    return _MARKS.sub("", page.read_text(encoding="utf-8"))


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return [code for kind, code in _FENCE.findall(text) if kind == language]


def inline(text: str) -> list[str]:
    """Everything between single backticks, outside fenced blocks and indented code."""
    text = _FENCE.sub("", text)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def indented(text: str) -> list[str]:
    """The lines of indented code, without the comment at their end."""
    lines = [line.strip() for line in _FENCE.sub("", text).splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+# .*$", "", line) for line in lines]


def commands(page: Path, program: str) -> list[list[str]]:
    """The words behind a program's name, of every command of a page that begins with it."""
    text = written(page)
    lines = [part.strip() for line in [*indented(text), *inline(text)] for part in line.split("&&")]
    return [shlex.split(line)[len(program.split()) :] for line in lines if f"{line} ".startswith(f"{program} ")]


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
