"""The page in a real headless Chromium: it shows the object, its curves move, stop stops."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks.report.browser import find_browser
from pipeline.output.glb import write_glb
from pipeline.runs.run import restore_stage
from pipeline.view.page import FOV_DEG, GREY, START
from pipeline.watch.mailbox import SHARP, SIZES, Sights
from pipeline.watch.sight import Camera, picture_of
from stages.cameras import Views, orbit_views, to_clip
from stages.kernels.raster import rasterise
from stages.mesh.files.read import read_mesh
from stages.mesh.mesh import Mesh
from tests.mesh.mesh_shapes import box
from tests.pipeline.runs.test_edit import TINY
from tests.toy_pipeline import octahedron
from tests.toy_runs import SMALL, lines

pytest.importorskip("viser", reason="extra viewer")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="forks"),
    pytest.mark.skipif(find_browser() is None, reason="no Chromium on the PATH"),
]

ROOT = Path(__file__).resolve().parents[3]
WIDTH, HEIGHT = 720, 400  # of the window; the panel is at its right
PATIENCE_S = 300  # a browser that renders in software on a busy machine
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def shown(browser, folder: Path, *words: str):
    """A browser's page of a run, or of a folder of runs."""
    command = [sys.executable, "-m", "pipeline", "view", str(folder), "--port", "0", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    viewer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        address = re.search(r"page: (\S+)", viewer.stdout.readline())[1]
        with contextlib.closing(browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})) as page:
            page.set_default_timeout(1000 * PATIENCE_S)
            page.goto(address)
            page.get_by_text("Software WebGL").locator("xpath=ancestor::*[button]").last.get_by_role("button").click()
            yield page
    finally:
        viewer.send_signal(signal.SIGINT)
        assert viewer.wait(60) == 0


PIXELS = "() => document.querySelector('.u-wrap canvas').toDataURL()"
CURVE = """() => {
    const chart = Object.values(window.__viserTestpoints.uplots)[0].chart
    const {min, max} = chart.scales.x
    const pixels = document.querySelector('.u-wrap canvas').toDataURL()
    return {points: chart.data[0].length, first: min, last: max, pixels}
}"""


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.3)


def object_pixels(page) -> np.ndarray:
    """Where something is before the grey, [H, W] bool; all of the panel."""
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    return (np.abs(pixels - GREY) > 12).any(-1)


def at_rest(page) -> bool:
    """Whether the page shows the same for three seconds."""
    before = object_pixels(page)
    time.sleep(3.0)
    return bool((before == object_pixels(page)).all())


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def canvas_size(page) -> tuple[int, int]:
    """Width and height of what the object is drawn in."""
    size = page.evaluate(
        "() => [...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect())"
        ".map(r => [r.width, r.height]).sort((a, b) => b[1] - a[1] || b[0] - a[0])[0]"
    )
    return round(size[0]), round(size[1])


def first_view(fov_deg: float = FOV_DEG) -> Views:
    """The page's first camera."""
    x, y, z = START
    elevation = math.degrees(math.atan2(y, math.hypot(x, z)))
    return orbit_views([0.0], elevation, distance=math.dist(START, (0, 0, 0)), fov_deg=fov_deg)


def silhouette(mesh: Mesh, width: int, height: int) -> np.ndarray:
    """Where our own rasteriser has a mesh from the page's first camera, [H, W] bool."""
    side = max(width, height)  # of a square picture, of whose middle the page shows a part
    fov_deg = 2 * math.degrees(math.atan(math.tan(math.radians(FOV_DEG) / 2) * side / height))
    vertices, faces = torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.faces).int()
    inside = rasterise(to_clip(vertices, first_view(fov_deg)), faces, side, side)[0, ..., 3] > 0
    top, left = (side - height) // 2, (side - width) // 2
    return inside[top : top + height, left : left + width].numpy()


@pytest.fixture
def red_run(uninterrupted, tmp_path) -> Path:
    """A finished run whose result is red, which no light makes the grey that is behind it."""
    run = shutil.copytree(uninterrupted, tmp_path / "red")
    mesh = octahedron()
    mesh.vertices *= np.float32([1.0, 0.7, 1.0])
    mesh.colours = np.tile(np.float32([0.8, 0.02, 0.02]), (len(mesh.vertices), 1))
    write_glb(mesh, run / "mesh.glb")
    return run


def test_a_finished_runs_object_is_where_our_own_render_has_it_and_its_files_come_down(browser, red_run):
    with shown(browser, red_run) as page:
        until(lambda: object_pixels(page).sum() > 500)
        width, height = canvas_size(page)
        own = silhouette(read_mesh(red_run / "mesh.glb"), width, height)
        until(lambda: iou(object_pixels(page)[:, :width], own) > 0.95)
        assert page.get_by_text("finished, fine step 9 of 9").is_visible()
        page.get_by_role("tab", name="Files").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="mesh.glb").click()
        assert Path(download.value.path()).read_bytes() == (red_run / "mesh.glb").read_bytes()


def test_the_coarse_stage_is_seen_while_it_is_paused_as_its_checkpoint_renders_and_stop_stops(
    browser, pipeline, tmp_path
):
    block = box((1.0, 0.8, 0.8))
    colours = np.tile(np.float32([0.8, 0.05, 0.05]), (8, 1))
    write_glb(Mesh(block.vertices, block.faces, colours), tmp_path / "block.glb")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(yaml.safe_load(TINY)))
    words = ["run", "--prompt", "a red block", "--config", "tiny.yaml", "reference.mesh=block.glb", "--out", "run"]
    process = pipeline(*words, "coarse.steps=100000", "checkpoint_every=1000", cwd=tmp_path)
    run = tmp_path / "run"
    process.wait_until(lambda: lines(run))
    with shown(browser, run) as page:
        step = page.get_by_text(re.compile(r"running, coarse step \d+ of 100000"))
        step.wait_for()
        first = step.inner_text()
        until(lambda: step.inner_text() != first)  # the step goes on, and so do the curves
        before = page.evaluate(CURVE)
        until(lambda: page.evaluate(CURVE)["points"] > before["points"] and page.evaluate(PIXELS) != before["pixels"])
        assert (before["first"], before["last"]) == (1, 100000)
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Go on").wait_for()
        process.wait_until(lambda: "paused by the page" in (tmp_path / "out.txt").read_text())
        at = len(lines(run))
        size = canvas_size(page)
        until(lambda: object_pixels(page).sum() > 500)
        until(
            lambda: max(Sights(run).next()["picture"].shape) >= SHARP * SIZES[0]
        )  # the sharp one, of a camera at rest
        until(lambda: at_rest(page))
        seen = object_pixels(page)[:, : size[0]]
        page.get_by_role("button", name="Stop").click()
        code, _, err = process.finish()
        assert code == 128 + signal.SIGINT and "pipeline resume run" in err
        page.get_by_text("interrupted").wait_for()
    assert len(lines(run)) <= at + 60  # those that were in the buffer
    stage = restore_stage(run, "coarse")
    c2w = first_view().c2w[0].reshape(-1).tolist()
    camera = Camera.read({"c2w": c2w, "fov_deg": FOV_DEG, "aspect": size[0] / size[1]})
    own = Image.fromarray(picture_of(stage, camera, 256)).resize(size)
    assert iou(seen, (np.abs(np.asarray(own, int) - GREY) > 12).any(-1)) > 0.9


def test_a_folder_of_runs_is_a_gallery_in_which_one_is_chosen(browser, uninterrupted, toy, tmp_path):
    (tmp_path / "runs").mkdir()
    for name, prompt in (("a", "a blue cat"), ("b", "a <b>bold</b> {cat}")):
        code, _, err = toy("run", "--prompt", prompt, "--out", f"runs/{name}", *SMALL, cwd=tmp_path).finish()
        assert code == 0, err
    with shown(browser, tmp_path / "runs") as page:
        page.get_by_text("a blue cat").first.wait_for()
        page.get_by_role("button", name="a <b>bold</b> {cat}, seed 0: done").click()
        page.get_by_text("a <b>bold</b> {cat}", exact=True).wait_for()
        page.get_by_role("tab", name="Curves").click()
        page.wait_for_function("() => document.querySelector('.u-wrap canvas')?.getBoundingClientRect().width > 150")
        record = json.loads((tmp_path / "runs" / "b" / "run.json").read_text())
        assert record["prompt"] == "a <b>bold</b> {cat}"
