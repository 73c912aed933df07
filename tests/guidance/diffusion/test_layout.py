"""Layout: words become objects that a camera sees; only a prior with a layout is conditioned on its picture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.cameras import CameraSettings, orbit_views, sample_views, to_clip
from stages.errors import UserError
from stages.guidance.diffusion.layout import CLASSES, Layout, Objects, Setting, look, radiance, radiance_at
from stages.guidance.diffusion.layout_condition import CACHE_SIZE, LayoutCondition
from stages.guidance.diffusion.prior import load_prior
from stages.guidance.diffusion.settings import DiffusionSettings
from stages.guidance.prior import ViewContext, add_noise
from stages.kernels.reference.grids import EXTENT
from stages.kernels.srgb import linear_to_srgb
from stages.pocket import models
from stages.pocket.train.export import save_prior
from stages.render.shade import ALBEDO, TEXTURELESS_ALBEDO, Shading

GREY = torch.full((3,), 0.4)


def setting(views, ambient: float = 1.0, bare: float = 0.0, under: torch.Tensor = GREY) -> Setting:
    every = torch.ones(len(views))
    return Setting(views, ambient * every, bare * every, under.expand(len(views), 3))


def speck(x: float, y: float, z: float, side: int = 32, half: float = 0.12) -> Objects:
    """One object: a dense red cube around a point, its normals towards +z."""
    at = ((torch.arange(side) + 0.5) / side * 2 - 1) * EXTENT
    place = torch.stack(torch.meshgrid(at, at, at, indexing="ij"), -1)
    inside = ((place - torch.tensor([x, y, z])).abs() < half).all(-1)
    grid = torch.zeros(1, side, side, side, 8)
    grid[..., 0] = torch.where(inside, 20.0, -20.0)
    grid[..., 1], grid[..., 6] = 1.0, 1.0
    alone = torch.tensor([[[1.0, 0, 0, 0], [1.0, 0, 0, 0]]])
    return Objects(grid, torch.tensor([[0, -1]], dtype=torch.int32), alone)


@pytest.mark.slow
def test_a_point_of_the_volume_is_seen_where_the_camera_projects_it():
    views = sample_views(CameraSettings(), 6, torch.Generator().manual_seed(2))
    point = torch.tensor([[0.5, 0.3, -0.2]])
    opacity = look(speck(*point[0].tolist(), side=64, half=0.04), torch.zeros(6, dtype=torch.long), setting(views), 64)[
        :, 3
    ]
    clip = to_clip(point, views)[:, 0]
    for k in range(6):
        rows, columns = (opacity[k] > 0.5).nonzero().float().mean(0)
        assert (columns + 0.5) / 32 - 1 == pytest.approx(float(clip[k, 0] / clip[k, 3]), abs=0.03)  # a pixel is 0.03
        assert 1 - (rows + 0.5) / 32 == pytest.approx(float(clip[k, 1] / clip[k, 3]), abs=0.03)


def test_light_backdrop_and_clay_are_those_of_the_shading_module():
    views = orbit_views([0.0], 0.0)
    objects, rows = speck(0.0, 0.0, 0.0), torch.zeros(1, dtype=torch.long)
    for ambient, bare in ((1.0, 0.0), (0.4, 0.0), (0.4, 1.0)):
        picture = look(objects, rows, setting(views, ambient, bare), 33)[0]
        assert torch.allclose(picture[:3, 0, 0], linear_to_srgb(GREY), atol=1e-5) and picture[3, 0, 0] == 0
        surface = torch.tensor([0.0, 0.0, 0.12])
        towards = torch.nn.functional.normalize(views.light[0] - surface, dim=0)
        albedo = torch.full((3,), TEXTURELESS_ALBEDO) if bare else torch.tensor([1.0, 0, 0])
        expected = albedo * (ambient + (1 - ambient) * towards[2])
        assert torch.allclose(picture[:3, 16, 16], linear_to_srgb(expected), atol=0.02)


def test_density_at_points_is_what_a_ray_through_them_meets():
    thing = speck(0.2, -0.1, 0.3, half=0.2)
    thing = Objects(thing.grids, thing.index, torch.tensor([[[0.8, 0.1, 0.05, -0.1], [1.0, 0, 0, 0]]]))
    origins = torch.tensor([[[0.1, -0.03, 3.0], [0.26, -0.03, 3.0], [0.6, 0.5, 3.0]]])
    directions = torch.tensor([0.0, 0.0, -1.0]).expand_as(origins).contiguous()
    views = orbit_views([0.0], 0.0)
    ray_opacity = radiance(thing, torch.zeros(1, dtype=torch.long), setting(views), origins, directions)[0, :, 3]
    depth = torch.linspace(-1.5, 1.5, 3001)
    for ray in range(3):
        points = torch.stack([*(origins[0, ray, k].expand_as(depth) for k in (0, 1)), depth], -1)
        density, _ = radiance_at(thing, points)
        opacity = 1 - torch.exp(-density.sum() * 3.0 / 3000)
        torch.testing.assert_close(ray_opacity[ray], opacity, atol=0.02, rtol=0)


def test_supersampling_averages_in_linear_light_and_keeps_the_backdrops_pixels():
    views, rows = orbit_views([20.0], 10.0), torch.zeros(1, dtype=torch.long)
    under = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    one = replace(setting(views), under=under)
    picture = look(speck(0.4, 0.0, 0.0), rows, one, 8, supersample=2)
    clear = picture[0, 3] == 0
    assert clear.any() and not clear.all()
    assert torch.allclose(picture[0, :3, clear], linear_to_srgb(under[0]).permute(2, 0, 1)[:, clear], atol=1e-5)
    fine = look(speck(0.4, 0.0, 0.0), rows, setting(views), 16)[:, 3:]
    coarse = look(speck(0.4, 0.0, 0.0), rows, setting(views), 8, supersample=2)[:, 3:]
    assert torch.allclose(torch.nn.functional.avg_pool2d(fine, 2), coarse, atol=1e-6)


WORDS = {"kinds": ["ball", "cube"], "patterns": ["striped"], "colours": ["red", "blue"], "joints": ["on"]}
TOKENS = {word: k for k, word in enumerate([*(word for name in CLASSES for word in WORDS[name]), "a"])}


def small(fine: bool = False) -> Layout:
    """A layout with few words, whose reader knows tokens that are one-hot."""
    torch.manual_seed(0)
    layout = Layout(len(TOKENS), WORDS, code=16, channels=(4, 4, 4), paints=3, fine=fine)
    layout.word_logits = lambda text: 50 * text
    return layout.eval().requires_grad_(False)


def one_hot(*texts: str) -> torch.Tensor:
    """Texts as one-hot tokens [M, 9, W]."""
    tokens = torch.full((len(texts), 9), TOKENS["a"])
    for k, text in enumerate(texts):
        words = text.split()
        tokens[k, : len(words)] = torch.tensor([TOKENS[word] for word in words])
    return torch.nn.functional.one_hot(tokens, len(TOKENS)).float()


def test_words_are_sorted_by_class_and_by_the_joint_between_the_objects():
    reading = small().read(one_hot("a red striped ball", "a blue cube on a red ball", ""))
    assert reading.kinds.round().tolist() == [[[1, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 0], [0, 0]]]
    assert reading.patterns.round().tolist() == [[[1], [0]], [[0], [0]], [[0], [0]]]
    assert reading.colours.round().tolist() == [[[1, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 0], [0, 0]]]
    assert reading.joints.round().tolist() == [[0], [1], [0]] and reading.pair.tolist() == [False, True, False]
    twice = small().read(one_hot("a red red ball"))
    assert twice.colours[0, 0].round().tolist() == [1, 0]


@pytest.mark.parametrize("fine", [False, True])
def test_objects_of_singles_and_pairs_are_counted_and_placed(fine):
    layout = small(fine)
    placement = torch.rand(3, 2, 4)
    texts = ("a red ball on a blue cube", "a striped cube", "a blue ball on a blue ball")
    objects = layout.placed(layout.read(one_hot(*texts)), placement)
    assert objects.index.tolist() == [[0, 1], [2, -1], [3, 4]]
    assert objects.grids.shape == (5, *[64 if fine else 32] * 3, 8)
    assert torch.equal(objects.placement[0], placement[0]) and objects.placement[1, 0].tolist() == [1, 0, 0, 0]
    if not fine:
        assert (objects.grids[..., 1:4] >= 0).all() and (objects.grids[..., 1:4] <= 1).all()


@pytest.mark.parametrize("fine", [False, True])
def test_a_kind_has_one_shape_in_all_colours_and_a_colour_paints_all_kinds_alike(fine):
    layout = small(fine)
    if fine:
        torch.nn.init.normal_(layout.eighths, std=0.1)
    red, blue, cube = layout.objects(layout.read(one_hot("a red ball", "a blue ball", "a red cube"))).grids
    assert torch.allclose(red[..., 0], blue[..., 0], atol=1e-6) and torch.allclose(red[..., 4:7], blue[..., 4:7])
    assert not torch.allclose(red[..., 1:4], blue[..., 1:4], atol=1e-3)
    assert not torch.allclose(red[..., 0], cube[..., 0], atol=1e-3)


def test_equal_shapes_are_made_once():
    layout = small()
    batch_sizes = []
    layout.volume.register_forward_hook(lambda module, inputs, output: batch_sizes.append(len(output)))
    layout.objects(layout.read(one_hot("a red ball", "a blue ball on a red ball", "a red cube")))
    assert batch_sizes == [2]


def test_the_finer_level_begins_as_the_interpolated_coarser_one():
    coarse, fine = small(), small(fine=True)
    fine.load_state_dict(coarse.state_dict(), strict=False)
    shapes, colours = torch.tensor([[1.0, 0, 1]]), torch.tensor([[0.0, 1]])
    a, b = coarse.grids(shapes, colours), fine.grids(shapes, colours)
    expected = torch.nn.functional.interpolate(a.permute(0, 4, 1, 2, 3), scale_factor=2, mode="trilinear")
    torch.testing.assert_close(b, expected.permute(0, 2, 3, 4, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fine", [False, True])
def test_shapes_at_points_are_what_their_grids_hold_there(fine):
    layout = small(fine)
    if fine:
        torch.nn.init.normal_(layout.eighths, std=0.1)
    shapes, colours = torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.tensor([[0.0, 1], [1, 0]])
    points = EXTENT * (2 * torch.rand(2, 500, 3, generator=torch.Generator().manual_seed(0)) - 1)
    values = layout.at(shapes, points)
    colour = torch.einsum("nqp,npk->nqk", values[..., 4:], layout.palettes(colours))
    cells = layout.grids(shapes, colours).permute(0, 4, 1, 2, 3)
    where = (points.flip(-1) / EXTENT)[:, :, None, None]
    samples = torch.nn.functional.grid_sample(cells, where, align_corners=False, padding_mode="border")[..., 0, 0]
    samples = samples.transpose(1, 2)
    torch.testing.assert_close(
        torch.cat([values[..., :1], colour, values[..., 1:4]], -1), samples[..., :7], atol=1e-4, rtol=0
    )


def test_an_object_on_the_right_from_the_front_is_on_the_left_from_behind():
    views, rows = orbit_views([0.0, 180.0], 0.0), torch.zeros(2, dtype=torch.long)
    front, behind = look(speck(0.4, 0.0, 0.0), rows, setting(views), 16)[:, 3]
    assert front[:, 8:].max() > 0.5 and not front[:, :8].any()
    assert behind[:, :8].max() > 0.5 and not behind[:, 8:].any()


@pytest.mark.slow
@pytest.mark.parametrize("fine", [False, True])
def test_a_picture_teaches_everything_that_makes_shapes_and_colours(fine):
    layout = small(fine).requires_grad_()
    if fine:
        torch.nn.init.normal_(layout.eighths, std=0.1)
    reading = layout.read(one_hot("a red ball on a blue cube"))
    placement = torch.tensor([[[0.5, 0, 0.3, 0], [0.5, 0, -0.3, 0]]])
    picture = look(
        layout.placed(reading, placement), torch.zeros(1, dtype=torch.long), setting(orbit_views([30.0])), 16
    )
    (picture * torch.rand_like(picture)).sum().backward()
    for name, weight in layout.named_parameters():
        if not name.startswith(("reader.", "box.", "place.")):  # taught by themselves
            assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.fixture(scope="module")
def saved_prior(tmp_path_factory):
    """A folder of the pocket's architecture with random weights, whose layout has an effect on the UNet."""
    torch.manual_seed(0)
    prior_folder = tmp_path_factory.mktemp("prior") / "pixel"
    tokenizer, condition = models.make_tokenizer(), models.make_condition("pixel", models.make_layout(fine=False))
    for layer in condition.levels:
        torch.nn.init.normal_(layer.weight, std=0.1)
    save_prior(
        prior_folder,
        pipeline="IFPipeline",
        unet=models.make_unet("pixel"),
        scheduler=models.make_scheduler(),
        tokenizer=tokenizer,
        text_encoder=models.make_text_encoder(len(tokenizer)),
        layout=condition,
    )
    return prior_folder


@pytest.fixture
def folder(saved_prior, tmp_path):
    return Path(shutil.copytree(saved_prior, tmp_path / "pixel"))


@pytest.mark.slow
def test_a_prior_with_the_part_draws_by_the_camera_and_without_the_setting_it_does_not(folder):
    views = orbit_views([0.0, 120.0], 15.0)
    z = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)
    t = torch.tensor([600, 600])

    def predict(prior, context):
        return prior.predict_noise(z, t, prior.embed(["a red mug"]).expand(2, -1, -1), context)

    prior = load_prior(folder, "cpu")
    context = ViewContext(views, GREY, ALBEDO)
    front, side = predict(prior, context)
    assert (front - side).abs().max() > 1e-3
    assert not torch.equal(front, predict(prior, ViewContext(views, 0.5 * GREY, ALBEDO))[0])
    assert not torch.equal(front, predict(prior, ViewContext(views, GREY, Shading(0.4, 0.6)))[0])
    in_parts = load_prior(folder, "cpu", settings=DiffusionSettings(max_batch=3))
    for one in (prior, in_parts):
        embedding = one.embed(["a red mug"]).expand(4, -1, -1)
        twice = one.predict_noise(z.repeat(2, 1, 1, 1), t.repeat(2), embedding, context.repeat(2))
        assert torch.allclose(twice, torch.stack([front, side, front, side]), atol=1e-4)

    plain = load_prior(folder, "cpu", settings=DiffusionSettings(camera=False))
    a, b = predict(plain, context)
    assert plain.layout is None and torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, front, atol=1e-3)
    assert torch.equal(predict(prior, None), predict(plain, None))  # no conditions without a backdrop
    assert torch.equal(predict(prior, ViewContext(views)), predict(plain, None))


def test_a_picture_of_the_backdrop_counts_pixel_by_pixel(folder):
    condition = load_prior(folder, "cpu").layout
    views, text = orbit_views([30.0], 10.0), torch.randn(1, models.TOKENS, models.WIDTH)
    flat = condition.picture(text, ViewContext(views, GREY.expand(1, 64, 64, 3), ALBEDO))
    assert torch.allclose(flat, condition.picture(text, ViewContext(views, GREY, ALBEDO)), atol=1e-5)
    split = GREY.repeat(1, 64, 64, 1)
    split[:, :, 32:] = 0.9
    half = condition.picture(text, ViewContext(views, split, ALBEDO))
    assert torch.equal(half[:, 3], flat[:, 3]) and torch.allclose(half[0, :, 0, 0], flat[0, :, 0, 0], atol=1e-5)
    assert half[0, 0, 0, 63] > flat[0, 0, 0, 63] + 0.2


def test_the_mean_is_left_out_of_what_the_network_sees_and_its_noise_stays(folder):
    """A network that predicts v of x - mu exactly gives the noise of x exactly."""
    prior = load_prior(folder, "cpu")
    x, mean, eps = torch.randn(3, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([700, 200])
    alpha_bar = prior.alphas_cumprod[t]
    inputs = []

    def exact(network, z, *rest, **conditions):
        inputs.append(z)
        a = alpha_bar.view(-1, 1, 1, 1)
        return a.sqrt() * eps - (1 - a).sqrt() * (x - mean)

    prior.denoiser.call = exact
    embedding = prior.embed(["a red mug"]).expand(2, -1, -1)
    noise = prior.noise(prior.unet, add_noise(x, eps, alpha_bar), t, embedding, mean=mean)
    assert torch.allclose(inputs[0], add_noise(x - mean, eps, alpha_bar), atol=1e-5)
    assert torch.allclose(noise, eps, atol=1e-5)


def test_objects_are_made_once_a_prompt_whatever_the_view_and_only_the_latest_are_kept():
    condition = LayoutCondition(small(), 32, 8, (16, 16))
    calls = []
    condition.layout.volume.register_forward_hook(lambda module, inputs, output: calls.append(1))
    context = ViewContext(orbit_views([0.0, 90.0], 10.0), GREY)

    def picture(*texts: str) -> torch.Tensor:
        return condition.picture(one_hot(*texts), context)

    first = picture("a red ball", "red ball a a")  # read alike
    assert len(calls) == 1 and torch.equal(picture("a red ball", "a red ball"), first) and len(calls) == 1
    assert torch.equal(picture("a red ball", "a red cube")[0], first[0]) and len(calls) == 2
    others = [
        f"a {colour} {kind} on a {base}"
        for colour in ("red", "blue")
        for kind in ("ball", "cube")
        for base in WORDS["kinds"]
    ]
    for text in others[:CACHE_SIZE]:
        picture(text, text)
    assert len(condition._cache) == CACHE_SIZE
    before = len(calls)
    picture("a red ball", "a red ball")
    assert len(calls) == before + 1  # the oldest had to go


@pytest.mark.slow
def test_saved_layout_comes_back_and_a_damaged_one_is_refused(folder):
    condition = models.make_condition("pixel", models.make_layout(fine=False))
    condition.save(folder / "layout")
    back = LayoutCondition.load(folder / "layout")
    shapes, colours = torch.eye(1, 29), torch.eye(1, 12)
    assert torch.allclose(back.layout.grids(shapes, colours), condition.layout.grids(shapes, colours), atol=5e-2)
    assert all(not p.requires_grad for p in back.parameters())
    other = models.make_condition("latent", back.layout)
    torch.nn.init.normal_(other.mean.weight, std=0.1)
    torch.nn.init.normal_(other.edges[-1].weight, std=0.1)
    latent_folder = folder.with_name("latent") / "layout"
    other.save(latent_folder, models.PIXEL_LAYOUT)
    whole = sum(p.numel() for p in other.layout.parameters()) * 2
    translators = (other.levels, other.mean, other.edges)
    translator_bytes = sum(p.numel() for part in translators for p in part.parameters()) * 2
    assert (
        (latent_folder / "model.safetensors").stat().st_size < translator_bytes + 4000 < translator_bytes + whole
    )  # what is the same is not twice there
    again = LayoutCondition.load(latent_folder)
    assert torch.allclose(again.mean.weight, other.mean.weight, atol=1e-3)
    picture = torch.rand(1, 4, other.side, other.side)
    assert torch.allclose(again.conditions(picture)["mean"], other.conditions(picture)["mean"], atol=0.05)
    other.edges[-1].weight.data.zero_()
    assert not torch.allclose(again.conditions(picture)["mean"], other.conditions(picture)["mean"], atol=0.05)
    assert torch.equal(again.layout.palette, back.layout.palette)
    (folder / "layout" / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="Cannot load the layout"):
        load_prior(folder, "cpu")
    load_prior(folder, "cpu", settings=DiffusionSettings(camera=False))


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["pixel", "latent"])
def test_both_unets_take_the_conditions_of_their_layouts(prior):
    condition, unet = models.make_condition(prior, models.make_layout(fine=False)), models.make_unet(prior)
    side = {"pixel": 64, "latent": 128}[prior]
    conditions = condition.conditions(torch.rand(2, 4, side, side))
    z, text = torch.randn(2, unet.config.in_channels, *[models.GRID[prior]] * 2), torch.randn(2, 20, models.WIDTH)
    channels = 3 if prior == "pixel" else models.LATENT_CHANNELS
    assert conditions.pop("mean").shape == (2, channels, 64, 64)
    with torch.no_grad():
        plain, zeros = unet(z, 500, text).sample, unet(z, 500, text, **condition.zero_conditions(2)).sample
        assert torch.allclose(plain, zeros, atol=1e-5)
        assert torch.allclose(unet(z, 500, text, **conditions).sample, plain, atol=1e-5)  # before it is taught
        for k, layer in enumerate(condition.levels):
            torch.nn.init.normal_(layer.weight, std=0.1)
            conditions = condition.conditions(torch.rand(2, 4, side, side))
            conditions.pop("mean")
            assert not torch.allclose(unet(z, 500, text, **conditions).sample, plain, atol=1e-4), k
            torch.nn.init.zeros_(layer.weight)


def test_the_folder_is_still_one_for_diffusers_own_pipeline(folder):
    from diffusers import UNet2DConditionModel

    prior = load_prior(folder, "cpu")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    z, text = torch.randn(1, 3, 64, 64), prior.embed(["a red mug, front view"])
    with torch.no_grad():
        v = unet(torch.nn.functional.pixel_unshuffle(z, 4), 500, text).sample
    a = prior.alphas_cumprod[500]
    eps = a.sqrt() * torch.nn.functional.pixel_shuffle(v, 4) + (1 - a).sqrt() * z
    assert torch.allclose(prior.predict_noise(z, torch.tensor([500]), text), eps.float(), atol=1e-3)
