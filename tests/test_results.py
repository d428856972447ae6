import json
import math
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch

from src import ProjectError, results
from src.device import Runtime
from src.results import Metric
from src.training import History

RUNTIME = Runtime(torch.device("cpu"))


class FakeSource:
    name, is_standin = "HW3_DATA", False


@pytest.fixture
def reports(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path / "reports"


def save(metrics, source=None, profile="cpu", runtime=RUNTIME, seconds=90, **more):
    return results.save_results(
        "test",
        metrics,
        profile=profile,
        source=source or FakeSource(),
        runtime=runtime,
        seeds=[0],
        seconds=seconds,
        **more,
    )


# --- measuring


def test_a_metric_stays_as_it_was_measured():
    with pytest.raises(FrozenInstanceError):
        Metric(0.5).value = 0.6


def test_wilson_interval_by_hand():
    # n = 2000, k = 1990: centre and half width from Wilson's closed form.
    n, p, z = 2000, 1990 / 2000, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    metric = results.proportion(1990, n)
    assert metric.value == p and metric.n == n
    assert metric.ci95 == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_mean_interval_by_hand():
    # Three values: t(0.975, 2) = 4.302652..., standard deviation 1, half width 4.302652 / sqrt(3).
    metric = results.mean([1.0, 2.0, 3.0], "px")
    assert metric.value == 2 and metric.n == 3
    assert metric.ci95 == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert results.mean([1.0], "px").ci95 is None
    two = results.mean([1.0, 2.0], "px")  # t(0.975, 1) = 12.706205, half width 12.706205 / 2
    assert two.ci95 == pytest.approx((1.5 - 6.353102, 1.5 + 6.353102), abs=1e-5)


def test_median_interval_holds_the_ranks_of_the_binomial():
    metric = results.median(range(1, 101), "px")  # ranks 40 and 61 of 100 hold the median in 95 %
    assert metric.value == 50.5 and metric.ci95 == (40, 61)
    assert results.median([1.0, 2.0], "px").ci95 is None


@pytest.mark.parametrize("values", [[], np.empty((3, 0))])
def test_there_must_be_scores(values):
    with pytest.raises(ProjectError, match="no scores"):
        results.bootstrap(values, [])


def test_bootstrap_draws_whole_groups():
    # 20 groups of 10 equal scores: as uncertain as 20 scores, not as 200.
    rng = np.random.default_rng(0)
    each = rng.integers(0, 2, 20)
    groups = np.repeat(np.arange(20), 10)
    metric = results.bootstrap(np.repeat(each, 10), groups)
    half = (metric.ci95[1] - metric.ci95[0]) / 2
    wanted = 1.96 * each.std() / math.sqrt(20)
    assert metric.value == each.mean() and metric.n == 20
    assert half == pytest.approx(wanted, rel=0.15)
    alone = results.bootstrap(np.repeat(each, 10))
    assert (alone.ci95[1] - alone.ci95[0]) / 2 == pytest.approx(wanted / math.sqrt(10), rel=0.15)


def test_bootstrap_draws_seeds_as_well():
    # Every sample has the same score for a seed: all of the uncertainty is that of the seeds.
    values = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]]) + np.zeros((5, 400))
    metric = results.bootstrap(values, unit="px")
    assert metric.value == 2
    assert metric.ci95[1] - metric.ci95[0] == pytest.approx(2 * 1.96 * math.sqrt(2 / 5), rel=0.15)
    points = results.bootstrap(values, unit=results.POINTS)
    assert points.value == 200


def test_paired_p_value_looks_at_the_discordant_pairs_only():
    a = np.array([True] * 8 + [False] * 92)
    assert results.paired_p_value(a, a) == 1.0
    assert results.paired_p_value(a, np.zeros(100, bool)) == pytest.approx(2 * 0.5**8)


def test_holm_by_hand():
    # Sorted .01, .02, .03, .04: times 4, 3, 2, 1 and never falling.
    corrected = results.holm({"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.02})
    assert list(corrected) == ["c", "a", "d", "b"]
    assert [corrected[key] for key in "abcd"] == pytest.approx([0.04, 0.06, 0.06, 0.06])


# --- showing


@pytest.mark.parametrize(
    "metric, form, wanted",
    [
        (Metric(0.993, 2000, (0.9883, 0.9957), "fraction"), "",
         "99.3 % (95 % interval 98.8 to 99.6, n = 2,000)"),
        (Metric(0.993, 2000, (0.9883, 0.9957), "fraction"), "short", "99.3 %"),
        (Metric(0.993, 2000, (0.9883, 0.9957), "fraction"), "range", "98.8 to 99.6 %"),
        (Metric(0.5712, 5, (0.554, 0.588), "fraction"), "±", "57.1 ± 1.7 %"),
        (Metric(0.5712, 5, (0.52, 0.62), "fraction"), "±", "57 ± 5 %"),
        (Metric(0.99945, 6000, (0.99922, 0.9995), "fraction"), "short", "99.945 %"),
        (Metric(4.06, 204, (1.51, 6.74), "percentage points"), "",
         "+4.1 percentage points (95 % interval +1.5 to +6.7, n = 204)"),
        (Metric(4.06, 204, (1.51, 6.74), "percentage points"), "short", "+4.1 points"),
        (Metric(-0.4, 1, None, "percentage points"), "short", "-0.4 points"),
        (Metric(3373570, 1, None, "parameters"), "short", "3,373,570 parameters"),
        (Metric(0.0067, 1, None, "px"), "short", "0.00670 px"),
        (Metric(0.993, 2000, (0.9883, 0.9957), "fraction"), ".4f", "0.9930"),
        (Metric(4.06, 204, (1.51, 6.74), "percentage points"), "±", "+4.1 ± 2.6 points"),
        (Metric(12.0, 9, (9.0, 15.0), "px"), "range", "9 to 15 px"),
        (Metric(12.0, 9, (11.75, 12.25), "px"), "short", "12.00 px"),
        (Metric(12.0, 9, (11.625, 12.375), "px"), "short", "12.0 px"),
        (Metric(5000.0, 9, (3000.0, 7000.0), "px"), "range", "3,000 to 7,000 px"),
        (Metric(2.0, 9, (2.0, 2.0), "px"), "short", "2.00 px"),
        (Metric(1e-9, 9, (0.0, 2e-9), "px"), "short", "0.000000 px"),
        (Metric(0.4, 2, None, "px"), "", "0.400 px (n = 2)"),
        (Metric(0.4, unit="px"), "", "0.400 px"),
        (Metric(-20.0, unit="px"), "short", "-20.0 px"),
        (Metric(0.0, unit="px"), "short", "0 px"),
        (Metric(1234.5, unit=""), "short", "1,234"),
        (Metric(2e-8, unit="px"), "short", "0.000000 px"),
    ],
)  # fmt: skip
def test_metrics_show_the_digits_that_their_interval_supports(metric, form, wanted):
    assert format(metric, form) == wanted


def test_table_aligns_numbers_and_escapes_bars():
    text = results.table(["a|b", "n"], [["x|y", Metric(0.5, 1, None, "fraction")], ["z", 1234]])
    assert text.splitlines()[2:] == ["| x\\|y  | 50.0 % |", "| z     |  1,234 |"] or "1,234" in text
    assert "x\\|y" in text and text.splitlines()[1].endswith(":|")


def test_table_reads_columns_cell_by_cell():
    rows = [["a", 0.12345, -3, ""], ["b", 2.0, "–5", "x"]]
    lines = results.table(["name", "share", "n", "rest"], rows).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")] == ["", "a", "0.123", "-3", "", ""]
    assert [cell.strip()[-1] for cell in lines[1].split("|")[1:-1]] == ["-", ":", ":", "-"]
    assert "| 0.500 |" in results.table(["p"], [["0.500"], ["2"]]), "digits are the caller's"
    assert results.table(["name", "n"], []).splitlines()[0].split() == ["|", "name", "|", "n", "|"]


def test_render_fills_text_from_the_results():
    metrics = {"ce.test_accuracy": results.proportion(1990, 2000), "loss": Metric(0.12345)}
    stored = {"metrics": metrics, "seconds": 90, "profile": "cpu"}
    text = "{ce.test_accuracy:short}, {ce.test_accuracy}, {loss:.3f}, {seconds:minutes}, {profile}"
    wanted = "99.5 %, 99.5 % (95 % interval 99.1 to 99.7, n = 2,000), 0.123, 1.5 minutes, cpu"
    assert results.render(text, stored) == wanted
    assert results.render("{loss:.1f} {word}", metrics, word="{kept}") == "0.1 {kept}"


def test_render_refuses_a_number_nobody_measured():
    with pytest.raises(ProjectError, match="names 'ce.accuracy', which is not in the results"):
        results.render("{ce.accuracy}", {"metrics": {}})


# --- storing


def test_saved_results_hold_their_provenance(reports):
    metrics = {"test_accuracy": results.proportion(9, 10), "one": results.single(1, "px")}
    path = save(metrics, arrays={"scores": np.arange(3)}, fingerprint="abc")
    stored = results.load_results(path)
    assert path == reports / "results" / "test.json"
    wanted = "profile data_source device machine seeds versions commit fingerprint seconds".split()
    assert set(wanted) <= set(stored) and stored["fingerprint"] == "abc"
    assert stored["metrics"] == metrics
    assert np.load(path.with_suffix(".npz"))["scores"].tolist() == [0, 1, 2]
    assert sorted(p.name for p in path.parent.iterdir()) == ["test.json", "test.npz"]


def test_saved_results_hold_the_run(reports):
    @dataclass
    class Config:
        width: int = 8

    history = History([{"val_loss": 0.5}], 1, 3.0)
    path = save({}, seconds=90.26, config=Config(), curves={"toy": history})
    stored = results.load_results(path)
    assert stored["seconds"] == 90.3 and stored["config"] == {"width": 8}
    assert stored["curves"] == {
        "toy": {"epochs": [{"val_loss": 0.5}], "best_epoch": 1, "seconds": 3.0}
    }
    assert stored["precision"] == "float32" and stored["data_source"] == "HW3_DATA"
    bfloat = Runtime(torch.device("cpu"), autocast=torch.bfloat16)
    stored = results.load_results(save({}, runtime=bfloat))
    assert stored["precision"] == "bfloat16" and stored["config"] == stored["curves"] == {}


def test_only_real_data_at_full_size_reach_the_committed_results(reports):
    class Standin(FakeSource):
        name, is_standin = "stand-in", True

    metric = {"a": results.single(1, "x")}
    real, drawn = save(metric), save({"a": results.single(2, "x")}, Standin(), "smoke")
    demo = save({"a": results.single(3, "x")}, profile="demo")
    assert [p.parent.parent.name for p in (real, drawn, demo)] == ["reports", "standin", "demo"]
    assert json.loads(real.read_text())["metrics"]["a"]["value"] == 1
    assert json.loads(drawn.read_text())["standin"] is True
    assert results.reports_folder() == reports, "the committed ones, unless something else is said"


@pytest.mark.parametrize(
    "metric",
    [{"value": 1.0}, Metric(math.nan), Metric(math.inf), Metric(1, 1, (0, math.nan)), None],
)
def test_what_is_not_a_finite_metric_is_refused(reports, metric):
    with pytest.raises(ProjectError, match="'a' of test is not a finite metric"):
        save({"a": metric})
    assert not reports.exists()


@pytest.mark.parametrize(
    "content",
    ['{"metrics":', "[]", "null", "{}", '{"metrics": []}', '{"metrics": {"a": {}}}',
     '{"metrics": {"a": {"value": NaN, "n": 1, "ci95": null, "unit": ""}}}',
     '{"metrics": {"a": {"value": "x", "n": 1, "ci95": null, "unit": ""}}}',
     b"\xff\xfe", b"\xef\xbb\xbf{}", "",
     '{"metrics": {"a": {"value": NaN, "n": NaN, "ci95": [NaN, NaN], "unit": ""}}}'],
)  # fmt: skip
def test_broken_results_files_get_one_line(tmp_path, content):
    path = tmp_path / "half.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProjectError, match="half.json is broken") as error:
        results.load_results(path)
    assert "\n" not in str(error.value)


def test_missing_results_file(tmp_path):
    with pytest.raises(ProjectError, match="no results file gone.json"):
        results.load_results(tmp_path / "gone.json")
