"""One look for all figures: palette, axes, stand-in mark, alt text."""

import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown, display

from src import ProjectError

# Okabe and Ito's palette: distinct to colour-blind eyes; line styles and markers carry it in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STANDIN_MARK = "STAND-IN DATA: says nothing about the real data"
_standin = False


def setup(standin: bool) -> None:
    """Sets the style, and whether every figure carries the stand-in's mark."""
    global _standin
    _standin = standin
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
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
            "legend.frameon": False,
        }
    )


def banner(standin: bool) -> None:
    """Displays a warning above a run on the stand-in data; nothing on real data."""
    if standin:
        display(
            Markdown(
                f"> **{STANDIN_MARK}.** The images of this run are drawn by the project's own code, because the real "
                "ones are not at hand (or the profile is `smoke`). It shows that everything works, and no more."
            )
        )


def show(fig, alt: str) -> None:
    """Displays a figure as PNG with alt text, and closes it.

    Raises:
        ProjectError: if the alt text is empty, or an axis with data lacks its label.
    """
    if not alt.strip():
        raise ProjectError("A figure needs alt text that says what it shows.")
    for ax in fig.axes:
        if (
            ax.axison
            and not ax.get_label().startswith("<colorbar>")
            and not (ax.get_xlabel() and ax.get_ylabel())
        ):
            raise ProjectError(f"The axis {ax.get_title()!r} needs labels on x and y.")
    if _standin:
        alt = f"{STANDIN_MARK}. {alt}"
        fig.text(
            0.5,
            0.5,
            "STAND-IN DATA",
            fontsize=28,
            color="#D55E00",
            alpha=0.25,
            rotation=20,
            ha="center",
            va="center",
        )
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(fig)
    display(Image(data=buffer.getvalue(), format="png", alt=alt))


def curves(ax, series: dict, title: str, ylabel: str, best_epoch: int | None = None):
    """Draws one line per entry of {label: values per epoch} and marks the epoch that was kept."""
    for i, (label, values) in enumerate(series.items()):
        epochs = np.arange(1, len(values) + 1)
        ax.plot(epochs, values, marker=MARKERS[i], linestyle=("-", "--", ":")[i % 3], label=label)
    if best_epoch:
        ax.axvline(best_epoch, color="#888888", linewidth=1, linestyle=":", label="epoch kept")
    ax.set(title=title, xlabel="epoch", ylabel=ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return ax


def picture(ax, image, title: str = ""):
    """Draws one RGB image, uint8 (3, H, W) or (H, W, 3), without axes."""
    image = np.asarray(image)
    ax.imshow(image.transpose(1, 2, 0) if image.shape[0] == 3 else image, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax


def confusion(ax, matrix, classes, title: str):
    """Draws a confusion matrix of counts, rows the true class, columns the predicted one."""
    matrix = np.asarray(matrix)
    ax.imshow(matrix / matrix.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        ax.text(
            column,
            row,
            f"{count}",
            ha="center",
            va="center",
            color="white" if row == column else "black",
        )
    ticks = range(len(classes))
    ax.set(title=title, xlabel="predicted class", ylabel="true class", xticks=ticks, yticks=ticks)
    ax.set_xticklabels(classes)
    ax.set_yticklabels(classes, rotation=90, va="center")
    ax.grid(False)
    return ax
