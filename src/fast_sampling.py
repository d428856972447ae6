"""Sampling and product, the costly steps of a deformable convolution, in few passes over memory.

The readable version (`sampled_product` in the notebook) writes four neighbors per sample, then
their weighted copies, before it adds them up. Here

- *forward*: `embedding_bag` adds weighted rows of a table in one pass, piece by piece; the columns
  of a convolution are never stored as a whole;
- *backward*, by hand: with g the gradient of the output, the columns' gradient is g times the
  transposed kernel. From it follow the kernel's gradient (columns sampled again, cheaper than
  keeping them), the gradient of each corner's weight (its scalar product with the corner's pixel)
  and the image's gradient. There, adding to scattered places would be slow and in an order that
  changes from run to run; the corners are sorted by the pixel that they read, and every pixel
  collects its own: the same bits each time;
- *second derivatives* go through the readable version, which is passed in as `reference`;
- on a CPU, each thread works on its own images: many short parallel regions would wait for each
  other wherever another program is busy.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from src import ProjectError

PIECE = {"cpu": 2**19, "cuda": 2**26}  # numbers sampled at once; 2 MB on a CPU: a core's cache


def slices(first: int, stop: int, size: int) -> Iterator[slice]:
    """Cut range(first, stop) into slices of `size`, the last one shorter."""
    size = max(1, size)
    return (slice(i, min(i + size, stop)) for i in range(first, stop, size))


def side_by_side(function: Callable[[slice], object], images: int, device: torch.device) -> list:
    """Results of function(slice) for shares of the images: on a CPU, one share for each thread."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    shares = min(threads, images)
    if shares < 2:
        return [function(slice(0, images))]

    inference = torch.is_inference_mode_enabled()  # new threads do not know of it

    def alone(share: slice):
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():
            return function(share)

    bounds = [i * images // shares for i in range(shares + 1)]
    try:
        with ThreadPoolExecutor(shares) as pool:
            return list(pool.map(alone, map(slice, bounds, bounds[1:])))
    finally:
        torch.set_num_threads(threads)  # some of the libraries below know one number only


def corner_rows(base: Tensor, row: int, rows: int) -> Tensor:
    """Give the four neighbors of every sample of a few images.

    Args:
        base: (B, P, K), the upper left neighbors.
        row: rows of the table per row of the image.
        rows: of the table per image.

    Returns:
        (B * P * K, 4): rows of the images' tables, one below the other.
    """
    images = torch.arange(len(base), dtype=base.dtype, device=base.device) * rows
    right, below = base.new_ones(()), base.new_full((), row)
    steps = torch.stack([right - right, right, below, below + right])
    return (base + images[:, None, None]).reshape(-1, 1) + steps


def sample(table: Tensor, corners: Tensor, weight: Tensor) -> Tensor:
    """Sample a table (R, C) at corners (samples, 4) with weights (samples, 4) -> (samples, C)."""
    return F.embedding_bag(corners, table, mode="sum", per_sample_weights=weight)


def corner_products(by_sample: Tensor, table: Tensor, corners: Tensor) -> Tensor:
    """Scalar products of samples (n, C) with a table's rows at their corners (n, 4) -> (n, 4)."""
    if table.device.type != "cpu":
        rows = (table.index_select(0, corner) for corner in corners.t())
        return torch.stack([torch.einsum("sc,sc->s", x, by_sample) for x in rows], dim=1)
    # A product of matrices of which only the entries of a sparse pattern are computed, four a row:
    # four to twelve times as fast as the lines above.
    with warnings.catch_warnings():  # the layout is announced as beta; it only carries indices here
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, corners.numel() + 1, 4, dtype=corners.dtype),
            corners.view(-1),
            table.new_zeros(corners.numel()),
            size=(len(corners), len(table)),
            check_invariants=False,
        )
    product = torch.sparse.sampled_addmm(pattern, by_sample, table.t(), beta=0.0)
    return product.values().view(-1, 4)


def pixel_sums(by_sample: Tensor, corners: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Add up, for every row of a table, the weighted samples that read it -> (rows, C)."""
    keys, order = corners.view(-1).sort()
    every_row = torch.arange(rows, dtype=keys.dtype, device=keys.device)
    starts = torch.searchsorted(keys, every_row)
    samples = order.div(4, rounding_mode="floor")
    weights = weight.view(-1)[order]
    return F.embedding_bag(samples, by_sample, starts, mode="sum", per_sample_weights=weights)


def piece_size(table: Tensor, taps: int) -> int:
    """How many positions are sampled at once."""
    return max(
        64, PIECE["cpu" if table.device.type == "cpu" else "cuda"] // (taps * table.shape[3])
    )


def blocks(share: slice, table: Tensor, base: Tensor, row: int, size: int) -> Iterator:
    """Take a few images at a time, of about `size` positions, and their sections one by one.

    Yields:
        The images, the section, its offset group, its table (B * R, C), `corner_rows` of both.
    """
    sections, rows, channels = table.shape[1:]
    for images in slices(share.start, share.stop, size // max(1, base.shape[2])):
        for s in range(sections):
            g = s * base.shape[1] // sections
            pixels = table[images, s].reshape(-1, channels)
            yield images, s, g, pixels, corner_rows(base[images, g], row, rows)


class SampledProduct(torch.autograd.Function):
    """Samples of a table times a kernel, with an explicit gradient, for float32 and float64.

    Args:
        table: (N, S, R, C), R rows of C channels per image and section.
        base, weight: (N, G, P, K) and (N, G, P, K, 4), see `bilinear_corners` in the notebook; G
            divides S.
        kernel: (S, K * C, O / groups).
        row: rows of the table per row of the image.
        groups: of the convolution, dividing S.
        reference: computes the same from the same arguments in differentiable operations.

    Returns:
        (N, groups, O / groups, P).
    """

    @staticmethod
    def forward(ctx, table, base, weight, kernel, row, groups, reference: Callable):
        ctx.save_for_backward(table, base, weight, kernel)
        ctx.row, ctx.groups, ctx.reference = row, groups, reference
        batch, _, positions, taps = base.shape
        out = table.new_zeros(groups, batch * positions, kernel.shape[2])
        size = piece_size(table, taps)

        def compute(share: slice) -> None:
            for images, s, g, pixels, corners in blocks(share, table, base, row, size):
                weights = weight[images, g].reshape(-1, 4)
                place = slice(images.start * positions, images.stop * positions)
                result = out[s * groups // len(kernel), place]
                for part in slices(0, len(result), size):
                    samples = slice(part.start * taps, part.stop * taps)
                    columns = sample(pixels, corners[samples], weights[samples])
                    result[part].addmm_(columns.view(len(columns) // taps, -1), kernel[s])

        side_by_side(compute, batch, table.device)
        return out.view(groups, batch, positions, kernel.shape[2]).permute(1, 0, 3, 2)

    @staticmethod
    def backward(ctx, grad):
        table, base, weight, kernel = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):  # it may be on where this is called
            if torch.is_grad_enabled():  # derivatives of the gradients are asked for, too
                wanted = ctx.needs_input_grad
                inputs = [x for x, asked in zip((table, base, weight, kernel), wanted) if asked]
                out = ctx.reference(table, base, weight, kernel, ctx.row, ctx.groups)
                grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
                return *(next(grads) if asked else None for asked in wanted[:4]), None, None, None
            grads = gradients(table, base, weight, kernel, grad, ctx.row, ctx.groups)
        return grads[0], None, *grads[1:], None, None, None


def gradients(table, base, weight, kernel, grad, row, groups) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of table, weight and kernel, given that of the result; see `SampledProduct`."""
    batch, _, positions, taps = base.shape
    grad_table, grad_weight = torch.empty_like(table), torch.zeros_like(weight)
    size = piece_size(table, taps)

    def compute(share: slice) -> Tensor:
        grad_kernel = torch.zeros_like(kernel)
        for images, s, g, pixels, corners in blocks(share, table, base, row, size):
            weights = weight[images, g].reshape(-1, 4)
            of_result = grad[images, s * groups // len(kernel)].transpose(1, 2).flatten(0, 1)
            for part in slices(0, len(of_result), size):  # (B * P, O / groups)
                samples = slice(part.start * taps, part.stop * taps)
                columns = sample(pixels, corners[samples], weights[samples])
                grad_kernel[s].addmm_(columns.view(len(columns) // taps, -1).t(), of_result[part])
            by_sample = (of_result @ kernel[s].t()).view(len(corners), -1)
            products = corner_products(by_sample, pixels, corners)
            grad_weight[images, g] += products.view(-1, positions, taps, 4)
            sums = pixel_sums(by_sample, corners, weights, len(pixels))
            grad_table[images, s] = sums.view_as(grad_table[images, s])
        return grad_kernel

    kernels = side_by_side(compute, batch, table.device)
    return grad_table, grad_weight, sum(kernels[1:], kernels[0])


# --- what the operator needs besides --------------------------------------------------------------
def is_autocast(kind: str) -> bool:
    """Whether autocast is on for a type of device."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def output_size(input: Tensor, weight: Tensor, *place: tuple[int, int]) -> tuple[int, ...]:
    """The output's size (H', W') of a convolution with this stride, padding and dilation."""
    axes = zip(input.shape[2:], weight.shape[2:], *place)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def check_arguments(input, offset, weight, mask, size: tuple[int, ...]) -> None:
    """Check that the arguments of `deform_conv2d` fit each other and the output's size (H', W').

    Raises:
        ProjectError: names the argument that does not fit.
    """
    channels, (outputs, share, *kernel_size) = input.shape[1], weight.shape
    if not share or channels % share or outputs % (channels // share):
        raise ProjectError(f"deform_conv2d: weight {tuple(weight.shape)} for {channels} channels.")
    taps = math.prod(kernel_size)
    groups = max(1, offset.shape[1] // (2 * taps))
    if channels % groups:
        raise ProjectError(f"deform_conv2d: {groups} offset groups for {channels} channels.")
    for name, x, each in (("offset", offset, 2 * taps), ("mask", mask, taps)):
        wanted = len(input), each * groups, *size
        if x is not None and x.shape != wanted:
            raise ProjectError(f"deform_conv2d: {name} is {tuple(x.shape)}; it needs {wanted}.")
