import json

import numpy as np
import pytest
import torch

from src import ProjectError, results
from src.device import Runtime

RUNTIME = Runtime(torch.device("cpu"), autocast=False)


class FakeSource:
    name, is_standin = "HW3_DATA", False


@pytest.fixture
def reports(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path / "reports"


def save(metrics, source=FakeSource()):
    return results.save_results(
        "test", metrics, profile="cpu", source=source, runtime=RUNTIME, seeds=[0], seconds=90
    )


def test_wilson_interval_by_hand():
    # n = 2000, k = 1990: centre and half width from Wilson's closed form.
    n, p, z = 2000, 1990 / 2000, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    metric = results.proportion(1990, n)
    assert metric["value"] == p and metric["n"] == n
    assert metric["ci95"] == pytest.approx([centre - half, centre + half], abs=1e-12)


def test_mean_interval_by_hand():
    # Three values: t(0.975, 2) = 4.302652..., standard deviation 1, half width 4.302652 / sqrt(3).
    metric = results.mean([1.0, 2.0, 3.0], "points")
    assert metric["value"] == 2 and metric["n"] == 3
    assert metric["ci95"] == pytest.approx([2 - 2.484138, 2 + 2.484138], abs=1e-5)
    assert results.mean([1.0], "points")["ci95"] is None


def test_paired_p_value_looks_at_the_discordant_pairs_only():
    a = np.array([True] * 8 + [False] * 92)
    assert results.paired_p_value(a, a) == 1.0
    assert results.paired_p_value(a, np.zeros(100, bool)) == pytest.approx(2 * 0.5**8)


def test_saved_results_hold_their_provenance(reports):
    path = save({"test_accuracy": results.proportion(9, 10)})
    stored = results.load_results(path)
    assert path == reports / "results" / "test.json"
    wanted = {
        "profile",
        "data_source",
        "device",
        "machine",
        "seeds",
        "versions",
        "commit",
        "seconds",
        "metrics",
    }
    assert wanted <= set(stored)
    assert stored["metrics"]["test_accuracy"]["value"] == 0.9
    assert [p.name for p in path.parent.iterdir()] == ["test.json"], "a temporary file stayed"


def test_standin_results_never_replace_real_ones(reports):
    class Standin(FakeSource):
        name, is_standin = "stand-in", True

    real = save({"a": results.single(1, "x")})
    drawn = save({"a": results.single(2, "x")}, Standin())
    assert real != drawn
    assert json.loads(real.read_text())["metrics"]["a"]["value"] == 1
    assert json.loads(drawn.read_text())["standin"] is True


@pytest.mark.parametrize(
    "metric", [{"value": 1.0}, results.single(float("nan"), "x"), results.single(float("inf"), "x")]
)
def test_incomplete_or_infinite_metrics_are_refused(reports, metric):
    with pytest.raises(ProjectError, match="Metric 'a' of test needs"):
        save({"a": metric})
    assert not reports.exists()


def test_render_fills_text_from_the_results():
    stored = {
        "metrics": {
            "ce.test_accuracy": results.proportion(1990, 2000),
            "loss": results.single(0.12345, "nats"),
        },
        "seconds": 90,
        "profile": "cpu",
    }
    text = results.render(
        "{ce.test_accuracy:short} | {ce.test_accuracy} | {loss:.3f} | {seconds:minutes} | {profile}",
        stored,
    )
    assert (
        text
        == "99.50 % | 99.50 % (95 % interval 99.08 to 99.73, n = 2000) | 0.123 | 1.5 minutes | cpu"
    )


def test_render_refuses_a_number_nobody_measured():
    with pytest.raises(ProjectError, match="names 'ce.accuracy', which is not in the results"):
        results.render("{ce.accuracy}", {"metrics": {}})


def test_missing_and_broken_results_files(tmp_path):
    with pytest.raises(ProjectError, match="no results file gone.json"):
        results.load_results(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"metrics":')
    with pytest.raises(ProjectError, match="half.json is broken"):
        results.load_results(tmp_path / "half.json")
