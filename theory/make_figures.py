"""Draw the figures of the theory answers: python -m theory.make_figures [folder].

Every figure is 5.2 inches wide and its text at least 10.5 points, so that on a screen of 390 pixels
no letter is smaller than 9 pixels. What is measured (figures T3 and T6) is measured while drawing.
"""

import argparse
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import nn
from torch.nn import functional as F

from src import ROOT, standin, stats
from src.files import write_whole
from src.show import COLORS
from theory.fields import walk

BLUE, ORANGE, GREEN = COLORS[:3]
GRAY, DARK, INK = "#B8BEC6", "#5B6470", "#1F2430"
WIDTH = 5.2  # inches
LAYERS = [(5, 1, 2), (2, 2)] * 3  # kernel, stride and padding in question 2's network
DEPTH, CHANNELS, GROWTH = 20, 24, 8  # of the stacks of 3.3b
SEEDS, FIELD_SEEDS = range(8), range(100)
STYLE = {
    "svg.hashsalt": "theory",
    "svg.fonttype": "path",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
}
STYLE |= {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}
BAR = [2 if u == 0 else -1 for v in (-1, 0, 1) for u in (-1, 0, 1)]  # the filter of 4.3, by rows
TAPS = np.array([(u, v) for v in (-1, 0, 1) for u in (-1, 0, 1)])  # x before y


def canvas(height):
    """Make a drawing area in which one unit is a tenth of an inch, on a white rounded ground."""
    fig = plt.figure(figsize=(WIDTH, height / 10))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 10 * WIDTH), ylim=(0, height))
    ax.axis("off")
    ground(fig)
    return fig, ax


def ground(fig):
    """Lay white with round corners below, so that the figure reads on a dark page as well."""
    fig.patch.set_alpha(0)
    width, height = fig.get_size_inches() - 0.1
    shape = FancyBboxPatch((0.05, 0.05), width, height, "round,pad=0,rounding_size=0.1")
    shape.set(fc="white", ec=GRAY, lw=0.8, zorder=-10, transform=fig.dpi_scale_trans)
    fig.add_artist(shape)


def arrow(ax, start, end, color=INK, bend=0):
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    curve = f"arc3,rad={bend}"
    ax.add_patch(FancyArrowPatch(start, end, color=color, connectionstyle=curve, **style))


def block(ax, x, y, width, height, face="white", edge=INK, lw=0.8, **style):
    ax.add_patch(Rectangle((x, y), width, height, fc=face, ec=edge, lw=lw, **style))


def pile(ax, x, y, faces, edge=INK):
    """Draw maps of channels one behind the other."""
    for i, face in enumerate(faces):
        block(ax, x + 0.7 * i, y + 0.7 * i, 7, 7, face, edge, lw=1)


def box(ax, x, y, width, height, label="", edge=INK, **text):
    shape = "round,pad=0,rounding_size=0.6"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, fc="white", ec=edge, lw=1.4))
    middle(ax, x + width / 2, y + height / 2, label, **text)


def middle(ax, x, y, label, **text):
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
    block(ax, 36, 22.4, 2, 12.9, GRAY, lw=0.7)
    ax.hlines(22.4 + 1.29 * np.arange(1, side), 36, 38, color="white", lw=0.7)
    middle(ax, 33.5, 28.9, "·", weight="bold", fontsize=16)
    middle(ax, 40.3, 28.9, "=", weight="bold")
    middle(ax, 26, 19.6, "row $k$ = filter $k$, written row by row", color=BLUE, weight="bold")
    middle(ax, 26, 16.4, "convolution", weight="bold")
    middle(ax, 26, 13.6, f"{classes} filters of {side} × {side} weights, one position each")
    for k in range(classes):
        x, y = 4.2 + 9.4 * k, 33.2 - 2.7 * k
        block(ax, 3, y, 28, 2.1, shades[k], lw=0.7)
        ax.vlines(3 + 2.8 * np.arange(1, side), y, y + 2.1, color="white", lw=0.7)
        middle(ax, 46.5, y + 1.05, f"class {k + 1}")
        block(ax, x, 5.4, 6, 6, shades[k], lw=0.7)
        ax.hlines(5.4 + 0.6 * np.arange(1, side), x, x + 6, color="white", lw=0.5)
        arrow(ax, (x + 3, 5.1), (x + 3, 3.3))
        middle(ax, x + 3, 2.1, f"class {k + 1}")
    return fig


def receptive_field():
    """Question 2: the field of a neuron, layer by layer, with its neighbor's one jump further."""
    names = [f"{part} {layer}" for layer in (1, 2, 3) for part in ("convolution", "max pooling")]
    steps = walk(LAYERS, 128)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.3))
    ground(fig)
    for y, (name, (_, field)) in enumerate(zip(names, steps)):
        index = round((64 - field.start) / field.jump)
        for shift, color in ((1, GRAY), (0, ORANGE if "pool" in name else BLUE)):
            first, _ = field.span(index + shift)
            place = first - 64, y - 0.34 + 0.2 * shift
            block(ax, *place, field.size, 0.52, color, "white", zorder=3 - shift)
        if field.size > 5:
            center = first - 64 + field.size / 2
            middle(ax, center, y - 0.09, field.size, color="white", weight="bold", zorder=4)
        else:
            ax.text(first - 65, y - 0.09, field.size, ha="right", va="center", weight="bold")
        ax.text(33, y, f"jump {field.jump}", ha="left", va="center")
    ax.set(xlim=(-21, 45), ylim=(len(steps) - 0.4, -0.6), xticks=range(-20, 31, 10))
    ax.set_yticks(range(len(steps)), names)
    ax.set_xlabel("input pixels from the image's middle")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    fig.tight_layout(pad=1)
    return fig


def field_gradients(image, neurons):
    """Measure the mean size of the gradients of outputs (n, n) of question 2's network.

    The image is (H, W, 3) uint8; the means over networks and colors are (len(neurons), H, W).
    """
    x = torch.tensor(image / 255 - 0.5, dtype=torch.float32).permute(2, 0, 1)[None]
    x.requires_grad_()
    total = np.zeros((len(neurons), *image.shape[:2]))
    for seed in FIELD_SEEDS:
        torch.manual_seed(seed)
        layers = []
        for channels in (3, 16, 16):
            layers += [nn.Conv2d(channels, 16, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()]
        y = nn.Sequential(*layers[:-1])(x)  # the last ReLU would hide half of the gradients
        for i, n in enumerate(neurons):
            (gradient,) = torch.autograd.grad(y[0, 0, n, n], x, retain_graph=True)
            total[i] += gradient[0].abs().mean(0).numpy()
    return total / len(FIELD_SEEDS)


def field_on_photo():
    """Question 2: the field of a middle and of the first neuron, and what of it counts."""
    (_, field), neurons = walk(LAYERS, 128)[-1], [8, 0]
    image = np.array(standin.draw_scene(38)[0].crop((86, 0, 214, 128)))  # one of its airplanes
    shade = sum(gradient / gradient.max() for gradient in field_gradients(image, neurons))
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.95), sharey=True)
    ground(fig)
    axes[0].imshow(image)
    axes[1].imshow(shade, cmap="cividis", vmin=0, vmax=1)
    for ax, title in zip(axes, ("theoretical field", "measured gradient")):
        for n in neurons:
            corner = field.span(n)[0] - 0.5
            for lw, edge in ((2.6, "white"), (1.5, INK if n == 0 else ORANGE)):
                square = (corner, corner, field.size, field.size)
                block(ax, *square, "none", edge, lw, clip_on=False)
        ax.set(title=title, xlabel="x (pixels)", xticks=(0, 64, 127), yticks=(0, 64, 127))
        ax.set(xlim=(-16, 129), ylim=(129, -16))
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("y (pixels)")
    style = {"weight": "bold", "bbox": {"fc": "white", "ec": "none", "pad": 1}}
    axes[0].text(field.span(0)[1] + 6, 10, f"{field.size} × {field.size}", va="center", **style)
    fig.tight_layout(pad=1)
    return fig


def unet():
    """Question 3: the U with its sizes, for padded convolutions and an input of 256 × 256."""
    channels = [64, 128, 256, 512, 1024]
    sizes = [256, *(size for size, _ in walk([(2, 2)] * 4, 256))]
    fig, ax = canvas(50)
    ax.text(1.4, 24, "encoder", color=BLUE, weight="bold", va="center")
    ax.text(50.6, 24, "decoder", color=GREEN, weight="bold", va="center", ha="right")
    ax.text(50, 47.3, "1 × 1: class scores", color=INK, ha="right", va="center")
    arrow(ax, (47.6, 43.6), (47.6, 46))
    for level, (c, n) in enumerate(zip(channels, sizes)):
        y, x, h = 38 - 8.4 * level, 2 + 4 * level, 5 - 0.5 * level
        mirror, label = 52 - x, f"{c} × {n} × {n}"
        if level == len(channels) - 1:
            block(ax, x, y, 52 - 2 * x, h, ORANGE)
            middle(ax, 26, y - 1.8, f"{label}: {n * n} pixels per map", weight="bold")
            break
        block(ax, x, y, 4.4, h, BLUE)
        block(ax, mirror - 4.4, y, 2.2, h, BLUE)
        block(ax, mirror - 2.2, y, 2.2, h, GREEN)
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
    y, places = 27, [3, 18, 33, 48]
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
    y, bars, colors = 8, [7.4, 20.2, 33, 46], [DARK, BLUE, ORANGE, GREEN]
    for layer, x in enumerate(bars):  # a bar joins the input and the outputs of the layers before
        for part in range(layer + 1):
            share = 6 / (layer + 1)
            block(ax, x, y - 3 + share * part, 1.4, share, colors[part], "white")
        if layer < 3:
            edge, following = colors[layer + 1], bars[layer + 1]
            arrow(ax, (x + 1.8, y), (x + 3.4, y))
            box(ax, x + 3.6, y - 1.8, 6.2, 3.6, f"layer {layer + 1}", edge=edge)
            arrow(ax, (x + 10, y), (following - 0.3, y), edge)
        for target in range(layer + 1, 4):
            start = (bars[layer] - 1.6 if layer else 5, y + 0.2)
            arrow(ax, start, (bars[target] + 0.7, y + 3.2), colors[layer], bend=-0.28)
    middle(ax, 2.6, y, "in")
    arrow(ax, (4, y), (7.1, y))
    middle(ax, 26, 2.2, "bars: channels joined so far")
    return fig


def dense_block():
    """Question 3: a dense block of three layers, drawn by channels."""
    start, growth, layers = 32, 24, 3
    fig, ax = canvas(31)
    unit, base, colors = 0.19, 5.2, [GRAY, BLUE, ORANGE, GREEN]
    widths = [start] + [growth] * layers
    for state in range(layers + 1):
        x, y = 3.2 + 13.8 * state, base
        for part in range(state + 1):
            h = widths[part] * unit
            block(ax, x, y, 4.2, h, colors[part], "white", lw=1)
            color = "white" if part else INK
            middle(ax, x + 2.1, y + h / 2, widths[part], color=color, weight="bold")
            y += h
        total = sum(widths[: state + 1])
        middle(ax, x + 2.1, y + 1.5, f"{total}", weight="bold")
        middle(ax, x + 2.1, base - 2.4, "input" if state == 0 else f"after {state}")
        if state < layers:
            edge = colors[state + 1]
            arrow(ax, (x + 4.5, base + 3), (x + 5.6, base + 3))
            box(ax, x + 5.7, base + 1.2, 6.2, 3.6, f"layer {state + 1}", edge=edge)
            new = base + total * unit + growth * unit / 2
            arrow(ax, (x + 9.6, base + 5), (x + 13.5, new), edge)
    return fig


def gradient_profile(kind, normalized, seed):
    """Measure the gradient at each layer's output of a "plain", "residual" or "dense" stack.

    Either with He initialization and BatchNorm (`normalized`), or as PyTorch initializes. Gives
    log10 of the norms relative to that at the last layer, (DEPTH,).
    """
    torch.manual_seed(seed)
    channels, made, layers = CHANNELS, GROWTH if kind == "dense" else CHANNELS, []
    for _ in range(DEPTH):
        layer = [nn.Conv2d(channels, made, 3, padding=1, bias=not normalized), nn.ReLU()]
        if normalized:
            nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
            layer.insert(1, nn.BatchNorm2d(made))
        layers.append(nn.Sequential(*layer))
        channels += made if kind == "dense" else 0
    head, outputs = nn.Linear(channels, 5), []
    x, labels = torch.randn(16, CHANNELS, 12, 12), torch.randint(5, (16,))
    for layer in layers:
        outputs.append(layer(x) + x if kind == "residual" else layer(x))
        x = torch.cat([x, outputs[-1]], 1) if kind == "dense" else outputs[-1]
    loss = F.cross_entropy(head(x.mean((2, 3))), labels)
    norms = [gradient.double().norm().item() for gradient in torch.autograd.grad(loss, outputs)]
    return np.log10(np.array(norms) / norms[-1])


def gradients():
    """Question 3: the measured gradient profiles, mean and 95 % interval over the seeds."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.5), sharey=True)
    ground(fig)
    titles = "default initialization,\nno normalization", "He initialization,\nBatchNorm"
    kinds = (("plain", ORANGE, "o"), ("residual", BLUE, "s"), ("dense", GREEN, "^"))
    layers = range(1, DEPTH + 1)
    for normalized, (ax, title) in enumerate(zip(axes, titles)):
        for kind, color, marker in kinds:
            profiles = [gradient_profile(kind, bool(normalized), seed) for seed in SEEDS]
            points = [stats.mean(values) for values in np.transpose(profiles)]
            # The last layer is the reference: all seeds give 0 there, without an interval.
            ranges = [point.ci95 or (point.value, point.value) for point in points]
            values = [10**point.value for point in points]
            low, high = 10 ** np.transpose(ranges)
            ax.plot(layers, values, color=color, marker=marker, ms=3.5, lw=1.3, label=kind)
            ax.fill_between(layers, low, high, color=color, alpha=0.25, lw=0)
        ax.set(yscale="log", title=title, xlabel="layer", xticks=[1, *range(5, DEPTH + 1, 5)])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("gradient norm, relative")
    labels = "10⁻⁸", "10⁻⁶", "10⁻⁴", "0.01", "1", "100"
    axes[0].set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1, 100], labels)
    axes[0].minorticks_off()
    axes[0].legend(loc="lower right", frameon=False)
    fig.tight_layout(pad=1)
    return fig


def pixels(ax, reach):
    """Show positions from `-reach` to `reach` around the output position, y downwards."""
    edge, ticks = reach + 0.5, (-reach, 0, reach)
    ax.set(xlim=(-edge, edge), ylim=(edge, -edge), aspect="equal", xticks=ticks, yticks=ticks)
    ax.spines[:].set_color(GRAY)
    ax.tick_params(length=0)


def deformable_sampling():
    """Practical 2: where a 3 × 3 filter samples: regular, dilated, with offsets for the eye."""
    offsets = [(-1.3, -0.7), (0.35, -1.6), (1.7, -1.25), (-1.75, 0.3), (0.3, 0.25), (0.6, -0.65)]
    offsets = np.array(offsets + [(-0.65, 1.5), (-0.4, 0.6), (1.4, 1.45)])
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.75), sharey=True)
    ground(fig)
    titles = ("regular grid", "dilation 2", "free offsets")
    for ax, title, points in zip(axes, titles, (TAPS, 2 * TAPS, TAPS + offsets)):
        ax.scatter(*np.meshgrid(range(-3, 4), range(-3, 4)), s=7, c=GRAY)
        block(ax, -0.5, -0.5, 1, 1, "none", lw=1.2)
        between = (points != np.round(points)).any()
        if between:
            ax.scatter(*TAPS.T, s=18, fc="white", ec=BLUE, lw=1.1, zorder=2)
            for start, end in zip(TAPS, points):
                arrow(ax, start, end, INK)
            corner = np.floor(points[2])  # the four pixels around one sample
            block(ax, *corner, 1, 1, GREEN, GREEN, lw=None, alpha=0.25, zorder=1)
            ax.scatter(*(corner + [(0, 0), (1, 0), (0, 1), (1, 1)]).T, s=14, c=GREEN, zorder=3)
        ax.scatter(*points.T, s=26, c=ORANGE if between else BLUE, zorder=4)
        pixels(ax, 3)
        ax.set_title(title)
    axes[0].set_ylabel("y (pixels)")
    axes[1].set_xlabel("x from the output position (pixels)")
    fig.tight_layout(pad=1, rect=(0, 0.1, 1, 1), w_pad=0.4)
    dots = (GRAY, "pixel"), (BLUE, "on a pixel"), (ORANGE, "between pixels")
    handles = [Line2D([], [], ls="", marker="o", ms=5, color=c, label=text) for c, text in dots]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.01), "frameon": False}
    fig.legend(handles=handles, ncols=3, handletextpad=0.1, columnspacing=1, **place)
    return fig


def turned_bar():
    """Practical 2: the filter for upright bars on the upright bar, the flat bar, and turned."""
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6), sharey=True)
    ground(fig)
    turned = np.stack([-TAPS[:, 1], TAPS[:, 0]], axis=1)  # by 90 degrees, y downwards
    titles = "upright bar,\nregular grid", "flat bar,\nregular grid", "flat bar,\nturned grid"
    for ax, title, along, points in zip(axes, titles, (0, 1, 1), (TAPS, TAPS, turned)):
        total = 0
        for (x, y), weight in zip(points, BAR):
            on = (x, y)[along] == 0
            total += weight * on
            block(ax, x - 0.5, y - 0.5, 1, 1, DARK if on else "white", GRAY, lw=1)
            color = "white" if on else INK
            middle(ax, x, y, f"{weight}".replace("-", "−"), color=color, weight="bold")
        pixels(ax, 1)
        ax.set(title=title, xlabel=f"response {total}")
    axes[0].set_ylabel("y (pixels)")
    fig.tight_layout(pad=1, w_pad=0.5)
    return fig


def offset_branch():
    """Practical 2: how the offsets are computed and used."""
    fig, ax = canvas(27)
    pile(ax, 2, 4.6, ["white"] * 3)
    middle(ax, 6.9, 9.5, "input")
    box(ax, 11.5, 18, 13, 5.4, "branch: 3 × 3\nconvolution", edge=ORANGE)
    pile(ax, 31, 15.2, ["white"] * 4 + ["#FBE8DC"], ORANGE)
    middle(ax, 37.3, 21.5, "2K\noffset\nmaps", linespacing=1.0)
    label = "sample at the shifted\npositions, times\nthe weights"
    box(ax, 17.5, 5.6, 17, 6.4, label, edge=BLUE, linespacing=1.05)
    pile(ax, 41, 4.6, ["white"] * 3)
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


def draw_all(folder):
    """Write every figure into `folder`; the same numbers give the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on networks this small, threads wait for each other
    for name, draw in FIGURES.items():
        kind, drawn = Path(name).suffix[1:], io.BytesIO()
        metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        with plt.rc_context(STYLE):
            fig = draw()
            fig.savefig(drawn, format=kind, dpi=150, metadata=metadata)
            plt.close(fig)
        data = drawn.getvalue()
        if kind == "svg":
            data = "".join(f"{line.rstrip()}\n" for line in data.decode().splitlines())
        write_whole(folder / name, data)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m theory.make_figures", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "theory" / "figures")
    draw_all(parser.parse_args().folder)
