"""Image registration without a network: least-squares alignment, and log-polar phase correlation.

A change is (dx, dy, angle, ln factor): what image 1 shows at x, image 2 shows at
factor * R(angle) x + (dx, dy), in pixels from the centres, y down, the angle clockwise in degrees.
"""

import math

import numpy as np
import scipy.fft
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_OVERLAP = 0.15  # share of image 1 below which an alignment does not count
LARGEST_CORRELATION = 0.9999
ROUNDING = 0.5  # variance of grey levels below which a patch counts as flat


def similarity(changes: Tensor) -> Tensor:
    """The matrices (N, 2, 3) that map positions in image 1 to positions in image 2."""
    dx, dy, angle, log_factor = changes.unbind(dim=-1)
    cos, sin = (f(torch.deg2rad(angle)) * log_factor.exp() for f in (torch.cos, torch.sin))
    rows = torch.stack([cos, -sin, dx], dim=-1), torch.stack([sin, cos, dy], dim=-1)
    return torch.stack(rows, dim=-2)


def align_back(second: Tensor, changes: Tensor) -> tuple[Tensor, Tensor]:
    """Undo changes: image 2 as it would look without them.

    Args:
        second: images (N, C, S, S).
        changes: (N, 4), in pixels of these images.

    Returns:
        The images (N, C, S, S), and the mask (N, 1, S, S) of what image 2 really shows.
    """
    theta = similarity(changes) * changes.new_tensor([1, 1, 2 / second.shape[-1]])
    grid = F.affine_grid(theta, second.shape, align_corners=False)
    back = F.grid_sample(second, grid, padding_mode="border", align_corners=False)
    return back, (grid.abs() <= 1).all(dim=3)[:, None]


# --- alignment ------------------------------------------------------------------------------------
def grey_levels(images: Tensor, factors=(4, 2, 1)) -> list[Tensor]:
    """RGB images (N, 3, S, S) in [0, 1] -> blurred grey levels of 0 to 255, S / factor a side."""
    grey = 255 * images.float().mean(dim=1, keepdim=True)
    row = grey.new_tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row)[None, None]

    def level(factor: int) -> Tensor:
        return F.conv2d(F.pad(F.avg_pool2d(grey, factor), (1, 1, 1, 1), mode="replicate"), kernel)

    return [level(factor) for factor in factors]


def gauss_newton(first: Tensor, second: Tensor, changes: Tensor, steps: int):
    """Align on one level by least squares (Lucas and Kanade 1981; Baker and Matthews 2004).

    Besides the change, a gain and a shift of brightness are fitted.

    Args:
        first, second: grey images (N, 1, n, n).
        changes: (N, 4) to start from, in pixels of this level.
        steps: Gauss-Newton steps; the best point on the way is kept.

    Returns:
        The changes (N, 4), and their scores (N,): Fisher's transform of the correlation, times the
        root of the overlap.
    """
    n = first.shape[-1]
    padded = F.pad(second, (1, 1, 1, 1), mode="replicate")
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    stack = torch.cat([second, across, down], dim=1)
    line = torch.arange(n, device=first.device) - (n - 1) / 2
    place = torch.stack(
        [line.repeat(n), line.repeat_interleave(n), torch.ones_like(line).repeat(n)]
    )
    bounds = changes.new_tensor([n / 2, n / 2, 70, 0.8])
    best, best_score = changes, torch.full_like(changes[:, 0], -math.inf)
    for i in range(steps + 1):
        score, columns, residual = _linearize(first, stack, changes, place)
        better = score > best_score
        best = torch.where(better[:, None], changes, best)
        best_score = torch.where(better, score, best_score)
        if i < steps:
            move = _solve(columns, residual, n / 4)
            changes = torch.maximum(torch.minimum(changes + move, bounds), -bounds)
    return best, best_score


def _linearize(first, stack, changes, place):
    """Score, the six columns of the Jacobian (N, 6, n * n), and the residual (N, n * n)."""
    n, arm = first.shape[-1], first.shape[-1] / 4  # arm: turns angle and scale into pixels
    moved = similarity(changes) @ place  # (N, 2, n * n)
    inside = (moved.abs() <= n / 2 - 1).all(dim=1).float()
    grid = moved.transpose(1, 2).reshape(-1, n, n, 2) * (2 / n)
    sampled = F.grid_sample(stack, grid, padding_mode="border", align_corners=False)
    value, gx, gy = sampled.flatten(2).unbind(dim=1)
    count = inside.sum(dim=1, keepdim=True).clamp_min(1)

    def centred(x):
        return (x - (x * inside).sum(dim=1, keepdim=True) / count) * inside

    a, b = centred(first.flatten(1)), centred(value)
    aa, bb, ab = ((p * q).sum(dim=1, keepdim=True) for p, q in ((a, a), (b, b), (a, b)))
    noise = ROUNDING * count  # a flat overlap proves nothing
    correlation, overlap = (ab / ((aa + noise) * (bb + noise)).sqrt())[:, 0], count[:, 0] / n**2
    limit = LARGEST_CORRELATION
    score = torch.atanh(correlation.clamp(-limit, limit)) * overlap.sqrt()
    score = torch.where(overlap < LEAST_OVERLAP, -math.inf, score)
    gain = (ab / (bb + noise)).clamp(0.2, 5)
    gx, gy = gain * gx * inside, gain * gy * inside
    x, y = (moved - changes[:, :2, None]).unbind(dim=1)  # turned and scaled, not yet moved
    light = b / (bb / count + 1).sqrt()
    columns = torch.stack(
        [gx, gy, (gy * x - gx * y) / arm, (gx * x + gy * y) / arm, light, inside], 1
    )
    return score, columns, a - gain * b


def _solve(columns, residual, arm):
    """One damped step (N, 4), at most 1.5 pixels long."""
    normal = (columns @ columns.transpose(1, 2)).double()
    diagonal = normal.diagonal(dim1=1, dim2=2)
    damping = 0.01 * diagonal + 1e-3 * diagonal.amax(dim=1, keepdim=True) + 1e-6
    right = (columns @ residual[:, :, None]).double()
    move = torch.linalg.solve(normal + torch.diag_embed(damping), right)[:, :4, 0].float()
    move = move * (1.5 / move.norm(dim=1, keepdim=True).clamp_min(1.5))
    return move * move.new_tensor([1, 1, math.degrees(1 / arm), 1 / arm])


def estimate_starts(changes: Tensor) -> Tensor:
    """Two starting points (N, 2, 4): an estimate (N, 4), and no change."""
    return torch.stack([changes, torch.zeros_like(changes)], dim=1)


def fixed_starts(n: int) -> Tensor:
    """15 starting points without any estimate, (n, 15, 4): five angles times three factors."""
    angles, factors = torch.tensor([-32.0, -16, 0, 16, 32]), torch.tensor([0.75, 1, 1.33]).log()
    turned = torch.cartesian_prod(angles, factors)
    return torch.cat([torch.zeros(15, 2), turned], dim=1).expand(n, 15, 4)


def log_strengths(changes: Tensor) -> Tensor:
    """Logarithms (N, 3) of the strengths of changes (N, 4): pixels, degrees, ln factor."""
    size = torch.cat([changes[:, :2].norm(dim=1, keepdim=True), changes[:, 2:].abs()], dim=1)
    return size.clamp_min(1e-6).log()


@torch.inference_mode()
def align(first: Tensor, second: Tensor, starts: Tensor, device="cpu", batch_size: int = 50):
    """Align pairs from several starting points each, from coarse to fine.

    Args:
        first, second: RGB images (N, 3, S, S), uint8 or in [0, 1].
        starts: changes (N, K, 4), in pixels of these images.
        device: where it is computed.
        batch_size: pairs at a time.

    Returns:
        For each pair the changes (N, 4) with the highest score, and that score (N,), on the CPU.
    """
    side, parts = first.shape[-1], []
    for batch in zip(*(x.split(batch_size) for x in (first, second, starts))):
        a, b, start = (x.to(device) for x in batch)
        a, b = (x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in (a, b))
        changes = start.float().flatten(0, 1)
        levels = zip(grey_levels(a), grey_levels(b), (8, 6, 4), (2, 1, 1))
        for x, y, steps, finalists in levels:
            each = len(changes) // len(a)
            unit = changes.new_tensor([x.shape[-1] / side] * 2 + [1, 1])
            x, y = (grey.repeat_interleave(each, 0) for grey in (x, y))
            changes, score = gauss_newton(x, y, changes * unit, steps)
            score, best = score.view(len(a), each).topk(min(finalists, each), dim=1)
            changes = (changes / unit).view(len(a), each, 4)
            changes = changes.gather(1, best[:, :, None].expand(-1, -1, 4)).flatten(0, 1)
        parts.append((changes.cpu(), score[:, 0].cpu()))
    return tuple(torch.cat(part) for part in zip(*parts))


# --- phase correlation ----------------------------------------------------------------------------
def phase_correlation(a: np.ndarray, b: np.ndarray) -> tuple[list[float], float]:
    """The shift (rows, columns) from a to b, both (n, m), and the height of the peak."""
    spectrum = np.conj(scipy.fft.fft2(a)) * scipy.fft.fft2(b)
    surface = scipy.fft.ifft2(spectrum / (np.abs(spectrum) + 1e-9)).real
    peak = np.unravel_index(surface.argmax(), surface.shape)
    shift = []
    for axis, position in enumerate(peak):  # a parabola through the peak and its neighbours
        size = surface.shape[axis]
        line = np.take(surface, [position - 1, position, position + 1], axis, mode="wrap")
        low, top, high = np.take(line, peak[1 - axis], 1 - axis)
        curvature = low - 2 * top + high
        fraction = 0.5 * (low - high) / curvature if curvature < 0 else 0.0
        shift.append(float((position + size // 2) % size - size // 2 + fraction))
    return shift, float(surface.max())


def fourier_mellin(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Estimate the change between grey images (S, S) (Reddy and Chatterji 1996).

    The magnitude of the Fourier transform does not move with the image, and in log-polar
    coordinates its rotation and scaling become shifts. Half a turn looks the same: both are tried.
    """
    side = first.shape[0]
    centre, window = (side - 1) / 2, np.outer(np.hanning(side), np.hanning(side))
    radii, angles = 64, 180
    log_step = math.log(side / 2 / 3) / radii
    rho, phi = 3 * np.exp(log_step * np.arange(radii)), np.pi * np.arange(angles) / angles
    place = [side / 2 + np.outer(f(phi), rho) for f in (np.sin, np.cos)]
    polar = []
    for image in (first, second):
        magnitude = scipy.fft.fftshift(np.abs(scipy.fft.fft2((image - image.mean()) * window)))
        lines = scipy.ndimage.map_coordinates(np.log1p(magnitude), place, order=1)
        polar.append(lines * np.hanning(radii))
    (turn, stretch), _ = phase_correlation(*polar)
    best, highest = None, -math.inf
    angle, log_factor = turn * 180 / angles, float(np.clip(-stretch * log_step, -0.7, 0.7))
    for half_turn in (0, 180):
        theta = math.radians(angle + half_turn)
        cos, sin = math.cos(theta), math.sin(theta)
        matrix = math.exp(log_factor) * np.array([[cos, sin], [-sin, cos]])  # rows, columns
        offset = centre - matrix @ [centre, centre]
        back = scipy.ndimage.affine_transform(second, matrix, offset, order=1, mode="reflect")
        windowed = [(image - image.mean()) * window for image in (first, back)]
        shift, height = phase_correlation(*windowed)
        if height > highest:
            dy, dx = (matrix @ shift).tolist()
            highest = height
            best = [dx, dy, (angle + half_turn + 180) % 360 - 180, log_factor]
    return best


def fourier_mellin_all(first: Tensor, second: Tensor) -> Tensor:
    """`fourier_mellin` of RGB images (N, 3, S, S), in any unit -> changes (N, 4)."""
    pairs = (images.float().mean(dim=1).cpu().numpy().astype(float) for images in (first, second))
    return torch.tensor([fourier_mellin(a, b) for a, b in zip(*pairs)]).float()
