"""Memory said before loading, and the way out when it runs out: three settings that help, the run kept."""

import ctypes
import errno
import json
import subprocess
import sys

import pytest
import torch

import pipeline.priors.memory as memory
from pipeline.cli import main
from pipeline.config.model import load_config
from pipeline.priors.sources import stage_prior
from stages.errors import out_of_memory
from stages.guidance.residuals import VsdRuleSettings
from tests import tiny_folders

SMALL = [
    *("coarse.steps=3", "coarse.resolution=16", "coarse.views_per_step=2", "coarse.samples=16", "checkpoint_every=1"),
    *("coarse.field.levels=2", "coarse.field.log2_table=10", "export.tets=16", "export.turntable_frames=0"),
    *("export.texture_size=64", "export.unwrap=boxes", "export.faces=500"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folders.stable_diffusion(tmp_path_factory.mktemp("memory") / "sd")


def config(*overrides):
    return load_config(None, list(overrides), {})


def forecast(chosen):
    return memory.forecast(stage_prior(chosen, "coarse").fetched(), torch.device("cpu"))


def test_our_own_priors_need_no_forecast():
    for source in ("pocket", "reference", "clip:pocket"):
        assert forecast(config(f"prior.coarse={source}")) is None


@pytest.mark.slow
def test_the_forecast_counts_what_goes_through_the_prior_at_once(folder, monkeypatch):
    calls = {}
    import stages.guidance.diffusion.footprint as footprint

    count = footprint.footprint

    def listen(*args, **kwargs):
        calls.update(kwargs)
        return count(*args, **kwargs)

    monkeypatch.setattr(footprint, "footprint", listen)
    chosen = config(
        f"prior.coarse={folder}", "coarse.views_per_step=5", "coarse.accumulate=2", "guidance.coarse.rule=csd"
    )
    line = forecast(chosen)
    assert line.startswith("memory: float32: unet 0.00 + vae 0.00 GB stay") and "GB free" in line
    assert calls == {"images": 3, "predictions": 6, "vsd": None, "decodes": False}
    pushed = ["negative=blurry", "prompts.blend=perp_neg", "guidance.coarse.rule=vsd", "coarse.views_per_step=1"]
    pushed += ["guidance.coarse.image_term=0.01", "guidance.coarse.scale=2"]
    forecast(config(f"prior.coarse={folder}", *pushed))
    assert calls == {"images": 1, "predictions": 4, "vsd": VsdRuleSettings(name="vsd"), "decodes": True}


def test_a_device_with_too_little_is_warned_of(folder, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    line = forecast(config(f"prior.coarse={folder}"))
    assert "may not fit; what helps: coarse.accumulate=4, prior.diffusion.vae_checkpointing=true, prior.d" in line


def test_advice_leaves_out_what_is_set_already(folder):
    chosen = config(f"prior.fine={folder}", "prior.diffusion.offload=blocks", "prior.diffusion.max_batch=1")
    assert memory.advice(stage_prior(chosen, "fine")) == [
        "prior.diffusion.vae_checkpointing=true",
        "prior.diffusion.dtype=bfloat16",
        "fine.resolution=256",
    ]
    (folder / "vae").rename(folder / "moved")  # a pixel model has no autoencoder to save on
    assert memory.advice(stage_prior(chosen, "fine"))[0] == "prior.diffusion.dtype=bfloat16"
    (folder / "moved").rename(folder / "vae")
    lines = memory.advice(stage_prior(config(), "coarse"))
    assert lines == ["coarse.accumulate=4", "coarse.views_per_step=2", "coarse.samples=40"]


def run(*words):
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    MemoryError("refused"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried 9 GB"),
    RuntimeError("CUDA error: out of memory"),  # main memory that cannot be pinned
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", SHORTAGES)
def test_every_shortage_is_told_from_a_bug(error):
    assert out_of_memory(error) and not out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.slow
def test_a_run_out_of_memory_names_three_settings_and_goes_on_with_them(folder, tmp_path, monkeypatch, capsys):
    from stages.coarse import CoarseStage

    monkeypatch.chdir(tmp_path)
    step = CoarseStage.step

    def fail(self):
        if self.step_index == 2:
            raise SHORTAGES[0]
        return step(self)

    monkeypatch.setattr(CoarseStage, "step", fail)
    words = ["--config", "stable-diffusion", "--out", "out", "--stages", "coarse", f"prior.coarse={folder}"]
    assert run("run", *words, *SMALL) == 2
    captured = capsys.readouterr()
    assert "memory: float32: unet" in captured.out + captured.err
    assert "coarse ran out of memory" in captured.err and "Tried to allocate 2.00 GiB" in captured.err
    expected = "coarse.accumulate=2, prior.diffusion.vae_checkpointing=true, prior.diffusion.offload=blocks"
    assert expected in captured.err and "pipeline resume out" in captured.err and "Traceback" not in captured.err
    monkeypatch.setattr(CoarseStage, "step", step)
    path = tmp_path / "out" / "config.yaml"
    text = path.read_text()
    assert "offload: none" in text
    path.write_text(text.replace("offload: none", "offload: blocks"))
    assert run("resume", "out") in (0, 2)  # three steps of a random prior may leave no surface to write
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


STEPS = """
import resource
import numpy as np
{set_up}
def step():
    held = [np.ones(1 << 17) for _ in range(40)]  # 1 MB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt"
)
def test_a_step_uses_the_last_ones_memory_again():
    faults = {}
    for name, line in {
        "given back": "",
        "kept": "import pipeline.priors.memory; pipeline.priors.memory.keep_freed_memory()",
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", STEPS.format(set_up=line)], capture_output=True, text=True, check=True
        )
        faults[name] = int(done.stdout)
    assert faults["kept"] < 100 < 1000 < faults["given back"]
