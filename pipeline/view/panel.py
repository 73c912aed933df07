"""The panel beside the object: words, buttons, curves, pictures along time, settings, files, and the gallery."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.view.follow import Facts, Followed, downloads_of, is_inside, previews_of
from pipeline.view.gallery import Card

if TYPE_CHECKING:
    import viser

MOST_POINTS = 600  # of a curve
FIRST_CURVES = ("agreement_db", "loss", "seconds")  # the one that is shown first is the first of these that there is
PIXELS = 512  # width of a preview on the page
_EMPTY = np.full((8, 8, 3), 128, np.uint8)


class Panel:
    """What is beside the object, for one run at a time.

    Args:
        gui: of the viser server.
        ask: called with run, pause or stop when a button says so.
        choose: called with a run's folder when it is chosen in the gallery.
        send: called with a browser and a file that it asks for.
        several: whether there is a gallery, which then comes first.
    """

    def __init__(
        self,
        gui: viser.GuiApi,
        ask: Callable[[str], None],
        choose: Callable[[Path], None],
        send: Callable[[Any, Path], None],
        *,
        several: bool = False,
    ) -> None:
        self._gui, self._choose, self._send = gui, choose, send
        self._words = gui.add_html("")
        self._bar = gui.add_progress_bar(0.0)
        self._paused = False
        self._pause = gui.add_button("Pause")
        self._stop = gui.add_button("Stop", color="red")
        self._pause.on_click(lambda _: ask("run" if self._paused else "pause"))
        self._stop.on_click(lambda _: ask("stop"))
        self._tabs = gui.add_tab_group()
        self._gallery = self._tabs.add_tab("Runs") if several else None
        with self._tabs.add_tab("Curves"):
            self._metric = gui.add_dropdown("metric", ["-"])
            self._curve = gui.add_uplot(*_lines([0.0], [0.0], "-"), aspect=1.5, scales=_scales(0, 1))
        self._metric.on_update(lambda _: self._draw())
        with self._tabs.add_tab("Pictures"):
            self._moment = gui.add_slider("picture", 0, 1, 1, 0)
            self._picture = gui.add_image(_EMPTY)
        self._moment.on_update(lambda _: self._show_preview())
        with self._tabs.add_tab("Settings"):
            self._settings = gui.add_html("")
        with self._tabs.add_tab("Files"):
            self._files = gui.add_folder("download", expand_by_default=True)
        self._cards: list[Card] = []
        self._hung: list[tuple[Any, Any]] = []  # picture and button of each card
        self._buttons: list[Any] = []
        self._offered: list[Path] = []
        self._previews: list[Path] = []
        self._followed = Followed(Path())

    def open(self, run: Path) -> Followed:
        """Show another run from its beginning; returns what follows its metrics."""
        self._followed = Followed(run)
        self._previews, self._offered = [], []
        text = _text(run / "config.yaml") if is_inside(run / "config.yaml", run) else ""
        self._settings.content = f'<pre style="font-size:0.7em;overflow-x:auto">{html.escape(text)}</pre>'
        self._offer([])
        return self._followed

    def tell(self, facts: Facts, paused: bool) -> None:
        """Bring words, buttons, curve, pictures and files up to date."""
        followed, running = self._followed, facts.status == "running"
        self._paused = paused and running
        where = f", {facts.stage} step {facts.step}" if facts.stage else ""
        where += f" of {facts.steps}" if where and facts.steps else ""
        state = html.escape(facts.status + where) + (", paused" if self._paused else "")
        words = f"<b>{html.escape(facts.prompt)}</b>, seed {html.escape(str(facts.seed))}<br>{state}"
        self._words.content = f'<div style="padding:0 0.75em 0.5em">{words}</div>'
        self._bar.value = min(100.0 * facts.step / facts.steps, 100.0) if facts.steps else 0.0
        self._pause.disabled = self._stop.disabled = not running
        self._pause.label = "Go on" if self._paused else "Pause"
        self._offer_metrics(facts.stage)
        self._draw()
        previews = previews_of(followed.folder)
        if previews != self._previews:
            at_end = self._moment.value >= len(self._previews) - 1
            self._previews = previews
            self._moment.max = max(len(previews) - 1, 1)
            if at_end:
                self._moment.value = max(len(previews) - 1, 0)
            self._show_preview()
        files = downloads_of(followed.folder)
        if files != self._offered:
            self._offer(files)

    def show_gallery(self, cards: Sequence[Card]) -> None:
        """Show a picture and a button for each run of a folder."""
        if self._gallery is None or list(cards) == self._cards:
            return
        before, self._cards = self._cards, list(cards)
        if [card.run for card in before] == [card.run for card in cards]:
            for old, card, (shown, button) in zip(before, cards, self._hung):
                if card != old:  # in its place, so that nothing moves under the pointer
                    shown.image, button.label = _picture(card), _caption(card)
            return
        for handle in (handle for pair in self._hung for handle in pair):
            handle.remove()
        with self._gallery:
            self._hung = [self._hang(card) for card in cards]

    def _hang(self, card: Card) -> tuple[Any, Any]:
        """Add a card to the gallery; returns its picture and its button."""
        shown, button = self._gui.add_image(_picture(card)), self._gui.add_button(_caption(card))
        button.on_click(lambda _: self._choose(card.run))
        return shown, button

    def _offer_metrics(self, stage: str) -> None:
        values = self._followed.values
        names = tuple(f"{of} {name}" for of in values for name in sorted(values[of])) or ("-",)
        if names != tuple(self._metric.options):
            before = self._metric.value
            self._metric.options = names
            firsts = [f"{stage} {name}" for name in FIRST_CURVES]
            self._metric.value = before if before in names else next((f for f in firsts if f in names), names[0])

    def _draw(self) -> None:
        stage, _, name = self._metric.value.partition(" ")
        steps = self._followed.steps.get(stage, [])
        values = self._followed.values.get(stage, {}).get(name, [])[: len(steps)]
        if not values:
            steps, values = [0.0], [0.0]
        each = -(-len(values) // MOST_POINTS)
        data, series = _lines(steps[: len(values)][::each], values[::each], name)
        if not all(np.array_equal(new, old, equal_nan=True) for new, old in zip(data, self._curve.data)):
            scales = _scales(steps[0], max(steps[-1], self._followed.planned().get(stage, 0)))
            if scales != self._curve.scales:
                self._curve.scales = scales
            self._curve.series, self._curve.data = series, data

    def _show_preview(self) -> None:
        from PIL import Image

        if not self._previews:
            return
        path = self._previews[min(int(self._moment.value), len(self._previews) - 1)]
        if not is_inside(path, self._followed.folder):  # again: it may have become a link since
            return
        try:
            with Image.open(path) as image:
                shown = image.convert("RGB")
        except OSError:
            return
        shown.thumbnail((PIXELS, 4 * PIXELS))
        self._picture.image = np.asarray(shown)

    def _offer(self, paths: list[Path]) -> None:
        for button in self._buttons:
            button.remove()
        self._buttons, self._offered = [], paths
        with self._files:
            for path in paths:
                button = self._gui.add_button(path.name)
                button.on_click(lambda event, path=path: self._send(event.client, path))
                self._buttons.append(button)


def _picture(card: Card) -> np.ndarray:
    picture = card.picture()
    return _EMPTY if picture is None else picture


def _caption(card: Card) -> str:
    return f"{card.prompt}, seed {card.seed}: {card.state}"


def _lines(steps: Sequence[float], values: Sequence[float], name: str) -> tuple[tuple, tuple]:
    """The data and the series of a curve."""
    data = (np.asarray(steps, np.float64), np.asarray(values, np.float64))
    return data, ({"label": "step"}, {"label": name, "stroke": "#2a7", "width": 2})


def _scales(first: float, last: float) -> dict[str, Any]:
    """The x axis from the first step to the last; viser's own loses what grows before a slow browser drew it."""
    return {"x": {"time": False, "range": (float(first), float(max(last, first + 1)))}}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
