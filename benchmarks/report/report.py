"""Show what was measured: `python -m benchmarks.report`.

python -m benchmarks.report OUT             one HTML page of a suite's folder: OUT/report.html, no network needed
python -m benchmarks.report OUT --picture PNG   and what the page looks like, by a headless Chromium
python -m benchmarks.report OUT --plots FOLDER  and its plots of quality against time
python -m benchmarks.report --markdown      the READMEs' tables from what is in results/
python -m benchmarks.report --into FILE     the same, put between FILE's <!-- benchmarks:NAME --> marks
python -m benchmarks.report --readmes       the same for every README of the checkout
"""

from __future__ import annotations

import argparse
import base64
import json
import struct
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, read_lines
from benchmarks.markdown import origin
from benchmarks.plots import Point, scatter, standalone
from benchmarks.quality.cells import Cell
from benchmarks.quality.summary import METRICS, interval_text, key_of
from benchmarks.quality.systems import Job, find_system
from benchmarks.report.browser import take_picture
from benchmarks.report.tables import answers, markdown_blocks, name_of, put_into, readmes
from pipeline.output.files import write_whole
from stages.errors import UserError
from stages.mesh.mesh import Mesh
from stages.paths import from_home

HERE = Path(__file__).parent
PLOTTED = ("r_precision_colour", "clip_colour", "volume_iou")  # against time
VIEWER_FACES = 5000  # of a mesh in the page


def plots(summary: dict[str, Any]) -> dict[str, str]:
    """Return quality against time for the systems that took any, with intervals: an SVG by metric."""
    figures = {}
    for name in PLOTTED:
        points = []
        for k, (system, facts) in enumerate(summary["systems"].items()):
            x, y = facts["all"].get("wall_s"), facts["all"].get(name)
            if x is not None and y is not None:
                points.append(
                    Point(name_of(system), x["mean"], y["mean"], (x["low"], x["high"]), (y["low"], y["high"]), k)
                )
        label = METRICS[name].label
        figures[name] = scatter(points, f"{label} against time", "seconds a mesh", label, log_x=True)
    return {name: figure for name, figure in figures.items() if figure}


def write_plots(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots as files of their own, FOLDER/quality_SUITE_METRIC.svg."""
    return [
        write_whole(folder / f"quality_{summary['suite']}_{name}.svg", standalone(figure).encode())
        for name, figure in plots(summary).items()
    ]


def facts_of(summary: dict[str, Any]) -> list[str]:
    """Return what was run, where and when, in a few lines."""
    prompts = sum(summary["prompts"].values())
    groups = ", ".join(f"{n} {name}" for name, n in summary["prompts"].items())
    looks = ", ".join(f"{n} {look}" for look, n in summary["candidates"].items())
    facts = [
        f"Suite {summary['suite']}: {prompts} prompts ({groups}); candidate captions: {looks}; "
        f"CLIP: {', '.join(summary['clips'])}.",
        f"{origin(summary['dates'], summary['revisions'])}; {'; '.join(summary['machines'])}; "
        f"torch {summary['versions'].get('torch')}.",
    ]
    if summary["options"]:
        facts.append(f"Settings other than the defaults: {' '.join(summary['options'])}.")
    return facts


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table of ready HTML cells; a cell that starts with * is the best of its column."""

    def cell(text: str) -> str:
        return f'<td class="best">{text[1:]}</td>' if text.startswith("*") else f"<td>{text}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{body}</table></div>'


def systems_table(summary: dict[str, Any], group: str) -> str:
    """Return systems by metrics, with intervals; the best of the real systems in bold."""
    names = [n for n in METRICS if any(n in facts.get(group, {}) for facts in summary["systems"].values())]
    best = {}
    for name in names:
        real = [
            facts[group][name]["mean"]
            for system, facts in summary["systems"].items()
            if system not in ("truth", "floor", "reference") and name in facts.get(group, {})
        ]
        if METRICS[name].better and len(real) > 1:
            best[name] = max(real) if METRICS[name].better > 0 else min(real)
    rows = []
    for system, facts in summary["systems"].items():
        steps = " + ".join(str(n) for n in facts.get("steps", {}).values())
        note = f"{facts['cells']} cells, {facts['failed']} failed{f', {steps} steps' if steps else ''}"
        row = [f"{escape(name_of(system))}<small>{note}</small>"]
        for name in names:
            interval = facts.get(group, {}).get(name)
            mark = (
                "*"
                if interval and interval["mean"] == best.get(name) and system not in ("truth", "floor", "reference")
                else ""
            )
            if interval is None:
                row.append("-")
                continue
            mean, low, high = (f"{interval[k]:.{METRICS[name].digits}f}" for k in ("mean", "low", "high"))
            row.append(f"{mark}{mean}<small>{'' if low == high else f'{low} to {high}'}</small>")
        rows.append(row)
    return html_table(["system", *(escape(METRICS[n].label) for n in names)], rows)


def times_table(summary: dict[str, Any]) -> str:
    """Every system's stages: seconds, steps a second, and the dearest phases."""
    rows = []
    for system, facts in summary["systems"].items():
        for stage, times in facts.get("times", {}).items():
            dear = sorted(times["phases"].items(), key=lambda item: -item[1])[:6]
            rate = "-" if times["steps_per_s"] is None else f"{times['steps_per_s']:.2f}"
            phases = ", ".join(f"{escape(name)} {seconds:.1f}" for name, seconds in dear if seconds >= 0.05)
            rows.append([escape(name_of(system)), escape(stage), f"{times['seconds']:.1f}", rate, phases])
    return html_table(["system", "stage", "seconds", "steps a second", "seconds by phase"], rows) if rows else ""


def clips_table(summary: dict[str, Any]) -> str:
    """Return R-Precision and score of every system under every CLIP."""
    names = list(METRICS)[:4]
    rows = [
        [escape(clip), escape(name_of(system)), *(interval_text(facts.get(n), METRICS[n].digits) for n in names)]
        for clip, systems in summary["by_clip"].items()
        for system, facts in systems.items()
    ]
    return html_table(["CLIP", "system", *(escape(METRICS[n].label) for n in names)], rows)


def comparisons_table(summary: dict[str, Any]) -> str:
    rows = []
    for c in summary["comparisons"]:
        d, metric = c["difference"], METRICS[c["metric"]]
        rows.append(
            [
                f"{escape(name_of(c['a']))} against {escape(name_of(c['b']))}",
                escape(metric.label),
                f"{d['mean']:+z.{metric.digits}f} [{d['low']:+z.{metric.digits}f}, {d['high']:+z.{metric.digits}f}]",
                f"{c['wins']} / {c['ties']} / {c['losses']}",
                f"{c['p_value']:.4f}",
                f"{c['p_sign']:.4f}",
            ]
        )
    return html_table(["pair", "metric", "difference", "better / same / worse", "p (sign flip)", "p (sign test)"], rows)


def gallery(summary: dict[str, Any], lines: list[dict[str, Any]], out: Path) -> tuple[str, str]:
    """(the grid of pictures, the meshes behind them), of every prompt and system at the first seed."""
    systems, clip = list(summary["systems"]), summary["clips"][0]
    at = {(line["system"], line["prompt"]): line for line in reversed(lines)}
    prompts = list(dict.fromkeys(line["prompt"] for line in lines))
    cells = ['<div class="head"></div>', *(f'<div class="head">{escape(name_of(s))}</div>' for s in systems)]
    meshes = []
    for prompt in prompts:
        cells.append(f'<div class="prompt">{escape(prompt)}</div>')
        for system in systems:
            line = at.get((system, prompt))
            if line is None or "failed" in line:
                why = "not run" if line is None else "no object: " + line["failed"].splitlines()[-1][:120]
                cells.append(f'<div class="cell none">{escape(why)}</div>')
                continue
            folder = Cell(system, prompt, line["seed"]).folder(out)
            place = f"mesh{len(meshes)}"
            mesh = load_mesh(folder)
            meshes.append(f'<script type="text/plain" id="{place}">{pack(simplified(mesh))}</script>')
            looks = summary["scores"][key_of(line)].get(clip, {})
            hit = looks.get("colour", {}).get("hit") == 100
            note = ", ".join(f"{look} rank {facts['rank']:g}" for look, facts in looks.items())
            picture = base64.b64encode((folder / "gallery.jpg").read_bytes()).decode()
            title = f"{prompt}: {name_of(system)}"
            cells.append(
                f'<button class="cell {"hit" if hit else "miss"}" data-mesh="{place}" data-title="{escape(title)}">'
                f'<img loading="lazy" alt="{escape(title)}, front, side, back, textureless" '
                f'src="data:image/jpeg;base64,{picture}"><span>{escape(note)}</span></button>'
            )
    style = f"grid-template-columns: 110px repeat({len(systems)}, minmax(0, 1fr))"
    return f'<div class="gallery" style="{style}">{"".join(cells)}</div>', "\n".join(meshes)


def load_mesh(folder: Path) -> Mesh:
    """Return the mesh of a finished cell."""
    from stages.mesh.files.read import read_mesh

    if (folder / "run" / "mesh.glb").is_file():
        return read_mesh(folder / "run" / "mesh.glb")
    line = json.loads((folder / "result.json").read_text())
    return find_system(line["system"]).make(Job(line["prompt"], line["seed"], folder, 1))[0]


def simplified(mesh: Mesh, faces: int = VIEWER_FACES) -> Mesh:
    """Return a copy with vertex colours and at most about `faces` faces, for the page."""
    from scipy.spatial import cKDTree

    from benchmarks.quality.assess import welded
    from benchmarks.quality.render import Subject
    from stages.mesh.clean import decimate

    subject = Subject.of(mesh)
    colours = subject.colour_of(subject.colours if subject.texture is None else subject.uv).numpy()
    if subject.texture is None and len(mesh.faces) <= faces:
        return Mesh(mesh.vertices, mesh.faces, colours)
    small = decimate(welded(mesh), faces)
    _, near = cKDTree(subject.vertices.numpy()).query(small.vertices)
    return Mesh(small.vertices, small.faces, colours[near])


def pack(mesh: Mesh) -> str:
    """Return a mesh with vertex colours as the viewer's base64: see viewer.js."""
    import torch

    from stages.kernels.srgb import linear_to_srgb

    scale = max(float(np.abs(mesh.vertices).max()), 1e-6) / 32767 if len(mesh.vertices) else 1.0
    positions = np.round(mesh.vertices / scale).astype("<i2")
    colours = (linear_to_srgb(torch.from_numpy(mesh.colours)) * 255).round().byte().numpy()
    data = struct.pack("<IIf", len(mesh.vertices), len(mesh.faces), scale) + positions.tobytes() + colours.tobytes()
    data += b"\0" * (-len(data) % 4)
    data += mesh.faces.astype("<u4" if len(mesh.vertices) > 65535 else "<u2").tobytes()
    return base64.b64encode(data).decode()


def write_report(out: Path) -> Path:
    """OUT/report.html from a suite's folder. UserError where there is no finished suite."""
    if not (out / "summary.json").is_file():
        raise UserError(
            f"{out} holds no finished suite", "it has no summary.json", "run python -m benchmarks.quality first"
        )
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    lines = read_lines(out / "results.jsonl")
    pictures, meshes = gallery(summary, lines, out)
    groups = list(summary["prompts"]) if len(summary["prompts"]) > 1 else []
    parts = [
        f"<h1>Text to 3D: {escape(summary['suite'])}</h1>",
        *(f'<p class="facts">{escape(fact)}</p>' for fact in facts_of(summary)),
        '<ul class="answers">' + "".join(f"<li>{escape(text)}</li>" for text in answers(summary)) + "</ul>",
        "<h2>All prompts</h2>",
        systems_table(summary, "all"),
        '<p class="facts">Means with 95 % bootstrap intervals over prompts and seeds. R-Precision: the own caption '
        "ranks first among all candidates, by the mean embedding of eight views at 30 degrees; textureless renders are "
        "judged against captions without colours and patterns. Lengths are shares of the truth's diagonal.</p>",
        "<h2>Quality against time</h2>",
        f'<div class="plots">{"".join(plots(summary).values())}</div>',
        *(["<h2>Time by stage and phase</h2>", times] if (times := times_table(summary)) else []),
        *(f"<h2>{escape(g.capitalize())}</h2>{systems_table(summary, g)}" for g in groups),
        *(["<h2>Under every CLIP</h2>", clips_table(summary)] if len(summary["clips"]) > 1 else []),
        "<h2>System against system, on the same prompts</h2>",
        comparisons_table(summary),
        "<h2>Every prompt</h2>",
        '<p class="facts">Front, side, back, textureless. Green: the own caption ranks first. '
        "Click to turn the mesh.</p>",
        pictures,
    ]
    viewer = (
        '<dialog id="viewer"><header><strong id="viewer-title"></strong>'
        + "".join(
            f'<button class="small" onclick="Viewer.set({k})">{name}</button>'
            for k, name in enumerate(("lit", "colour", "clay"))
        )
        + '<form method="dialog"><button class="small">close</button></form></header>'
        '<canvas id="viewer-canvas" width="720" height="720"></canvas><p class="facts" id="viewer-note"></p></dialog>'
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(summary["suite"])}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{(HERE / 'report.css').read_text()}</style></head><body>{''.join(parts)}{viewer}{meshes}"
        f"<script>{(HERE / 'viewer.js').read_text()}</script></body></html>"
    )
    return write_whole(out / "report.html", page.encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=from_home, help="folder of a suite: writes OUT/report.html")
    parser.add_argument(
        "--picture", type=from_home, help="also write a picture of the page's top, by a headless Chromium"
    )
    parser.add_argument("--plots", type=from_home, metavar="FOLDER", help="also write the plots against time, as SVG")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument(
        "--into", type=from_home, nargs="+", metavar="FILE", help="put the tables between the files' marks"
    )
    parser.add_argument("--readmes", action="store_true", help="the same for every README of the checkout")
    parser.add_argument("--results", type=from_home, default=RESULTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    pages = [*(args.into or []), *(readmes() if args.readmes else [])]
    if not (args.out or args.markdown or pages):
        parser.error("wanted a suite's folder, --markdown, --readmes or --into FILE")
    if (args.picture or args.plots) and not args.out:
        parser.error("--picture, --plots: wanted a suite's folder")
    try:
        if args.out:
            print(page := write_report(args.out))
            if args.picture:
                print(take_picture(page, args.picture))
            if args.plots:
                summary = json.loads((args.out / "summary.json").read_text(encoding="utf-8"))
                print(*write_plots(summary, args.plots), sep="\n")
        blocks = markdown_blocks(args.results) if args.markdown or pages else {}
        for page in pages:
            print(f"{page}: {', '.join(put_into(page, blocks)) or 'no marks found'}")
        if args.markdown:
            print("\n\n".join(f"### {name}\n\n{text}" for name, text in blocks.items()) or "no results yet")
    except UserError as error:
        print(f"{error.what}\n{error.why}\n{error.fix}", file=sys.stderr)
        return 2
    return 0
