"""The exact denoiser of a finite set of images, against brute force; the renders behind it."""

import numpy as np
import pytest
import torch

from stages.cameras import CameraSettings, orbit_views, sample_views
from stages.errors import UserError
from stages.guidance.exact import (
    ReferencePrior,
    ReferenceSettings,
    class_views,
    crease_normals,
    fit_scene,
    load_reference,
    mixture_noise,
)
from stages.guidance.guidance import Guidance, GuidanceSettings
from stages.guidance.prior import ViewContext, add_noise
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.files.read import read_mesh
from stages.mesh.mesh import Mesh
from stages.prompts import PromptSettings, ViewPrompts, view_class
from stages.render.shade import Shading


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_of_a_single_image_is_exact_whatever_was_added():
    image, eps = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    alpha_bar = torch.tensor([0.7, 0.05], dtype=torch.float64)
    got = mixture_noise(add_noise(image, eps, alpha_bar), image[:, None], alpha_bar)
    torch.testing.assert_close(got, eps)


@pytest.mark.parametrize("std", [0.0, 0.4])
def test_mixture_noise_is_the_score_of_the_mixture_density(std):
    images = random(1, 5, 3, 2, 2)
    alpha_bar = torch.tensor([0.3], dtype=torch.float64)
    z = random(1, 3, 2, 2, seed=2).requires_grad_()
    variance = alpha_bar * std**2 + 1 - alpha_bar
    distance = (z[:, None] - alpha_bar.sqrt() * images).square().sum((2, 3, 4))
    log_density = torch.logsumexp(-distance / (2 * variance), 1).sum()
    (score,) = torch.autograd.grad(log_density, z)
    got = mixture_noise(z.detach(), images, alpha_bar, std)
    torch.testing.assert_close(got, -(1 - alpha_bar).sqrt() * score)  # eps = -sigma * score
    assert (torch.softmax(-distance / (2 * variance), 1).max() < 0.99).item()  # a real mixture, not one winner


def test_mixture_noise_is_the_mean_noise_given_the_noisy_image():
    images = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64).view(1, 3, 1, 1, 1)
    alpha_bar, std, z = torch.tensor([0.5], dtype=torch.float64), 0.2, 0.3
    generator = torch.Generator().manual_seed(0)
    n = 2_000_000
    which = torch.randint(3, (n,), generator=generator)
    x = images.flatten()[which] + std * torch.randn(n, generator=generator, dtype=torch.float64)
    eps = torch.randn(n, generator=generator, dtype=torch.float64)
    near = (0.5**0.5 * (x + eps) - z).abs() < 0.01
    got = mixture_noise(torch.full((1, 1, 1, 1), z, dtype=torch.float64), images, alpha_bar, std).item()
    assert got == pytest.approx(eps[near].mean().item(), abs=5 * eps[near].std().item() / near.sum().item() ** 0.5)


def test_weights_survive_distances_far_beyond_float32_exponents():
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])[None]
    z = torch.full((1, 3, 64, 64), 0.9)
    got = mixture_noise(z, images, torch.tensor([0.999]))
    expected = mixture_noise(z, images[:, 1:], torch.tensor([0.999]))
    torch.testing.assert_close(got, expected)


def two_tone_box(half=0.4) -> Mesh:
    """A box whose corners are red below and green above."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * half
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([f for a, b, c, d in quads for f in ((a, b, c), (a, c, d))], np.int32)
    colours = np.where(corners[:, 1:2] > 0, [[0.1, 0.6, 0.1]], [[0.7, 0.1, 0.1]]).astype(np.float32)
    return Mesh(corners, faces, colours)


def test_box_of_the_tests_is_solid():
    assert two_tone_box().signed_volume() == pytest.approx(0.8**3, rel=1e-5)


def test_guidance_with_the_exact_pose_is_noise_free_reconstruction():
    prior = ReferencePrior(two_tone_box(), ReferenceSettings(resolution=24))
    settings = GuidanceSettings(scale=1.0, t_min=0.4, t_max=0.4)
    guidance = Guidance(prior, settings, ViewPrompts("box"), torch.Generator().manual_seed(0))
    views, backdrop = orbit_views([20.0, 140.0], 25.0), torch.rand(2, 24, 24, 3)
    images = torch.rand(2, 24, 24, 3, requires_grad=True)
    guidance(images, views, 0.0, backdrop=backdrop).loss.backward()
    target = linear_to_srgb(prior.render(views, backdrop=backdrop))
    srgb = linear_to_srgb(images.detach())
    alpha_bar = prior.alphas_cumprod[400].item()
    # grad on x in [-1, 1]: w alpha / sigma (x - y) / B, and x = 2 srgb - 1
    expected = (1 - alpha_bar) * (alpha_bar / (1 - alpha_bar)) ** 0.5 * 2 * (srgb - target) / 2 * 2
    twin = images.detach().requires_grad_()
    linear_to_srgb(twin).backward(expected)
    torch.testing.assert_close(images.grad, twin.grad, rtol=1e-3, atol=1e-4)


def test_target_itself_gets_no_gradient_and_full_agreement():
    prior = ReferencePrior(two_tone_box(), ReferenceSettings(resolution=32))
    guidance = Guidance(prior, GuidanceSettings(scale=1.0), ViewPrompts("box"), torch.Generator().manual_seed(0))
    views = orbit_views([0.0, 100.0], 10.0)
    shading, grey = Shading(0.3, 0.7), torch.full((2, 32, 32, 3), 0.2)
    images = prior.render(views, shading, grey).requires_grad_()
    output = guidance(images, views, 0.2, backdrop=grey, shading=shading)
    output.loss.backward()
    assert images.grad.abs().max() < 1e-3 and output.metrics["agreement_db"] > 60
    other = guidance(images, views, 0.2, backdrop=grey, shading=Shading(0.3, 0.7, textureless=True))
    assert other.metrics["agreement_db"] < 30


def test_render_shows_colour_shading_and_background_where_they_belong():
    prior = ReferencePrior(two_tone_box(), ReferenceSettings(resolution=64, supersample=4))
    view = orbit_views([0.0], 0.0)
    backdrop = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    image = prior.render(view, Shading(), backdrop)
    torch.testing.assert_close(image[0, :8], backdrop[0, :8])
    top, bottom = image[0, 25, 32], image[0, 39, 32]
    assert top[1] > 0.4 > top[0] and bottom[0] > 0.4 > bottom[1]
    bare = prior.render(view, Shading(0.25, 0.0, textureless=True), backdrop)
    torch.testing.assert_close(bare[0, 32, 32], torch.full((3,), 0.2))


def test_supersampled_render_converges_to_pixel_coverage():
    views = orbit_views([30.0], 20.0)
    white, black = torch.ones(3), torch.zeros(3)
    coverage = {}
    for n in (1, 2, 8):
        prior = ReferencePrior(two_tone_box(), ReferenceSettings(resolution=32, supersample=n))
        coverage[n] = 1 - (prior.render(views, backdrop=white) - prior.render(views, backdrop=black)).mean(-1)
    assert set(coverage[1].unique().tolist()) <= {0.0, 1.0}
    error = {n: (coverage[n] - coverage[8]).abs().mean().item() for n in (1, 2)}
    assert error[2] < 0.6 * error[1]


def test_creases_stay_sharp_and_seams_do_not_show():
    box = two_tone_box()
    normals = crease_normals(box.vertices, box.faces)
    np.testing.assert_allclose(normals, np.repeat(box.face_normals()[:, None], 3, 1), atol=1e-6)
    steps = np.linspace(0, 2 * np.pi, 33)[:-1]
    ring = np.stack([np.cos(steps), np.zeros(32), np.sin(steps)], -1)
    vertices = np.concatenate([ring, ring + np.array([0, 1, 0])]).astype(np.float32)
    k, n = np.arange(32), (np.arange(32) + 1) % 32
    faces = np.concatenate([np.stack([k, k + 32, n], -1), np.stack([n, k + 32, n + 32], -1)]).astype(np.int32)
    split = crease_normals(vertices[faces].reshape(-1, 3), np.arange(3 * len(faces), dtype=np.int32).reshape(-1, 3))
    np.testing.assert_allclose(split, crease_normals(vertices, faces), atol=1e-6)
    radial = vertices[faces] * [1, 0, 1]
    assert (np.abs(np.einsum("fij,fij->fi", split, radial)) > 0.995).all()  # round a cylinder, smooth


@pytest.mark.parametrize("sides", [False, True])
def test_class_views_belong_to_the_class_of_the_asked_view(sides):
    prompts, settings = PromptSettings(sides=sides), ReferenceSettings(class_azimuths=5, class_elevations=3)
    views = sample_views(CameraSettings(elevation_deg=(-10.0, 80.0)), 60, torch.Generator().manual_seed(0))
    values = set()
    for k in range(len(views)):
        group = class_views(views[k], settings, prompts)
        name = view_class(views.azimuth_deg[k].item(), views.elevation_deg[k].item(), prompts)
        values.add(name)
        assert len(group) == 15
        for azimuth, elevation in zip(group.azimuth_deg.tolist(), group.elevation_deg.tolist(), strict=True):
            assert view_class(azimuth, elevation, prompts) == name
        torch.testing.assert_close(group.fov_deg, views.fov_deg[k].expand(15))
        torch.testing.assert_close(group.position.norm(dim=-1), views.position[k].norm().expand(15))
        torch.testing.assert_close(
            (group.light - group.position).norm(dim=-1), (views.light[k] - views.position[k]).norm().expand(15)
        )
    assert len(values) == (5 if sides else 4)


def test_class_pose_posterior_picks_the_nearest_view_at_low_noise():
    settings = ReferenceSettings(resolution=24, pose="class", class_azimuths=4, class_elevations=2)
    prior = ReferencePrior(two_tone_box(), settings)
    context = ViewContext(orbit_views([10.0, 170.0], 20.0), torch.full((2, 24, 24, 3), 0.5))
    images = prior.image_set(context)
    assert images.shape == (2, 8, 3, 24, 24)
    t = torch.tensor([5, 5])
    eps = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    alpha_bar = prior.alphas_cumprod[t]
    got = prior.predict_noise(add_noise(images[:, 3], eps, alpha_bar), t, prior.embed(["", ""]), context)
    torch.testing.assert_close(got, eps, rtol=1e-3, atol=1e-3)
    high = torch.tensor([999, 999])
    alpha_bar = prior.alphas_cumprod[high]
    z_t = add_noise(images[:, 3], eps, alpha_bar)
    blurred = prior.predict_noise(z_t, high, prior.embed(["", ""]), context)
    assert (blurred - eps).abs().max() > 1e-3


def test_a_mesh_whose_squares_float32_cannot_hold_is_fitted_without_a_warning():
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32) * np.float32(1e37)
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]], np.int32)
    with np.errstate(all="raise", under="ignore"):
        radius = np.linalg.norm(fit_scene(Mesh(corners, faces)).vertices, axis=1).max()
    assert radius == pytest.approx(0.8, abs=0.2)


def test_mesh_outside_the_scene_is_fitted_and_one_inside_is_left_alone():
    small, large = two_tone_box(0.3), two_tone_box(3.0)
    assert fit_scene(small) is small
    moved = Mesh(large.vertices + 5, large.faces, large.colours)
    radius = np.linalg.norm(fit_scene(moved).vertices, axis=1)
    np.testing.assert_allclose(radius, 0.8, atol=1e-5)


def test_mesh_files_keep_colours_and_textures(tmp_path):
    import trimesh
    from PIL import Image

    box = two_tone_box()
    srgb = (linear_to_srgb(torch.from_numpy(box.colours)).numpy() * 255).round().astype(np.uint8)
    trimesh.Trimesh(box.vertices, box.faces, vertex_colors=srgb, process=False).export(tmp_path / "box.ply")
    back = read_mesh(tmp_path / "box.ply")
    np.testing.assert_allclose(back.colours, box.colours, atol=0.01)
    linear = (box.colours * 255).round().astype(np.uint8)
    trimesh.Trimesh(box.vertices, box.faces, vertex_colors=linear, process=False).export(tmp_path / "box.glb")
    np.testing.assert_allclose(read_mesh(tmp_path / "box.glb").colours, box.colours, atol=0.01)

    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4], picture[4:] = (255, 0, 0), (0, 0, 255)  # red above, blue below
    quad = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(picture))
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    trimesh.Trimesh(quad, faces, visual=visual, process=False).export(tmp_path / "quad.glb")
    prior = load_reference(ReferenceSettings(mesh=str(tmp_path / "quad.glb"), resolution=64))
    assert prior.mesh.texture is not None
    image = prior.render(orbit_views([0.0], 0.0), backdrop=torch.zeros(3))[0]
    torch.testing.assert_close(image[26, 32], torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(image[38, 32], torch.tensor([0.0, 0.0, 1.0]), atol=0.02, rtol=0)


def test_base_colour_factor_is_linear(tmp_path):
    import trimesh

    box = two_tone_box()
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[128, 64, 255, 255])
    visual = trimesh.visual.TextureVisuals(material=material)
    trimesh.Trimesh(box.vertices, box.faces, visual=visual, process=False).export(tmp_path / "plain.glb")
    colours = read_mesh(tmp_path / "plain.glb").colours
    np.testing.assert_allclose(colours[0], [128 / 255, 64 / 255, 1.0], atol=0.01)
    assert srgb_to_linear(torch.tensor(0.5)) < 0.25  # so a wrong conversion would not pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.glb", None, "no such file"),
        ("broken.glb", b"glTF rubbish", "Cannot read the mesh"),
        ("points.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
         b"property float z\nend_header\n0 0 0\n", "no triangles"),
        ("text.xyzzy", b"hello", "Cannot read the mesh"),
    ],
)  # fmt: skip
def test_unreadable_meshes_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_mesh(tmp_path / name)
