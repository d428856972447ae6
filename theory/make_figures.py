"""Draws the figures of the theory answers as SVG, one as PNG: python theory/make_figures.py [--measure] [folder]."""

import argparse
import io
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from src import ROOT, ProjectError
from src.accounting import summary, walk
from src.device import Runtime
from src.results import load_results, mean, save_results

BLUE, ORANGE, GREEN, GREY, INK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#B8BEC6",
    "#1F2430",
)  # Okabe & Ito 2008, and neutrals
DEPTH, SEEDS = 20, range(8)
STYLE = {
    "svg.hashsalt": "theory",
    "svg.fonttype": "path",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 12,
}


def canvas(width: float, height: float):
    """A drawing area in which one unit is a tenth of an inch, on a white rounded ground."""
    fig = plt.figure(figsize=(width / 10, height / 10))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    ground(fig)
    return fig, ax


def ground(fig) -> None:
    """White with round corners, so that the figure reads on a dark page as well."""
    fig.patch.set_alpha(0)
    width, height = fig.get_size_inches()
    fig.add_artist(
        FancyBboxPatch(
            (0.1, 0.1),
            width - 0.2,
            height - 0.2,
            boxstyle="round,pad=0,rounding_size=0.15",
            fc="white",
            ec=GREY,
            lw=0.8,
            transform=fig.dpi_scale_trans,
            zorder=-10,
        )
    )


def arrow(ax, start, end, colour=INK) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=colour,
            lw=1.3,
            shrinkA=0,
            shrinkB=0,
        )
    )


def equivalence():
    """Question 1: the matrix's rows are the filters."""
    side, classes = 10, 5
    pixels = side * side
    fig, ax = canvas(92, 44)
    ax.text(19, 40, "fully connected", ha="center", weight="bold")
    ax.text(66, 40, "convolution", ha="center", weight="bold")
    shades = plt.cm.cividis(np.linspace(0.1, 0.95, classes))
    for k in range(classes):
        y = 30 - 4 * k
        ax.add_patch(Rectangle((6, y), 26, 2.6, fc=shades[k], ec=INK, lw=0.8))
        for x in range(1, side):
            ax.plot([6 + 2.6 * x] * 2, [y, y + 2.6], color="white", lw=0.8)
        ax.text(40.5, y + 1.3, f"$s_{k}$", ha="center", va="center")
        arrow(ax, (33, y + 1.3), (38.5, y + 1.3))
        x0 = 50.6 + 6.4 * k
        ax.add_patch(Rectangle((x0, 26), 5.2, 6.6, fc=shades[k], ec=INK, lw=0.8))
        for i in range(1, side):
            ax.plot([x0, x0 + 5.2], [26 + 0.66 * i] * 2, color="white", lw=0.6)
        arrow(ax, (x0 + 2.6, 25.2), (x0 + 2.6, 20.6))
        ax.text(x0 + 2.6, 18.8, f"$s_{k}$", ha="center", va="center")
    ax.text(19, 34.4, f"matrix: {classes} rows of {pixels} weights", ha="center")
    ax.text(66, 34.4, f"{classes} filters of {side} × {side} weights", ha="center")
    ax.text(
        66,
        12.2,
        f"one position on the {side} × {side} image:\noutput {classes} × 1 × 1",
        ha="center",
        va="center",
    )
    ax.text(19, 10.6, f"times the image as a vector of {pixels} values", ha="center", va="center")
    ax.text(
        46,
        5,
        "row $k$ of the matrix = filter $k$, read row by row (a piece of the row = a row of the filter)",
        ha="center",
        va="center",
        color=BLUE,
        weight="bold",
    )
    return fig


def receptive_field():
    """Question 2: the field of a neuron of the final map, layer by layer, with a neighbour's one jump further."""
    names = [f"{part} {layer}" for layer in (1, 2, 3) for part in ("convolution", "max pooling")]
    steps = walk([(5, 1, 2), (2, 2)] * 3, 128)
    fig, ax = plt.subplots(figsize=(9.2, 4.3))
    ground(fig)
    for y, (name, (_, axis)) in enumerate(zip(names, steps)):
        index = round((64 - axis.start) / axis.jump)
        for shift, colour, alpha in ((1, GREY, 0.75), (0, ORANGE if "pool" in name else BLUE, 1)):
            first, last = axis.span(index + shift)
            ax.add_patch(
                Rectangle(
                    (first - 64, y - 0.32 + 0.2 * shift),
                    last - first + 1,
                    0.5,
                    fc=colour,
                    ec="white",
                    lw=0.8,
                    alpha=alpha,
                    zorder=3 - shift,
                )
            )
        first, last = axis.span(index)
        ax.text(
            (first + last + 1) / 2 - 64,
            y - 0.07,
            f"{axis.size:g}",
            ha="center",
            va="center",
            color="white",
            weight="bold",
            zorder=4,
        )
        ax.text(31, y, f"jump {axis.jump:g}, start {axis.start:g}", ha="left", va="center")
    ax.set(
        ylim=(len(steps) - 0.4, -0.7),
        xlim=(-23, 47),
        yticks=range(len(steps)),
        yticklabels=names,
        xticks=range(-20, 31, 10),
        xlabel="input pixels along one axis, from the image's middle",
        title="Receptive field after each layer (grey behind: the next neuron's, one jump further)",
    )
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    fig.tight_layout(pad=1.6)
    return fig


def unet():
    """Question 3: the U with its sizes, for padded convolutions and an input of 256 × 256."""
    channels, size = [64, 128, 256, 512, 1024], 256
    pool = nn.MaxPool2d(2)
    sizes = [size]
    for _ in channels[1:]:
        sizes.append(summary([pool], (1, sizes[-1], sizes[-1])).output[-1])
    fig, ax = canvas(96, 60)
    heights = [9.0, 7.4, 6.0, 4.8, 3.8]
    y = 46.0
    for level, (c, n, h) in enumerate(zip(channels, sizes, heights)):
        x, mirror = 5 + 9.5 * level, 91 - 9.5 * level
        label = f"{c} × {n} × {n}"
        if level == len(channels) - 1:
            ax.add_patch(Rectangle((41, y), 14, h, fc=ORANGE, ec=INK, lw=0.8))
            ax.text(48, y - 2.0, label, ha="center", va="center")
            break
        for left, colour in ((x, BLUE), (mirror - 5, GREEN)):
            ax.add_patch(Rectangle((left, y), 5, h, fc=colour, ec=INK, lw=0.8))
        arrow(ax, (x + 5.8, y + h / 2), (mirror - 5.8, y + h / 2), GREY)
        ax.text(48, y + h / 2 + 1.3, label, ha="center", va="center")
        below = y - heights[level + 1] - 3.6
        last = level == len(channels) - 2
        arrow(
            ax,
            (x + 2.5, y - 0.5),
            (x + 6.6 if last else x + 9.0, below + heights[level + 1] + 0.4),
            INK,
        )
        arrow(
            ax,
            (mirror - 6.6 if last else mirror - 9.0, below + heights[level + 1] + 0.4),
            (mirror - 2.5, y - 0.5),
            INK,
        )
        y = below
    ax.text(
        5,
        57,
        "encoder: two 3 × 3 convolutions, halve",
        ha="left",
        va="center",
        color=BLUE,
        weight="bold",
    )
    ax.text(
        91,
        57,
        "decoder: double, concatenate, convolve",
        ha="right",
        va="center",
        color=GREEN,
        weight="bold",
    )
    ax.text(5, 14, "2 × 2\nmax pooling", ha="left", va="center")
    ax.text(91, 14, "2 × 2\nup-convolution", ha="right", va="center")
    ax.text(48, 48.9, "skip connection", ha="center", va="center", color="#5B6470")
    ax.text(
        48,
        3.6,
        f"bottom: {sizes[-1]} × {sizes[-1]} = {sizes[-1] ** 2} pixels per map",
        ha="center",
        va="center",
        weight="bold",
        color=ORANGE,
    )
    return fig


def dense_block():
    """Question 3: a dense block of three layers, drawn by channels."""
    start, growth, layers = 32, 24, 3
    fig, ax = canvas(96, 39)
    unit, base = 0.2, 6.4
    colours = [GREY, BLUE, ORANGE, GREEN]
    widths = [start] + [growth] * layers
    for state in range(layers + 1):
        x, y = 8 + 24 * state, base
        for part in range(state + 1):
            h = widths[part] * unit
            ax.add_patch(Rectangle((x, y), 5, h, fc=colours[part], ec="white", lw=1.0))
            ax.text(
                x + 2.5,
                y + h / 2,
                widths[part],
                ha="center",
                va="center",
                color="white" if part else INK,
                weight="bold",
            )
            y += h
        total = sum(widths[: state + 1])
        ax.text(x + 2.5, y + 1.8, f"{total} channels", ha="center", va="center")
        ax.text(
            x + 2.5,
            base - 2.2,
            "input" if state == 0 else f"after layer {state}",
            ha="center",
            va="center",
        )
        if state < layers:
            middle = base + total * unit / 2
            box = (x + 9.2, base + 7.2)
            arrow(ax, (x + 5.6, middle), (box[0] - 0.4, box[1] + 2.4))
            ax.add_patch(
                FancyBboxPatch(
                    box,
                    7.6,
                    4.8,
                    boxstyle="round,pad=0,rounding_size=0.8",
                    fc="white",
                    lw=2,
                    ec=colours[state + 1],
                )
            )
            ax.text(box[0] + 3.8, box[1] + 2.4, f"layer {state + 1}", ha="center", va="center")
            arrow(
                ax,
                (box[0] + 8.0, box[1] + 2.4),
                (x + 23.4, base + total * unit + growth * unit / 2),
                colours[state + 1],
            )
    ax.text(
        48,
        34.8,
        f"Each layer reads all channels before it and adds {growth} new ones",
        ha="center",
        va="center",
        weight="bold",
    )
    return fig


class Stack(nn.Module):
    """``depth`` layers of 3 × 3 convolution, plain, residual or dense; ``outputs`` keeps what each layer made."""

    def __init__(
        self,
        kind: str,
        normalised: bool,
        depth: int = DEPTH,
        width: int = 24,
        growth: int = 8,
        classes: int = 5,
    ):
        super().__init__()
        self.kind = kind
        layers, channels = [], width
        for _ in range(depth):
            made = growth if kind == "dense" else width
            conv = nn.Conv2d(channels, made, 3, padding=1, bias=not normalised)
            if normalised:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers.append(
                nn.Sequential(conv, nn.BatchNorm2d(made), nn.ReLU())
                if normalised
                else nn.Sequential(conv, nn.ReLU())
            )
            channels += made if kind == "dense" else 0
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(channels, classes)

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
    """log10 of the gradient norm at each layer's output over that at the last layer's, shape (depth,)."""
    torch.manual_seed(seed)
    model = Stack(kind, normalised)
    images, labels = torch.randn(16, 24, 12, 12), torch.randint(5, (16,))
    F.cross_entropy(model(images), labels).backward()
    norms = np.array([out.grad.double().norm().item() for out in model.outputs])
    return np.log10(norms / norms[-1])


def measure() -> None:
    """Measures the gradient profiles over all seeds and writes the result file."""
    began, metrics = time.time(), {}
    for normalised in (False, True):
        for kind in ("plain", "residual", "dense"):
            profiles = np.stack([gradient_profile(kind, normalised, seed) for seed in SEEDS])
            for layer, values in enumerate(profiles.T, 1):
                key = f"{'batchnorm_he' if normalised else 'default'}.{kind}.layer_{layer:02d}"
                metrics[key] = mean(values, "log10 of gradient norm relative to the last layer")
    save_results(
        "theory_gradients",
        metrics,
        profile="cpu",
        source=None,
        runtime=Runtime(torch.device("cpu"), autocast=False),
        seeds=SEEDS,
        seconds=time.time() - began,
    )


def gradients():
    """Question 3: the measured gradient profiles, mean and 95 % interval over the seeds."""
    metrics = load_results(ROOT / "reports" / "results" / "theory_gradients.json")["metrics"]
    fig, axes = plt.subplots(1, 2, figsize=(9.4, 4.2), sharey=True)
    ground(fig)
    titles = {
        "default": "default initialisation, no normalisation",
        "batchnorm_he": "He initialisation, BatchNorm",
    }
    for ax, (setting, title) in zip(axes, titles.items()):
        for kind, colour, marker in (
            ("plain", ORANGE, "o"),
            ("residual", BLUE, "s"),
            ("dense", GREEN, "^"),
        ):
            found = [
                metrics[f"{setting}.{kind}.layer_{layer:02d}"] for layer in range(1, DEPTH + 1)
            ]
            x = range(1, DEPTH + 1)
            ax.plot(
                x, [10 ** m["value"] for m in found], color=colour, marker=marker, ms=4, label=kind
            )
            ax.fill_between(
                x,
                *([10 ** m["ci95"][end] for m in found] for end in (0, 1)),
                color=colour,
                alpha=0.25,
                lw=0,
            )
        ax.set(
            yscale="log",
            title=title,
            xlabel=f"layer (1 is next to the input, {DEPTH} to the loss)",
            xticks=[1, *range(5, DEPTH + 1, 5)],
        )
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("gradient norm relative to last layer")
    axes[0].legend(
        title=f"mean and 95 % interval,\nn = {found[0]['n']} seeds",
        loc="lower right",
        frameon=False,
    )
    fig.tight_layout(pad=1.6)
    return fig


def deformable_sampling():
    """Practical 2: where a 3 × 3 filter samples, on the regular grid, with dilation and with free offsets (chosen to be seen)."""
    taps = np.array([(u, v) for v in (-1, 0, 1) for u in (-1, 0, 1)])
    offsets = np.array(
        [
            (-1.3, -0.7),
            (0.35, -1.6),
            (1.7, -1.25),
            (-1.75, 0.3),
            (0.3, 0.25),
            (0.6, -0.65),
            (-0.65, 1.5),
            (-0.4, 0.6),
            (1.4, 1.45),
        ]
    )
    fig, axes = plt.subplots(1, 3, figsize=(9.4, 4.1))
    ground(fig)
    for ax, title, points, colour in zip(
        axes,
        ("regular grid", "dilation 2", "free offsets"),
        (taps, 2 * taps, taps + offsets),
        (BLUE, BLUE, ORANGE),
    ):
        x, y = np.meshgrid(range(-3, 4), range(-3, 4))
        ax.scatter(x, y, s=14, c=GREY)
        ax.add_patch(Rectangle((-0.5, -0.5), 1, 1, fc="none", ec=INK, lw=1.3))
        if (points != np.round(points)).any():
            ax.scatter(*taps.T, s=46, fc="white", ec=BLUE, lw=1.3, zorder=2)
            for start, end in zip(taps, points):
                arrow(ax, start, end, INK)
            corner = np.floor(points[2])  # the four pixels around one sample
            ax.add_patch(Rectangle(corner, 1, 1, fc=GREEN, ec=GREEN, alpha=0.25, zorder=1))
            ax.scatter(*(corner + [(0, 0), (1, 0), (0, 1), (1, 1)]).T, s=26, c=GREEN, zorder=3)
        ax.scatter(*points.T, s=58, c=colour, zorder=4)
        ax.set(
            xlim=(-3.4, 3.4),
            ylim=(3.4, -3.4),
            aspect="equal",
            title=title,
            xlabel="x from the output position (pixels)",
            xticks=range(-3, 4),
            yticks=range(-3, 4),
        )
        ax.spines[["top", "right", "left", "bottom"]].set_color(GREY)
        ax.tick_params(length=0)
    axes[0].set_ylabel("y from the output position (pixels)")
    fig.tight_layout(pad=1.6, rect=(0, 0.1, 1, 1))
    handles = [
        Line2D([], [], ls="", marker="o", ms=size, mfc=face, mec=edge, label=label)
        for size, face, edge, label in (
            (3.7, GREY, GREY, "pixel"),
            (7.6, BLUE, BLUE, "sample on a pixel"),
            (7.6, ORANGE, ORANGE, "sample between pixels"),
            (5.1, GREEN, GREEN, "the four pixels that one sample reads"),
        )
    ]
    handles.insert(
        1, Line2D([], [], ls="", marker="s", ms=9, mfc="none", mec=INK, label="output position")
    )
    fig.legend(
        handles=handles,
        loc="lower center",
        ncols=5,
        frameon=False,
        fontsize=9.5,
        bbox_to_anchor=(0.5, 0.035),
        handletextpad=0.2,
        columnspacing=1.2,
    )
    return fig


FIGURES = {
    "1_equivalence": equivalence,
    "2_receptive_field": receptive_field,
    "3_unet": unet,
    "3_dense_block": dense_block,
    "3_gradients": gradients,
    "deformable_sampling": deformable_sampling,
}
RASTER = {"deformable_sampling"}  # PNG, which a notebook can show as a picture with alt text


def write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def draw_all(folder: Path) -> None:
    """Writes every figure into ``folder``; the same numbers give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        with plt.rc_context(STYLE):
            fig, drawn = draw(), io.BytesIO()
            if name in RASTER:
                fig.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
            else:
                fig.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(fig)
        if name in RASTER:
            write(folder / f"{name}.png", drawn.getvalue())
        else:
            lines = drawn.getvalue().decode().splitlines()
            write(
                folder / f"{name}.svg", ("\n".join(line.rstrip() for line in lines) + "\n").encode()
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
