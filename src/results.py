"""Measured numbers: values that know how to show themselves, one results file per notebook."""

import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from tabulate import tabulate

from src import ROOT, ProjectError, provenance
from src.files import replacing, write_whole

POINTS = "percentage points"
_COUNTS = ("parameters", "MACs", "images", "pairs", "pixels", "bytes")


@dataclass(frozen=True)
class Metric:
    """A measured number: its value, the number of samples, the 95 % interval and the unit.

    As text it has the digits that its interval supports. `format` takes these forms:

    - "": value and interval, `99.3 % (95 % interval 98.8 to 99.6, n = 2000)`
    - "short": the value, `99.3 %`
    - "±": value and half the interval, `57.1 ± 1.7 %`
    - "range": the interval, `98.8 to 99.6 %`
    - any other: the bare value in that form, such as ".3f"

    A unit of "fraction" prints in percent, "percentage points" with its sign.
    """

    value: float
    n: int = 1
    ci95: tuple[float, float] | None = None
    unit: str = ""

    def __format__(self, form: str) -> str:
        if form not in ("", "short", "±", "range"):
            return format(self.value, form)
        scale = 100 if self.unit == "fraction" else 1
        digits, sign = self._digits(scale), "+" if self.unit == POINTS else ""
        number = f"{{:{sign},.{digits}f}}".format
        unit = {"fraction": " %", POINTS: " points"}.get(self.unit, f" {self.unit}".rstrip())
        if form == "short" or not self.ci95:
            several = f" (n = {self.n:,})" if not form and self.n > 1 else ""
            return number(scale * self.value) + unit + several
        low, high = (number(scale * bound) for bound in self.ci95)
        if form == "range":
            return f"{low} to {high}{unit}"
        if form == "±":
            half = scale * (self.ci95[1] - self.ci95[0]) / 2
            return f"{number(scale * self.value)} ± {half:,.{digits}f}{unit}"
        unit = f" {POINTS}" if self.unit == POINTS else unit
        value = number(scale * self.value) + unit
        return f"{value} (95 % interval {low} to {high}, n = {self.n:,})"

    def _digits(self, scale: int) -> int:
        """Decimals up to the interval's first digit, one more where that is a 1 or a 2."""
        half = scale * (self.ci95[1] - self.ci95[0]) / 2 if self.ci95 else 0
        if half > 0:
            magnitude = math.floor(math.log10(half))
            return min(6, max(0, -magnitude + (half / 10**magnitude < 3)))
        if self.unit in _COUNTS:
            return 0
        if self.unit in ("fraction", POINTS):
            return 1
        size = abs(self.value)
        return 0 if size == 0 or size >= 1000 else min(6, max(0, 2 - math.floor(math.log10(size))))


# --- measuring ------------------------------------------------------------------------------------
def proportion(successes: int, n: int, unit: str = "fraction") -> Metric:
    """A metric from a count with the Wilson interval (Wilson 1927; good near 0 and 1)."""
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(0.95, method="wilson")
    return Metric(successes / n, int(n), (float(interval.low), float(interval.high)), unit)


def mean(values, unit: str) -> Metric:
    """A metric from repeated measurements: the mean with Student's interval, none for one value."""
    values = np.asarray(values, dtype=float)
    n, centre = len(values), float(np.mean(values))
    if n < 2:
        return Metric(centre, n, None, unit)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Metric(centre, n, (centre - half, centre + half), unit)


def median(values, unit: str) -> Metric:
    """A metric from repeated measurements: the median with the interval that the ranks give."""
    values = np.asarray(values, dtype=float)
    interval = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    low, high = float(interval.low), float(interval.high)
    bounds = (low, high) if math.isfinite(low) and math.isfinite(high) else None
    return Metric(float(np.median(values)), len(values), bounds, unit)


def single(value: float, unit: str) -> Metric:
    """A metric that is measured once, or counted: no interval."""
    return Metric(float(value), 1, None, unit)


def bootstrap(
    values, groups=None, unit: str = "fraction", draws: int = 2000, seed: int = 0
) -> Metric:
    """The mean of scores with a percentile bootstrap interval (Efron and Tibshirani 1993).

    Samples of one group are not independent, so whole groups are drawn with replacement; where
    several trained networks are scored on the same samples, networks are drawn as well.

    Args:
        values: scores (N,), or (S, N) with one row per seed; for a paired difference, the
            differences. In units of 1 also for "percentage points", which are 100 times as many.
        groups: (N,), what each sample belongs to, such as its photo; None if to itself.
        unit: "fraction", "percentage points" or any other.
        draws: bootstrap samples.
        seed: of the draws.

    Returns:
        A metric whose n is the number of groups.

    Raises:
        ProjectError: if there are no values.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float)) * (100 if unit == POINTS else 1)
    rows, n = values.shape
    if not values.size:
        raise ProjectError("There are no scores to average.")
    _, group = np.unique(
        np.arange(n) if groups is None else np.asarray(groups), return_inverse=True
    )
    counts = np.bincount(group)
    sums = np.stack([np.bincount(group, weights=row) for row in values])  # (S, G)
    rng, total = np.random.default_rng(seed), len(counts)
    weights = rng.multinomial(total, np.full(total, 1 / total), size=draws)  # (draws, G)
    chosen = rng.multinomial(rows, np.full(rows, 1 / rows), size=draws)  # (draws, S)
    means = ((weights @ sums.T) * chosen).sum(axis=1) / rows / (weights @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return Metric(float(values.mean()), total, (float(low), float(high)), unit)


def paired_p_value(wrong_a, wrong_b) -> float:
    """McNemar's exact test for two classifiers on the same images (McNemar 1947).

    Args:
        wrong_a, wrong_b: boolean arrays (N,), true where the classifier errs.

    Returns:
        The two-sided p-value of the hypothesis that both err equally often.
    """
    wrong_a, wrong_b = np.asarray(wrong_a, bool), np.asarray(wrong_b, bool)
    only_a, only_b = int((wrong_a & ~wrong_b).sum()), int((wrong_b & ~wrong_a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Mapping) -> dict:
    """Correct p-values for the number of comparisons (Holm 1979); the keys stay."""
    corrected, largest = {}, 0.0
    for i, key in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[key]))
        corrected[key] = largest
    return {key: corrected[key] for key in p_values}


# --- showing --------------------------------------------------------------------------------------
def table(headings: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A markdown table; metrics in short form, columns of numbers aligned to the right."""

    def text(cell) -> str:
        if isinstance(cell, Metric):
            return f"{cell:short}"
        if isinstance(cell, float):
            return f"{cell:.3g}"
        return (f"{cell:,}" if type(cell) is int else str(cell)).replace("|", "\\|")

    rows = [[text(cell) for cell in row] for row in rows]
    columns = [[row[i] for row in rows] for i in range(len(headings))]
    numeric = [all(re.match(r"[-+–—−]?(\d|$)", cell) for cell in column) for column in columns]
    align = ["right" if is_number else "left" for is_number in numeric]
    return tabulate(rows, headings, "pipe", disable_numparse=True, colalign=align if rows else None)


def render(text: str, results: Mapping, **values) -> str:
    """Fill measured numbers into prose.

    `{name}` gives a metric with its interval, `{name:short}` and the other forms of `Metric` a
    shorter text; `{seconds:minutes}`, `{machine}`, `{profile}` and the other entries of a results
    file work alike, as do the `values`.

    Args:
        text: a plain string.
        results: {name: Metric}, or what `load_results` gives.

    Raises:
        ProjectError: if the text names something that is not there.
    """
    metrics = results.get("metrics", results)

    def fill(match) -> str:
        name, _, form = match.group(1).partition(":")
        for known in (values, metrics, results):
            if name in known:
                entry = known[name]
                break
        else:
            raise ProjectError(f"The text names {name!r}, which is not in the results.")
        if form == "minutes":
            return f"{(entry.value if isinstance(entry, Metric) else entry) / 60:.1f} minutes"
        return format(entry, form) if form or isinstance(entry, Metric) else str(entry)

    return re.sub(r"\{([A-Za-z_][\w.\-]*(?::[^{}]+)?)\}", fill, text)


# --- storing --------------------------------------------------------------------------------------
def reports_folder(standin: bool = False, profile: str = "cpu") -> Path:
    """Where a run writes: only real data at full size reach the committed results."""
    reports = ROOT / "reports"
    return reports / "standin" if standin else reports / "demo" if profile == "demo" else reports


def save_results(
    name: str,
    metrics: Mapping[str, Metric],
    *,
    profile: str,
    source,
    runtime,
    seeds: Iterable[int],
    seconds: float,
    config=None,
    curves: Mapping | None = None,
    arrays: Mapping | None = None,
    fingerprint: str = "",
) -> Path:
    """Write `results/<name>.json` in one step: the metrics with their provenance.

    Args:
        name: of the notebook or benchmark.
        metrics: by name.
        profile: one of `src.settings.PROFILES`.
        source: the `src.data.Source` of the images, or None where no image is involved.
        runtime: the `src.device.Runtime`.
        seeds: all seeds of the run.
        seconds: length of the run.
        config: a dataclass with the settings of the run.
        curves: {training: `src.training.History`}, the numbers behind the learning curves.
        arrays: raw scores by name, written beside as `<name>.npz`.
        fingerprint: of the code, see `src.provenance.code_fingerprint`.

    Raises:
        ProjectError: if a metric is not a finite number, or the file cannot be written.
    """
    for key, metric in metrics.items():
        if not isinstance(metric, Metric) or not _is_finite(metric):
            raise ProjectError(f"{key!r} of {name} is not a finite metric: {metric!r}.")
    standin = bool(source and source.is_standin)
    content = {
        "profile": profile,
        "data_source": source.name if source else "none",
        "standin": standin,
        "device": runtime.device.type,
        "machine": provenance.machine(runtime.device),
        "precision": str(runtime.autocast or "torch.float32").removeprefix("torch."),
        "seeds": list(seeds),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "fingerprint": fingerprint,
        "date": datetime.date.today().isoformat(),
        "seconds": round(float(seconds), 1),
        "config": asdict(config) if config else {},
        "metrics": {key: asdict(metric) for key, metric in metrics.items()},
        "curves": {key: asdict(history) for key, history in (curves or {}).items()},
    }
    path = reports_folder(standin, profile) / "results" / f"{name}.json"
    if arrays:
        with replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
    write_whole(path, json.dumps(content, indent=1, default=str) + "\n")
    return path


def _is_finite(metric: Metric) -> bool:
    """Whether value, n and interval are finite numbers, and the unit is text."""
    bounds = (0.0, 0.0) if metric.ci95 is None else metric.ci95
    try:
        low, high = bounds
        numbers = all(map(math.isfinite, (metric.value, metric.n, low, high)))
    except (TypeError, ValueError, OverflowError):
        return False
    return numbers and isinstance(metric.unit, str)


def load_results(path: Path) -> dict:
    """Read a results file; its "metrics" are {name: Metric}.

    Raises:
        ProjectError: if it is missing or broken.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metrics = {}
        for key, entry in content["metrics"].items():
            bounds = None if entry["ci95"] is None else tuple(entry["ci95"])
            metrics[key] = Metric(entry["value"], entry["n"], bounds, entry["unit"])
            if not _is_finite(metrics[key]):
                raise ValueError(f"{key} is not a finite number")
    except FileNotFoundError:
        raise ProjectError(
            f"There is no results file {path.name}: run the notebook that writes it."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProjectError(f"{path.name} is broken ({error}): run the notebook again.") from None
    return content | {"metrics": metrics}
