"""The runs of a batch: a prompt and a seed each, where each lies, and how far it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.output.files import write_whole
from pipeline.runs.folder import in_use
from pipeline.runs.log import UNFINISHED, read_record
from stages.errors import UserError

FILE = "batch.json"
STATES = ("done", "failed", "running", "waiting")


@dataclass(frozen=True)
class BatchRun:
    """One run of a batch."""

    prompt: str
    seed: int
    name: str  # of its folder


@dataclass(frozen=True)
class State:
    """How far a run is.

    Args:
        state: done, failed, running, or waiting for a worker.
        seconds: that its stages and its export took so far.
        error: what it failed of, as the user is told; empty otherwise.
    """

    state: str
    seconds: float = 0.0
    error: str = ""


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, one a line, each once; empty lines and those that begin with # are left out.

    Raises: UserError for a file that cannot be read, is no text, or holds no prompt.
    """
    fix = "give a text file with one prompt a line"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the prompts {path}", f"it is no UTF-8 text: {error.reason}", fix) from None
    except OSError as error:
        raise UserError(f"cannot read the prompts {path}", error.strerror or str(error), fix) from None
    if "\0" in text:
        raise UserError(f"cannot read the prompts {path}", "it holds bytes that are no text", fix)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise UserError(f"no prompt in {path}", "every line is empty or begins with #", fix)
    return prompts


def plan_runs(prompts: Sequence[str], seeds: int) -> list[BatchRun]:
    """Return a run for each prompt and seed from 0; all prompts of a seed come before the next seed."""
    return [BatchRun(prompt, seed, f"{_slug(prompt)}-{seed}") for seed in range(seeds) for prompt in prompts]


def _slug(text: str) -> str:
    """A folder's name for any text; two texts never share one."""
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if slug == text.replace(" ", "-") and len(slug) <= 60:
        return slug
    return f"{slug[:50]}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")


def state_of(folder: Path) -> State:
    """Return how far the run in a folder is, by its record and its lock."""
    if not (folder / "run.json").is_file():
        return State("running" if in_use(folder) else "waiting")
    try:
        record = read_record(folder / "run.json")
    except UserError as error:
        return State("failed", error=f"{error.what}: {error.why}")
    export = record.get("export", {}).get("phases", {})
    seconds = sum(facts["seconds"] for facts in record["stages"].values()) + sum(export.values())
    status = record.get("status", UNFINISHED)
    if status == "finished":
        whole = all((folder / name).is_file() for name in record.get("outputs", []))
        return State("done" if whole else "waiting", seconds)
    if status == "failed":
        return State("failed", seconds, str(record.get("error", "")))
    return State("running" if in_use(folder) else "waiting", seconds)


def save_plan(out: Path, asked: dict[str, Any], runs: Sequence[BatchRun], errors: dict[str, str]) -> None:
    """Write batch.json: what all runs were asked for, and each run, with what it failed of.

    Raises: UserError where the folder holds a batch of other settings, or other files.
    """
    path = out / FILE
    if path.is_file():
        before = read_plan(out)
        if before.get("asked") != asked:
            raise UserError(
                f"{out} holds another batch",
                f"its runs were asked for with {json.dumps(before.get('asked'), ensure_ascii=False)}",
                "choose another --out, or type the same settings",
            )
        known = {run["name"]: run for run in before["runs"]}
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise UserError(f"{out} already holds files", "a batch never writes over what is there", "choose another --out")
    else:
        known = {}
    for run in runs:
        known[run.name] = {"name": run.name, "prompt": run.prompt, "seed": run.seed}
        if run.name in errors:
            known[run.name]["error"] = errors[run.name]
    data = {"asked": asked, "runs": list(known.values())}
    write_whole(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_plan(out: Path) -> dict[str, Any]:
    """Return what a batch.json holds. Raises: UserError where it is damaged."""
    path = out / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        runs = [BatchRun(run["prompt"], run["seed"], run["name"]) for run in data["runs"]]
        if any(Path(run.name).name != run.name for run in runs):
            raise ValueError("a run's name is a path")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"damaged file {path}", f"{type(error).__name__}: {error}", "remove it and type the batch again"
        ) from None
    return data
