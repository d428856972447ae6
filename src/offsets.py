"""What learnt offsets do: measured over views, fitted by a linear map, drawn as arrows.

The networks are the notebook's heads: `combined(levels)` gives the map that their `layers` read;
the first module of each is a convolution, a deformable one if it has `offsets_and_mask`.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src import objects, plotting

ON, BESIDE = "#E69F00", "#56B4E9"  # positions on the object and beside it


def regular_taps(side: int) -> Tensor:
    """The regular grid (side * side, 2), y then x, around zero."""
    steps = torch.arange(side, dtype=torch.float32) - side // 2
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(-1, 2)


def last_offsets(head, levels: Sequence[Tensor]) -> Tensor:
    """Offsets (B, K, 2, s, s) of a head's last layer, zeros where it is an ordinary one."""
    x = head.combined(levels)
    for layer in head.layers[:-1]:
        x = layer(x)
    layer = head.layers[-1][0]
    taps = layer.kernel_size[0] ** 2
    if hasattr(layer, "offsets_and_mask"):  # of several offset groups the first
        return layer.offsets_and_mask(x)[0][:, : 2 * taps].unflatten(1, (taps, 2))
    return x.new_zeros(len(x), taps, 2, *x.shape[2:])


@torch.inference_mode()
def over_views(head, views: objects.Views, runtime, function, size: int = 256) -> list[Tensor]:
    """Apply function(offsets, inside), which gives a tuple of tensors (B,), to all views."""
    rows = []
    for index in torch.arange(len(views)).split(size):
        levels, masks, _ = views.batch(index, runtime)
        offsets = last_offsets(head, levels)
        found = function(offsets, objects.shrink(masks, offsets.shape[-1]))
        rows.append([value.cpu() for value in found])
    return [torch.cat(values) for values in zip(*rows)]


def fitted_map(offsets: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Angle and size of the turn with a zoom that is nearest to the mean offsets inside the object.

    A least-squares fit of p + mean offset = A p over the taps p; of A, its nearest similarity. A
    size below a tenth counts as a tenth, so that its logarithm stays small.

    Args:
        offsets: (B, K, 2, s, s).
        inside: (B, s, s) bool.

    Returns:
        The angle (B,) in radians, clockwise, and the size (B,); 0 and 1 for zero offsets.
    """
    share = inside / inside.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    mean = (offsets * share[:, None, None]).sum(dim=(3, 4))  # (B, K, 2)
    taps = regular_taps(round(offsets.shape[1] ** 0.5)).to(offsets)
    matrix = (taps + mean).transpose(1, 2) @ taps / (taps**2).sum(dim=0)  # (B, 2, 2), y before x
    sine, cosine = matrix[:, 0, 1] - matrix[:, 1, 0], matrix[:, 0, 0] + matrix[:, 1, 1]
    return torch.atan2(sine, cosine), (torch.hypot(sine, cosine) / 2).clamp_min(0.1)


MEASURES = {
    "length_inside": "length inside the object",
    "length_outside": "length outside of it",
    "length_rim": "length at its rim",
    "length_centre": "length in the middle of the view",
    "length_edge": "length at the view's edge",
    "spread": "spread of the points inside",
    "on_object": "points on the object, of positions inside",
}


def describe(offsets: Tensor, inside: Tensor) -> list[Tensor]:
    """What the points of every view do, averaged over its positions, in the order of `MEASURES`.

    Args:
        offsets: (B, K, 2, s, s).
        inside: (B, s, s) bool.

    Returns:
        A tensor (B,) each, in positions of the map, the last one a share; NaN where a view has no
        such position.
    """
    side, length = offsets.shape[-1], offsets.norm(dim=2).mean(dim=1)  # (B, s, s)
    solid = inside[:, None].float()
    rim = (F.max_pool2d(solid, 3, 1, 1) + F.max_pool2d(-solid, 3, 1, 1))[:, 0] > 0
    axis = torch.arange(side, device=offsets.device)
    line = torch.minimum(axis, side - 1 - axis)  # steps to the nearer edge
    to_edge = torch.minimum(line[:, None], line).expand_as(length)
    middle, edge = to_edge >= 3 * side // 8, to_edge == 0
    found = [_mean(length, where) for where in (inside, ~inside, rim, middle, edge)]
    taps = regular_taps(round(offsets.shape[1] ** 0.5)).to(offsets)[..., None, None]
    points = taps + offsets  # seen from their position
    spread = (points - points.mean(dim=1, keepdim=True)).norm(dim=2).mean(dim=1)
    found.append(_mean(spread, inside))
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).to(offsets)
    place = (points + grid).round().long()  # (B, K, 2, s, s)
    valid = ((place >= 0) & (place < side)).all(dim=2)
    y, x = place.clamp(0, side - 1).unbind(dim=2)
    hit = inside.flatten(1).gather(1, (y * side + x).flatten(1)).view_as(valid) & valid
    return [*found, _mean(hit.float().mean(dim=1), inside)]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum(dim=(1, 2)) / where.sum(dim=(1, 2))


# --- effective receptive fields -------------------------------------------------------------------
def input_gradient(head, backbone, images: Tensor) -> Tensor:
    """Mean absolute gradient (S, S) of the middle foreground logit with respect to the pixels."""
    images = images.clone().requires_grad_()
    maps = backbone.feature_maps(images, objects.STRIDES)
    foreground = head([m.float() for m in maps])[1]
    middle = foreground.shape[-1] // 2
    (gradient,) = torch.autograd.grad(foreground[:, middle, middle].sum(), images)
    return gradient.abs().sum(dim=1).mean(dim=0).cpu()


def mean_distance(field: Tensor, positions: int) -> float:
    """Mean distance (pixels) of a field (S, S) from the centre of the middle one of `positions`."""
    stride = len(field) / positions
    steps = torch.arange(len(field)) - ((positions // 2 + 0.5) * stride - 0.5)
    distance = (steps[:, None] ** 2 + steps**2).sqrt()
    return float((field * distance).sum() / field.sum())


# --- pictures -------------------------------------------------------------------------------------
def outline(ax, mask: Tensor, side: int, colour: str = ON) -> None:
    """Draw the outline of a mask (s, s) over a picture of `side` pixels."""
    if mask.any() and not mask.all():
        at = (np.arange(len(mask)) + 0.5) * side / len(mask) - 0.5
        ax.contour(at, at, mask.float().numpy(), levels=[0.5], colors=colour, linewidths=1.8)


def arrows(ax, field: Tensor, position: Sequence[int], side: int, colour: str) -> None:
    """Draw the points of one position with arrows from the regular grid.

    Args:
        field: (K, 2, s, s).
        position: row and column of the map.
        side: of the picture in pixels.
    """
    scale = side / field.shape[-1]
    taps = regular_taps(round(len(field) ** 0.5))
    start = (taps + torch.tensor(position) + 0.5) * scale - 0.5
    end = start + scale * field[:, :, position[0], position[1]]
    for (y, x), (to_y, to_x) in zip(start.tolist(), end.tolist()):
        style = dict(arrowstyle="->", color=colour, linewidth=1.4)
        ax.annotate("", (to_x, to_y), (x, y), arrowprops=style)
    ax.plot(end[:, 1], end[:, 0], "o", color=colour, markersize=5, markeredgecolor="black")
    ax.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))


def two_positions(mask: Tensor, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The position deepest inside a mask (S, S), and the emptiest one off the view's edge."""
    soft = F.adaptive_avg_pool2d(mask[None, None].float(), side)
    deep = F.avg_pool2d(soft, 5, 1, 2)[0, 0]
    beside = torch.ones_like(deep)
    beside[2:-2, 2:-2] = deep[2:-2, 2:-2]
    return divmod(int(deep.argmax()), side), divmod(int(beside.argmin()), side)


def plot_views(crops: objects.Crops, config):
    """Draw a training view of two objects of every class, with their outlines."""
    labels, classes = crops.labels.numpy(), crops.classes
    pairs = [np.flatnonzero(labels == c)[[0, -1]] for c in range(len(classes))]
    chosen = torch.from_numpy(np.stack(pairs).T.reshape(-1))
    numbers = objects.draw_numbers(len(chosen), 5, config.angle, config.zoom, config.shift)
    images, masks = objects.make_views(crops.crops[chosen], config.crop_side, **numbers)
    fig, axes = plt.subplots(2, len(classes), figsize=(1.75 * len(classes), 3.8), squeeze=False)
    for ax, image, mask, i in zip(axes.flat, images, masks, chosen.tolist()):
        plotting.picture(ax, (255 * image.clamp(0, 1)).byte(), classes[labels[i]])
        outline(ax, mask, config.crop_side)
    return fig


def plot_arrows(heads: dict, views: objects.Views, crops: objects.Crops, config, runtime, count=4):
    """Draw a few test objects once per head, with the points of two positions each.

    Args:
        heads: {title: head}.
        views: the test views of the crops, as `objects.prepare` draws them.
    """
    shares = views.masks.float().mean(dim=(1, 2))
    fits = [(views.labels == c) & (shares > 0.12) & (shares < 0.4) for c in views.labels.unique()]
    fits = [fit.nonzero()[:, 0] for fit in fits]
    chosen = torch.tensor([int(fit[len(fit) // 2]) for fit in fits if len(fit)][:count] or [0])
    shape, n = (len(heads), len(chosen)), len(crops)
    fig, axes = plt.subplots(*shape, figsize=(3 * shape[1], 3.2 * shape[0]), squeeze=False)
    levels, _, _ = views.batch(chosen, runtime)
    for row, (title, head) in zip(axes, heads.items()):
        with torch.inference_mode():
            fields = last_offsets(head, levels).cpu()
        for ax, i, field in zip(row, chosen.tolist(), fields):
            draw = (objects.FIXED_SEEDS["test"] + i // n, 0.0, config.zoom, config.shift)
            numbers = {k: v[[i % n]] for k, v in objects.draw_numbers(n, *draw).items()}
            picture = objects.make_views(crops.crops[[i % n]], config.crop_side, **numbers)[0][0]
            name = crops.classes[int(views.labels[i])]
            plotting.picture(ax, (255 * picture.clamp(0, 1)).byte(), f"{name}: {title}")
            outline(ax, views.masks[i], config.crop_side, "white")
            for position, colour in zip(
                two_positions(views.masks[i], field.shape[-1]), (ON, BESIDE)
            ):
                arrows(ax, field, position, config.crop_side, colour)
    return fig


def plot_fields(heads: dict, backbone, images: Tensor):
    """Draw the gradient fields of several networks.

    Args:
        heads: {title: heads of all seeds}.

    Returns:
        {title: mean distances of the seeds, "uniform": that of a uniform field}, and the figure.
    """
    fig, (axes,) = plt.subplots(1, len(heads), figsize=(3.7 * len(heads), 3.8), squeeze=False)
    side = images.shape[-1]
    positions, radii = side // objects.STRIDES[0], {}
    for ax, (title, of_seeds) in zip(axes, heads.items()):
        fields = [input_gradient(head, backbone, images) for head in of_seeds]
        radii[title] = [mean_distance(field, positions) for field in fields]
        field = torch.stack(fields).mean(dim=0)
        shown = (field / field.max() + 1e-6).log10().numpy()
        drawn = ax.imshow(shown, cmap="magma", vmin=-2.5, vmax=0)
        text = f"{title}: {np.mean(radii[title]):.1f} pixels"
        ax.set(title=text, xlabel="x (pixels)", ylabel="y (pixels)")
        ax.grid(False)
    fig.colorbar(drawn, ax=axes, label="log10 of the gradient, largest = 0", shrink=0.8)
    return radii | {"uniform": [mean_distance(torch.ones(side, side), positions)]}, fig


def grids(positions_of):
    """Draw three grids of nine points around the position (4, 4) of a map of 9 × 9.

    Args:
        positions_of: called with offsets (1, 18, 9, 9); gives y and x (1, 1, 81, 9).
    """
    moved = 0.9 * torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
    shapes = {
        "ordinary: fixed beforehand": torch.zeros(9, 2),
        "static: the same for all positions": 1.7 * regular_taps(3) - regular_taps(3),
        "deformable: computed from the input": moved,
    }
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.6))
    for ax, (title, shift) in zip(axes, shapes.items()):
        field = shift[..., None, None].expand(9, 2, 9, 9)
        y, x = (p[0, 0, 40] for p in positions_of(field.reshape(1, 18, 9, 9)))
        start = regular_taps(3) + 4
        ax.plot(start[:, 1], start[:, 0], "o", color="#999999", markersize=9, fillstyle="none")
        arrows(ax, field, (4, 4), 9, ON)
        ax.plot(x, y, "x", color="black", markersize=4)
        ax.plot(4, 4, "s", color=plotting.COLOURS[0], markersize=14, fillstyle="none")
        ax.set(title=title, xlabel="column (pixels)", ylabel="row (pixels)", aspect="equal")
        ax.set(xticks=range(9), yticks=range(9), xlim=(0.5, 7.5), ylim=(7.5, 0.5))
    return fig
