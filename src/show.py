"""One look for all figures: palette, axes, pictures, captions, alt text."""

import base64
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import Markdown, display

# Okabe and Ito's palette: distinct to color-blind eyes; lines and markers carry it in grey print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
STANDIN_MARK = "STAND-IN DATA: says nothing about the real data"


def setup():
    """Set the style of all figures."""
    matplotlib.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": matplotlib.cycler(color=COLORS),
            "legend.frameon": False,
        }
    )


def display_figure(fig, caption, alt, standin=False):
    """Display a figure as PNG with a caption in markdown below, and close it.

    `alt` says what the figure shows, for readers who do not see it; `standin`, whether it carries
    the mark of the stand-in data.
    """
    if standin:
        alt = f"{STANDIN_MARK}. {alt}"
        mark = {"fontsize": 28, "color": COLORS[1], "alpha": 0.25, "rotation": 20}
        fig.text(0.5, 0.5, "STAND-IN DATA", ha="center", va="center", **mark)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(fig)
    if get_ipython():
        # As raw data, since only IPython 8 and newer give an Image its alt text.
        pixels = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}
        display(pixels, raw=True, metadata={"image/png": {"alt": alt}})
        display(Markdown(caption))


def curves(ax, series, title, ylabel, best_epoch=None, colors=COLORS):
    """Draw one line per entry of {label: values per epoch} and mark the epoch that was kept."""
    for i, (label, values) in enumerate(series.items()):
        style = {"color": colors[i % len(colors)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(range(1, len(values) + 1), values, label=label, ls=LINES[i % len(LINES)], **style)
    if best_epoch:
        ax.axvline(best_epoch, color="#888888", linewidth=1, linestyle=":", label="epoch kept")
    ax.set(title=title, xlabel="epoch", ylabel=ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    if series:
        ax.legend()
    return ax


def picture(ax, image, title=""):
    """Draw one RGB image, uint8 (3, H, W) or (H, W, 3), without axes."""
    image = np.asarray(image)
    ax.imshow(image.transpose(1, 2, 0) if image.shape[0] == 3 else image, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax
