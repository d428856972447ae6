"""Images that are cut out of photos without a border: canvases, views of them, their pixels."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from src import ProjectError, data

CANVAS_PER_SIDE = 3  # leaves room around an image for the strongest changes
LEAST_SIDE = 16  # of a photo that is compared, in pixels


def square(photo, side, place=0.5):
    """A square (3, side, side) uint8 of a photo, from its one end (0) to its other (1)."""
    pixels = ImageOps.fit(photo, (side, side), Image.Resampling.LANCZOS, centering=(place, place))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def central_square(image, side):
    """The central square of an image or image file, resized: (1, 3, side, side) uint8."""
    is_open = isinstance(image, Image.Image)
    photo = ImageOps.exif_transpose(image).convert("RGB") if is_open else data.read_image(image)
    if min(photo.size) < LEAST_SIDE:
        raise ProjectError(f"A photo has {photo.size} pixels: give one of {LEAST_SIDE} or more.")
    return square(photo, side)[None]


def make_canvases(paths, side):
    """Square canvases of photos, two of an elongated one; all stay in memory.

    Gives (M, 3, C, C) uint8 with C = 3 * side, and the number of the photo behind each, (M,);
    photos that cannot be read are left out, and counted in a printed line.
    """
    canvases, numbers, failures = [], [], []
    for number, path in enumerate(paths):
        try:
            photo = data.read_image(path)
        except ProjectError as error:
            failures.append(error)
            continue
        places = (0.0, 1.0) if max(photo.size) > 1.2 * min(photo.size) else (0.5,)
        canvases += [square(photo, CANVAS_PER_SIDE * side, place) for place in places]
        numbers += [number] * len(places)
    if failures:
        print(f"{len(failures)} of {len(paths)} photos are left out, for instance: {failures[0]}")
    if not canvases:
        raise failures[0]
    return torch.stack(canvases), torch.tensor(numbers)


@dataclass(frozen=True)
class View:
    """Images that are not sampled yet: which canvas, and where in it.

    A pose maps positions in the image to positions in its canvas, both in pixels from the center, x
    to the right, y down.
    """

    canvases: Tensor  # (M, 3, C, C) uint8
    index: Tensor  # (N,), the canvas of each image
    pose: Tensor  # (N, 3, 3)
    side: int  # of the images, in pixels

    def through(self, transform):
        """The images that show at x what these show at transform @ x."""
        return replace(self, pose=self.pose @ transform)

    def corners(self):
        """Positions of the four corners in the canvas, (N, 2, 4)."""
        x, y = torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1]]) * self.side / 2
        return (self.pose @ torch.stack([x, y, torch.ones(4)]))[:, :2]


def matrix(*entries):
    """Matrices (N, 3, 3) from six entries row by row, numbers or (N,); the last row is 0, 0, 1."""
    entries = [torch.as_tensor(entry, dtype=torch.float32) for entry in (*entries, 0, 0, 1)]
    return torch.stack(torch.broadcast_tensors(*entries), dim=-1).view(-1, 3, 3)


def sample(*views, resolution=None):
    """Read the pixels of views with the same index, where their canvases are.

    It is the only resampling. A pixel is the mean of 2x2 points, as a camera's collects light.
    Gives one (N, 3, R, R) in [0, 1] for each view; R is the resolution, or else the views' side.
    """
    canvases, index, side = views[0].canvases, views[0].index, views[0].side
    whole = canvases[index.to(canvases.device)].float()
    scale = torch.tensor([side, side, 2.0]) / canvases.shape[-1]  # to grid_sample's -1 to 1
    points, images = 2 * (resolution or side), []
    for view in views:
        theta = (view.pose[:, :2] * scale).to(canvases.device)
        grid = F.affine_grid(theta, (len(index), 3, points, points), align_corners=False)
        values = F.grid_sample(whole, grid, padding_mode="border", align_corners=False)
        images.append(F.avg_pool2d(values, 2) / 255)
    return images


def sample_bytes(view):
    """The pixels of any number of views as uint8, sampled in parts: (N, 3, side, side)."""
    parts = zip(view.index.split(100), view.pose.split(100))
    return torch.cat([as_bytes(sample(replace(view, index=i, pose=p))[0]) for i, p in parts])


def as_bytes(images):
    """Images in [0, 1] as uint8 on the CPU; what lies outside is clipped."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
