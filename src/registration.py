"""Image registration without a network: alignment by least squares from several starting points.

A change is (dx, dy, angle, ln factor): what image 1 shows at x, image 2 shows at
factor * R(angle) x + (dx, dy), in pixels from the centers, y down, the angle clockwise in degrees.
"""

import math
from multiprocessing.pool import ThreadPool

import torch
import torch.nn.functional as F

# 15 starting points without any estimate, (15, 4): five angles times three factors
ANGLES, FACTORS = torch.tensor([-32.0, -16, 0, 16, 32]), torch.tensor([0.75, 1, 1.33])
STARTS = F.pad(torch.cartesian_prod(ANGLES, FACTORS.log()), (2, 0))
LEVELS = ((4, 8, 2), (2, 6, 1), (1, 4, 1))  # reduction, steps, starts that go on, coarse to fine
LEAST_OVERLAP = 0.15  # share of image 1 below which an alignment does not count
LARGEST = 0.9999  # correlation, whose transform would be infinite at 1
ROUNDING = 0.5  # variance of gray levels below which a patch counts as flat


def log_strengths(changes):
    """Logarithms (N, 3) of the strengths of changes (N, 4): pixels, degrees, ln factor."""
    strengths = torch.cat([changes[:, :2].norm(dim=1, keepdim=True), changes[:, 2:].abs()], dim=1)
    return strengths.clamp_min(1e-6).log()


def positions(changes, n):
    """Where the pixels of image 1 lie in image 2, (N, n, n, 2), from -1 to 1 inside of it."""
    dx, dy, angle, log_factor = changes.unbind(dim=1)
    cos, sin = (f(torch.deg2rad(angle)) * log_factor.exp() for f in (torch.cos, torch.sin))
    theta = torch.stack([cos, -sin, dx * 2 / n, sin, cos, dy * 2 / n], dim=1).view(-1, 2, 3)
    return F.affine_grid(theta, (len(changes), 1, n, n), align_corners=False)


def align(first, second):
    """Align pairs of RGB images (N, 3, S, S), uint8, on their device, from coarse to fine.

    Gives for each pair the changes (N, 4) with the highest score, and that score (N,), on the CPU:
    Fisher's transform of the correlation of what both show, times the root of that overlap.
    """
    threads = torch.get_num_threads()
    # Many short operations share their work badly: each batch gets a thread of its own instead.
    with ThreadPool(threads, torch.set_num_threads, (1,)) as pool:
        results = pool.starmap(_align_batch, zip(first.split(50), second.split(50)))
    torch.set_num_threads(threads)
    return tuple(map(torch.cat, zip(*results)))


@torch.inference_mode()
def _align_batch(first, second):
    changes = STARTS.expand(len(first), -1, 4).to(first.device)
    for factor, steps, finalists in LEVELS:
        n, each = changes.shape[:2]
        unit = changes.new_tensor([factor, factor, 1, 1])
        pair = (_gray(image, factor).repeat_interleave(each, dim=0) for image in (first, second))
        moved, score = _gauss_newton(*pair, changes.flatten(0, 1) / unit, steps)
        score, best = score.view(n, each).topk(min(finalists, each))
        changes = (moved * unit).view(n, each, 4).take_along_dim(best[:, :, None], dim=1)
    return changes[:, 0].cpu(), score[:, 0].cpu()


def _gray(images, factor):
    """Gray levels (N, 1, S / factor, S / factor), smoothed by the 3x3 binomial kernel."""
    gray = F.avg_pool2d(images.float().mean(dim=1, keepdim=True), factor)
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=1)


def _gauss_newton(first, second, changes, steps):
    """Align gray images (N, 1, n, n) from changes (N, 4): the best on the way, and their scores."""
    down, across = torch.gradient(second, dim=(2, 3))
    stack = torch.cat([second, across, down], dim=1)
    best, best_score = changes, torch.full_like(changes[:, 0], -math.inf)
    for _ in range(steps + 1):
        score, move = _step(first, stack, changes)
        best = torch.where((score > best_score)[:, None], changes, best)
        best_score = best_score.maximum(score)
        changes = changes + move
    return best, best_score


def _step(first, stack, changes):
    """The scores (N,) of changes and one Gauss-Newton step (N, 4) from them.

    Least squares (Lucas and Kanade 1981; Baker and Matthews 2004) with a gain and a shift of
    brightness: image 1 = gain * (image 2 + gradient * movement) + shift, linear in six unknowns.
    `stack` holds image 2 and its derivatives across and down, (N, 3, n, n).
    """
    n = first.shape[-1]
    arm = n / 4  # turns angle and scale into pixels
    grid = positions(changes, n)
    sampled = F.grid_sample(stack, grid, padding_mode="border", align_corners=False).flatten(2)
    inside = (grid.abs().amax(dim=3) <= 1 - 2 / n).flatten(1).float()  # (N, n * n)
    x, y = (grid.flatten(1, 2) * n / 2 - changes[:, None, :2]).unbind(dim=2)
    count = inside.sum(dim=1, keepdim=True).clamp_min(1)

    def centered(image):
        return (image - (image * inside).sum(dim=1, keepdim=True) / count) * inside

    a, b = centered(first.flatten(1)), centered(sampled[:, 0])
    noise = ROUNDING * count[:, 0]  # a flat overlap proves nothing
    power = (a.square().sum(dim=1) + noise) * (b.square().sum(dim=1) + noise)
    correlation = (a * b).sum(dim=1) / power.sqrt()
    overlap = count[:, 0] / n**2
    score = correlation.clamp(-LARGEST, LARGEST).atanh() * overlap.sqrt()
    score[overlap < LEAST_OVERLAP] = -math.inf

    gx, gy = (sampled[:, 1:] * inside[:, None]).unbind(dim=1)
    movement = gx, gy, (gy * x - gx * y) / arm, (gx * x + gy * y) / arm
    columns = torch.stack([*movement, b, inside], dim=1)
    normal = (columns @ columns.mT).double()
    damping = 0.003 * normal.diagonal(dim1=1, dim2=2) + 1e-6
    right = (columns @ a[:, :, None]).double()
    solution = torch.linalg.solve(normal + damping.diag_embed(), right)[:, :, 0].float()
    move = solution[:, :4] / solution[:, 4:5].clamp(0.2, 5)  # undoes the gain
    move = move.renorm(2, 0, 1.5)  # each at most 1.5 pixels long
    return score, move * move.new_tensor([1, 1, math.degrees(1 / arm), 1 / arm])
