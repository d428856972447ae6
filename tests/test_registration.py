"""Alignment by least squares, on warps that are known."""

import math
from multiprocessing.pool import ThreadPool

import pytest
import torch
import torch.nn.functional as F

from src import registration


@pytest.fixture(scope="module")
def scene():
    """One smooth gray scene with all scales, 0 to 255, (1, 1, 256, 256)."""
    torch.manual_seed(0)
    sizes = (4, 8, 16, 32, 64, 128)
    layers = [F.interpolate(torch.rand(1, 1, n, n), size=256, mode="bicubic") for n in sizes]
    return 255 * sum(layers) / 6


def warped(scene, change, side=96):
    """Image 1 and image 2 (1, 3, side, side), read off the middle of the scene."""
    dx, dy, angle, log_factor = change
    line = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    cos, sin, factor = (
        math.cos(math.radians(angle)),
        math.sin(math.radians(angle)),
        math.exp(log_factor),
    )
    # what image 2 shows at q, the scene has at R(-angle) (q - d) / factor
    u, v = (x - dx) / factor, (y - dy) / factor
    places = torch.stack(
        [torch.stack([x, y], 2), torch.stack([cos * u + sin * v, cos * v - sin * u], 2)]
    )
    images = F.grid_sample(
        scene.expand(2, -1, -1, -1), places / 128, "bicubic", align_corners=False
    )
    return images.expand(2, 3, side, side).split(1)


CHANGES = [
    (0.0, 0.0, 0.0, 0.0),
    (7.3, -4.6, 0.0, 0.0),
    (0.0, 0.0, 25.0, 0.0),
    (0.0, 0.0, 0.0, math.log(1.3)),
    (-9.0, 5.5, -30.0, math.log(0.75)),
]
ERRORS = torch.tensor([0.05, 0.05, 0.05, 0.001])


def test_alignment_finds_known_warps(scene):
    """Also in parts, as more pairs than a batch holds are split, and its threads are given back."""
    pairs = [warped(scene, change) for change in CHANGES] * 12
    first, second = (torch.cat(images) for images in zip(*pairs))
    torch.set_num_threads(2)
    changes, scores = registration.align(first, second)
    assert ThreadPool(1).apply(torch.get_num_threads) == 2
    assert (changes - torch.tensor(CHANGES * 12)).abs().lt(ERRORS).all() and scores.min() > 1.5


def test_alignment_ignores_brightness_and_takes_bytes(scene):
    first, second = warped(scene, (3.0, 2.0, 5.0, 0.05))
    darker = (0.7 * second + 25).round().to(torch.uint8)
    changes, _ = registration.align(first, darker)
    assert (changes[0] - torch.tensor([3.0, 2, 5, 0.05])).abs().lt(2 * ERRORS).all()


def test_flat_and_unrelated_images_score_low(scene):
    flat = torch.full((1, 3, 96, 96), 102.0)
    assert registration.align(flat, flat)[1].abs() < 1e-3
    a, b = warped(scene, CHANGES[0])[0], warped(scene.flip(2, 3), CHANGES[0])[0]
    assert registration.align(a, b)[1] < 1


def test_strengths():
    strengths = registration.log_strengths(torch.tensor([[3.0, 4, -10, -0.7], [0.0] * 4])).exp()
    assert torch.allclose(strengths[0], torch.tensor([5.0, 10.0, 0.7])) and strengths.min() < 1e-5
