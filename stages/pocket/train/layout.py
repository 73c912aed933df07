"""Train the layout (stages/guidance/diffusion/layout.py) on shapes and renders, before a UNet is trained on it.

First its volumes are fitted to the world's objects at points of space (solids.py). Then its picture is regressed ray by
ray: words, camera, light and backdrop in, sRGB out, without the noise in a UNet's training. All renders of one caption
in a batch share one volume, so most of a step's work is spent once: views are cheap, volumes are not. The placement of
a pair's objects is known from the world and regressed separately.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.cameras import orbit_views
from stages.guidance.diffusion.layout import Layout, Objects, Reading, look, radiance
from stages.guidance.diffusion.layout_condition import LayoutCondition
from stages.kernels.srgb import linear_to_srgb
from stages.pocket import data, models, world
from stages.pocket.build import build_placed
from stages.pocket.pattern import PATTERNS
from stages.pocket.train.device import device_of, placed
from stages.pocket.train.export import write_grid
from stages.pocket.train.loop import Training
from stages.pocket.train.solids import Roles, Solids, find_roles, make_solids, paint_roles, shape_captions, solid_loss
from stages.pocket.train.text import SUFFIXES, encode_text, find_text, fit_reader

SHAPES = {"plain": 5, "patterned": 4, "pair": 4}  # of a step; those of a pair are two
COLOURS = {"plain": 3, "patterned": 3, "pair": 1}  # captions of each shape
VIEWS = {"plain": 5, "patterned": 5, "pair": 4}  # renders of each caption
RAYS = {"plain": 400, "patterned": 400, "pair": 1200}  # of each render; a pair's objects are small
SOLIDS, POINTS = 8, 8000  # of such a step: shapes, and points of each
EMPTY = 4  # every so many steps a group of anything stands under the empty caption
PAIRS = 24000  # of the placement's data
PLACEMENT_STEPS = 6000
GRID_PROMPTS = (
    "a blue robot",
    "a white house",
    "a purple cat",
    "a yellow bus",
    "a red checkered mug",
    "a green lamp",
    "a yellow cat on a blue table",
    "a white snowman next to a red cone",
)

CPU = torch.device("cpu")


class Pool:
    """A pool's renders by caption, and rays through them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images, self.records, self.scenes = data.load_pool(folder)
        self.pictures = {self.images.shape[1]: self.images}
        self.on_device: dict[int, Tensor] = {}
        self.captions: dict[str, dict[str, dict[str, list[int]]]] = {name: {} for name in SHAPES}  # by shape
        for i, record in enumerate(self.records):
            caption = record["caption"]
            kind = kind_of(caption)
            shape = caption if kind == "pair" else " ".join(caption.split()[2:])
            self.captions[kind].setdefault(shape, {}).setdefault(caption, []).append(i)

    def at(self, side: int) -> np.ndarray:
        """Return all renders at a smaller size, [N, side, side, 3] uint8."""
        if side not in self.pictures:
            self.pictures[side] = data.resized_pool(self.folder, side)
        return self.pictures[side]

    def rays(
        self, index: np.ndarray, count: int, side: int, rng: np.random.Generator, device: torch.device = CPU
    ) -> tuple[Tensor, ...]:
        """Draw random pixels of renders [B] at `side` pixels: origins, directions and sRGB [B, count, 3].

        Half of the pixels are drawn evenly and half from a square around the middle, where objects are.
        """
        pick = rng.random((len(index), count, 2))
        pick[:, ::2] = 0.5 + 0.66 * (pick[:, ::2] - 0.5)
        row, column = np.moveaxis((pick * side).astype(np.int64), -1, 0)
        colours = self._colours(index, row, column, side, device)
        scenes = self.scenes[index]
        tan = np.tan(np.radians(scenes.fov_deg) / 2)[:, None]
        x, y = (2 * (column + 0.5) / side - 1) * tan, (1 - 2 * (row + 0.5) / side) * tan
        local = torch.from_numpy(np.stack([x, y, -np.ones_like(x)], -1)).float()
        c2w = torch.from_numpy(scenes.c2w)
        directions = F.normalize(torch.einsum("bij,brj->bri", c2w[:, :3, :3], local), dim=-1)
        origins = c2w[:, None, :3, 3].expand_as(directions)
        return origins.contiguous().to(device), directions.contiguous().to(device), colours.float() / 255

    def _colours(self, index, row, column, side: int, device: torch.device) -> Tensor:
        """Return pixels [B, count, 3] of renders [B], uint8; all renders stay on a device that is not the CPU."""
        if device.type == "cpu":
            return torch.from_numpy(self.at(side)[index[:, None], row, column])
        if side not in self.on_device:
            self.on_device[side] = placed(self.at(side), device)
        where = placed(np.stack([np.broadcast_to(index[:, None], row.shape), row, column]), device)
        return self.on_device[side][tuple(where)]


def kind_of(caption: str) -> str:
    """Return the kind of a caption: plain, patterned or pair."""
    words = caption.split()
    return "plain" if len(words) == 3 else "patterned" if len(words) == 4 else "pair"


def with_view_words(caption: str, rng: np.random.Generator) -> str:
    """Return a caption with the words of a random view: the volume must not depend on them."""
    text = caption + SUFFIXES[int(rng.integers(len(SUFFIXES)))]
    return text + (", clay render" if rng.random() < 0.3 else "")


@torch.no_grad()
def pictures(layout: Layout, text: Tensor, scenes: data.Scenes, side: int) -> Tensor:
    """Return sRGB pictures [B, side, side, 3] of one text [1, L, W] in every scene."""
    objects = layout.objects(layout.read(text))
    rows = torch.zeros(len(scenes.fov_deg), dtype=torch.long, device=text.device)
    drawings = look(objects, rows, data.setting_of(scenes, text.device), side, supersample=2 if side < 128 else 1)
    return drawings[:, :3].permute(0, 2, 3, 1)


def score(layout: Layout, encode, pool: Pool, side: int, limit: int = 400) -> dict[str, float]:
    """Return the mean PSNR over the object of a pool's renders, by kind of caption, in dB."""
    rows: dict[str, list[float]] = {}
    numbers = np.linspace(0, len(pool.records) - 1, min(limit, len(pool.records))).astype(int)
    for i in numbers:
        record = pool.records[i]
        truth = torch.from_numpy(pool.at(side)[i]).float() / 255
        picture = pictures(layout, encode([record["caption"]]), pool.scenes[i : i + 1], side)[0].cpu()
        value = data.object_psnr(picture, truth)
        if value is None:
            continue
        kind = "clay" if record["shading"] == "textureless" else kind_of(record["caption"])
        rows.setdefault(kind, []).append(value)
        rows.setdefault("all", []).append(value)
    return {k: round(float(np.mean(v)), 2) for k, v in sorted(rows.items())}


def fit_placement(
    layout: Layout, encode, seed: int, steps: int = PLACEMENT_STEPS, count: int = PAIRS
) -> dict[str, float]:
    """Train a layout's box and placement networks on pairs of the world; returns the errors.

    The pairs vary by the full spread, so that the placement is learnt as a function of the boxes; the boxes themselves
    are those of the objects as the layout's own renders vary.
    """
    rng = np.random.default_rng([seed, 9])
    captions, boxes, places = [], [], []
    while len(captions) < count:
        spec = world.sample_spec(rng)
        if spec.other is None:
            continue
        _, place, box = build_placed(spec, rng, variation=1.0)
        captions.append(world.caption(spec))
        boxes.append(box)
        places.append(place)
    device = layout.palette.device
    boxes, places = (torch.tensor(np.array(a), dtype=torch.float32, device=device) for a in (boxes, places))
    with torch.no_grad():
        readings = [layout.read(encode(captions[k : k + 512])) for k in range(0, count, 512)]
    parts = [torch.cat([getattr(r, name) for r in readings]) for name in ("kinds", "patterns", "colours", "joints")]
    alone = [world.caption(world.Spec(kind, "red", pattern)) for kind in world.KINDS for pattern in ("plain", *PATTERNS)
             if pattern == "plain" or kind in world.PATTERNED]  # fmt: skip
    sizes = np.array([build_placed(world.parse(text))[2][0] for text in alone])
    sizes = torch.tensor(sizes, dtype=torch.float32, device=device)
    with torch.no_grad():
        single = layout.read(encode(alone))
    optimiser = torch.optim.AdamW([*layout.box.parameters(), *layout.place.parameters()], lr=2e-3, weight_decay=0.01)
    errors = {}
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
        batch = torch.from_numpy(rng.integers(0, count, 256)).to(device)
        reading = Reading(*(part[batch] for part in parts))
        placement_error = (layout.placement(reading, boxes[batch]) - places[batch]).square().mean()
        box_error = (layout.boxes(single)[:, 0] - sizes).square().mean()
        optimiser.zero_grad()
        (placement_error + box_error).backward()
        optimiser.step()
        errors = {"placement": float(placement_error.detach()) ** 0.5, "box": float(box_error.detach()) ** 0.5}
    return {k: round(v, 4) for k, v in errors.items()}


def solid_lessons(layout: Layout, encode, solids: Solids, roles: Roles) -> Callable[[np.random.Generator], Tensor]:
    """Return a function that draws shapes and points and returns the loss of the layout's volumes there."""
    captions = shape_captions()
    with torch.no_grad():
        reading = layout.read(encode([alike[0] for alike in captions]))
        shapes = torch.cat([reading.kinds[:, 0], reading.patterns[:, 0]], -1).round()
        colours = layout.read(encode(captions[0])).colours[:, 0].round()

    def loss(rng: np.random.Generator) -> Tensor:
        rows = np.sort(rng.choice(len(captions), SOLIDS, replace=False))
        index = np.sort(rng.choice(solids.points.shape[1], POINTS, replace=False))
        return solid_loss(layout, shapes[rows], colours, roles, solids, rows, index)

    return loss


def train_layout(args: argparse.Namespace) -> None:
    """Train the layout under the text encoder of the pixel UNet in --out or --start."""
    from safetensors.torch import load_file, save_file

    pool = Pool(data.make_pool(args.data / "pixel128", size=128, count=args.images or 60000, seed=args.seed))
    test_pool = Pool(data.make_pool(args.data / "held128", size=128, count=800, seed=777, split="heldout"))
    torch.manual_seed(args.seed)
    tokenizer, text_encoder = find_text(args)

    def encode(captions: list[str]) -> Tensor:
        return encode_text(tokenizer, text_encoder, captions)

    device = device_of(args)
    layout = models.make_layout(args.fine)
    layout.half = args.half or device.type == "cuda"
    if args.init is not None:
        shapes = {k: v.shape for k, v in layout.state_dict().items()}
        if args.init.is_dir():
            state = LayoutCondition.load(args.init).layout.state_dict()
        else:
            state = {k.removeprefix("e/layout."): v for k, v in load_file(args.init).items() if k.startswith("e/")}
        layout.load_state_dict({k: v for k, v in state.items() if shapes.get(k) == v.shape}, strict=False)
    solids = make_solids(args.data / "solids", args.seed)
    roles = find_roles(solids, shape_captions(), len(layout.palette))
    paint_roles(layout, roles)
    layout, roles = layout.to(device), roles.to(device)
    heads = (layout.reader, layout.box, layout.place)  # taught apart, and first
    work = args.work / "layout"
    ready = work / "heads.safetensors"
    if ready.exists():
        layout.load_state_dict(load_file(ready), strict=False)
    else:
        print({"words read right": fit_reader(layout, encode, args.seed)}, flush=True)
        print(fit_placement(layout, encode, args.seed), flush=True)
        work.mkdir(parents=True, exist_ok=True)
        names = ("reader.", "box.", "place.")
        save_file({k: v.cpu().contiguous() for k, v in layout.state_dict().items() if k.startswith(names)}, ready)
    for head in heads:
        head.requires_grad_(False)
    layout.palette.requires_grad_(False)  # nor the paints: in a colour without captions they would drift with the rest
    layout.palette_of.requires_grad_(False)
    settings = {"steps": args.steps, "minutes": args.minutes, "ema": 0.99, "weight_decay": 0.001, "warmup": 100}
    training = Training({"layout": layout}, work, lr=args.lr or 2e-3, **settings)
    side = args.side
    learn_solids = solid_lessons(layout, encode, solids, roles)

    def loss_step(step: int) -> Tensor:
        rng = np.random.default_rng([args.seed, step])
        return learn_solids(rng) if training.progress < args.solid else ray_loss(step, rng)

    def ray_loss(step: int, rng: np.random.Generator) -> Tensor:
        groups: list[tuple[str, np.ndarray, int]] = []  # text, renders, rays a render
        for kind, many in SHAPES.items():
            shapes = list(pool.captions[kind].values())
            for k in rng.choice(len(shapes), many, replace=False):
                captions = list(shapes[k])
                for c in rng.permutation(len(captions))[: COLOURS[kind]]:
                    index = rng.permutation(shapes[k][captions[c]])[: VIEWS[kind]]
                    groups.append((with_view_words(captions[c], rng), index, RAYS[kind]))
        if step % EMPTY == 0:
            groups.append(("", rng.choice(len(pool.records), 16), 256))
        with torch.no_grad():
            reading = layout.read(encode([g[0] for g in groups]))
        reading = Reading(
            *(part.round() for part in (reading.kinds, reading.patterns, reading.colours, reading.joints))
        )
        rows = np.array([g[1][0] for g in groups])
        truth = torch.from_numpy(pool.scenes.placement[rows]).to(device)  # [groups, 2, 4]
        two = reading.pair
        objects = layout.placed(reading, truth.nan_to_num())
        total, weight = 0.0, 0
        for count in sorted({g[2] for g in groups}):
            members = [n for n, g in enumerate(groups) if g[2] == count]
            index = np.concatenate([groups[n][1] for n in members])
            owner = torch.tensor([n for n in members for _ in groups[n][1]], device=device)
            scenes = pool.scenes[index]
            origins, directions, colours = pool.rays(index, count, side, rng, device)
            places = torch.from_numpy(scenes.placement).to(device)
            placement = torch.where(two[owner][:, None, None], places, objects.placement[owner])
            view_objects = Objects(objects.grids, objects.index[owner], placement)
            jitter = torch.from_numpy(rng.random((len(index), count), dtype=np.float32)).to(device)
            each, setting = torch.arange(len(index), device=device), data.setting_of(scenes, device)
            values = radiance(view_objects, each, setting, origins, directions, jitter)
            total = total + (linear_to_srgb(values[..., :3]) - colours).square().sum()
            weight += colours.numel()
        return 10 * total / weight

    def grid() -> None:
        views = orbit_views(torch.arange(8) * 45.0, 15.0)
        n = len(views)
        ones = np.ones(n, np.float32)
        under = np.full((n, 3), 0.35, np.float32)
        empty = np.zeros((n, 2, 4), np.float32)
        scenes = data.Scenes(
            views.c2w.numpy(), views.fov_deg.numpy(), views.light.numpy(), ones, 0 * ones, under, empty
        )
        text = encode(list(GRID_PROMPTS))
        drawings = [pictures(layout, text[k : k + 1], scenes, 64) for k in range(len(GRID_PROMPTS))]
        path = work / f"samples_{training.step_index:06d}.png"
        write_grid(torch.cat(drawings).permute(0, 3, 1, 2) * 2 - 1, path)
        row = {
            "step": training.step_index,
            "minutes": round(training.seconds / 60, 1),
            "psnr": score(layout, encode, test_pool, 64),
        }
        print(row, flush=True)

    def export() -> None:
        save_file({k: v.cpu().contiguous() for k, v in layout.state_dict().items()}, work / "layout.safetensors")

    training.finish(loss_step, grid, export, args.export)
