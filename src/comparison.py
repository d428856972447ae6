"""Scores of several networks and seeds on the same samples: compared in pairs, drawn."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np

from src import plotting, results
from src.results import Metric


def by_seed(scores: Mapping, key: str, name: str, role: str = "test") -> np.ndarray:
    """Scores (seeds, N) of {(key, seed): {role: {name: (N,)}}}."""
    return np.stack([np.asarray(scores[k, s][role][name]) for k, s in scores if k == key])


def gain(scores: Mapping, one: str, other: str, name: str, groups) -> Metric:
    """Score of one network minus another's, paired, in percentage points; see `bootstrap`."""
    difference = by_seed(scores, one, name) - by_seed(scores, other, name)
    return results.bootstrap(difference, groups, results.POINTS)


def average(values: np.ndarray, groups, unit: str) -> Metric:
    """As `results.bootstrap`, but without an interval where all values are one constant."""
    if np.ptp(values) < 1e-4:  # as the spread of the regular grid: there is no doubt about it
        return results.single(np.mean(values), unit)
    return results.bootstrap(values, groups, unit)


def balanced(correct: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weight scores (..., N) so that their mean is the mean of the classes' own means."""
    counts = np.bincount(labels)
    return correct * len(labels) / ((counts > 0).sum() * counts[labels])


def summary(scores: Mapping, key: str, groups, labels: np.ndarray) -> dict[str, Metric]:
    """Metrics of a network: training and validation over the seeds, test with a bootstrap.

    Args:
        groups: (N,), the photo of every test sample.
        labels: (N,), true classes of the test samples.
    """
    metrics, units = {}, {"accuracy": "fraction", "mask_iou": "fraction", "cross_entropy": "nats"}
    for name, unit in units.items():
        for role in ("train", "val"):
            means = by_seed(scores, key, name, role).mean(axis=1)
            metrics[f"{key}.{role}_{name}"] = results.mean(means, unit)
        values = by_seed(scores, key, name)
        metrics[f"{key}.test_{name}"] = results.bootstrap(values, groups, unit)
    weighted = balanced(by_seed(scores, key, "accuracy"), labels)
    return metrics | {f"{key}.test_balanced_accuracy": results.bootstrap(weighted, groups)}


def compact(scores: Mapping, keys: Iterable[str], prefix: str = "") -> dict[str, np.ndarray]:
    """What was found for every seed and test sample, and the mask IoU, in few bytes."""
    arrays = {}
    for key in keys:
        arrays[f"{prefix}{key}.found"] = by_seed(scores, key, "found").astype(np.uint8)
        arrays[f"{prefix}{key}.mask_iou"] = by_seed(scores, key, "mask_iou").astype(np.float16)
    return arrays


def verdict(metric: Metric, gained="a gain", lost="a loss", unclear="interval includes 0") -> str:
    """Choose the words that fit the interval of a difference."""
    low, high = metric.ci95
    return gained if low > 0 else lost if high < 0 else unclear


def with_range(metric: Metric) -> str:
    """A difference and its interval in one cell, without the unit, which the heading has."""
    return f"{metric:short} ({metric:range})".replace(" points", "")


def in_percent(metric: Metric) -> str:
    """A rate in percent, ± half its interval, without the sign, which the heading has."""
    return f"{metric:±}".removesuffix(" %")


def train_and_val(metrics: Mapping, key: str, name: str, form: str) -> str:
    """Training and validation mean of a network in one cell, rates in percent."""
    cells = [metrics[f"{key}.{role}_{name}"] for role in ("train", "val")]
    values = (100 * m.value if m.unit == "fraction" else m.value for m in cells)
    return " / ".join(format(value, form) for value in values)


def baseline_cells(metrics: Mapping, name: str) -> list[str]:
    """Accuracy, balanced accuracy and mask IoU of a baseline in percent, "–" where it has none."""
    keys = (f"baseline.{name}_{measure}" for measure in ("accuracy", "balanced_accuracy", "iou"))
    return [in_percent(metrics[key]) if key in metrics else "–" for key in keys]


def lead(
    scores: Mapping, keys: Iterable[str], name: str, level: np.ndarray, groups
) -> tuple[str, Metric, int]:
    """Compare networks with an answer that was scored on the same test samples.

    Args:
        level: its scores (N,).
        groups: (N,), the photo of every sample.

    Returns:
        The network with the best mean, its paired lead in percentage points, and how many of the
        networks have a better mean than the answer.
    """
    level, found = np.asarray(level, float), {key: by_seed(scores, key, name) for key in keys}
    means = {key: values.mean() for key, values in found.items()}
    best = max(means, key=means.get)
    difference = results.bootstrap(found[best] - level, groups, results.POINTS)
    return best, difference, sum(mean > level.mean() for mean in means.values())


def plot_points(metrics: Mapping, panels: Mapping, kinds: Sequence[str], points: Sequence[int]):
    """Draw metrics `kind_points.name` against the number of points, a line per kind.

    Args:
        panels: {name: (axis label with unit, scale, name of a metric drawn as a level, or "")}.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.4))
    for ax, (name, (label, scale, level)) in zip(axes, panels.items()):
        for i, kind in enumerate(kinds):
            cells = [metrics[f"{kind}_{k}.{name}"] for k in points]
            middle = scale * np.array([cell.value for cell in cells])
            bounds = scale * np.array([cell.ci95 or (cell.value,) * 2 for cell in cells]).T
            style = dict(color=plotting.COLOURS[i], marker=plotting.MARKERS[i], capsize=2)
            style |= dict(label=kind, linestyle=plotting.LINES[i])
            places = np.arange(len(points)) + 0.06 * (i - 1)
            ax.errorbar(places, middle, abs(bounds - middle), **style)
        if level:
            value = scale * metrics[level].value
            text = level.split(".")[1].rsplit("_", 1)[0].replace("_", " ")
            ax.axhline(value, color="#888888", linewidth=1)
            ax.text(len(points) - 0.8, value, text, ha="right", va="bottom", fontsize=8)
        ax.set(title=label.split(" (")[0], xlabel="points per output position", ylabel=label)
        ax.set(xticks=range(len(points)), xticklabels=points)
    axes[0].legend(fontsize=8)
    return fig


def plot_learning(histories: Mapping, panels: Mapping, keys: Mapping, seeds: Sequence[int]):
    """Draw columns of the histories `key seed` against epochs, means over the seeds.

    Args:
        panels: {column: axis label}.
        keys: {label of the line: key}.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.2))
    for ax, (column, label) in zip(axes, panels.items()):
        lines = {
            title: np.mean([histories[f"{key} {seed}"].column(column) for seed in seeds], axis=0)
            for title, key in keys.items()
        }
        plotting.curves(ax, lines, label.split(" (")[0], label)
        if ax is not axes[0]:
            ax.get_legend().remove()
    return fig


def plot_confusions(found: Mapping, truth: np.ndarray, classes: Sequence[str]):
    """Draw the confusion matrix of each {title: found classes (seeds, N)}, the seeds' mean."""
    fig, axes = plt.subplots(1, len(found), figsize=(4.1 * len(found), 4.4))
    for ax, (title, answers) in zip(axes, found.items()):
        matrix = np.zeros((len(classes), len(classes)))
        for answer in answers:
            np.add.at(matrix, (truth, answer), 1 / len(answers))
        plotting.confusion(ax, matrix.round().astype(int), classes, title)
    return fig


def worst_mistake(found: Sequence, truth: np.ndarray, classes: Sequence[str]) -> str:
    """Say which class is most often taken for which other, of found classes (seeds, N)."""
    shares = np.zeros((len(classes), len(classes)))
    np.add.at(shares, (np.tile(truth, len(found)), np.concatenate(found)), 1)
    shares /= shares.sum(axis=1, keepdims=True).clip(min=1)
    np.fill_diagonal(shares, 0)
    true, taken = np.unravel_index(shares.argmax(), shares.shape)
    share = f"{100 * shares[true, taken]:.0f} %"
    return f"{share} of the views of *{classes[true]}* are taken for *{classes[taken]}*"


def benchmark_table(stored: Mapping) -> tuple[list[str], list[tuple], str]:
    """Headings, rows (a contender each) and caption of the stored benchmark of `tools.bench`."""
    labels = {
        "ours": "ours, fast",
        "readable": "ours, readable",
        "grid_sample": "grid_sample",
        "torchvision": "torchvision",
        "conv": "ordinary convolution",
    }
    timed, shapes, rows = stored["metrics"], stored["config"]["shapes"], []
    for name, label in labels.items():
        cells = []
        for shape in shapes:
            key = f"{'x'.join(map(str, shape))}.{name}"
            peak = timed.get(f"{key}_peak_mb")
            memory = f", {peak.value:.0f} MB" if peak else ""
            cells.append(f"{1000 * timed[f'{key}_seconds'].value:.0f} ms{memory}")
        rows.append((label, *cells))
    headings = ["contender", *(" × ".join(map(str, shape)) for shape in shapes)]
    caption = (
        "Batch × channels in × out × side: median time of forward and backward, and the memory "
        f"that one call takes beside its inputs, on {stored['machine']}. Geometric means: ours "
        f"over the ordinary convolution {timed['geometric_mean.ours_over_conv']:.2f}, torchvision "
        f"over ours {timed['geometric_mean.torchvision_over_ours']:.1f}."
    )
    return headings, rows, caption
