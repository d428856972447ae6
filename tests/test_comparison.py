"""Comparing networks in pairs: what is averaged over what."""

import numpy as np
import pytest
import torch

from src import comparison, results

RNG = np.random.default_rng(0)


def scores_of(**values):
    """{(key, seed): {"test": {"score": (N,)}}} from (S, N) per key."""
    return {
        (key, seed): {"test": {"score": torch.tensor(row)}}
        for key, rows in values.items()
        for seed, row in enumerate(rows)
    }


def test_scores_keep_seeds_and_samples_apart():
    a, b = RNG.random((3, 8)), RNG.random((3, 8))
    scores = scores_of(a=a, b=b)
    assert np.array_equal(comparison.by_seed(scores, "a", "score"), a)
    assert np.array_equal(comparison.by_seed(scores, "b", "score"), b)


def test_a_gain_is_paired():
    """Samples that are hard for both do not widen the interval of the difference."""
    hard = RNG.normal(0.5, 0.3, 400)
    a = hard + RNG.normal(0.02, 0.02, (3, 400))
    b = hard + RNG.normal(0.0, 0.02, (3, 400))
    scores = scores_of(a=a, b=b)
    gain = comparison.gain(scores, "a", "b", "score", np.arange(400) // 4)
    assert gain.unit == results.POINTS and gain.n == 100
    assert gain.value == pytest.approx(100 * (a - b).mean())
    low, high = gain.ci95
    assert 1 < low < gain.value < high < 3
    alone = results.bootstrap(a, np.arange(400) // 4, results.POINTS)
    assert high - low < 0.3 * (alone.ci95[1] - alone.ci95[0])
    back = comparison.gain(scores, "b", "a", "score", np.arange(400) // 4)
    assert back.value == pytest.approx(-gain.value)


def test_photos_and_seeds_widen_the_interval():
    groups = np.arange(400) // 20
    by_photo = RNG.normal(0, 0.1, 20)[groups] + np.zeros((3, 1))
    by_object = RNG.permutation(by_photo[0]) + np.zeros((3, 1))
    by_network = np.array([[-0.1], [0.0], [0.1]]) + np.zeros((3, 400))

    def width(values, groups):
        low, high = results.bootstrap(values, groups).ci95
        return high - low

    assert width(by_photo, groups) > 2 * width(by_object, groups)
    assert width(by_photo, groups) > 2 * width(by_photo, None)
    assert width(by_network, groups) > 0.1


def test_a_constant_has_no_interval_and_few_digits():
    groups, values = np.arange(6) // 2, 1.072984 + 1e-7 * RNG.random((2, 6))
    found = comparison.average(values, groups, "positions")
    assert f"{found:±}" == "1.07 positions"
    values[0, 0] = 2
    assert comparison.average(values, groups, "") == results.bootstrap(values, groups, "")


def test_balanced_accuracy_is_the_mean_over_classes():
    labels = np.array([0] * 8 + [1] * 2 + [3] * 5)  # class 2 has no sample
    correct = np.zeros((2, 15))
    correct[0, :8], correct[1, 8:10], correct[1, 10] = 1, 1, 1
    found = comparison.balanced(correct, labels).mean(axis=1)
    assert found.tolist() == pytest.approx([1 / 3, (1 + 1 / 5) / 3])


def test_words_follow_the_interval():
    words = ("up", "down", "open")
    for bounds, wanted in (((0.1, 2), "up"), ((-2, -0.1), "down"), ((-1, 1), "open")):
        metric = results.Metric(sum(bounds) / 2, 5, bounds, results.POINTS)
        assert comparison.verdict(metric, *words) == wanted
    metric = results.Metric(4.2, 100, (2.1, 6.3), results.POINTS)
    assert comparison.with_range(metric) == "+4.2 (+2.1 to +6.3)"
    assert comparison.in_percent(results.Metric(0.42, 9, (0.4, 0.44), "fraction")) == "42.0 ± 2.0"


def test_compact_scores_hold_what_was_found():
    scores = {
        (key, seed): {"test": {"found": torch.arange(4) + seed, "mask_iou": torch.rand(4)}}
        for key in ("a", "b")
        for seed in (0, 1)
    }
    arrays = comparison.compact(scores, ["b"], "turned.")
    assert set(arrays) == {"turned.b.found", "turned.b.mask_iou"}
    assert arrays["turned.b.found"].dtype == np.uint8
    assert arrays["turned.b.found"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]
    wanted = comparison.by_seed(scores, "b", "mask_iou")
    assert np.allclose(arrays["turned.b.mask_iou"], wanted, atol=1e-3)


def test_the_best_network_against_an_answer_without_training():
    hard = RNG.normal(0.5, 0.3, 400)
    a, b, c = (hard + shift + RNG.normal(0, 0.02, (3, 400)) for shift in (-0.1, 0.1, 0.05))
    scores, groups = scores_of(a=a, b=b, c=c), np.arange(400) // 4
    best, difference, above = comparison.lead(scores, "abc", "score", hard, groups)
    assert best == "b" and above == 2 and difference.unit == results.POINTS
    assert difference.value == pytest.approx(100 * (b.mean() - hard.mean()))
    low, high = difference.ci95
    assert 9 < low < difference.value < high < 11, "paired: hard samples do not widen it"
    best, difference, above = comparison.lead(scores, "ab", "score", hard > 5, groups)  # bool
    assert best == "b" and above == 2 and difference.value == pytest.approx(100 * b.mean())


def test_every_baseline_has_its_cells():
    known = {
        "baseline.linear_probe_accuracy": 0.7,
        "baseline.linear_probe_balanced_accuracy": 0.6,
        "baseline.mean_mask_iou": 0.3,
    }
    metrics = {key: results.single(value, "fraction") for key, value in known.items()}
    assert comparison.baseline_cells(metrics, "linear_probe") == ["70.0", "60.0", "–"]
    assert comparison.baseline_cells(metrics, "mean_mask") == ["–", "–", "30.0"]


def test_the_worst_mistake_is_a_share_of_its_class():
    truth = np.array([0] * 10 + [1] * 4 + [2] * 2)
    first, second = truth.copy(), truth.copy()
    first[:4] = 2  # 40 % and 0 % of class 0, a mean of 20 %
    first[10:12], second[10] = 0, 0  # 50 % and 25 % of class 1
    found = comparison.worst_mistake([first, second], truth, ("cat", "cup", "car"))
    assert found == "38 % of the views of *cup* are taken for *cat*"


def test_summaries_name_all_measures():
    scores = {
        ("a", seed): {
            role: {name: torch.rand(6) for name in ("accuracy", "mask_iou", "cross_entropy")}
            for role in ("train", "val", "test")
        }
        for seed in (0, 1)
    }
    found = comparison.summary(scores, "a", np.arange(6), np.arange(6) % 2)
    names = {
        f"a.{role}_{name}"
        for role in ("train", "val", "test")
        for name in ("accuracy", "mask_iou", "cross_entropy")
    }
    assert set(found) == names | {"a.test_balanced_accuracy"}
    values = comparison.by_seed(scores, "a", "accuracy", "train")
    assert found["a.train_accuracy"].value == pytest.approx(values.mean())
    assert found["a.train_accuracy"].n == 2 and found["a.test_accuracy"].n == 6


def test_the_benchmark_s_table():
    metrics = {}
    for name, seconds in (("ours", 0.05), ("conv", 0.02)):
        metrics[f"1x2x3x4.{name}_seconds"] = results.single(seconds, "seconds")
    for name in ("readable", "grid_sample", "torchvision"):
        metrics[f"1x2x3x4.{name}_seconds"] = results.single(0.5, "seconds")
    metrics["1x2x3x4.ours_peak_mb"] = results.single(12.3, "megabytes")
    metrics["geometric_mean.ours_over_conv"] = results.single(2.5, "ratio")
    metrics["geometric_mean.torchvision_over_ours"] = results.single(10, "ratio")
    stored = {"metrics": metrics, "config": {"shapes": [[1, 2, 3, 4]]}, "machine": "a machine"}
    headings, rows, caption = comparison.benchmark_table(stored)
    assert headings == ["contender", "1 × 2 × 3 × 4"]
    assert rows[0] == ("ours, fast", "50 ms, 12 MB") and rows[-1][1] == "20 ms"
    assert len(rows) == 5 and "a machine" in caption and "2.50" in caption
