"""README tables of benchmarks.kernels: times and ratios from its lines, and whether what was asked for is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.markdown import markdown_table, origin_of

OURS = ("numba", "warp")
TWIN, PEER = "torch", "the fastest peer"
Line = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio that was asked for: other time over ours, on one thread of a CPU."""

    case: str
    work: str
    against: str  # TWIN or PEER
    least: float
    meaning: str


BOTH, FORWARD = "forward + backward", "forward"
TARGETS = (
    Target("nerf_step", BOTH, TWIN, 10, "NeRF step (hash, perceptrons, compositing)"),
    Target("raster_step", BOTH, TWIN, 15, "rasterise + interpolate + antialias"),
    Target("rasterise", FORWARD, PEER, 3, "rasterise"),
)


def kernels_markdown(lines: list[Line]) -> str:
    """Return a table for every device, what was asked for, and who is absent."""
    parts = []
    for device in dict.fromkeys(line["device"] for line in lines if "case" in line):
        chosen = [line for line in lines if line["device"] == device]
        parts.append(_table([line for line in chosen if "case" in line]))
        parts += _said(chosen)
    return "\n\n".join(parts)


def goals_markdown(lines: list[Line]) -> str:
    """What was asked for, which was of a CPU alone, and whether it is met; kernels_markdown without its tables."""
    return "\n\n".join(_said([line for line in lines if line["device"] == "cpu"]))


def _said(lines: list[Line]) -> list[str]:
    """Below a device's table: what was asked for, who is absent, and where it was measured."""
    sentences = [*targets(lines), *on_moved_meshes(lines), *_absent(lines)]
    points = ["\n".join(f"- {text}" for text in sentences)] if sentences else []
    return [*points, _footer([line for line in lines if "case" in line])]


def rows_of(lines: list[Line]) -> dict[tuple[str, str, str], list[Line]]:
    """Lines of one measurement together: by case, work, and what tells its shapes from those of its namesakes."""
    shapes: dict[tuple[str, str], list[dict]] = {}
    for line in lines:
        known = shapes.setdefault((line["case"], line["work"]), [])
        if line["shapes"] not in known:
            known.append(line["shapes"])
    rows: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        known = shapes[line["case"], line["work"]]
        differing = [k for k in line["shapes"] if len({str(s.get(k)) for s in known}) > 1]
        label = ", ".join(f"{k} {line['shapes'][k]}" for k in differing)
        rows.setdefault((line["case"], line["work"], label), []).append(line)
    return rows


def _table(lines: list[Line]) -> str:
    threads = sorted({line["threads"] for line in lines}, key=lambda n: n or 0)
    head = ["op", "work"]
    for n in threads:
        on = "on the GPU" if n is None else f"{n} thread{'s' if n > 1 else ''}"
        head += [f"ours, {on}", "torch twin", "others"]
    rows = []
    for (case, work, label), measurements in rows_of(lines).items():
        row = [f"{case} ({label})" if label else case, work]
        for n in threads:
            here = [line for line in measurements if line["threads"] == n]
            ours = next((line for line in here if line["contestant"] in OURS), None)
            twin = next((line for line in here if line["contestant"] == TWIN), None)
            others = [line for line in here if line not in (ours, twin)]
            row += [_time(ours), _times(twin), ", ".join(f"{o['contestant']} {_times(o)}" for o in others) or "-"]
        rows.append(row)
    return markdown_table(head, rows)


def _time(line: Line | None) -> str:
    if line is None:
        return "-"
    return f"{line['ms']:.{1 if line['ms'] >= 10 else 2}f} ms"


def _times(line: Line | None) -> str:
    """How many times as long as ours; the time itself where there is nothing of ours to compare it with."""
    if line is None:
        return "-"
    if "times_ours" not in line:
        return _time(line)
    return f"{line['times_ours']:.{0 if line['times_ours'] >= 20 else 1}f}x"


def targets(lines: list[Line]) -> list[str]:
    """Return a sentence for every measured ratio that was asked for; bold where it is missed."""
    sentences = []
    mine = [line for line in lines if "case" in line and line["device"] == "cpu" and line["threads"] == 1]
    rows = rows_of(mine)
    for target in TARGETS:
        for (case, work, label), measurements in rows.items():
            if (case, work) != (target.case, target.work):
                continue
            others = [line for line in measurements if "times_ours" in line]
            twins = [line for line in others if line["contestant"] == TWIN]
            peers = [line for line in others if line["contestant"] != TWIN]
            against = min(twins if target.against == TWIN else peers, key=lambda line: line["ms"], default=None)
            what = f"{target.meaning}, {work}{', ' + label if label else ''}, 1 thread, against "
            if against is None:
                sentences.append(f"{what}{target.against}: **not measured**")
                continue
            name = "the torch twin" if against["contestant"] == TWIN else f"{target.against}, {against['contestant']}"
            value, low, high = (against[k] for k in ("times_ours", "times_ours_low", "times_ours_high"))
            met = "" if value >= target.least else " **missed**"
            runs = f" in {against['runs']} runs" if against["runs"] < 5 else ""
            ratio = f"{value:.1f}x [{low:.1f}, {high:.1f}]{runs}"
            sentences.append(f"{what}{name}: {ratio}; wanted >= {target.least:g}x{met}")
    return sentences


def on_moved_meshes(lines: list[Line]) -> list[str]:
    """How the ray casters do where the mesh has moved, as in every step of a fine stage: building and casting."""
    mine = [line for line in lines if line.get("case") == "rasterise" and line["device"] == "cpu"]
    sentences = []
    for threads in sorted({line["threads"] for line in mine}):
        here = [line for line in mine if line["threads"] == threads]
        build = {line["contestant"]: line["ms"] for line in here if line["work"] == "build"}
        cast = {line["contestant"]: line["ms"] for line in here if line["work"] == FORWARD}
        ours = next((cast[name] for name in OURS if name in cast), None)
        both = {name: cast[name] + build[name] for name in build if name in cast}
        if ours is None or not both:
            continue
        name = min(both, key=both.get)
        sentences.append(
            f"rasterise, forward, {threads} thread{'s' if threads > 1 else ''}, on a mesh that has moved, as a fine "
            f"step's has: {both[name] / ours:.1f}x the fastest peer with its structure built anew, {name}"
        )
    return sentences


def _absent(lines: list[Line]) -> list[str]:
    gone = {line["contestant"]: line["absent"] for line in lines if "absent" in line}
    return ["not measured here: " + "; ".join(f"{name} ({why})" for name, why in gone.items())] if gone else []


def _footer(lines: list[Line]) -> str:
    last = lines[-1]
    where = f"{last['cores']} cores of {last['cpu']}" if last["device"] == "cpu" else last["device"]
    versions = {"torch": last["versions"].get("torch"), "numba": last["versions"].get("numba")}
    versions |= {line["contestant"]: line["version"] for line in lines if "version" in line}
    return (
        "Medians of interleaved runs in one process per number of threads; `x` is time over ours. Ray casters build "
        "their structure beforehand (`build`), embree casts on one thread; Dr.Jit's grid has its own layout. "
        f"{origin_of(lines)}, {where}; {', '.join(f'{k} {v}' for k, v in versions.items())}."
    )
