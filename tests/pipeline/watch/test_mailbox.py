"""Wishes of a page and the run's answers: drawn from any camera, without a trace in the run, never in its way."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pipeline.watch import mailbox
from pipeline.watch.mailbox import FOLDER, SIGHT, WISH, Mailbox, Sights, action_of_others, write_sight, write_wish
from pipeline.watch.sight import BEHIND, Camera, can_show, is_mesh, mesh_of, picture_of
from stages.cameras import orbit_views
from stages.coarse import CoarseSettings, CoarseStage
from stages.fine import FineSettings, FineStage
from stages.kernels.srgb import linear_to_srgb
from tests.toy_pipeline import ToyStage


def camera(azimuth: float = 30.0, aspect: float = 1.0) -> Camera:
    return Camera.read(
        {"c2w": orbit_views([azimuth], 20.0).c2w[0].reshape(-1).tolist(), "fov_deg": 36, "aspect": aspect}
    )


def coarse() -> CoarseStage:
    settings = CoarseSettings(resolution=16, samples=32, field={"levels": 4, "log2_table": 10, "hidden": 8})
    return CoarseStage(settings, None, torch.device("cpu"), 0)


@dataclass
class Stopped:
    requested: bool = False
    said: list[str] = field(default_factory=list)

    def request(self, text: str) -> None:
        self.requested = True
        self.said.append(text)


@dataclass
class Drawn:
    """A stage that counts how often it is drawn."""

    name: str = "coarse"
    step_index: int = 1
    seconds: float = 0.0
    broken: bool = False
    count: int = 0
    device: str = "cpu"

    def render(self, views, size, *, backdrop):
        self.count += 1
        time.sleep(self.seconds)
        if self.broken:
            raise RuntimeError("out of memory")
        return type("Images", (), {"colour": torch.zeros(1, size, size, 3)})


def test_a_run_that_nobody_looks_at_is_asked_for_nothing(tmp_path):
    box = Mailbox(tmp_path, print)
    assert not box.wished() and not list(tmp_path.iterdir())


def test_a_picture_is_that_of_the_stage_from_there_and_leaves_no_trace():
    stage = coarse()
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    shown = picture_of(stage, camera(), 24)
    own = stage.render(orbit_views([30.0], 20.0), 24, backdrop=torch.full((3,), BEHIND)).colour[0]
    np.testing.assert_array_equal(shown, linear_to_srgb(own).mul(255).round().numpy().astype(np.uint8))
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())


def test_a_wide_picture_has_the_cameras_vertical_field_of_view():
    stage = coarse()
    high, wide = picture_of(stage, camera(), 32), picture_of(stage, camera(aspect=2.0), 64)
    assert wide.shape == (32, 64, 3)
    assert np.abs(wide[:, 16:48].astype(int) - high).mean() < 1.0  # the same middle; rays of other pixels
    assert picture_of(stage, camera(aspect=0.5), 32).shape == (32, 16, 3)


def test_a_fine_stage_is_shown_as_its_mesh():
    stage = FineStage(FineSettings(tets=12, resolution=16), None, torch.device("cpu"), 0)
    assert is_mesh(stage) and not is_mesh(coarse()) and can_show(coarse())
    assert not can_show(ToyStage("coarse", 3, 0, None))
    mesh = mesh_of(stage)
    assert mesh["faces"].dtype == np.int32 and mesh["faces"].max() < len(mesh["vertices"])
    assert mesh["colours"].shape == mesh["vertices"].shape and mesh["colours"].dtype == np.uint8
    radius = np.linalg.norm(mesh["vertices"], axis=1)
    assert abs(radius.mean() - 0.6) < 0.05


def test_what_is_asked_for_is_drawn_and_read_once(tmp_path):
    box, sights, stage, stop = Mailbox(tmp_path, print), Sights(tmp_path), Drawn(), Stopped()
    write_wish(tmp_path, "run", camera())
    assert box.wished() and box.answer("coarse", stage, stop) == 0
    assert set(sights.next()) == {"picture"} and sights.next() == {} and not stop.requested
    box.answer("coarse", stage, stop)
    assert stage.count == 1  # the same step from the same place


def test_drawing_takes_at_most_its_share_of_the_time(tmp_path, monkeypatch):
    box, stage, clock = Mailbox(tmp_path, print), Drawn(), [0.0]
    monkeypatch.setattr(mailbox.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(mailbox, "GONE_S", 1e9)
    write_wish(tmp_path, "run", camera())
    render = stage.render

    def slow(*words, **more):
        clock[0] += 0.5
        return render(*words, **more)

    stage.render = slow
    while clock[0] < 100:
        clock[0] += 0.2  # a step
        stage.step_index += 1
        if box.wished():
            box.answer("coarse", stage, Stopped())
    assert 0.5 * mailbox.SHARE < stage.count * 0.5 / clock[0] <= mailbox.SHARE * 1.05


def test_pause_waits_and_shows_until_it_is_over_and_stop_asks_for_a_stop(tmp_path):
    said, stage, stop = [], Drawn(), Stopped()
    box = Mailbox(tmp_path, said.append)

    def go_on():
        time.sleep(0.3)
        write_wish(tmp_path, "pause", camera(90.0))  # looked at from another side meanwhile
        time.sleep(0.4)
        write_wish(tmp_path, "run", camera())

    write_wish(tmp_path, "pause", camera())
    thread = threading.Thread(target=go_on)
    thread.start()
    assert box.wished() and 0.6 < box.answer("coarse", stage, stop) < 30
    thread.join()
    assert stage.count >= 3 and max(Sights(tmp_path).next()["picture"].shape) >= mailbox.SHARP * mailbox.SIZES[0]
    assert len(said) == 1 and not stop.requested
    write_wish(tmp_path, "stop", None)
    assert box.wished() and box.answer("coarse", stage, stop) == 0
    assert stop.requested and "stop" in stop.said[0]


def test_a_signal_ends_a_pause_and_several_processes_do_not_pause(tmp_path):
    write_wish(tmp_path, "pause", None)
    box = Mailbox(tmp_path, print)
    assert box.wished() and box.answer("coarse", Drawn(), Stopped(True)) == 0
    box = Mailbox(tmp_path, print, alone=False)
    assert box.wished() and box.answer("coarse", Drawn(), Stopped()) == 0


def test_a_page_that_is_gone_holds_nothing_up(tmp_path, monkeypatch):
    box = Mailbox(tmp_path, lambda text: None)
    write_wish(tmp_path, "pause", camera())
    monkeypatch.setattr(mailbox, "GONE_S", 0.5)
    assert box.wished() and 0.4 < box.answer("coarse", Drawn(), Stopped()) < 30
    assert not box.wished()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"action": "format"}', "[" * 10_000, '{"action": {"a": 1}}', "\0", '{"action": null}']
)
def test_a_file_that_is_no_wish_counts_as_none(text, tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / WISH).write_text(text)
    assert not Mailbox(tmp_path, print).wished()


@pytest.mark.parametrize("words", [None, 3, {}, {"c2w": [1] * 15, "fov_deg": 30, "aspect": 1}])
def test_a_camera_that_is_none_draws_nothing(words, tmp_path):
    assert Camera.read(words) is None
    assert Camera.read({"c2w": [float("nan")] * 16, "fov_deg": 30, "aspect": 1}) is None
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / WISH).write_text(json.dumps({"action": "run", "camera": words}))
    box, stage = Mailbox(tmp_path, print), Drawn()
    assert box.wished() and box.answer("coarse", stage, Stopped()) == 0 and stage.count == 0


def test_a_drawing_that_fails_ends_no_run(tmp_path, caplog):
    box, stage = Mailbox(tmp_path, print), Drawn(broken=True)
    write_wish(tmp_path, "run", camera())
    for _ in range(3):
        stage.step_index += 1
        assert box.wished() and box.answer("coarse", stage, Stopped()) == 0
    assert stage.count == 1 and len(caplog.records) == 1 and "out of memory" in caplog.text


def test_a_picture_that_cannot_be_written_is_drawn_again_later_and_another_stage_is_still_shown(tmp_path, monkeypatch):
    box, stage, broken = Mailbox(tmp_path, print), Drawn(), Drawn(name="fine", broken=True)
    monkeypatch.setattr(mailbox, "AGAIN_S", 0.0)
    write_wish(tmp_path, "run", camera())
    assert box.wished() and box.answer("fine", broken, Stopped()) == 0
    with monkeypatch.context() as full:
        full.setattr(mailbox, "write_sight", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        box.answer("coarse", stage, Stopped())
    box.answer("coarse", stage, Stopped())
    assert stage.count == 2 and set(Sights(tmp_path).next()) == {"picture"}


def test_a_page_hears_what_another_page_asked_for(tmp_path, monkeypatch):
    assert action_of_others(tmp_path) is None
    write_wish(tmp_path, "pause", None)
    assert action_of_others(tmp_path) is None  # its own
    monkeypatch.setattr(mailbox.os, "getpid", lambda: 1)
    assert action_of_others(tmp_path) == "pause"
    old = time.time() - 2 * mailbox.GONE_S
    os.utime(tmp_path / FOLDER / WISH, (old, old))
    assert action_of_others(tmp_path) is None


def test_an_earlier_sessions_wish_is_void_and_a_broken_answer_is_none(tmp_path):
    write_wish(tmp_path, "stop", None)
    box = Mailbox(tmp_path, print)
    box.empty()
    assert not box.wished() and not (tmp_path / FOLDER).exists()
    write_sight(tmp_path, {"picture": np.zeros((2, 2, 3), np.uint8)})
    file = tmp_path / FOLDER / SIGHT
    file.write_bytes(file.read_bytes()[:20])
    assert Sights(tmp_path).next() == {}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER).write_text("a file")
    Mailbox(tmp_path / "run", print).empty()
    if os.name == "posix":
        (tmp_path / FOLDER / WISH).symlink_to(tmp_path / "nowhere")
        assert not box.wished()
