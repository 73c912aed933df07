"""The memory that is told before loading, against what a process then really takes, to 15 %.

Folders of random weights, a thousand times larger than the tests' others. What a step takes is counted in bytes of its
tensors: resident memory varied by a quarter from run to run.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.guidance.diffusion.footprint import footprint
from stages.guidance.diffusion.plan import make_plan
from stages.guidance.diffusion.settings import DiffusionSettings
from tests import tiny_families, tiny_folders
from tests.guidance.diffusion.measured_memory import WARM_SIDE

VIEWS = 2
ROOT = Path(__file__).resolve().parents[3]
UNET, VAE = {"block_out_channels": (128, 256)}, {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8}
T5 = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8}
SCALED = {  # what makes a tiny folder, what is larger in it, and the side of its pictures
    "sdxl": (tiny_families.sdxl, {"unet": UNET, "vae": VAE}, 256),
    "sd3": (
        tiny_families.sd3,
        {
            "transformer": {
                "num_layers": 8,
                "num_attention_heads": 48,
                "caption_projection_dim": 384,
                "pos_embed_max_size": 32,
                "joint_attention_dim": 512,
            },
            "vae": VAE,
            "text_encoder_3": T5 | {"num_layers": 4},
        },
        256,
    ),
    "t5": (
        tiny_folders.deepfloyd,
        {"unet": UNET | {"encoder_hid_dim": 512}, "text_encoder": T5 | {"num_layers": 24}},
        32,
    ),
}


def scaled(folder: Path, changes: dict[str, dict]) -> Path:
    """Make parts of a folder anew, with other numbers in their configs."""
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    for part, change in changes.items():
        library, name = index[part]
        path = folder / part
        if library == "diffusers":
            kind = getattr(diffusers, name)
            module = kind.from_config({**kind.load_config(path), **change})
        else:
            kind = getattr(transformers, name)
            config = kind.config_class.from_pretrained(path)
            config.update(change)
            module = kind(config)
        shutil.rmtree(path)
        module.save_pretrained(path)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory as Linux tells it")
@pytest.mark.parametrize("name", list(SCALED))
def test_a_scaled_folder_takes_what_is_told_of_it(name, tmp_path):
    build, changes, resolution = SCALED[name]
    small, large = build(tmp_path / "small"), scaled(build(tmp_path / "large"), changes)
    words = [str(large), str(small), str(resolution), str(VIEWS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-m", "tests.guidance.diffusion.measured_memory", *words],
        capture_output=True, text=True, check=True, env=environment, cwd=ROOT,
    ).stdout  # fmt: skip
    taken = json.loads(out.splitlines()[-1])
    told = []
    for folder, side in ((small, WARM_SIDE), (large, resolution)):
        settings = DiffusionSettings(resolution=side)
        plan, cpu = make_plan(folder, settings), torch.device("cpu")
        told.append(footprint(plan, settings, cpu, images=VIEWS, predictions=2 * VIEWS))
    assert told[1].peak > 80e6, told  # large enough to be measured
    assert told[1].images == pytest.approx(taken[1]["step"], rel=0.15), (told, taken)
    assert sum(told[1].weights.values()) == pytest.approx(taken[1]["weights"], rel=0.15), (told, taken)
    if name == "t5":  # whose text encoder is more than what is left after it
        real = taken[1]["loading"] - taken[0]["loading"]
        assert told[1].peak - told[0].peak == pytest.approx(real, rel=0.15), (told, taken)
