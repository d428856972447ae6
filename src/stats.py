"""Measured numbers that print themselves, their intervals, and the tests between them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

POINTS = "percentage points"
COUNTED = ("parameters", "MACs", "images", "pairs", "photos")  # units of whole numbers
DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A measured number: value, number of independent samples, 95 % interval, unit.

    As text it has the digits that its interval supports, rates in percent: `f"{e}"` gives
    "99.3 % (98.8 to 99.6)", `f"{e:short}"` "99.3 %", `f"{e:range}"` "98.8 to 99.6 %", and any other
    form, such as ".3f", the bare value. What could not be measured (NaN) is "–".
    """

    value: float
    n: int = 1
    ci95: tuple[float, float] | None = None
    unit: str = ""

    def __str__(self):
        return format(self, "")

    def __format__(self, form):
        if not math.isfinite(self.value):
            return "–"
        if form not in ("", "short", "range"):
            return format(self.value, form)
        scale = 100 if self.unit in ("fraction", POINTS) else 1
        half = scale * (self.ci95[1] - self.ci95[0]) / 2 if self.ci95 else 0
        sign = "+" if self.unit == POINTS else ""
        unit = {"fraction": " %", POINTS: " points"}.get(self.unit, f" {self.unit}".rstrip())

        def number(value):
            digits = self._digits(half, scale)
            return f"{round(scale * value, digits) + 0.0:{sign},.{digits}f}"  # + 0.0: no "-0"

        interval = " to ".join(map(number, self.ci95)) if self.ci95 else ""
        if form == "range" and interval:
            return interval + unit
        value = number(self.value) + unit
        return f"{value} ({interval})" if form == "" and interval else value

    def _digits(self, half, scale):
        """Decimals up to the first digit of half an interval, one more where that is 1 or 2."""
        if half > 0:
            magnitude = math.floor(math.log10(half))
            return min(6, max(0, -magnitude + (half / 10**magnitude < 3)))
        if scale == 100:
            return 1
        size = abs(self.value)
        if self.unit in COUNTED or size == 0 or size >= 1000:
            return 0
        return min(6, max(0, 2 - math.floor(math.log10(size))))


# --- one sample -----------------------------------------------------------------------------------
def _wilson(p, n):
    """Wilson's interval (1927) of a share p among n samples, which need not be a whole number."""
    z = float(stats.norm.ppf(0.975))
    center, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((center + side * half) / (1 + z**2 / n) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def _seed_half(means):
    """Half of Student's interval of the mean of a few trainings; 0 where there is only one."""
    n = len(means)
    return float(stats.t.ppf(0.975, n - 1) * means.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def _joined(value, interval, half):
    """Join an interval over samples with that over seeds: independent errors add as squares."""
    low, high = (math.hypot(value - bound, half) for bound in interval)
    return value - low, value + high


def mean(values, unit=""):
    """The mean of repeated measurements with Student's interval; none of a single one."""
    values = np.asarray(values, dtype=float)
    value, half = float(values.mean()) if len(values) else math.nan, _seed_half(values)
    return Estimate(value, len(values), (value - half, value + half) if half else None, unit)


def _numbered(groups, n):
    """The group of each of n samples as a number from 0; None: each is its own."""
    return np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]


def rate(values, groups=None):
    """A mean of shares in [0, 1] with one rule for all rates, 0 and 1 included.

    Samples of a group (such as a photo) are not independent: Wilson's interval takes the number of
    independent samples that would vary as much (Korn and Graubard 1998). Where all values are
    alike, nothing tells how much a group's samples have in common, and each counts. The values are
    (N,), or (S, N) with a row for each trained network, whose spread joins in; the groups (N,), or
    None where every sample stands for itself.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float))
    if not values.size:
        return Estimate(math.nan, 0, None, "fraction")
    group, p = _numbered(groups, values.shape[1]), float(values.mean())
    deviations = np.bincount(group, weights=values.mean(axis=0) - p)
    variance = float((deviations**2).sum()) / len(group) ** 2
    independent = p * (1 - p) / variance if 0 < p < 1 and variance > 0 else len(group)
    low, high = _joined(p, _wilson(p, independent), _seed_half(values.mean(axis=1)))
    return Estimate(p, len(deviations), (max(0.0, low), min(1.0, high)), "fraction")


def _drawn_mean(values, chosen, groups):
    """The mean of values (N,) over the chosen samples (N,), and that of every bootstrap draw.

    Whole groups are drawn, always the same ones, and each draw divides by the samples it holds.
    """
    group = _numbered(groups, len(values))
    sums, counts = (np.bincount(group, weights=x) for x in (values * chosen, chosen))
    n = len(sums)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    with np.errstate(invalid="ignore"):  # none may be chosen
        return float(sums.sum() / counts.sum()), (drawn @ sums) / (drawn @ counts)


def _estimate(value, draws, n, seed_means, unit):
    if not np.isfinite(draws).any():
        return Estimate(math.nan, 0, None, unit)
    interval = np.nanpercentile(draws, [2.5, 97.5]).tolist()
    return Estimate(value, n, _joined(value, interval, _seed_half(seed_means)), unit)


def bootstrap(values, groups=None, unit="fraction"):
    """A mean of scores with a percentile bootstrap over whole groups (Efron and Tibshirani 1993).

    Values (N,) or (S, N), and groups (N,), as in `rate`.
    """
    values = np.atleast_2d(np.asarray(values, dtype=float))
    if not values.size:
        return Estimate(math.nan, 0, None, unit)
    n = _numbered(groups, values.shape[1]).max() + 1
    drawn = _drawn_mean(values.mean(axis=0), np.ones(values.shape[1]), groups)
    return _estimate(*drawn, int(n), values.mean(axis=1), unit)


# --- comparisons ----------------------------------------------------------------------------------
def difference(a, b, groups=None, unit=POINTS):
    """The mean of a - b, paired sample by sample and seed by seed; see `bootstrap`."""
    return bootstrap(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), groups, unit)


def group_difference(values, in_a, in_b, groups):
    """The mean of scores (N,) over the samples in a, minus that over those in b, in points.

    Both kinds of samples share their groups, which are drawn together.
    """
    values, chosen = np.asarray(values, float), (np.asarray(x, float) for x in (in_a, in_b))
    (a, drawn_a), (b, drawn_b) = (_drawn_mean(values, x, groups) for x in chosen)
    n = len(np.unique(groups))
    return _estimate(a - b, drawn_a - drawn_b, n, np.zeros(1), POINTS)


def mcnemar(wrong_a, wrong_b):
    """Two-sided p of McNemar's exact test for two classifiers' errors (N,) on the same images."""
    wrong_a, wrong_b = np.asarray(wrong_a, bool), np.asarray(wrong_b, bool)
    only_a, only_b = int((wrong_a & ~wrong_b).sum()), int((wrong_b & ~wrong_a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values):
    """Correct p-values for the number of comparisons (Holm 1979); the keys stay."""
    corrected, largest = {}, 0.0
    for i, key in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[key]))
        corrected[key] = largest
    return {key: corrected[key] for key in p_values}


def verdict(estimate, gain="a gain", loss="a loss", unclear="cannot be told from zero"):
    """The words that fit the interval of a difference; `unclear` where there is none."""
    low, high = estimate.ci95 or (-math.inf, math.inf)
    return gain if low > 0 else loss if high < 0 else unclear


# --- a baseline that two notebooks share ----------------------------------------------------------
def linear_probe(x, y, val_x, val_y, classes):
    """Fit a logistic regression to fixed features (N, D) with labels (N,).

    Its weight decay is the one with the lowest loss on validation features. Gives a function of
    features (M, D), whose logits are (M, classes).
    """
    center, scale = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6

    def standardize(features):
        return F.pad((features - center) / scale, (0, 1), value=1.0)  # the ones carry the bias

    z, val_z, best, lowest = standardize(x), standardize(val_x), None, math.inf
    for decay in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        weight = z.new_zeros(z.shape[1], classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=50, line_search_fn="strong_wolfe")

        def closure(weight=weight, optimizer=optimizer, decay=decay):
            optimizer.zero_grad()
            loss = F.cross_entropy(z @ weight, y) + decay * weight[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        loss = float(F.cross_entropy(val_z @ weight.detach(), val_y))
        if best is None or loss < lowest:
            best, lowest = weight.detach(), loss
    return lambda features: standardize(features) @ best
