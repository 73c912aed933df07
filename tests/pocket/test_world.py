"""The pocket world: captions and specs are one to one, every mesh is sound, and the split is fair and in sync."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from stages.kernels.srgb import srgb_to_linear as camera_srgb_to_linear
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build, build_placed
from stages.pocket.palette import COLOURS, Palette, Vary, srgb_to_linear
from stages.pocket.pattern import PATTERNS, apply_pattern, cut, refine
from stages.pocket.shapes import box, ellipsoid
from stages.pocket.world import KINDS, Spec, all_specs, caption, geometry_caption, held_out, parse


def welded(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Faces [F, 3] over unique positions."""
    _, number = np.unique(np.round(vertices, 7), axis=0, return_inverse=True)
    return number.reshape(-1)[faces]


def assert_closed(vertices: np.ndarray, faces: np.ndarray, where: str) -> None:
    """Every directed edge once, and its opposite once; no triangle with two corners in one place."""
    f = welded(vertices, faces)
    assert (f != np.roll(f, 1, 1)).all(), f"{where}: degenerate triangle"
    edges = np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
    keys = np.sort(edges[:, 0] * (f.max() + 1) + edges[:, 1])
    assert (np.diff(keys) > 0).all(), f"{where}: an edge used twice in one direction"
    assert np.array_equal(keys, np.sort(edges[:, 1] * (f.max() + 1) + edges[:, 0])), f"{where}: open edge"


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    return Mesh(vertices, faces).signed_volume()


@cache
def example_specs() -> tuple[Spec, ...]:
    """One plain spec per kind, every pattern on every patterned kind, every pair composition; colours in turn."""
    looks, out = set(), []
    colours = Counter()
    for spec in all_specs():
        look = (geometry_caption(spec), spec.pattern)
        if look not in looks and spec.colour == list(COLOURS)[colours[spec.kind] % 12]:
            looks.add(look)
            colours[spec.kind] += 5
            out.append(spec)
    return tuple(out)


def test_every_caption_parses_back_and_is_unique():
    captions = [caption(s) for s in all_specs()]
    assert len(set(captions)) == len(captions) > 10_000
    assert [parse(c) for c in captions] == list(all_specs())


def test_captions_read_as_the_grammar_says():
    assert caption(Spec("mug", "red")) == "a red mug"
    assert caption(Spec("ball", "orange", "striped")) == "an orange striped ball"
    pair = Spec("ball", "red", relation="on", other=Spec("table", "blue"))
    assert caption(pair) == "a red ball on a blue table"
    assert geometry_caption(pair) == "a ball on a table"
    assert geometry_caption(Spec("airplane", "red")) == "an airplane"
    assert caption(parse("  A green cube  next to an yellow cone. ")) == "a green cube next to a yellow cone"


@pytest.mark.parametrize("text", [
    "", "mug", "a mug", "a red", "red mug", "the red mug", "a red red mug", "a mug red", "a red striped table",
    "a red mug on", "on a red table", "a red mug on a table", "a red table on a red mug", "a red mug near a red table",
    "a red ball next a red cube", "a red ball on a red table on a red cube", "a red striped ball on a blue table",
    "a red ball on a blue striped cube", "a scarlet mug", "a red spaceship",
])  # fmt: skip
def test_text_outside_the_grammar_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


def test_words_are_exactly_the_words_of_all_captions():
    vocabulary = {w for s in all_specs() for w in (*caption(s).split(), *geometry_caption(s).split())}
    assert len(world.words()) == len(set(world.words()))
    assert set(world.words()) == vocabulary


def test_the_world_is_as_large_as_the_issue_asks():
    assert len(KINDS) == 26 and len(COLOURS) == 12
    srgb = np.array(list(COLOURS.values()))
    apart = np.linalg.norm(srgb[:, None] - srgb[None], axis=-1) + 9 * np.eye(12)
    assert apart.min() > 0.3  # two colours of the world are never close


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_closed_and_faces_outwards(kind):
    for seed in (None, 0, 1):
        for colour in ("red", "black", "white"):
            rng = None if seed is None else np.random.default_rng(seed)
            for i, part in enumerate(KINDS[kind].make(Vary(rng), Palette(colour, rng))):
                where = f"{kind}, part {i}, seed {seed}"
                assert_closed(part.vertices, part.faces, where)
                assert volume(part.vertices, part.faces) > 1e-6, where


@pytest.mark.slow
def test_every_look_builds_a_sound_normalised_mesh():
    assert len(example_specs()) == len(KINDS) + 3 * len(world.PATTERNED) + len(world._compositions())
    for spec in example_specs():
        mesh = build(spec, np.random.default_rng(3))
        name = caption(spec)
        assert mesh.vertices.dtype == np.float32 and mesh.faces.dtype == np.int32, name
        assert mesh.colours.dtype == np.float32 and mesh.colours.shape == mesh.vertices.shape, name
        assert np.isfinite(mesh.vertices).all() and mesh.colours.min() >= 0 and mesh.colours.max() <= 1, name
        assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(0.85, abs=1e-5), name
        assert np.abs(mesh.vertices.min(0) + mesh.vertices.max(0)).max() < 1e-5, name
        assert np.ptp(mesh.vertices, axis=0).min() > 0.2, name  # nothing is flat or thin as a hair
        assert mesh.signed_volume() > 0.02 and 40 <= len(mesh.faces) <= 16_000, name
        assert set(np.unique(mesh.faces)) == set(range(len(mesh.vertices))), name
        flat = mesh.colours[mesh.faces]
        assert (flat == flat[:, :1]).all(), name  # each face has one colour


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", world.PATTERNED)
def test_a_patterned_object_keeps_its_shape_and_its_main_colour_leads(kind, pattern):
    plain, patterned = build(Spec(kind, "blue")), build(Spec(kind, "blue", pattern))
    assert patterned.signed_volume() == pytest.approx(plain.signed_volume(), rel=1e-4)
    corners = patterned.vertices[patterned.faces].astype(np.float64)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    colour = patterned.colours[patterned.faces[:, 0]]
    main = np.abs(colour - srgb_to_linear(COLOURS["blue"])).max(1) < 1e-4
    white = np.abs(colour - srgb_to_linear((0.94, 0.94, 0.94))).max(1) < 1e-4
    share = area[main].sum() / area[main | white].sum()
    least = {"rocket": 0.2, "hat": 0.36}.get(kind, 0.45)  # a white nose and fins, a white band, count as the pattern
    assert least < share < 0.9


def test_patterns_leave_the_surface_closed_and_give_each_face_one_colour():
    for part in (ellipsoid(0.85, (0, 0, 0), (0, 0, 0)), box((1, 1, 1), (0, 0, 0), (0, 0, 0), bevel=0.05)):
        for pattern in PATTERNS:
            for square in (False, True):
                vertices, faces, second = apply_pattern(part.vertices, part.faces, pattern, square=square)
                f = welded(vertices, faces)
                f = f[(f != np.roll(f, 1, 1)).all(1)]  # a cut may pass within rounding of a vertex
                edges = np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
                net = Counter(map(tuple, edges.tolist()))
                net.subtract(Counter(map(tuple, edges[:, ::-1].tolist())))
                assert not any(net.values()), pattern
                assert volume(vertices, faces) == pytest.approx(volume(part.vertices, part.faces), rel=1e-6)
                assert not set(faces[second].reshape(-1)) & set(faces[~second].reshape(-1))
                assert 0.05 < second.mean() < 0.95


def test_refine_bounds_the_edges_and_cut_separates_the_signs():
    part = ellipsoid(1.0, (0, 0, 0), (0, 0, 0), sides=10)
    vertices, faces = refine(part.vertices, part.faces, 0.2)
    edges = vertices[faces] - vertices[np.roll(faces, 1, 1)]
    assert np.linalg.norm(edges, axis=-1).max() <= 0.2
    assert_closed(vertices, faces, "refined")
    vertices, faces, values = cut(vertices, faces, vertices[:, 1] - 0.123)
    assert ((values[faces] >= 0).all(1) | (values[faces] <= 0).all(1)).all()
    on_the_cut = vertices[values == 0]
    assert len(on_the_cut) > 20 and np.abs(on_the_cut[:, 1] - 0.123).max() < 2e-3


def test_canonical_objects_ignore_the_generator_and_variation_follows_it():
    for spec in (Spec("cat", "red"), Spec("mug", "blue", "spotted"), parse("a red ball on a blue table")):
        a, b = build(spec), build(spec)
        assert np.array_equal(a.vertices, b.vertices) and np.array_equal(a.colours, b.colours)
        c, d, e = (build(spec, np.random.default_rng(s)) for s in (7, 7, 8))
        assert np.array_equal(c.vertices, d.vertices) and np.array_equal(c.colours, d.colours)
        assert c.vertices.shape != e.vertices.shape or np.abs(c.vertices - e.vertices).max() > 1e-3
        assert not np.array_equal(np.unique(c.colours, axis=0), np.unique(e.colours, axis=0))


def test_colours_are_the_linear_values_of_the_srgb_table():
    import torch

    table = np.array(list(COLOURS.values()))
    reference = camera_srgb_to_linear(torch.tensor(table)).numpy()
    assert np.allclose(srgb_to_linear(table), reference, atol=1e-6)
    assert np.allclose(build(Spec("ball", "cyan")).colours, srgb_to_linear(COLOURS["cyan"]), atol=1e-6)


def splat(mesh: Mesh, azimuth: float, elevation: float, side: int = 24, count: int = 30_000) -> np.ndarray:
    """Orthographic colour, coverage and depth [side, side, 5] from a direction in degrees, by splatting points."""
    a, e = np.radians(azimuth), np.radians(elevation)
    back = np.array([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)])
    right = np.array([np.cos(a), 0, -np.sin(a)])
    axes = np.stack([right, np.cross(back, right), back], 1)
    rng = np.random.default_rng(0)
    a, b, c = (mesh.vertices[mesh.faces[:, k]] @ axes for k in range(3))
    normal = np.cross(b - a, c - a)
    area = np.where(normal[:, 2] > 0, np.linalg.norm(normal, axis=1), 0)
    pick = rng.choice(len(area), count, p=area / area.sum())
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    points = a[pick] + u * (b - a)[pick] + v * (c - a)[pick]
    x, y = ((points[:, k] + 0.9) / 1.8 * side for k in range(2))
    order = np.argsort(points[:, 2])  # the nearest is written last
    image = np.zeros((side, side, 5))
    image[y[order].astype(int), x[order].astype(int), :3] = mesh.colours[mesh.faces[pick[order], 0]]
    image[y[order].astype(int), x[order].astype(int), 4] = points[order, 2]
    image[y.astype(int), x.astype(int), 3] = 1
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_front_and_back_differ_exactly_where_the_table_says(kind):
    mesh = build(Spec(kind, "green"))
    front, back = (splat(mesh, azimuth, 0) for azimuth in (0, 180))

    def change(other: np.ndarray) -> float:
        """Share of the front's cells that look like none of the 3 x 3 cells around them in the other picture."""
        around = [np.roll(other, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        least = np.min([np.abs(front - o).max(-1) for o in around], 0)
        return (least > 0.2).sum() / front[..., 3].sum()

    # the mirror image of the back as well: a handle on the other side alone makes no front
    share = min(change(back), change(back[:, ::-1]))
    if world.true_front(kind):
        assert share > 0.025
    else:
        assert share < 0.022


@pytest.mark.slow
@pytest.mark.parametrize("colour", ["green", "black", "white"])
def test_the_caption_colour_leads_over_all_views(colour):
    """Mean share of the main colour over eight views and its least share in one view."""
    main = srgb_to_linear(COLOURS[colour])
    for kind in KINDS:
        mesh = build(Spec(kind, colour))
        shares = Counter()
        views = [(azimuth, elevation) for azimuth in (0, 90, 180, 270) for elevation in (15, 50)]
        for azimuth, elevation in views:
            image = splat(mesh, azimuth, elevation, side=20, count=5000)
            pixels = image[image[..., 3] > 0][:, :3]
            colours, counts = np.unique(np.round(pixels, 3), axis=0, return_counts=True)
            is_main = np.abs(colours - main).max(1) < 2e-3
            assert counts[is_main].sum() / counts.sum() > 0.25, (kind, colour, azimuth, elevation)
            shares["main"] += counts[is_main].sum() / counts.sum() / len(views)
            for trim, count in zip(colours[~is_main].tolist(), counts[~is_main].tolist(), strict=True):
                shares[tuple(trim)] += count / counts.sum() / len(views)
        assert shares["main"] > 0.4, (kind, colour, shares["main"])


def test_the_heldout_listing_is_in_sync_with_its_generator():
    lines = world.HELDOUT_FILE.read_text(encoding="utf-8").splitlines()
    assert lines == world.choose_heldout()
    assert len(set(lines)) == len(lines)


def test_a_tenth_is_held_out_and_everything_is_seen_in_training():
    plain = [s for s in all_specs() if s.other is None and s.pattern == "plain"]
    patterned = [s for s in all_specs() if s.pattern != "plain"]
    compositions = {geometry_caption(s) for s in all_specs() if s.other is not None}
    listing = world.heldout_listing()
    assert len({caption(s) for s in plain} & listing) / len(plain) == pytest.approx(0.1, abs=0.01)
    assert len({caption(s) for s in patterned} & listing) / len(patterned) == pytest.approx(0.1, abs=0.01)
    assert len(compositions & listing) / len(compositions) == pytest.approx(0.1, abs=0.015)
    training = [s for s in all_specs() if not held_out(s)]
    assert {s.kind for s in training if s.other is None} == set(KINDS)
    assert {(s.kind, s.pattern) for s in training} >= {(k, p) for k in world.PATTERNED for p in PATTERNS}
    assert {(s.pattern, s.colour) for s in training} >= {(p, c) for p in PATTERNS for c in COLOURS}
    pairs = [s for s in training if s.other is not None]
    assert {s.relation for s in pairs} == set(world.RELATIONS)
    assert {s.kind for s in pairs if s.relation == "on"} == set(world.RIDERS)
    assert {s.other.kind for s in pairs if s.relation == "on"} == set(world.SUPPORTS)
    for kind in KINDS:
        assert sum(not held_out(s) for s in plain if s.kind == kind) >= 9
    for colour in COLOURS:
        assert sum(not held_out(s) for s in plain if s.colour == colour) >= 22


def test_training_samples_hold_no_part_of_a_heldout_object():
    rng = np.random.default_rng(1)
    specs = [world.sample_spec(rng) for _ in range(6000)]
    assert not any(held_out(s) for s in specs)
    assert not any(held_out(o) for s in specs for o in s.objects())
    share = Counter("pair" if s.other else "plain" if s.pattern == "plain" else "patterned" for s in specs)
    for name, weight in world.WEIGHTS.items():
        assert share[name] / len(specs) == pytest.approx(weight, abs=0.03)
    kinds = Counter(s.kind for s in specs if s.other is None and s.pattern == "plain")
    assert set(kinds) == set(KINDS) and max(kinds.values()) < 2 * min(kinds.values())


def test_heldout_samples_are_all_held_out_by_a_line_of_their_own():
    rng = np.random.default_rng(2)
    specs = [world.sample_spec(rng, "heldout") for _ in range(500)]
    listing = world.heldout_listing()
    assert all(held_out(s) for s in specs)
    assert all((geometry_caption(s) if s.other else caption(s)) in listing for s in specs)
    assert not any(held_out(o) for s in specs if s.other for o in s.objects())
    with pytest.raises(ValueError, match="split"):
        world.sample_spec(rng, "test")


def test_pairs_stand_where_their_words_say():
    def centres(text: str) -> tuple[np.ndarray, np.ndarray]:
        mesh = build(parse(text))
        boxes = []
        for word in (parse(text).colour, parse(text).other.colour):
            mask = np.abs(mesh.colours - srgb_to_linear(COLOURS[word])).max(1) < 1e-5
            boxes.append((mesh.vertices[mask].min(0), mesh.vertices[mask].max(0)))
        return boxes

    for support in world.SUPPORTS:
        (low, high), (low2, high2) = centres(
            f"a red ball on a blue {support}" if support != "cube" else "a red ball on a blue cube"
        )
        assert low[1] > 0.5 * (low2[1] + high2[1]) - 0.25 and high[1] > low2[1] + 0.3
        assert (low[[0, 2]] > low2[[0, 2]] - 0.15).all() and (high[[0, 2]] < high2[[0, 2]] + 0.15).all()
    (low, high), (low2, high2) = centres("a green cube next to a yellow cone")
    assert high[0] < low2[0] < high[0] + 0.2 and low[1] == pytest.approx(low2[1], abs=1e-4)


def test_no_listed_colour_makes_a_choice_of_trim_that_no_other_colour_shows():
    """White is the only colour whose rocket has red fins: that cannot be known from the other rockets."""
    assert not world.learnable("rocket", "white") and world.learnable("rocket", "red")
    plain = [parse(line) for line in world.choose_heldout() if line.split()[1] in COLOURS]
    assert all(world.learnable(s.kind, s.colour) for s in plain if s.pattern == "plain")


@pytest.mark.parametrize("text", ["a red cat", "a red ball on a blue table", "a red cube next to a blue tree"])
def test_the_objects_of_a_scene_are_where_their_placement_says(text):
    spec = parse(text)
    mesh, placement, boxes = build_placed(spec, np.random.default_rng(4))
    assert len(placement) == len(boxes) == len(spec.objects())
    rest = mesh.vertices
    for one, (scale, *offset), corners in zip(spec.objects(), placement, boxes, strict=True):
        alone = build(one)
        part, rest = rest[: len(alone.vertices)], rest[len(alone.vertices) :]
        local = (part - offset) / scale
        assert np.linalg.norm(local, axis=1).max() == pytest.approx(0.85, abs=1e-4)
        assert np.allclose([*local.min(0), *local.max(0)], corners, atol=1e-4)
    assert len(rest) == 0


def test_spots_stay_where_they_are_when_proportions_vary():
    """Found anew on every instance they would scatter: the mean of many would be grey."""
    spec = Spec("vase", "red", "spotted")

    def spots(seed: int) -> np.ndarray:
        mesh = build(spec, np.random.default_rng(seed))
        white = mesh.colours.min(1) > 0.5
        return np.histogramdd(mesh.vertices[white], bins=6, range=[(-0.9, 0.9)] * 3)[0] > 0

    first = spots(0)
    overlaps = [(first & spots(seed)).sum() / (first | spots(seed)).sum() for seed in range(1, 6)]
    assert min(overlaps) > 0.6


def test_the_spread_of_instances_follows_the_variation():
    spec = Spec("house", "red")
    canonical = build(spec).vertices
    near, far = (np.abs(build(spec, np.random.default_rng(1), v).vertices - canonical).max() for v in (0.25, 1.0))
    assert 0 < 3 * near < far


@pytest.mark.parametrize(
    "text, what",
    [
        ("a purple fish next to a yellow mushroom", "no fish next to a mushroom"),
        ("a mug", "no colour for the mug"),
        ("a red blue mug", "more than one colour for the mug"),
        ("a red checkered robot", "patterns on ball"),
        ("a red striped mug on a blue table", "no patterns in pairs"),
        ("a red cube a blue ball", "one object, or two"),
        ("a red ball on a blue table next to a green cone", "one object, or two"),
        ("red", "names no object"),
    ],
)
def test_what_no_caption_is_like_is_named(text, what):
    assert len([line for line in world.oddities(text) if what in line]) == 1


def test_captions_and_what_reads_like_one_are_nothing_odd():
    captions = [world.caption(spec) for spec in world.all_specs()]
    assert not any(world.oddities(text) for text in [*captions, "Red mug.", "A red ball, on the blue table"])
