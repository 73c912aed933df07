"""The picture of an object: told from what is behind it, refused where it cannot be, and held by both stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.config.model import load_config
from pipeline.config.written import dump_read
from pipeline.runs.inputs import check_inputs, load_picture
from stages import parallel
from stages.cameras import orbit_views
from stages.coarse import CoarseSettings, CoarseStage
from stages.errors import UserError
from stages.fine import FineSettings, FineStage
from stages.guidance.guide import GuidanceOutput
from stages.picture import Picture, PictureSettings, nearest_caption, read_picture
from stages.stage import Asset


def disc(size: int = 96, radius: float = 30.0, at=(40.0, 55.0), hole: float = 0.0) -> np.ndarray:
    y, x = np.mgrid[:size, :size] + 0.5
    r = np.hypot(x - at[0], y - at[1])
    return (r < radius) & (r >= hole)


def saved(path, inside, colour=(200, 30, 30), behind=(230, 230, 225), alpha=False, noise=0):
    rgb = np.where(inside[..., None], np.uint8(colour), np.uint8(behind)).astype(int)
    rgb += np.random.default_rng(0).integers(-noise, noise + 1, rgb.shape)
    rgb = rgb.clip(0, 255).astype(np.uint8)
    layers = np.dstack([rgb, inside.astype(np.uint8) * 255]) if alpha else rgb
    Image.fromarray(layers).save(path)
    return path


@pytest.mark.parametrize("alpha", [True, False])
def test_the_object_is_told_from_a_plain_or_transparent_background(alpha, tmp_path):
    inside = disc(hole=8)
    file = saved(tmp_path / "ring.png", inside, alpha=alpha, noise=0 if alpha else 2)
    picture = read_picture(PictureSettings(fit=False), file)
    small = torch.nn.functional.avg_pool2d(picture.mask.permute(2, 0, 1), 4)[0] > 0.5
    wanted = torch.nn.functional.interpolate(torch.from_numpy(inside)[None, None].float(), (128, 128))[0, 0] > 0.5
    both, either = (small & wanted).sum(), (small | wanted).sum()
    assert float(both / either) > 0.95  # the hole is seen through
    srgb = np.array([200, 30, 30]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(picture.colour[picture.mask[..., 0] > 0.99].mean(0), linear, atol=0.02)


def test_fit_centres_the_object_and_fills_the_frame(tmp_path):
    picture = read_picture(PictureSettings(), saved(tmp_path / "disc.png", disc()))
    rows, columns = (np.flatnonzero((picture.mask[..., 0] > 0.5).any(k).numpy()) for k in (1, 0))
    for where in (rows, columns):
        assert abs((where[0] + where[-1]) / 2 - 255.5) < 6
        assert (where[-1] - where[0]) / 512 == pytest.approx(0.85, abs=0.03)


def stripes(path):
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)).save(path)


def blank(path):
    Image.new("RGB", (64, 64), "white").save(path)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (stripes, "cannot tell the object"),
        (blank, "there is no object in"),
        (lambda path: path.write_bytes(b"%PDF-1.4"), "cannot read the picture"),
        (lambda path: None, "no such picture"),
    ],
)
def test_other_pictures_are_refused_in_three_lines_before_any_work(make, what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stop:
        main(["run", "--image", "a.png", "--prompt", "a red ball", "--out", "run"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and what in lines[0] and len(lines) == 3 and not (tmp_path / "run").exists()


def test_a_run_keeps_its_own_copy_and_a_run_without_a_picture_does_not_speak_of_one(tmp_path):
    file = saved(tmp_path / "disc.PNG", disc())
    config = load_config(None, ["image.azimuth_deg=30"], {"image": {"file": str(file)}})
    inputs = check_inputs(config)
    assert "held to disc.PNG" in inputs.note and "azimuth 30" in inputs.note
    inputs.write(tmp_path / "run")
    file.unlink()
    picture = load_picture(tmp_path / "run", config)
    assert picture.settings.azimuth_deg == 30 and 0.2 < float(picture.mask.mean()) < 0.8
    assert "azimuth_deg: 30" in dump_read(config) and "image:" not in dump_read(load_config())
    with pytest.raises(UserError, match="has no use here"):
        check_inputs(load_config(None, ["image.depth_file=a.png"], {}))


def silent(images, views, progress, textureless=False, *, backdrop=None, shading=None, part=None) -> GuidanceOutput:
    """A guidance that wants nothing."""
    return GuidanceOutput(images.sum() * 0, {}, 0.0)


def shown(side: int = 64, **settings) -> Picture:
    """An ellipse, red above and blue below, in the middle of the frame."""
    y, x = np.mgrid[:side, :side] / side * 2 - 1 + 1 / side
    mask = (x**2 / 0.55**2 + y**2 / 0.3**2 < 1).astype(np.float32)[..., None]
    colour = np.where(y[..., None] < 0, np.float32([0.7, 0.05, 0.05]), np.float32([0.05, 0.05, 0.6])).astype(np.float32)
    depth = settings.pop("depth", None)
    return Picture(torch.from_numpy(colour), torch.from_numpy(mask), depth, PictureSettings(**settings))


@pytest.mark.slow
def test_the_coarse_stage_takes_silhouette_and_colours_of_its_picture():
    settings = CoarseSettings(steps=60, resolution=32, views_per_step=1, opacity=0.0, lr=0.03)
    ends = []
    for picture in (None, shown(azimuth_deg=90)):
        previous = None if picture is None else Asset(picture=picture)
        stage = CoarseStage(settings, silent, torch.device("cpu"), 0, previous)
        while stage.step_index < stage.steps:
            metrics = stage.step()
        view = orbit_views([90.0], 0.0)
        images = stage.render(view, 64, backdrop=torch.full((3,), 0.5))
        ends.append(shown().loss(images.colour, images.opacity)[1])
    assert ends[1]["picture_iou"] > 0.85 > ends[0]["picture_iou"]
    assert ends[1]["picture_db"] > 18 > ends[0]["picture_db"]
    assert metrics["picture_iou"] > 0.8


@pytest.mark.slow
def test_the_fine_stage_takes_silhouette_and_colours_of_its_picture():
    settings = FineSettings(steps=40, resolution=64, tets=24, sphere=0.5, lr_sdf=0.01, lr_texture=0.02)
    stage = FineStage(settings, silent, torch.device("cpu"), 0, Asset(picture=shown()))
    rows = []
    while stage.step_index < stage.steps:
        rows.append(stage.step())
    assert rows[-1]["picture_iou"] > rows[0]["picture_iou"] + 0.1
    assert rows[-1]["picture_db"] > rows[0]["picture_db"] + 3


@pytest.mark.parametrize("kind", ["coarse", "fine"])
def test_several_processes_hold_on_to_the_picture_once(kind, monkeypatch):
    def states(accumulate):
        size = {"steps": 2, "resolution": 16, "views_per_step": 2, "accumulate": accumulate}
        if kind == "coarse":
            settings = CoarseSettings(**size, opacity=0.0)
            stage = CoarseStage(settings, silent, torch.device("cpu"), 0, Asset(picture=shown()))
        else:
            settings = FineSettings(**size, tets=12)
            stage = FineStage(settings, silent, torch.device("cpu"), 0, Asset(picture=shown()))
        rows = [stage.step() for _ in range(2)]
        stage.guidance = None  # has no state
        return stage.state_dict(), [{k: row[k] for k in ("picture_iou", "picture_db", "grad_norm")} for row in rows]

    def join(leaves, totals):  # with another process that did the very same
        for leaf in leaves:
            leaf.grad = None if leaf.grad is None else 2 * leaf.grad
        totals.update({name: 2 * value for name, value in totals.items()})

    alone, rows = states(2)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    monkeypatch.setattr(parallel, "join", join)
    together, rows_together = states(1)
    assert all(torch.equal(value, together[name]) for name, value in alone.items())
    assert rows_together == rows


def test_depth_pulls_by_its_order_alone():
    depth = torch.linspace(0, 1, 64)[None, :, None].expand(64, 64, 1).contiguous()
    picture = shown(depth=depth)
    colour = (picture.colour * picture.mask + 0.5 * (1 - picture.mask))[None]
    mask = picture.mask[None]
    same, other = (picture.loss(colour, mask, mask * (3 + s * 0.2 * depth[None]))[0] for s in (1, -1))
    assert float(same) < 1e-2 * float(other)


def test_the_nearest_caption_is_the_one_whose_embedding_is_nearest():
    class Scorer:
        def embed_texts(self, texts):
            return torch.eye(3)[: len(texts)]

        def embed_images(self, images):
            return images.mean((1, 2))

    red = Picture(torch.tensor([1.0, 0, 0]).expand(8, 8, 3), torch.ones(8, 8, 1), None, PictureSettings())
    assert nearest_caption(red, Scorer(), ["a red ball", "a green ball", "a blue ball"])[0] == "a red ball"
