"""Draw the figures of the theory answers: python -m theory.make_figures [--measure] [folder].

Every figure is 5.2 inches wide and its text at least 10.5 points, so that on a screen of 390 pixels
no letter is smaller than 9 pixels.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from src import ROOT, ProjectError, standin
from src.accounting import summary, walk
from src.data import read_image
from src.device import Runtime
from src.files import write_whole
from src.plotting import COLOURS
from src.results import load_results, mean, save_results

BLUE, ORANGE, GREEN = COLOURS[:3]
GREY, DARK, INK = "#B8BEC6", "#5B6470", "#1F2430"
WIDTH = 5.2  # inches
DEPTH, SEEDS, FIELD_SEEDS = 20, range(8), range(100)
STYLE = {
    "svg.hashsalt": "theory",
    "svg.fonttype": "path",
    **dict.fromkeys(("font.size", "axes.titlesize"), 10.5),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
BAR = [2 if u == 0 else -1 for v in (-1, 0, 1) for u in (-1, 0, 1)]  # the filter of 4.3, by rows
TAPS = np.array([(u, v) for v in (-1, 0, 1) for u in (-1, 0, 1)])  # x before y


def canvas(height: float):
    """Make a drawing area in which one unit is a tenth of an inch, on a white rounded ground."""
    fig = plt.figure(figsize=(WIDTH, height / 10))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 10 * WIDTH), ylim=(0, height))
    ax.axis("off")
    ground(fig)
    return fig, ax


def ground(fig) -> None:
    """Lay white with round corners below, so that the figure reads on a dark page as well."""
    fig.patch.set_alpha(0)
    width, height = fig.get_size_inches() - 0.1
    style = dict(boxstyle="round,pad=0,rounding_size=0.1", fc="white", ec=GREY, lw=0.8, zorder=-10)
    shape = FancyBboxPatch((0.05, 0.05), width, height, transform=fig.dpi_scale_trans, **style)
    fig.add_artist(shape)


def arrow(ax, start, end, colour=INK, bend: float = 0) -> None:
    style = dict(arrowstyle="-|>", mutation_scale=9, lw=1.2, shrinkA=0, shrinkB=0)
    curve = f"arc3,rad={bend}"
    ax.add_patch(FancyArrowPatch(start, end, color=colour, connectionstyle=curve, **style))


def box(ax, x, y, width, height, label="", edge=INK, face="white", **text) -> None:
    shape = "round,pad=0,rounding_size=0.6"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc=face, ec=edge, lw=1.4))
    middle(ax, x + width / 2, y + height / 2, label, **text)


def middle(ax, x, y, label, **text) -> None:
    ax.text(x, y, label, ha="center", va="center", **text)


def equivalence():
    """Question 1: the matrix's rows are the filters."""
    side, classes = 10, 5
    fig, ax = canvas(43)
    shades = plt.cm.cividis(np.linspace(0.1, 0.95, classes))
    middle(ax, 26, 40.5, "fully connected", weight="bold")
    middle(ax, 17, 37.6, f"matrix: {classes} rows of {side * side} weights")
    middle(ax, 37, 37.6, "image")
    middle(ax, 46.5, 37.6, "scores")
    for k in range(classes):
        y = 33.2 - 2.7 * k
        ax.add_patch(Rectangle((3, y), 28, 2.1, fc=shades[k], ec=INK, lw=0.7))
        for x in range(1, side):
            ax.plot([3 + 2.8 * x] * 2, [y, y + 2.1], color="white", lw=0.7)
        middle(ax, 46.5, y + 1.05, f"class {k + 1}")
    ax.add_patch(Rectangle((36, 22.4), 2, 12.9, fc=GREY, ec=INK, lw=0.7))
    for i in range(1, side):
        ax.plot([36, 38], [22.4 + 1.29 * i] * 2, color="white", lw=0.7)
    middle(ax, 33.5, 28.9, "·", weight="bold", fontsize=16)
    middle(ax, 40.3, 28.9, "=", weight="bold")
    middle(ax, 26, 19.6, "row $k$ = filter $k$, written row by row", color=BLUE, weight="bold")
    middle(ax, 26, 16.4, "convolution", weight="bold")
    middle(ax, 26, 13.6, f"{classes} filters of {side} × {side} weights, one position each")
    for k in range(classes):
        x = 4.2 + 9.4 * k
        ax.add_patch(Rectangle((x, 5.4), 6, 6, fc=shades[k], ec=INK, lw=0.7))
        for i in range(1, side):
            ax.plot([x, x + 6], [5.4 + 0.6 * i] * 2, color="white", lw=0.5)
        arrow(ax, (x + 3, 5.1), (x + 3, 3.3))
        middle(ax, x + 3, 2.1, f"class {k + 1}")
    return fig


def receptive_field():
    """Question 2: the field of a neuron, layer by layer, with its neighbour's one jump further."""
    names = [f"{part} {layer}" for layer in (1, 2, 3) for part in ("convolution", "max pooling")]
    steps = walk([(5, 1, 2), (2, 2)] * 3, 128)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.3))
    ground(fig)
    for y, (name, (_, axis)) in enumerate(zip(names, steps)):
        index = round((64 - axis.start) / axis.jump)
        for shift, colour in ((1, GREY), (0, ORANGE if "pool" in name else BLUE)):
            first, last = axis.span(index + shift)
            corner = (first - 64, y - 0.34 + 0.2 * shift)
            style = dict(fc=colour, ec="white", lw=0.8, zorder=3 - shift)
            ax.add_patch(Rectangle(corner, last - first + 1, 0.52, **style))
        first, last = axis.span(index)
        centre = (first + last + 1) / 2 - 64
        if axis.size > 5:
            middle(ax, centre, y - 0.09, f"{axis.size:g}", color="white", weight="bold", zorder=4)
        else:
            ax.text(first - 65, y - 0.09, f"{axis.size:g}", ha="right", va="center", weight="bold")
        ax.text(33, y, f"jump {axis.jump:g}", ha="left", va="center")
    ax.set(xlim=(-21, 45), ylim=(len(steps) - 0.4, -0.6), xticks=range(-20, 31, 10))
    ax.set(yticks=range(len(steps)), yticklabels=names)
    ax.set_xlabel("input pixels from the image's middle")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    fig.tight_layout(pad=1)
    return fig


def photo() -> np.ndarray:
    """Draw a photo of 128 × 128 pixels, (128, 128, 3)."""
    with tempfile.TemporaryDirectory() as folder:
        standin.write_photos(Path(folder) / "photos", 1, 128, seed=3)
        return np.array(read_image(next(Path(folder).rglob("*.jpg"))))


def field_gradients(image: np.ndarray, neurons: list[int], seeds=FIELD_SEEDS) -> list[np.ndarray]:
    """Measure the mean size of the gradients of outputs (n, n) of question 2's network."""
    x = torch.tensor(image / 255 - 0.5, dtype=torch.float32).permute(2, 0, 1)[None]
    x.requires_grad_()
    sums = [np.zeros(image.shape[:2]) for _ in neurons]
    for seed in seeds:
        torch.manual_seed(seed)
        layers = []
        for channels in (3, 16, 16):
            layers += [nn.Conv2d(channels, 16, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()]
        y = nn.Sequential(*layers[:-1])(x)
        for total, n in zip(sums, neurons):
            (gradient,) = torch.autograd.grad(y[0, 0, n, n], x, retain_graph=True)
            total += gradient[0].abs().mean(0).numpy()
    return [total / len(seeds) for total in sums]


def field_on_photo():
    """Question 2: the field of a middle and of the first neuron, and what of it counts."""
    (_, axis), neurons = walk([(5, 1, 2), (2, 2)] * 3, 128)[-1], [8, 0]
    image = photo()
    gradients = field_gradients(image, neurons)
    shade = sum(gradient / gradient.max() for gradient in gradients)
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.95), sharey=True)
    ground(fig)
    axes[0].imshow(image)
    axes[1].imshow(shade, cmap="cividis", vmin=0, vmax=1)
    for ax, title in zip(axes, ("theoretical field", "measured gradient")):
        for n in neurons:
            first, last = axis.span(n)
            corner, side = (first - 0.5, first - 0.5), last - first + 1
            edge = INK if n == 0 else ORANGE
            for lw, line in ((2.6, "white"), (1.5, edge)):
                style = dict(fc="none", ec=line, lw=lw, clip_on=False)
                ax.add_patch(Rectangle(corner, side, side, **style))
        ax.set(title=title, xlabel="x (pixels)", xticks=(0, 64, 127), yticks=(0, 64, 127))
        ax.set(xlim=(-16, 129), ylim=(129, -16))
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("y (pixels)")
    first, last = axis.span(neurons[0])
    style = dict(ha="right", va="bottom", weight="bold", bbox=dict(fc="white", ec="none", pad=1))
    axes[0].text(last + 2, first - 3, f"{axis.size:g} × {axis.size:g}", **style)
    fig.tight_layout(pad=1)
    return fig


def unet():
    """Question 3: the U with its sizes, for padded convolutions and an input of 256 × 256."""
    channels, size = [64, 128, 256, 512, 1024], 256
    sizes = [size]
    for _ in channels[1:]:
        sizes.append(summary([nn.MaxPool2d(2)], (1, sizes[-1], sizes[-1])).output[-1])
    fig, ax = canvas(50)
    ax.text(1.4, 24, "encoder", color=BLUE, weight="bold", va="center")
    ax.text(50.6, 24, "decoder", color=GREEN, weight="bold", va="center", ha="right")
    ax.text(50, 47.3, "1 × 1: class scores", color=INK, ha="right", va="center")
    arrow(ax, (47.6, 43.6), (47.6, 46))
    for level, (c, n) in enumerate(zip(channels, sizes)):
        y, x, h = 38 - 8.4 * level, 2 + 4 * level, 5 - 0.5 * level
        mirror, label = 52 - x, f"{c} × {n} × {n}"
        if level == len(channels) - 1:
            ax.add_patch(Rectangle((x, y), 52 - 2 * x, h, fc=ORANGE, ec=INK, lw=0.8))
            middle(ax, 26, y - 1.8, f"{label}: {n * n} pixels per map", weight="bold")
            break
        ax.add_patch(Rectangle((x, y), 4.4, h, fc=BLUE, ec=INK, lw=0.8))
        ax.add_patch(Rectangle((mirror - 4.4, y), 2.2, h, fc=BLUE, ec=INK, lw=0.8))
        ax.add_patch(Rectangle((mirror - 2.2, y), 2.2, h, fc=GREEN, ec=INK, lw=0.8))
        arrow(ax, (x + 4.9, y + h / 2), (mirror - 4.9, y + h / 2), DARK)
        middle(ax, 26, y + h / 2 + 1.7, label)
        if level < 2:
            middle(ax, 26, y + h / 2 - 1.7, "skip: concatenate" if level == 0 else f"{c} + {c}")
        below = y - 8.4 + 5 - 0.5 * (level + 1)
        arrow(ax, (x + 2.2, y - 0.3), (x + 5.6, below + 0.3))
        arrow(ax, (mirror - 5.6, below + 0.3), (mirror - 2.2, y - 0.3))
    ax.text(1.4, 12, "2 × 2 max\npooling", va="center")
    ax.text(50.6, 12, "2 × 2 up-\nconvolution", va="center", ha="right")
    return fig


def wiring():
    """Question 3: three layers with residual and with dense connections."""
    fig, ax = canvas(38)
    middle(ax, 26, 35.6, "residual: add", weight="bold", color=BLUE)
    y = 27
    places = [3, 18, 33, 48]
    for start, end in zip(places, places[1:]):
        arrow(ax, (start + 1.4, y), (start + 3.4, y))
        arrow(ax, (start + 9.6, y), (end - 1.5, y))
        arrow(ax, (start, y + 1.4), (end, y + 1.5), BLUE, bend=-0.35)
    for layer, x in enumerate(places):
        if layer:
            ax.add_patch(Circle((x, y), 1.4, fc="white", ec=BLUE, lw=1.4))
            middle(ax, x, y - 0.1, "+", color=BLUE, weight="bold")
            box(ax, x - 11.6, y - 1.8, 6.2, 3.6, f"layer {layer}")
    middle(ax, 3, y, "in")
    middle(ax, 26, 19.8, "dense: concatenate", weight="bold", color=GREEN)
    y, bars, colours = 8, [7.4, 20.2, 33, 46], [DARK, BLUE, ORANGE, GREEN]
    for layer, x in enumerate(bars):  # a bar joins the input and the outputs of the layers before
        for part in range(layer + 1):
            share = 6 / (layer + 1)
            style = dict(fc=colours[part], ec="white", lw=0.8)
            ax.add_patch(Rectangle((x, y - 3 + share * part), 1.4, share, **style))
        if layer < 3:
            edge, following = colours[layer + 1], bars[layer + 1]
            arrow(ax, (x + 1.8, y), (x + 3.4, y))
            box(ax, x + 3.6, y - 1.8, 6.2, 3.6, f"layer {layer + 1}", edge=edge)
            arrow(ax, (x + 10, y), (following - 0.3, y), edge)
        for target in range(layer + 1, 4):
            start = (bars[layer] - 1.6 if layer else 5, y + 0.2)
            arrow(ax, start, (bars[target] + 0.7, y + 3.2), colours[layer], bend=-0.28)
    middle(ax, 2.6, y, "in")
    arrow(ax, (4, y), (7.1, y))
    middle(ax, 26, 2.2, "bars: channels joined so far")
    return fig


def dense_block():
    """Question 3: a dense block of three layers, drawn by channels."""
    start, growth, layers = 32, 24, 3
    fig, ax = canvas(31)
    unit, base = 0.19, 5.2
    colours, widths = [GREY, BLUE, ORANGE, GREEN], [start] + [growth] * layers
    for state in range(layers + 1):
        x, y = 3.2 + 13.8 * state, base
        for part in range(state + 1):
            h = widths[part] * unit
            ax.add_patch(Rectangle((x, y), 4.2, h, fc=colours[part], ec="white", lw=1.0))
            colour = "white" if part else INK
            middle(ax, x + 2.1, y + h / 2, widths[part], color=colour, weight="bold")
            y += h
        total = sum(widths[: state + 1])
        middle(ax, x + 2.1, y + 1.5, f"{total}", weight="bold")
        middle(ax, x + 2.1, base - 2.4, "input" if state == 0 else f"after {state}")
        if state < layers:
            edge = colours[state + 1]
            arrow(ax, (x + 4.5, base + 3), (x + 5.6, base + 3))
            box(ax, x + 5.7, base + 1.2, 6.2, 3.6, f"layer {state + 1}", edge=edge)
            new = base + total * unit + growth * unit / 2
            arrow(ax, (x + 9.6, base + 5), (x + 13.5, new), edge)
    return fig


class Stack(nn.Module):
    """Stack `DEPTH` layers of 3 × 3, plain, residual or dense; `outputs` keeps what each made."""

    def __init__(self, kind: str, normalised: bool, width: int = 24, growth: int = 8):
        super().__init__()
        self.kind = kind
        layers, channels = [], width
        for _ in range(DEPTH):
            made = growth if kind == "dense" else width
            parts = [nn.Conv2d(channels, made, 3, padding=1, bias=not normalised)]
            if normalised:
                nn.init.kaiming_normal_(parts[0].weight, nonlinearity="relu")
                parts.append(nn.BatchNorm2d(made))
            layers.append(nn.Sequential(*parts, nn.ReLU()))
            channels += made if kind == "dense" else 0
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.outputs = []
        for layer in self.layers:
            made = layer(x)
            if self.kind == "residual":
                made = made + x
            self.outputs.append(made)
            made.retain_grad()
            x = torch.cat([x, made], 1) if self.kind == "dense" else made
        return self.head(x.mean((2, 3)))


def gradient_profile(kind: str, normalised: bool, seed: int) -> np.ndarray:
    """Measure log10 of the gradient norm at each layer over that at the last, shape (depth,)."""
    torch.manual_seed(seed)
    model = Stack(kind, normalised)
    images, labels = torch.randn(16, 24, 12, 12), torch.randint(5, (16,))
    F.cross_entropy(model(images), labels).backward()
    norms = np.array([out.grad.double().norm().item() for out in model.outputs])
    return np.log10(norms / norms[-1])


def measure() -> None:
    """Measure the gradient profiles over all seeds and write the results file."""
    began, metrics = time.time(), {}
    for normalised in (False, True):
        for kind in ("plain", "residual", "dense"):
            profiles = np.stack([gradient_profile(kind, normalised, seed) for seed in SEEDS])
            for layer, values in enumerate(profiles.T, 1):
                key = f"{'batchnorm_he' if normalised else 'default'}.{kind}.layer_{layer:02d}"
                metrics[key] = mean(values, "log10 of gradient norm relative to the last layer")
    about = dict(profile="cpu", source=None, runtime=Runtime(torch.device("cpu")), seeds=SEEDS)
    save_results("theory_gradients", metrics, **about, seconds=time.time() - began)


def gradients():
    """Question 3: the measured gradient profiles, mean and 95 % interval over the seeds."""
    metrics = load_results(ROOT / "reports" / "results" / "theory_gradients.json")["metrics"]
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.5), sharey=True)
    ground(fig)
    titles = {
        "default": "default initialisation,\nno normalisation",
        "batchnorm_he": "He initialisation,\nBatchNorm",
    }
    kinds = (("plain", ORANGE, "o"), ("residual", BLUE, "s"), ("dense", GREEN, "^"))
    layers = range(1, DEPTH + 1)
    for ax, (setting, title) in zip(axes, titles.items()):
        for kind, colour, marker in kinds:
            points = [metrics[f"{setting}.{kind}.layer_{layer:02d}"] for layer in layers]
            values = [10**point.value for point in points]
            low, high = ([10 ** point.ci95[end] for point in points] for end in (0, 1))
            ax.plot(layers, values, color=colour, marker=marker, ms=3.5, lw=1.3, label=kind)
            ax.fill_between(layers, low, high, color=colour, alpha=0.25, lw=0)
        ax.set(yscale="log", title=title, xlabel="layer", xticks=[1, *range(5, DEPTH + 1, 5)])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("gradient norm, relative")
    axes[0].set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1, 100])
    axes[0].set_yticklabels(["10⁻⁸", "10⁻⁶", "10⁻⁴", "0.01", "1", "100"])
    axes[0].minorticks_off()
    axes[0].legend(loc="lower right", frameon=False)
    fig.tight_layout(pad=1)
    return fig


def pixels(ax, reach: int) -> None:
    """Show positions from `-reach` to `reach` around the output position, y downwards."""
    edge, ticks = reach + 0.5, (-reach, 0, reach)
    ax.set(xlim=(-edge, edge), ylim=(edge, -edge), aspect="equal", xticks=ticks, yticks=ticks)
    ax.spines[:].set_color(GREY)
    ax.tick_params(length=0)


def deformable_sampling():
    """Practical 2: where a 3 × 3 filter samples: regular, dilated, with offsets for the eye."""
    offsets = [(-1.3, -0.7), (0.35, -1.6), (1.7, -1.25), (-1.75, 0.3), (0.3, 0.25), (0.6, -0.65)]
    offsets = np.array(offsets + [(-0.65, 1.5), (-0.4, 0.6), (1.4, 1.45)])
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.75), sharey=True)
    ground(fig)
    titles = ("regular grid", "dilation 2", "free offsets")
    for ax, title, points in zip(axes, titles, (TAPS, 2 * TAPS, TAPS + offsets)):
        x, y = np.meshgrid(range(-3, 4), range(-3, 4))
        ax.scatter(x, y, s=7, c=GREY)
        ax.add_patch(Rectangle((-0.5, -0.5), 1, 1, fc="none", ec=INK, lw=1.2))
        between = (points != np.round(points)).any()
        if between:
            ax.scatter(*TAPS.T, s=18, fc="white", ec=BLUE, lw=1.1, zorder=2)
            for start, end in zip(TAPS, points):
                arrow(ax, start, end, INK)
            corner = np.floor(points[2])  # the four pixels around one sample
            ax.add_patch(Rectangle(corner, 1, 1, fc=GREEN, ec=GREEN, alpha=0.25, zorder=1))
            ax.scatter(*(corner + [(0, 0), (1, 0), (0, 1), (1, 1)]).T, s=14, c=GREEN, zorder=3)
        ax.scatter(*points.T, s=26, c=ORANGE if between else BLUE, zorder=4)
        pixels(ax, 3)
        ax.set_title(title)
    axes[0].set_ylabel("y (pixels)")
    axes[1].set_xlabel("x from the output position (pixels)")
    fig.tight_layout(pad=1, rect=(0, 0.1, 1, 1), w_pad=0.4)
    handles = []
    for colour, label in ((GREY, "pixel"), (BLUE, "on a pixel"), (ORANGE, "between pixels")):
        handles.append(Line2D([], [], ls="", marker="o", ms=5, color=colour, label=label))
    place = dict(loc="lower center", bbox_to_anchor=(0.5, 0.01), frameon=False)
    fig.legend(handles=handles, ncols=3, handletextpad=0.1, columnspacing=1, **place)
    return fig


def turned_bar():
    """Practical 2: the filter for upright bars on the upright bar, the flat bar, and turned."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6), sharey=True)
    ground(fig)
    turned = np.stack([-TAPS[:, 1], TAPS[:, 0]], axis=1)  # by 90 degrees, y downwards
    panels = (
        ("upright bar,\nregular grid", 0, TAPS),
        ("flat bar,\nregular grid", 1, TAPS),
        ("flat bar,\nturned grid", 1, turned),
    )
    for ax, (title, along, points) in zip(axes, panels):
        total = 0
        for (x, y), weight in zip(points, BAR):
            on = (x, y)[along] == 0
            total += weight * on
            face = DARK if on else "white"
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=face, ec=GREY, lw=1))
            colour = "white" if on else INK
            middle(ax, x, y, f"{weight}".replace("-", "−"), color=colour, weight="bold")
        pixels(ax, 1)
        ax.set(title=title, xlabel=f"response {total}")
    axes[0].set_ylabel("y (pixels)")
    fig.tight_layout(pad=1, w_pad=0.5)
    return fig


def offset_branch():
    """Practical 2: how the offsets are computed and used."""
    fig, ax = canvas(27)
    for i in range(3):
        ax.add_patch(Rectangle((2 + 0.7 * i, 4.6 + 0.7 * i), 7, 7, fc="white", ec=INK, lw=1))
    middle(ax, 6.9, 9.5, "input")
    box(ax, 11.5, 18, 13, 5.4, "branch: 3 × 3\nconvolution", edge=ORANGE)
    for i in range(5):
        face = "white" if i < 4 else "#FBE8DC"
        style = dict(fc=face, ec=ORANGE, lw=1)
        ax.add_patch(Rectangle((31 + 0.7 * i, 15.2 + 0.7 * i), 7, 7, **style))
    middle(ax, 37.3, 21.5, "2K\noffset\nmaps", linespacing=1.0)
    label = "sample at the shifted\npositions, times\nthe weights"
    box(ax, 17.5, 5.6, 17, 6.4, label, edge=BLUE, linespacing=1.05)
    for i in range(3):
        ax.add_patch(Rectangle((41 + 0.7 * i, 4.6 + 0.7 * i), 7, 7, fc="white", ec=INK, lw=1))
    middle(ax, 45.9, 9.5, "output")
    arrow(ax, (7, 13.4), (11.2, 20), ORANGE)
    arrow(ax, (24.8, 20.7), (30.7, 20.7), ORANGE)
    arrow(ax, (33, 15), (29.5, 12.2), ORANGE)
    arrow(ax, (10.6, 8.8), (17.3, 8.8), BLUE)
    arrow(ax, (34.7, 8.8), (40.7, 8.8), BLUE)
    middle(ax, 26, 2.3, "gradient: back through the sampling into the branch", color=DARK)
    return fig


FIGURES = {
    "1_equivalence.svg": equivalence,
    "2_receptive_field.svg": receptive_field,
    "2_field_on_photo.png": field_on_photo,
    "3_unet.svg": unet,
    "3_wiring.svg": wiring,
    "3_dense_block.svg": dense_block,
    "3_gradients.svg": gradients,
    "deformable_sampling.png": deformable_sampling,  # PNG: a notebook shows these as well
    "4_turned_bar.png": turned_bar,
    "4_offset_branch.png": offset_branch,
}


def draw_all(folder: Path) -> None:
    """Write every figure into `folder`; the same numbers give the same bytes."""
    for name, draw in FIGURES.items():
        kind, drawn = Path(name).suffix[1:], io.BytesIO()
        with plt.rc_context(STYLE):
            fig = draw()
            metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
            fig.savefig(drawn, format=kind, dpi=150, metadata=metadata)
            plt.close(fig)
        data = drawn.getvalue()
        if kind == "svg":
            data = "".join(f"{line.rstrip()}\n" for line in data.decode().splitlines())
        write_whole(Path(folder) / name, data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m theory.make_figures", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure the gradient norms first")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "theory" / "figures")
    options = parser.parse_args()
    if options.measure:
        measure()
    draw_all(options.folder)


if __name__ == "__main__":
    try:
        main()
    except ProjectError as error:
        sys.exit(str(error))
