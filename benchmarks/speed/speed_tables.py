"""README tables and plots of benchmarks.speed: its lines in words, fitted growth, whether what was asked for is met."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import markdown_table, origin_of
from benchmarks.speed.curves import Curve, growth_plot
from benchmarks.timing import fit_line, fit_power

Line = dict[str, Any]
MAIN_S, NETWORKS, MEMORY_MB = 180, 0.60, 3 * 1024  # issue: main job's time, share of the networks, memory
COMPILE_S, START_S = 40, 6
TAIL = {("fine", "tets"): 64}  # from here on a fit is made: below, what does not grow hides the growth
MEANINGS = {"occupied": "occupied share", "pixels": "pixels a side", "samples": "steps along the diagonal"}
MEANINGS |= {"table": "rows of a hash level", "tets": "lattice cells a side"}


def x_of(line: Line) -> float:
    """Where a growth line lies: the measured occupied share, rows for their logarithm, else the value set."""
    if line["sweep"] == "occupied":
        return line["facts"]["occupied"]
    return 2.0 ** line["value"] if line["sweep"] == "table" else float(line["value"])


def curve_of(lines: list[Line], label: str, ms: str | None = None) -> Curve:
    """One sweep's curve with its fit; `ms` names a phase instead of the whole step."""
    ordered = sorted(lines, key=x_of)
    if ms is None:
        points = [(x_of(line), line["step_ms"], line["ms_low"], line["ms_high"]) for line in ordered]
    else:
        points = [(x_of(line), *[line["phases_ms"].get(ms, 0.0)] * 3) for line in ordered]
    low = TAIL.get((ordered[0]["stage"], ordered[0]["sweep"]), 0)
    chosen = [p for p in points if p[0] >= low]
    chosen = chosen if len({p[0] for p in chosen}) > 1 else points
    fit = None
    x, y = [p[0] for p in chosen], [p[1] for p in chosen]
    if len(set(x)) > 1 and min(y) > 0:
        kind, fitted = ("line", fit_line) if ordered[0]["linear"] else ("power", fit_power)
        fit = (kind, *fitted(x, y), min(x))
    return Curve(label, tuple(points), fit)


def sweeps_of(lines: list[Line]) -> dict[tuple, list[Line]]:
    """Return growth lines by device, threads, networks, stage and sweep."""
    sweeps: dict[tuple, list[Line]] = {}
    for line in lines:
        if line["part"] == "growth":
            key = (line["device"], line["threads"], line["networks"], line["stage"], line["sweep"])
            sweeps.setdefault(key, []).append(line)
    return sweeps


def plots(lines: list[Line]) -> dict[str, str]:
    """SVG by file stem, a plot per stage and sweep: the whole step, and its phases where the growth is about them."""
    groups: dict[str, list[Curve]] = {}
    about: dict[str, Line] = {}
    for (device, threads, networks, stage, sweep), sizes in sweeps_of(lines).items():
        name = f"speed_{stage}_{sweep}"
        where = f"{threads} threads" if device == "cpu" else device
        label = f"step, {where}" + ("" if networks == "none" else f", {networks} prior")
        curves = groups.setdefault(name, [])
        curves.append(curve_of(sizes, label))
        if (stage, sweep) == ("fine", "tets") and networks == "none":
            for phase in ("surface", "backward", "regularisers"):
                curve = curve_of(sizes, f"{phase}, {where}", phase)
                curves += [curve] if curve.fit is not None else []
        about[name] = sizes[0]
    return {
        name: growth_plot(
            curves, f"{about[name]['stage']} step", _axis(about[name]), "ms", log=not about[name]["linear"]
        )
        for name, curves in groups.items()
    }


def _axis(line: Line) -> str:
    return "rows of a hash level" if line["sweep"] == "table" else line["label"]


def speed_markdown(lines: list[Line]) -> str:
    """Everything there are lines for: what was asked for, the split of a step, growth."""
    sentences = [*_main(lines), *_starts(lines), *_full(lines)]
    parts = ["\n".join(f"- {text}" for text in sentences)] if sentences else []
    parts += [table for table in (_split(lines), _growth(lines)) if table]
    last = lines[-1]
    machines = {f"{line['cores']} cores of {line['cpu']}" for line in lines if line["device"] == "cpu"}
    machines |= {line["device"] for line in lines if line["device"] != "cpu"}
    where = f"{origin_of(lines)}, {'; '.join(sorted(machines))}"
    return "\n\n".join([*parts, f"{where}; torch {last['versions'].get('torch')}."])


def _met(good: bool) -> str:
    return "" if good else " **missed**"


def _where(line: Line) -> str:
    return f"{line['threads']} threads" if line["device"] == "cpu" else line["device"]


def _main(lines: list[Line]) -> list[str]:
    sentences = []
    for line in lines:
        if line["part"] != "main":
            continue
        seconds, memory = line["wall_s"], line["peak_memory_mb"]
        if not line["profiled"]:
            stages = ", ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in line["stages"].items())
            spread = f" [{line['low_s']:.0f}, {line['high_s']:.0f}]" if line.get("runs", 1) > 1 else ""
            sentences.append(
                f"main job, from command to files, {_where(line)}: {seconds:.0f} s{spread} ({stages}, export "
                f"{line['export_s']:.0f} s); wanted <= {MAIN_S} s{_met(seconds <= MAIN_S)}; peak memory "
                f"{memory / 1024:.1f} GB; wanted <= {MEMORY_MB / 1024:.0f} GB{_met(memory <= MEMORY_MB)}"
            )
            continue
        profile = line["profile"]
        share = profile["networks_share"]
        stages = ", ".join(f"{name} {100 * stage['networks_share']:.0f} %" for name, stage in profile["stages"].items())
        sentences.append(
            f"step time inside the prior's networks: {100 * share:.0f} % ({stages}); wanted >= "
            f"{100 * NETWORKS:.0f} %{_met(share >= NETWORKS)}"
        )
    return sentences


def _starts(lines: list[Line]) -> list[str]:
    sentences = []
    for line in lines:
        if line["part"] != "start":
            continue
        if line["which"] == "first":
            seconds = line["compilation_s"]
            sentences.append(
                f"first run ever: {seconds:.0f} s of compiling kernels; wanted <= {COMPILE_S} s"
                f"{_met(seconds <= COMPILE_S)}; loading them later takes {line['again_loading_s']:.1f} s"
            )
        else:
            seconds = line["to_first_step_s"]
            sentences.append(
                f"later starts, from command to the first step: {seconds:.1f} s [{line['low_s']:.1f}, "
                f"{line['high_s']:.1f}]; wanted <= {START_S} s{_met(seconds <= START_S)}; that step is done at "
                f"{line['first_step_done_s']:.1f} s"
            )
    return sentences


def _full(lines: list[Line]) -> list[str]:
    sentences = []
    for line in lines:
        if line["part"] != "full":
            continue
        stages = ", ".join(
            f"{name} {stage['step_ms']:.0f} ms a step, {100 * stage['networks_share']:.0f} % in its networks"
            for name, stage in line["profile"]["stages"].items()
        )
        millions = ", ".join(f"{name} {count / 1e6:.0f} M" for name, count in line["parameters"].items())
        memory = f"; device memory {line['device_memory_mb'] / 1024:.1f} GB" if line["device_memory_mb"] else ""
        what = f"a model of Stable Diffusion 2.1's size, random weights, time only ({millions})"
        sentences.append(f"{what}: {stages}{memory}")
    return sentences


def _split(lines: list[Line]) -> str:
    """The split of a step of the main job, by stage."""
    jobs = [line for line in lines if line["part"] == "main" and line["profiled"]]
    if not jobs:
        return ""
    profile = jobs[-1]["profile"]
    steps = profile["step_phases_ms"]
    names = list(dict.fromkeys(name for split in steps.values() for name in split))
    rows = []
    for stage, split in steps.items():
        total = max(profile["stages"][stage]["step_ms"], 1e-9)
        shares = [f"{100 * split[name] / total:.0f} %" if name in split else "-" for name in names]
        inside = f"{100 * profile['stages'][stage]['networks_share']:.0f} %"
        rows.append([stage, f"{total:.0f} ms", *shares, inside])
    return markdown_table(["stage of the main job", "a step", *names, "of it in the networks"], rows)


def _growth(lines: list[Line]) -> str:
    rows = []
    for (_, _, networks, stage, sweep), sizes in sweeps_of(lines).items():
        curve = curve_of(sizes, "")
        first, last = curve.points[0], curve.points[-1]
        at = [f"{p[1]:.0f} ms at {p[0]:g}" for p in (first, last)]
        kind = "none" if curve.fit is None else curve.fit[0]
        grows = {
            "none": "-",
            "line": f"linear, R2 {curve.fit[3]:.4f}" if curve.fit else "",
            "power": f"power {curve.fit[2]:.2f} from {curve.fit[4]:g}" if curve.fit else "",
        }[kind]
        name = stage if networks == "none" else f"{stage}, {networks} prior"
        rows.append([f"{name}: {MEANINGS[sweep]}", _where(sizes[0]), *at, grows])
    head = ["step time against", "on", "from", "to", "grows"]
    return markdown_table(head, rows) if rows else ""
