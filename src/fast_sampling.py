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
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from src import ProjectError

PIECE, PIECE_ON_GPU = 2**19, 2**26  # numbers sampled at once; 2 MB: the cache of a processor


def slices(first, stop, size):
    """Cut range(first, stop) into slices of `size`, the last one shorter."""
    size = max(1, size)
    return (slice(i, min(i + size, stop)) for i in range(first, stop, size))


def side_by_side(function, images, device):
    """Results of function(slice) for shares of the images: on a CPU, one share for each thread."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    shares = min(threads, images)
    if shares < 2:
        return [function(slice(0, images))]

    inference = torch.is_inference_mode_enabled()  # new threads do not know of it

    def alone(share):
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():
            return function(share)

    bounds = [i * images // shares for i in range(shares + 1)]
    try:
        with ThreadPoolExecutor(shares) as pool:
            return list(pool.map(alone, map(slice, bounds, bounds[1:])))
    finally:
        torch.set_num_threads(threads)  # some of the libraries below know one number only


def corner_rows(base, row, rows):
    """The rows (B * P * K, 4) that every sample of a few images reads, in one table of them all.

    `base` (B, P, K) are the upper left neighbors in the table of each image, which has `rows` rows
    in all and `row` for each row of the image.
    """
    images = torch.arange(len(base), dtype=base.dtype, device=base.device) * rows
    return (base + images[:, None, None]).reshape(-1, 1) + base.new_tensor([0, 1, row, row + 1])


def corner_products(by_sample, table, corners):
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


def pixel_sums(by_sample, corners, weights, rows):
    """Add up, for every row of a table, the weighted samples that read it -> (rows, C)."""
    keys, order = corners.view(-1).sort()
    every_row = torch.arange(rows, dtype=keys.dtype, device=keys.device)
    samples, weights = order.div(4, rounding_mode="floor"), weights.view(-1)[order]
    starts = torch.searchsorted(keys, every_row)
    return F.embedding_bag(samples, by_sample, starts, mode="sum", per_sample_weights=weights)


def piece_size(pixels, taps):
    """How many positions are sampled at once from a table (..., C)."""
    piece = PIECE if pixels.device.type == "cpu" else PIECE_ON_GPU
    return max(64, piece // (taps * pixels.shape[-1]))


def blocks(share, table, base, weight, row):
    """Take a few images of a share at a time, and their sections one by one.

    Yields the images, the section, its offset group, its table (B * R, C), and the corners that are
    read there, (B * P * K, 4), with their weights.
    """
    sections, rows, channels = table.shape[1:]
    size = piece_size(table, base.shape[3]) // max(1, base.shape[2])
    for images in slices(share.start, share.stop, size):
        for s in range(sections):
            g = s * base.shape[1] // sections
            corners = corner_rows(base[images, g], row, rows)
            pixels, weights = table[images, s].reshape(-1, channels), weight[images, g]
            yield images, s, g, pixels, corners, weights.reshape(-1, 4)


def columns(pixels, corners, weights, taps):
    """Sample a table piece by piece: yields a slice of the positions, and their (p, K * C)."""
    for part in slices(0, len(corners) // taps, piece_size(pixels, taps)):
        samples = slice(part.start * taps, part.stop * taps)
        sampled = F.embedding_bag(
            corners[samples], pixels, mode="sum", per_sample_weights=weights[samples]
        )
        yield part, sampled.view(part.stop - part.start, -1)


class SampledProduct(torch.autograd.Function):
    """Samples of a table times a kernel, with an explicit gradient, for float32 and float64.

    Arguments and result are those of `reference`, the notebook's `sampled_product`, which computes
    the same in differentiable operations.
    """

    @staticmethod
    def forward(ctx, table, base, weight, kernel, row, groups, reference):
        ctx.save_for_backward(table, base, weight, kernel)
        ctx.row, ctx.groups, ctx.reference = row, groups, reference
        batch, _, positions, taps = base.shape
        out = table.new_zeros(groups, batch, positions, kernel.shape[2])

        def compute(share):
            for images, s, _, *samples in blocks(share, table, base, weight, row):
                result = out[s * groups // len(kernel), images].view(-1, kernel.shape[2])
                for part, sampled in columns(*samples, taps):
                    result[part].addmm_(sampled, kernel[s])

        side_by_side(compute, batch, table.device)
        return out.permute(1, 0, 3, 2)

    @staticmethod
    def backward(ctx, grad):
        tensors, (row, groups) = ctx.saved_tensors, (ctx.row, ctx.groups)
        with torch.autocast(grad.device.type, enabled=False):  # it may be on where this is called
            if torch.is_grad_enabled():  # derivatives of the gradients are asked for, too
                wanted = ctx.needs_input_grad[:4]
                inputs = [x for x, asked in zip(tensors, wanted) if asked]
                out = ctx.reference(*tensors, row, groups)
                grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
                return *(next(grads) if asked else None for asked in wanted), None, None, None
            grad_table, *others = gradients(*tensors, grad, row, groups)
        return grad_table, None, *others, None, None, None


def gradients(table, base, weight, kernel, grad, row, groups):
    """The gradients of table, weight and kernel, given that of the result; see `SampledProduct`."""
    batch, _, positions, taps = base.shape
    grad_table, grad_weight = torch.empty_like(table), torch.zeros_like(weight)

    def compute(share):
        grad_kernel = torch.zeros_like(kernel)
        for images, s, g, *samples in blocks(share, table, base, weight, row):
            pixels, corners, weights = samples
            of_result = grad[images, s * groups // len(kernel)].transpose(1, 2).flatten(0, 1)
            for part, sampled in columns(*samples, taps):
                grad_kernel[s].addmm_(sampled.t(), of_result[part])  # (B * P, O / groups)
            by_sample = (of_result @ kernel[s].t()).view(len(corners), -1)
            products = corner_products(by_sample, pixels, corners)
            grad_weight[images, g] += products.view(-1, positions, taps, 4)
            sums = pixel_sums(by_sample, corners, weights, len(pixels))
            grad_table[images, s] = sums.view_as(grad_table[images, s])
        return grad_kernel

    kernels = side_by_side(compute, batch, table.device)
    return grad_table, grad_weight, sum(kernels[1:], kernels[0])


# --- what the operator needs besides --------------------------------------------------------------
def output_size(input, weight, *place):
    """The output's size (H', W') of a convolution with this stride, padding and dilation."""
    axes = zip(input.shape[2:], weight.shape[2:], *place)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def check_arguments(input, offset, weight, mask, size):
    """Check that the arguments of `deform_conv2d` fit each other and the output's size (H', W').

    A ProjectError names the argument that does not fit.
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
