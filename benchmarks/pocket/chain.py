"""Measure each step of a run, from the layout's picture to the finished mesh, against the truth in the same views.

layout   the layout's picture, which the prior is conditioned on
x0       the pixel prior's x0 from the true picture with noise of t = 0.9, given words and layout
coarse   the coarse stage's field, volume rendered
fine     the finished mesh
All at 64 pixels; and layout, coarse and fine at 512, where only the fine stage can show more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.pocket.fidelity import Shot, mean_psnr, x0_pictures
from benchmarks.quality.render import COLOUR, GREY, Subject, shoot
from pipeline import generate
from stages.cameras import orbit_views
from stages.guidance.prior import ViewContext, resized
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.pocket import world
from stages.pocket.build import build

AZIMUTHS, ELEVATION = tuple(22.5 + 45 * k for k in range(8)), 20.0
SMALL, LARGE = 64, 512
LATE = 0.9  # share of the noise schedule at which x0 is asked for


def measure_chain(
    prior: Any, prompts: list[str], out: Path, *, seed: int = 0, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run every prompt by the default recipe and compare each of its steps with the truth.

    Args:
        prior: the pixel prior of the runs, one with a layout.
        prompts: captions of the pocket world.
        out: folder of the runs and of pocket_chain.png.
        settings: values by key over the default recipe's.
    Returns: PSNR over the object in dB, "small" and "large" by step, mean and by prompt; "finer": on how many prompts
        fine is nearer to the truth than coarse at 512 pixels.
    """
    by_prompt, sheet = {}, []
    for prompt in prompts:
        folder = out / "chain" / prompt.replace(" ", "-")
        result = generate(prompt, seed=seed, out=folder, settings=settings, quiet=True, force=True)
        pictures = _pictures(prior, prompt, result)
        truth = pictures.pop("truth")
        small = {k: mean_psnr(list(_small(v)), list(_small(truth))) for k, v in pictures.items()}
        large = {k: mean_psnr(list(v), list(truth)) for k, v in pictures.items() if k != "x0"}
        by_prompt[prompt] = {"small": small, "large": large}
        thumbnails = [F.adaptive_avg_pool2d(v[[7, 2, 4]].permute(0, 3, 1, 2), 128) for v in (*pictures.values(), truth)]
        sheet.append(torch.cat([torch.cat(list(row), 2) for row in thumbnails], 2))
        print(prompt, by_prompt[prompt], flush=True)
    image = (torch.cat(sheet, 1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    Image.fromarray(image).save(out / "pocket_chain.png", optimize=True)
    rows = list(by_prompt.values())
    means = {
        size: {k: round(float(np.mean([row[size][k] for row in rows])), 2) for k in rows[0][size]}
        for size in ("small", "large")
    }
    finer = sum(row["large"]["fine"] > row["large"]["coarse"] for row in rows)
    return means | {"finer": finer, "prompts": by_prompt}


@torch.no_grad()
def _pictures(prior: Any, prompt: str, result: Any) -> dict[str, Tensor]:
    """Return sRGB pictures [8, 512, 512, 3] of every step of a run and of the truth."""
    views = orbit_views(list(AZIMUTHS), ELEVATION)
    under = srgb_to_linear(torch.full((3,), GREY))
    truth = linear_to_srgb(shoot(Subject.of(build(world.parse(prompt))), views, LARGE, COLOUR)[0])
    shots = [Shot(prompt, "plain", picture, views[k], under, COLOUR) for k, picture in enumerate(_small(truth))]
    embedding = prior.embed([shots[0].words]).expand(len(views), -1, -1)
    drawings = prior.layout.picture(embedding, ViewContext(views, under, COLOUR))[:, :3]
    field = result.stage("coarse")
    renders = [linear_to_srgb(field.render(views[k], LARGE, shading=COLOUR, backdrop=under).colour) for k in range(8)]
    mesh = linear_to_srgb(shoot(Subject.of(result.mesh.data), views, LARGE, COLOUR)[0])
    return {
        "layout": resized(drawings, LARGE).permute(0, 2, 3, 1),
        "x0": resized(torch.stack(x0_pictures(prior, shots, LATE)).permute(0, 3, 1, 2), LARGE).permute(0, 2, 3, 1),
        "coarse": torch.cat(renders),
        "fine": mesh,
        "truth": truth,
    }


def _small(pictures: Tensor) -> Tensor:
    """Average pictures [B, S, S, 3] down to 64 pixels."""
    return F.adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2), SMALL).permute(0, 2, 3, 1)
