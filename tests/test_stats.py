"""Estimates, intervals and tests, on numbers that are known and for every outcome."""

import math

import numpy as np
import pytest
import torch
from scipy import stats as reference

from src import stats
from src.stats import POINTS, Estimate


@pytest.mark.parametrize(
    "estimate, form, text",
    [
        (Estimate(0.9925, 2000, (0.988, 0.9958), "fraction"), "", "99.2 % (98.8 to 99.6)"),
        (Estimate(0.9925, 2000, (0.988, 0.9958), "fraction"), "short", "99.2 %"),
        (Estimate(0.9925, 2000, (0.988, 0.9958), "fraction"), "range", "98.8 to 99.6 %"),
        (Estimate(0.12, 9, (0.102, 0.139), POINTS), "", "+12.0 points (+10.2 to +13.9)"),
        (Estimate(-0.0001, 9, (-0.05, 0.05), POINTS), "short", "+0 points"),
        (Estimate(11539715, unit="parameters"), "", "11,539,715 parameters"),
        (Estimate(12.3456, unit="seconds"), "", "12.3 seconds"),
        (Estimate(0.5, 1, None, "fraction"), "range", "50.0 %"),
        (Estimate(0.0, 9, (0.0, 0.0), POINTS), "", "+0.0 points (+0.0 to +0.0)"),
        (Estimate(math.nan, 0, None, "fraction"), "", "–"),
        (Estimate(math.nan), ".2f", "–"),
        (Estimate(2.5, unit="nats"), ".2f", "2.50"),
    ],
)
def test_an_estimate_prints_itself(estimate, form, text):
    assert format(estimate, form) == text and str(estimate) == format(estimate, "")


@pytest.mark.parametrize("k, n", [(0, 250), (1, 250), (249, 250), (250, 250), (3, 7)])
def test_wilson(k, n):
    low, high = reference.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert stats.rate(np.arange(n) < k).ci95 == pytest.approx((low, high), rel=1e-6)


def test_one_rule_from_no_error_to_some():
    photos = np.arange(400) % 100
    widths = [stats.rate(np.arange(400) < k, photos).ci95[1] for k in range(6)]
    assert widths == sorted(widths)  # one false alarm never looks surer than none


@pytest.mark.parametrize("function", [stats.rate, stats.bootstrap])
def test_intervals_cover_the_truth_where_samples_share_a_group(function, monkeypatch):
    monkeypatch.setattr(stats, "DRAWS", 300)
    rng, covered = np.random.default_rng(3), {"grouped": 0, "alone": 0}
    for _ in range(200):
        values = rng.random(300) < rng.beta(3, 1, size=60).repeat(5)  # the truth is 0.75
        for kind, groups in (("grouped", np.arange(300) // 5), ("alone", None)):
            low, high = function(values, groups).ci95
            covered[kind] += low <= 0.75 <= high
    assert 180 <= covered["grouped"] and covered["alone"] < covered["grouped"]


@pytest.mark.parametrize("function", [stats.rate, stats.bootstrap])
def test_few_seeds_widen_by_students_t(function):
    values = np.repeat([[0.0], [0.4], [0.5]], 5000, axis=1)
    values[:, ::2] += 0.5
    half = reference.t.ppf(0.975, 2) * np.std([0.25, 0.65, 0.75], ddof=1) / math.sqrt(3)
    low, high = function(values).ci95
    assert high == pytest.approx(
        min(1, 0.55 + half) if function is stats.rate else 0.55 + half, abs=0.01
    )
    assert function(values[:1]).ci95[1] < 0.28


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.random(500)
    one, other = hard < 0.5, hard < 0.45
    paired = stats.difference(one, other, np.arange(500) // 2)
    assert paired.value == pytest.approx(one.mean() - other.mean()) and paired.unit == POINTS
    assert (
        paired.ci95[1] - paired.ci95[0] < 0.05 < stats.rate(one).ci95[1] - stats.rate(one).ci95[0]
    )
    assert stats.difference(one, one).ci95 == (0.0, 0.0)


def test_group_differences_divide_by_the_drawn_numbers():
    photos = np.repeat([0, 1, 2, 3], [40, 2, 40, 2])
    in_a = np.isin(photos, [0, 1])
    apart = stats.group_difference(in_a, in_a, ~in_a, photos)
    assert apart.value == 1.0 and apart.ci95 == (1.0, 1.0)


def test_mcnemar_and_holm():
    a, b = np.array([1] * 8 + [0] * 92, bool), np.array([0] * 9 + [1] + [0] * 90, bool)
    assert stats.mcnemar(a, b) == pytest.approx(reference.binomtest(8, 9).pvalue)
    assert stats.mcnemar(a, a) == 1.0
    corrected = stats.holm({"x": 0.01, "y": 0.04, "z": 0.03})
    assert corrected == pytest.approx({"x": 0.03, "y": 0.06, "z": 0.06}) and stats.holm({}) == {}


def test_one_value_is_enough():
    assert stats.mean([2.0]).ci95 is None and stats.mean([2.0, 2.0]).value == 2.0
    assert stats.rate([1.0]).value == 1.0


def test_verdicts():
    gain, loss, open_ = ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))
    words = [stats.verdict(Estimate(0.0, 9, interval)) for interval in (gain, loss, open_, None)]
    assert words == ["a gain", "a loss", *["cannot be told from zero"] * 2]


def test_the_probe_separates_what_a_line_separates():
    torch.manual_seed(0)
    x = torch.randn(200, 5) * torch.tensor([1.0, 100.0, 1.0, 0.0, 1.0])  # one feature is constant
    y = (x[:, 0] + x[:, 1] / 100 > 0).long()
    probe = stats.linear_probe(x[:100], y[:100], x[100:], y[100:], 2)
    assert (probe(x[100:]).argmax(dim=1) == y[100:]).float().mean() > 0.93
