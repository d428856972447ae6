"""Measured numbers: one JSON file per notebook, and prose rendered from it."""

import datetime
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from scipy import stats

from src import ROOT, ProjectError
from src.device import machine

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pycocotools")


def proportion(successes: int, n: int, unit: str = "fraction") -> dict:
    """A metric from a count: value, n and the Wilson 95 % interval (Wilson 1927; good near 0 and 1)."""
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(0.95, method="wilson")
    return {
        "value": successes / n,
        "n": int(n),
        "ci95": [float(interval.low), float(interval.high)],
        "unit": unit,
    }


def mean(values, unit: str) -> dict:
    """A metric from repeated measurements: mean, n and Student's 95 % interval (none for a single value)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return {"value": float(values.mean()), "n": len(values), "ci95": None, "unit": unit}
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return {
        "value": float(values.mean()),
        "n": len(values),
        "ci95": [values.mean() - half, values.mean() + half],
        "unit": unit,
    }


def single(value: float, unit: str) -> dict:
    """A metric that is measured once or counted: no interval."""
    return {"value": float(value), "n": 1, "ci95": None, "unit": unit}


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


def reports_folder(standin: bool) -> Path:
    """Where a run writes: runs on the stand-in never overwrite results of the real data."""
    return ROOT / "reports" / "standin" if standin else ROOT / "reports"


def commit() -> str:
    """The commit of this code, with `+changes` behind it where code differs from it."""

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git(
            "status", "--porcelain", "--", "src", "notebooks", "theory", "requirements.txt"
        )
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_results(
    name, metrics, *, profile, source, runtime, seeds, seconds, config=None, curves=None
) -> Path:
    """Writes `reports/results/<name>.json` in one step: the metrics with their provenance.

    Args:
        name: of the notebook or benchmark.
        metrics: {name: {value, n, ci95: [lo, hi] or None, unit}}.
        profile: smoke, demo, cpu or gpu.
        source: the `src.data.Source` of the images, or None where no image is involved.
        runtime: the `src.device.Runtime`.
        seeds: all seeds of the run.
        seconds: the run's length.
        config: a dataclass with the run's settings.
        curves: {training: `src.training.History`}, the numbers behind the learning curves.

    Raises:
        ProjectError: if a metric lacks a key or is not finite.
    """
    for key, metric in metrics.items():
        if set(metric) != {"value", "n", "ci95", "unit"} or not math.isfinite(metric["value"]):
            raise ProjectError(
                f"Metric {key!r} of {name} needs value (finite), n, ci95 and unit: {metric}."
            )
    standin = bool(source and source.is_standin)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    content = {
        "profile": profile,
        "data_source": source.name if source else "none",
        "standin": standin,
        "device": runtime.device.type,
        "machine": machine(runtime.device),
        "seeds": list(seeds),
        "versions": versions,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(float(seconds), 1),
        "config": asdict(config) if config else {},
        "metrics": metrics,
        "curves": {key: asdict(history) for key, history in (curves or {}).items()},
    }
    path = reports_folder(standin) / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def load_results(path: Path) -> dict:
    """Reads a results file.

    Raises:
        ProjectError: if it is missing or broken.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProjectError(
            f"There is no results file {Path(path).name}: run the notebook that writes it."
        ) from None
    except ValueError as error:
        raise ProjectError(
            f"{Path(path).name} is broken ({error}): run the notebook again."
        ) from None


def percent(metric: dict, digits: int = 2, interval: bool = True) -> str:
    """A fraction as text: `99.45 % (95 % interval 99.02 to 99.69, n = 2000)`."""
    text = f"{100 * metric['value']:.{digits}f} %"
    if interval and metric["ci95"]:
        low, high = (100 * bound for bound in metric["ci95"])
        text += f" (95 % interval {low:.{digits}f} to {high:.{digits}f}, n = {metric['n']})"
    return text


def render(text: str, results: dict) -> str:
    """Fills measured numbers into prose.

    `{name}` gives a fraction as percent with its interval, `{name:short}` without it,
    `{name:.1f}` any metric in that format; `{seconds:minutes}`, `{machine}`, `{profile}` and
    the other entries of the results file work alike.

    Raises:
        ProjectError: if the text names a metric that the results do not hold.
    """

    def fill(match):
        name, _, form = match.group(1).partition(":")
        entry = results["metrics"].get(name, results.get(name))
        if entry is None:
            raise ProjectError(
                f"The text names {name!r}, which is not in the results: correct the name."
            )
        if form == "minutes":
            return f"{(entry['value'] if isinstance(entry, dict) else entry) / 60:.1f} minutes"
        if not isinstance(entry, dict):
            return str(entry)
        if form in ("", "short"):
            return percent(entry, interval=not form)
        return format(entry["value"], form)

    return re.sub(r"\{([A-Za-z_][\w. ]*(?::[\w.]+)?)\}", fill, text)
