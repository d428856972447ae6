"""Where nine sampling points lie: fitted by a turn, drawn as arrows.

A field is the offsets (18, s, s) of a layer of 3 × 3: per tap (row by row) y, then x.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from src import show

TAPS = torch.cartesian_prod(*2 * [torch.arange(-1.0, 2)])  # the regular grid (9, 2), y then x


def fitted_map(fields, inside):
    """The turn with a zoom that comes nearest to the mean offsets inside an object.

    A least-squares fit of p + mean offset = a p over the taps p, as complex numbers, to fields
    (B, 18, s, s) where `inside` (B, s, s) is true. Gives a (B,), complex: its angle is clockwise,
    its absolute value the zoom; 1 for zero offsets, NaN where no position is inside.
    """
    mean = (fields * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None]
    mean, taps = (torch.view_as_complex(x.view(-1, 9, 2)) for x in (mean, TAPS.to(mean)))
    # Rows come first and grow downwards, so that a clockwise turn is that of the conjugates.
    return 1 + (mean.conj() * taps).sum(1) / taps.abs().square().sum()


def arrows(ax, start, end, color):
    """Draw points (K, 2), y then x, with arrows from where they start to where they end."""
    (y, x), (down, right) = start.t(), (end - start).t()
    ax.quiver(x, y, right, down, color=color, angles="xy", scale_units="xy", scale=1)
    ax.plot(x + right, y + down, "o", color=color, markeredgecolor="black")


def two_positions(mask, side):
    """The fullest and the emptiest position, y and x, off the edge of a mask (S, S)."""
    near = F.avg_pool2d(F.adaptive_avg_pool2d(mask[None].float(), side), 5, 1)[0]
    places = [near.argmax(), near.argmin()]
    return [torch.stack([i // len(near), i % len(near)]) + 2 for i in places]


def pictures(images, masks, titles, fields=None, columns=4):
    """Draw images (N, 3, S, S) in [0, 1] with outlines (N, s, s) and points on and off them."""
    rows, side = -(-len(images) // columns), images.shape[-1]
    fig, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.8 * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (ax, mask) in enumerate(zip(axes.flat, masks)):
        show.picture(ax, images[i].clamp(0, 1), titles[i]).autoscale(False)
        if mask.any() and not mask.all():
            ax.contour(mask, [0.5], extent=(0, side - 1, 0, side - 1), colors="white")
        if fields is not None:
            for (y, x), color in zip(two_positions(mask, fields.shape[-1]), show.COLORS[4:]):
                start, scale = TAPS + torch.stack([y, x]) + 0.5, side / fields.shape[-1]
                end = start + fields[i, :, y, x].view(9, 2)
                arrows(ax, scale * start - 0.5, scale * end - 0.5, color)
    return fig
