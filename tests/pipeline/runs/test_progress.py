"""What a run says: plain lines, a live bar, compilation announced once."""

import io

import pytest
import torch
from rich.console import Console

from pipeline.runs.progress import Progress, duration


def plain() -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress(Console(file=text, width=200, force_terminal=False)), text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_read_naturally(seconds, text):
    assert duration(seconds) == text


def test_plain_progress_prints_the_first_and_the_last_step_and_brackets_as_they_are():
    progress, text = plain()
    with progress.stage("coarse", 50, 0) as stage_progress:
        for step in range(1, 51):
            stage_progress.update(step, f"cover {step} % [bold]")
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("coarse  1/50") and "left" not in lines[0]  # the first step may have compiled
    assert lines[1].startswith("coarse  50/50")
    assert "it/s" in lines[1] and "0 s left" in lines[1] and lines[1].endswith("cover 50 % [bold]")


def test_live_progress_draws_step_speed_and_headline():
    text = io.StringIO()
    progress = Progress(Console(file=text, width=200, force_terminal=True))
    with progress.stage("fine", 4, 2) as stage_progress:
        stage_progress.update(3, "3 faces [red]")
        stage_progress.update(4, "4 faces [red]")
    assert "4/4" in text.getvalue() and "4 faces [red]" in text.getvalue() and "fine" in text.getvalue()


def test_compilation_is_announced_once_and_cached_kernels_are_silent():
    import numba

    progress, text = plain()

    @numba.njit
    def add(a, b):
        return a + b

    with progress.announce_compilation():
        add(1, 2)
        add(1.0, 2.0)
    lines = text.getvalue().splitlines()
    assert [line for line in lines if line.startswith("compiling kernels")] == lines[:1]
    assert len(lines) == 2 and lines[1].startswith("compiled 2 kernels")
    with progress.announce_compilation():
        add(3, 4)
    assert text.getvalue().splitlines() == lines


@pytest.mark.slow
def test_a_module_that_warp_compiles_is_announced_and_a_cached_one_is_silent(tmp_path, monkeypatch):
    warp = pytest.importorskip("warp", reason="warp-lang is not installed (extra: cuda)")
    from stages.kernels.cuda import launch as cuda_launch

    @warp.kernel(enable_backward=False, module="unique")
    def double(values: warp.array(dtype=warp.float32)):
        i = warp.tid()
        values[i] = 2.0 * values[i]

    values = torch.ones(3)
    cuda_launch._start()
    monkeypatch.setattr(warp.config, "kernel_cache_dir", str(tmp_path))
    progress, text = plain()
    with progress.announce_compilation():
        for _ in range(2):
            cuda_launch.launch(double, 3, (values,))
    lines = text.getvalue().splitlines()
    assert lines[0] == "compiling kernels for this machine, once" and lines[1].startswith("compiled 1 kernels in")
    assert len(lines) == 2 and values.tolist() == [4, 4, 4]
    cuda_launch._loaded.clear()  # as in another process
    with progress.announce_compilation():
        cuda_launch.launch(double, 3, (values,))
    assert text.getvalue().splitlines() == lines and values.tolist() == [8, 8, 8]
