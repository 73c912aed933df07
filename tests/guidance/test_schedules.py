"""Timestep ranges, schedules and weightings."""

import math
from itertools import pairwise

import pytest
import torch

from stages.guidance.prior import path_alphas_cumprod, scaled_linear_alphas_cumprod
from stages.guidance.schedules import (
    TIMESTEPS,
    WEIGHTINGS,
    at_or_above_sd_noise,
    dreamtime_table,
    stratified,
    to_index,
)

ALPHAS = scaled_linear_alphas_cumprod()


def flow_alphas(shift=3.0, steps=1000):
    """alpha_bar of a rectified flow whose noise levels are shifted (Stable Diffusion 3 sec. 5.3.2)."""
    k = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    sigma = shift * k / (1 + (shift - 1) * k)
    return path_alphas_cumprod(1 - sigma, sigma)


def test_noise_levels_are_compared_and_not_timesteps():
    assert at_or_above_sd_noise(0.2, ALPHAS).tolist() == [False] * 200 + [True] * 800
    rounded = ALPHAS.double() * (1 + 1e-6 * torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(at_or_above_sd_noise(0.2, rounded), at_or_above_sd_noise(0.2, ALPHAS))
    flow = flow_alphas()
    first = at_or_above_sd_noise(0.2, flow).nonzero()[0].item()
    # alpha_bar 0.754 is sigma / alpha = 0.571, so sigma 0.364 on the flow's path: k = sigma / (3 - 2 sigma) = 0.160
    assert first == pytest.approx(160, abs=1)


def test_stratified_draws_put_one_in_each_part_in_random_order():
    generator = torch.Generator().manual_seed(0)
    draws = [stratified(8, generator) for _ in range(50)]
    for u in draws:
        assert sorted((u * 8).floor().tolist()) == list(range(8))
    assert len({tuple((u * 8).floor().tolist()) for u in draws}) > 40
    assert torch.cat(draws).mean() == pytest.approx(0.5, abs=0.02)


def test_timesteps_stay_inside_the_range_and_reach_both_ends():
    u = torch.linspace(0, 1 - 1e-9, 10001, dtype=torch.float64)
    t = to_index(TIMESTEPS["uniform"](0.0, 0.02, 0.98, u, ALPHAS), 0.02, 0.98, 1000)
    assert (t.min(), t.max()) == (20, 980)
    assert to_index(torch.ones(1), 0.5, 1.0, 1000).item() == 999
    assert to_index(torch.zeros(1), 0.5, 0.5, 1000).item() == 500


@pytest.mark.parametrize("name", ["linear", "sqrt", "dreamtime"])
def test_deterministic_schedules_fall_from_the_top_to_the_bottom_with_one_t_for_the_batch(name):
    u = torch.rand(3, dtype=torch.float64)
    values = [TIMESTEPS[name](p, 0.1, 0.9, u, ALPHAS) for p in torch.linspace(0, 1, 21).tolist()]
    assert all((v == v[0]).all() for v in values)
    series = [v[0].item() for v in values]
    assert series[0] == pytest.approx(0.9, abs=2e-3) and series[-1] == pytest.approx(0.1, abs=2e-3)
    assert all(a >= b for a, b in pairwise(series))


def test_sqrt_schedule_falls_faster_at_first_than_linear():
    u = torch.rand(1, dtype=torch.float64)
    assert TIMESTEPS["sqrt"](0.25, 0.0, 1.0, u, ALPHAS).item() == pytest.approx(0.5)
    assert TIMESTEPS["linear"](0.25, 0.0, 1.0, u, ALPHAS).item() == pytest.approx(0.75)


def test_dreamtime_spends_its_run_in_proportion_to_its_weight():
    share = dreamtime_table(ALPHAS, 0.0, 1.0)
    spent = share[:-1] - share[1:]  # share of the run at each timestep
    weight = ((1 - ALPHAS.double()) / ALPHAS.double()).sqrt()
    assert spent[650] / spent[550] == pytest.approx((weight[650] / weight[550]).item(), rel=1e-6)
    bell = math.exp(-((400 - 500) ** 2) / (2 * 100**2))
    assert spent[400] / spent[550] == pytest.approx((bell * weight[400] / weight[550]).item(), rel=1e-6)


def test_dreamtime_spends_as_much_of_its_run_at_a_level_of_noise_on_any_schedule():
    theirs = dreamtime_table(ALPHAS, 0.0, 1.0)
    t = torch.arange(2001, dtype=torch.float64) / 2001
    cosine = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # ends in pure noise, which theirs never reaches
    ours = dreamtime_table(cosine, 0.0, 1.0)
    for k in (300, 450, 600, 750, 900):
        same = (cosine - ALPHAS[k]).abs().argmin()
        assert ours[same] == pytest.approx(theirs[k].item(), abs=0.01)
    assert ours[cosine < ALPHAS[-1]].max() < 0.01
    beyond = [TIMESTEPS["dreamtime"](p, 0.98, 1.0, torch.rand(2), cosine)[0].item() for p in (0.0, 0.5, 1.0)]
    assert beyond == pytest.approx([1.0, 0.99, 0.98], abs=2e-3)  # nothing but such noise: evenly


def test_weightings_are_the_named_functions_of_alpha_bar():
    alpha_bar = torch.tensor([0.25, 1.0])
    assert WEIGHTINGS["sds"](alpha_bar).tolist() == [0.75, 0.0]
    assert WEIGHTINGS["uniform"](alpha_bar).tolist() == [1.0, 1.0]
    assert WEIGHTINGS["fantasia3d"](alpha_bar).tolist() == [0.375, 0.0]
