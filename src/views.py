"""Images that are cut out of photos without a border: canvases, views of them, their pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from src import data

CANVAS_PER_SIDE = 3  # leaves room around an image for the strongest changes


def make_canvases(paths: Sequence[Path], side: int) -> tuple[Tensor, Tensor]:
    """Square canvases of photos; an elongated photo gives two, one from each end.

    Args:
        paths: image files.
        side: of the images to be cut out, in pixels.

    Returns:
        (M, 3, C, C) uint8 with C = 3 * side, and the number of the photo behind each, (M,).
    """
    size, squares, owners = CANVAS_PER_SIDE * side, [], []
    for owner, path in enumerate(paths):
        photo = data.read_image(path)
        factor = size / min(photo.size)
        new_size = [max(size, round(length * factor)) for length in photo.size]
        pixels = torch.from_numpy(np.array(photo.resize(new_size, Image.Resampling.LANCZOS)))
        slack = max(new_size) - size
        for begin in (0, slack) if slack > 0.2 * size else (slack // 2,):
            x, y = (begin, 0) if photo.width > photo.height else (0, begin)
            squares.append(pixels[y : y + size, x : x + size].permute(2, 0, 1).clone())
            owners.append(owner)
    canvases = torch.empty(len(squares), 3, size, size, dtype=torch.uint8)
    for i in range(len(squares)):
        canvases[i], squares[i] = squares[i], None  # never all of them twice in memory
    return canvases, torch.tensor(owners)


@dataclass(frozen=True)
class View:
    """Images that are not sampled yet: which canvas, and where in it.

    Attributes:
        canvases: (M, 3, C, C) uint8.
        index: (N,), the canvas of each image.
        pose: (N, 3, 3), maps positions in the image to positions in its canvas, both in pixels
            from the centre, x to the right, y down.
        side: of the images, in pixels.
    """

    canvases: Tensor
    index: Tensor
    pose: Tensor
    side: int

    def through(self, transform: Tensor) -> "View":
        """The images that show at x what these show at transform @ x."""
        return replace(self, pose=self.pose @ transform)

    def corners(self) -> Tensor:
        """Positions of the four corners in the canvas, (N, 2, 4)."""
        x, y = torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1]]) * self.side / 2
        return (self.pose @ torch.stack([x, y, torch.ones(4)]))[:, :2]


def matrix(*entries) -> Tensor:
    """Matrices (N, 3, 3) from six entries row by row, numbers or (N,); the last row is 0, 0, 1."""
    entries = [torch.as_tensor(entry, dtype=torch.float32) for entry in (*entries, 0, 0, 1)]
    return torch.stack(torch.broadcast_tensors(*entries), dim=-1).view(-1, 3, 3)


def sample(*views: View, resolution: int | None = None, device="cpu") -> tuple[Tensor, ...]:
    """Read the pixels of views of the same canvases: the only resampling there is.

    Only the window that the images need is converted. A pixel is the mean of 2x2 points, as a
    camera's pixel collects light over its area.

    Args:
        views: one or more, with the same index.
        resolution: pixels per side of the result, default the views' side.
        device: where the pixels are computed.

    Returns:
        One (N, 3, resolution, resolution) in [0, 1] for each view.
    """
    canvases, index = views[0].canvases, views[0].index
    half, out = canvases.shape[-1] // 2, resolution or views[0].side
    reached = torch.cat([view.corners() for view in views], dim=2)
    low = ((reached.amin(dim=2) + half).floor() - 1).clamp_min(0)  # (N, 2), x and y
    need = (reached.amax(dim=2) + half - low).amax(dim=1)
    images = torch.empty(len(views), len(index), 3, out, out, device=device)
    for group in need.argsort().split(min(32, -(-len(index) // 4))):  # alike in window size
        size = min(int(need[group].max()) + 2, 2 * half)
        begin = low[group].clamp_max(2 * half - size).long()
        places = zip(index[group].tolist(), begin.tolist())
        windows = [canvases[i, :, y : y + size, x : x + size] for i, (x, y) in places]
        windows = torch.stack(windows).to(device).float() / 255
        centre = begin + size / 2 - half
        grids = [_grid(view.pose[group], centre, view.side, size, 2 * out) for view in views]
        grid = torch.cat(grids, dim=1).to(device)
        points = F.grid_sample(windows, grid, padding_mode="border", align_corners=False)
        points = points[:, :, ::2] + points[:, :, 1::2]
        pixels = (points[..., ::2] + points[..., 1::2]) / 4
        images[:, group.to(device)] = torch.stack(pixels.chunk(len(views), dim=2))
    return images.unbind()


def _grid(pose: Tensor, centre: Tensor, side: int, size: int, points: int) -> Tensor:
    """Positions (N, points, points, 2) in windows of a size around a centre, from -1 to 1."""
    shift = (pose[:, :2, 2:] - centre[:, :, None]) * (2 / size)
    theta = torch.cat([pose[:, :2, :2] * (side / size), shift], dim=2)
    return F.affine_grid(theta, (len(pose), 3, points, points), align_corners=False)


def sample_bytes(view: View, batch_size: int = 128) -> Tensor:
    """The pixels of views as uint8, sampled in parts: (N, 3, side, side)."""
    parts = zip(view.index.split(batch_size), view.pose.split(batch_size))
    return torch.cat([as_bytes(sample(replace(view, index=i, pose=p))[0]) for i, p in parts])


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
