"""Efficiency of several processes: what is asked of torchrun, what of its metrics counts, and the sums."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.speed import ranks


@pytest.fixture
def commands(monkeypatch):
    """The commands of runs that take a second a part of the views, and another second with N > 1 processes."""
    commands = []

    def start(command, **_):
        commands.append(command)
        n = int(next(word for word in command if word.startswith("--nproc")).partition("=")[2])
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        steps, parts = (
            int(next(w for w in command if w.startswith(name)).partition("=")[2])
            for name in ("coarse.steps=", "coarse.accumulate=")
        )
        times = [99.0] * ranks.WARM + [parts + (n > 1)] * (steps - ranks.WARM)
        (out / "metrics.jsonl").write_text("\n".join(json.dumps({"seconds": t}) for t in times))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(ranks.subprocess, "Popen", start)
    return commands


def test_efficiency_is_that_of_equal_parts_after_the_first_steps(commands, capsys):
    assert ranks.main(["--ranks", "1", "2", "4", "--steps", "9"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step_s"] == {"1": 8, "2": 5, "4": 3}
    assert facts["efficiency"] == {"1": 1, "2": 0.8, "4": pytest.approx(8 / 12)}
    assert facts["apart"] == {"1": 1, "2": 1, "4": 1}  # no second more: they exchange nothing
    assert len(commands) == 3 + 2 + 4
    for n, command in zip((1, 2, 4), commands, strict=False):
        assert f"--nproc-per-node={n}" in command and f"coarse.accumulate={8 // n}" in command
        assert {"coarse.views_per_step=8", "--config", "default"} <= set(command)


def test_the_gradients_are_those_of_the_recipes_field(commands):
    """16 levels of at most 2^19 rows of two numbers: 64 MB and a few networks."""
    assert 4 * 2 * 2**19 * 10 < ranks.gradient_bytes([], "stable-diffusion") < 1.1 * 4 * 2 * 2**19 * 16


def test_a_ring_sends_each_gradient_nearly_twice():
    assert ranks.allreduce_seconds(64e6, 1, 1e9) == 0
    assert ranks.allreduce_seconds(64e6, 8, 450e9) == pytest.approx(0.249e-3, rel=0.01)


@pytest.mark.parametrize("words", [["--ranks", "2"], ["--steps", "4"], ["--ranks", "1", "3"]])
def test_what_cannot_be_compared_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        ranks.main(words)
    assert "wanted 1 among the ranks" in capsys.readouterr().err


@pytest.mark.slow
def test_real_runs_are_measured(tmp_path):
    assert 0 < ranks.measure(1, 2, ranks.WARM + 1, [], tmp_path / "one") < 60
    assert 0 < ranks.measure_apart(2, 2, ranks.WARM + 1, [], tmp_path / "apart") < 60


def test_a_run_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="ended with code"):
        ranks.measure(1, 2, 5, ["no.such.setting=1"], tmp_path / "one")
