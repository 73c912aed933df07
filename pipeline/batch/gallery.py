"""A page of all runs of a folder: one HTML file without scripts, whose pictures and links lie beside it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from pipeline.batch.listing import Row, rows_of
from pipeline.runs.log import read_record
from pipeline.runs.progress import duration
from stages.errors import UserError

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.45 system-ui,sans-serif;margin:2rem;max-width:90rem}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
article{border:1px solid #8885;border-radius:8px;overflow:hidden}
article img,article .none{width:100%;aspect-ratio:1;object-fit:cover;background:#8882;display:block}
article .none{display:grid;place-items:center;color:#888}
article div.text{padding:.6rem .8rem}
h2{font-size:1rem;margin:0}
p{margin:.2rem 0 0;font-size:.85rem}
.failed{color:#c0392b;white-space:pre-line}
""".strip()


def write_gallery(out: Path) -> str:
    """Return the page of a folder of runs as HTML; its links are relative to the folder."""
    rows = rows_of(out)
    done = sum(row.state == "done" for row in rows)
    cards = "\n".join(_card(row) for row in rows)
    title = escape(out.name)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>\n{_STYLE}\n</style>\n'
        f"<h1>{title}</h1>\n<p>{done} of {len(rows)} runs are done.</p>\n<main>\n{cards}\n</main>\n</html>\n"
    )


def _card(row: Row) -> str:
    picture = picture_of(row.folder)
    alt = escape(row.run.prompt, quote=True)
    shown = f'<img loading="lazy" src="{_link(row, picture)}" alt="{alt}">' if picture else '<div class="none">-</div>'
    facts = f"seed {row.run.seed}, {row.state}" + (f", {duration(row.seconds)}" if row.seconds else "")
    links = " ".join(f'<a href="{_link(row, row.folder / name)}">{escape(name)}</a>' for name in _files(row))
    error = f'<p class="failed">{escape(row.error)}</p>' if row.error else ""
    text = f"<h2>{escape(row.run.prompt)}</h2><p>{escape(facts)}</p>{error}<p>{links}</p>"
    return f'<article>{shown}<div class="text">{text}</div></article>'


def picture_of(folder: Path) -> Path | None:
    """Return the picture that shows a run best: the object turning, else the last preview; None without any."""
    if (folder / "turntable.webp").is_file():
        return folder / "turntable.webp"
    previews = sorted(folder.glob("*/previews/*.png"), key=lambda path: path.stat().st_mtime)
    return previews[-1] if previews else None


def _files(row: Row) -> list[str]:
    """The run's results by their record, those that are there."""
    try:
        outputs = read_record(row.folder / "run.json").get("outputs", [])
    except (UserError, OSError):
        return []
    return [name for name in outputs if Path(name).name == name and (row.folder / name).is_file()]


def _link(row: Row, path: Path) -> str:
    return escape(quote(f"{row.run.name}/{path.relative_to(row.folder).as_posix()}"), quote=True)
