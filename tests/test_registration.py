"""Alignment by least squares and log-polar phase correlation, on warps that are known."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from src import registration


@pytest.fixture(scope="module")
def scene():
    """One smooth grey scene of 256 pixels with all scales, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        F.interpolate(torch.rand(1, 1, n, n, generator=generator), size=256, mode="bicubic")
        for n in (4, 8, 16, 32, 64, 128)
    ]
    return (sum(layers) / 6)[0, 0].clamp(0, 1).numpy().astype(float)


def warped(scene, change, side=96):
    """Image 1 and image 2 (1, 3, side, side), read off the scene by SciPy."""
    dx, dy, angle, log_factor = change
    line = np.arange(side) - (side - 1) / 2
    y, x = np.meshgrid(line, line, indexing="ij")
    theta, factor = math.radians(angle), math.exp(log_factor)
    # what image 2 shows at q, the scene has at R(-theta) (q - d) / factor
    u, v = (x - dx) / factor, (y - dy) / factor
    back = math.cos(theta) * u + math.sin(theta) * v, -math.sin(theta) * u + math.cos(theta) * v
    images = [
        scipy.ndimage.map_coordinates(scene, [rows + 127.5, columns + 127.5], order=3)
        for columns, rows in ((x, y), back)
    ]
    return [torch.tensor(image).float().expand(1, 3, side, side) for image in images]


CHANGES = [
    (0.0, 0.0, 0.0, 0.0),
    (7.3, -4.6, 0.0, 0.0),
    (0.0, 0.0, 25.0, 0.0),
    (0.0, 0.0, 0.0, math.log(1.3)),
    (-9.0, 5.5, -30.0, math.log(0.75)),
]
ERRORS = torch.tensor([0.05, 0.05, 0.05, 0.001])


@pytest.mark.parametrize("change", CHANGES)
def test_alignment_finds_known_warps_from_fixed_starts(scene, change):
    found, score = registration.align(*warped(scene, change), registration.fixed_starts(1))
    assert (found[0] - torch.tensor(change)).abs().lt(ERRORS).all() and score > 1.5


def test_alignment_ignores_brightness_and_takes_bytes(scene):
    first, second = warped(scene, (3.0, 2.0, 5.0, 0.05))
    darker = ((0.7 * second + 0.1) * 255).round().to(torch.uint8)
    guess = torch.tensor([[[0.0, 0, 0, 0]]])
    found, _ = registration.align(first, darker, guess)
    assert (found[0] - torch.tensor([3.0, 2, 5, 0.05])).abs().lt(2 * ERRORS).all()


def test_flat_and_unrelated_images_score_low(scene):
    flat = torch.full((1, 3, 96, 96), 0.4)
    starts = registration.fixed_starts(1)
    assert registration.align(flat, flat, starts)[1] == 0
    a, b = warped(scene, (0, 0, 0, 0))[0], warped(scene[::-1, ::-1].copy(), (0, 0, 0, 0))[0]
    assert registration.align(a, b, starts)[1] < 1


def test_the_best_of_several_starts_is_kept_and_batches_do_not_matter(scene):
    pairs = [warped(scene, change) for change in CHANGES]
    first, second = (torch.cat(images) for images in zip(*pairs))
    starts = registration.estimate_starts(torch.tensor(CHANGES))
    assert starts.shape == (5, 2, 4) and not starts[:, 1].any()
    whole = registration.align(first, second, starts)
    parts = registration.align(first, second, starts, batch_size=2)
    assert all(torch.allclose(x, y, atol=5e-3) for x, y in zip(whole, parts))
    assert (whole[0] - torch.tensor(CHANGES)).abs().lt(ERRORS).all()


def test_undoing_a_change_brings_image_2_onto_image_1(scene):
    for change in CHANGES:
        first, second = warped(scene, change)
        back, mask = registration.align_back(second, torch.tensor([change]))
        assert ((back - first).abs() * mask)[:, :, 2:-2, 2:-2].max() < 0.05
        assert mask.float().mean() > 0.4


def test_phase_correlation_is_exact_to_a_part_of_a_pixel():
    rng = np.random.default_rng(0)
    image = scipy.ndimage.gaussian_filter(rng.normal(size=(64, 64)), 1.5, mode="wrap")
    for shift in ((0, 0), (5, -9), (2.4, 7.7), (-31.6, 0.3)):
        moved = np.fft.ifft2(scipy.ndimage.fourier_shift(np.fft.fft2(image), shift)).real
        found, height = registration.phase_correlation(image, moved)
        assert np.abs(np.subtract(found, shift)).max() < 0.15 and height > 0.3


@pytest.mark.parametrize("change", CHANGES)
def test_log_polar_phase_correlation_finds_known_warps(scene, change):
    found = registration.fourier_mellin_all(*warped(scene, change))[0]
    assert (found - torch.tensor(change)).abs().lt(torch.tensor([1.0, 1.0, 1.0, 0.03])).all()


def test_strengths_and_fixed_starts():
    changes = torch.tensor([[3.0, 4, -10, math.log(0.5)], [0, 0, 0, 0]])
    strengths = registration.log_strengths(changes).exp()
    assert torch.allclose(strengths[0], torch.tensor([5.0, 10.0, math.log(2)]))
    assert (strengths[1] < 1e-5).all()
    starts = registration.fixed_starts(2)
    assert starts.shape == (2, 15, 4) and len(starts[0].unique(dim=0)) == 15
    assert not starts[..., :2].any()
