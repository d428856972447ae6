"""Sampling and product, the costly steps of a deformable convolution, in few passes over memory.

The readable version (`sampled_product` in the notebook) writes four neighbours per sample, then
their weighted copies, before it adds them up. Here

- *forward*: `embedding_bag` adds weighted rows of a table in one pass, block by block; the columns
  of a convolution are never stored as a whole;
- *backward*, by hand: with g the gradient of the output, the columns' gradient is g times the
  transposed kernel. From it follow the kernel's gradient (columns sampled again, cheaper than
  keeping them), the gradient of each corner's weight (its scalar product with the corner's pixel)
  and the image's gradient. There, adding to scattered places would be slow and in an order that
  changes from run to run; the corners are sorted by the pixel that they read, and every pixel
  collects its own: a segment sum, the same bits each time;
- *second derivatives* go through the readable version, which is passed in as `reference`.

The same code runs on the CPU, on CUDA, on `meta` tensors and under `FakeTensorMode`.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from src import ProjectError, accounting

# Numbers of a block of columns. Whole images, at least one, form a block, for which the columns'
# gradient exists as a whole; what is sampled at once is smaller where a cache can hold it.
BLOCK = {"cpu": 2**21, "other": 2**26}
SAMPLED = {"cpu": 2**19, "other": 2**26}  # 2 MB on the CPU: a core's cache
CORNERS = 1 / 8  # of a block's numbers: corners read at once where there is no sparse product


def _numbers(table: dict[str, int], x: Tensor) -> int:
    return table["cpu" if x.device.type == "cpu" else "other"]


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut range(length) into slices of `size`, the last one shorter."""
    size = max(1, size)
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def image_blocks(table: Tensor, base: Tensor) -> Iterator[slice]:
    """Cut the batch of a table (N, S, R, C) into blocks of whole images."""
    numbers = base[0, 0].numel() * table.shape[3] if len(base) else 1
    return slices(len(base), _numbers(BLOCK, table) // max(1, numbers))


def corner_rows(base: Tensor, row: int, rows: int) -> Tensor:
    """Give the four neighbours of every sample of a few images.

    Args:
        base: (B, P, K), the upper left neighbours.
        row: rows of the table per row of the image.
        rows: of the table per image.

    Returns:
        (B * P * K, 4): rows of the images' tables, one below the other.
    """
    images = torch.arange(len(base), dtype=base.dtype, device=base.device) * rows
    steps = base.new_zeros(4)
    steps[1::2] += 1
    steps[2:] += row
    return (base + images[:, None, None]).reshape(-1, 1) + steps


def sample(table: Tensor, corners: Tensor, weight: Tensor) -> Tensor:
    """Sample a table (R, C) at corners (samples, 4) with weights (samples, 4) -> (samples, C)."""
    return F.embedding_bag(corners, table, mode="sum", per_sample_weights=weight)


def corner_products(by_sample: Tensor, table: Tensor, corners: Tensor) -> Tensor:
    """Scalar product of each sample (samples, C) with the table's rows (R, C) at its corners.

    Returns:
        (samples, 4), as `corners`.
    """
    if table.device.type != "cpu" or isinstance(table, FakeTensor):
        products, channels = by_sample.new_empty(corners.shape), table.shape[1]
        # Most blocks are one piece; in larger ones a launch is short beside the work of a piece.
        step = int(CORNERS * _numbers(BLOCK, table)) // (4 * channels)
        for part in slices(len(corners), step):
            pixels = table.index_select(0, corners[part].view(-1)).view(-1, 4, channels)
            products[part] = pixels.mul_(by_sample[part, None]).sum(dim=2)
            del pixels
        return products
    # A product of matrices of which only the entries of a sparse pattern are computed, four a row.
    pointers = torch.arange(0, corners.numel() + 1, 4, dtype=corners.dtype)
    with warnings.catch_warnings():  # the layout is announced as beta; it only carries indices here
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        pattern = torch.sparse_csr_tensor(
            pointers,
            corners.view(-1),
            table.new_zeros(corners.numel()),
            size=(len(corners), len(table)),
            check_invariants=False,
        )
    product = torch.sparse.sampled_addmm(pattern, by_sample, table.t(), beta=0.0)
    return product.values().view(-1, 4)


class PixelSum:
    """Adds up, for every row of a table, the samples that read it; sorted once, used per section.

    Args:
        corners: (samples, 4), see `corner_rows`.
        weight: (samples, 4).
        rows: of the table.
    """

    def __init__(self, corners: Tensor, weight: Tensor, rows: int):
        keys, order = corners.view(-1).sort()
        every_row = torch.arange(rows, dtype=keys.dtype, device=keys.device)
        self.starts = torch.searchsorted(keys, every_row, out_int32=True)
        del keys
        self.weight = weight.reshape(-1)[order]
        self.sample = order.div_(4, rounding_mode="floor").int()

    def __call__(self, by_sample: Tensor) -> Tensor:
        """Samples (samples, C) -> (rows, C)."""
        return F.embedding_bag(
            self.sample, by_sample, self.starts, mode="sum", per_sample_weights=self.weight
        )


def _one_by_one(function, info, in_dims, inputs):
    """The rule for torch.func.vmap: the function of each entry of the mapped dimension, stacked."""
    outputs = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims)))
        for i in range(info.batch_size)
    ]
    if torch.is_tensor(outputs[0]):
        return torch.stack(outputs), 0
    return tuple(torch.stack(parts) for parts in zip(*outputs)), (0,) * len(outputs[0])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.row, ctx.groups, ctx.reference = inputs
    ctx.save_for_backward(*tensors)


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

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def forward(table, base, weight, kernel, row, groups, reference: Callable):
        (batch, sections, rows, channels), (_, split, positions, taps) = table.shape, base.shape
        out = table.new_zeros(groups, batch * positions, kernel.shape[2])
        step = max(64, _numbers(SAMPLED, table) // max(1, taps * channels))  # positions at once
        for images in image_blocks(table, base):
            for s in range(sections):
                g, h = s * split // sections, s * groups // sections
                pixels = table[images, s].reshape(-1, channels)
                corners = corner_rows(base[images, g], row, rows)
                weights = weight[images, g].reshape(-1, 4)
                result = out[h, images.start * positions : images.stop * positions]
                for part in slices(len(result), step):
                    samples = slice(part.start * taps, part.stop * taps)
                    columns = sample(pixels, corners[samples], weights[samples])
                    result[part].addmm_(columns.view(-1, taps * channels), kernel[s])
                    del columns
        return out.view(groups, batch, positions, kernel.shape[2]).permute(1, 0, 3, 2)

    @staticmethod
    def backward(ctx, grad):
        others = ctx.row, ctx.groups, ctx.reference
        with full_precision(grad.device.type):  # autocast may be on where backward is called
            grads = SampledProductGradient.apply(*ctx.saved_tensors, grad, *others)
        return grads[0], None, *grads[1:], None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(SampledProduct, info, in_dims, inputs)


class SampledProductGradient(torch.autograd.Function):
    """The gradients of table, weight and kernel, given that of the result; see `SampledProduct`."""

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def forward(table, base, weight, kernel, grad, row, groups, reference):
        (_, sections, rows, channels), (_, split, positions, taps) = table.shape, base.shape
        grad_table, grad_weight = torch.empty_like(table), weight.new_zeros(weight.shape)
        grad_kernel = torch.zeros_like(kernel)
        step = max(64, _numbers(SAMPLED, table) // max(1, taps * channels))
        for images in image_blocks(table, base):
            length = images.stop - images.start
            for s in range(sections):
                g, h = s * split // sections, s * groups // sections
                if s * split % sections == 0:  # the first section of its offset group
                    corners = corner_rows(base[images, g], row, rows)
                    weights = weight[images, g].reshape(-1, 4)
                    pixel_sum = PixelSum(corners, weights, length * rows)
                pixels = table[images, s].reshape(-1, channels)
                of_result = grad[images, h].transpose(1, 2).flatten(0, 1)
                for part in slices(len(of_result), step):
                    samples = slice(part.start * taps, part.stop * taps)
                    columns = sample(pixels, corners[samples], weights[samples])
                    columns = columns.view(-1, taps * channels)
                    grad_kernel[s].addmm_(columns.t(), of_result[part])
                    del columns
                by_sample = (of_result @ kernel[s].t()).view(-1, channels)
                del of_result
                products = corner_products(by_sample, pixels, corners)
                grad_weight[images, g] += products.view(length, positions, taps, 4)
                grad_table[images, s] = pixel_sum(by_sample).view(length, rows, channels)
                del by_sample, products
        return grad_table, grad_weight, grad_kernel

    @staticmethod
    def backward(ctx, *grads):
        table, base, weight, kernel, grad = ctx.saved_tensors

        def product(table, weight, kernel):
            return ctx.reference(table, base, weight, kernel, ctx.row, ctx.groups)

        def gradients(table, weight, kernel, grad):
            return torch.func.vjp(product, table, weight, kernel)[1](grad)

        second = torch.func.vjp(gradients, table, weight, kernel, grad)[1](grads)
        return second[0], None, *second[1:], None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(SampledProductGradient, info, in_dims, inputs)


# --- what the operator needs besides --------------------------------------------------------------
def is_autocast(kind: str) -> bool:
    """Whether autocast is on for a type of device; `meta` and others have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def full_precision(kind: str):
    """The context for what needs float32 whatever the autocast, on a type of device."""
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else contextlib.nullcontext()


def is_fast(dtype: torch.dtype) -> bool:
    """Whether `SampledProduct` takes a type; a compiler merges the readable version's parts."""
    return dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def output_size(input: Tensor, weight: Tensor, *place: tuple[int, int]) -> tuple[int, ...]:
    """The output's size (H', W') of a convolution with this stride, padding and dilation."""
    axes = zip(input.shape[2:], weight.shape[2:], *place)
    return tuple(accounting.output_size(*of_axis) for of_axis in axes)


def check_arguments(input, offset, weight, bias, stride, padding, dilation, mask):
    """Check the arguments of `deform_conv2d`.

    Returns:
        The output's size (H', W').

    Raises:
        ProjectError: names the argument that does not fit.
    """

    def refuse(text):
        raise ProjectError(f"deform_conv2d: {text}")

    named = dict(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    for name, x in named.items():
        wanted = 1 if name == "bias" else 4
        if x is not None and x.dim() != wanted:
            dimensions = f"{wanted} dimension{'s' if wanted > 1 else ''}"
            refuse(f"{name} has the shape {tuple(x.shape)}; it needs {dimensions}.")
        if x is not None and (
            x.device != input.device or x.dtype != input.dtype or not x.is_floating_point()
        ):
            kinds = f"input is {input.dtype} on {input.device}, {name} is {x.dtype} on {x.device}"
            refuse(f"{kinds}: give all tensors one floating-point type and one device.")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0),
                              ("dilation", dilation, 1)):  # fmt: skip
        if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
            refuse(f"{name} is {pair}; it needs one or two integers of at least {least}.")
    channels, (outputs, share, *kernel_size) = input.shape[1], weight.shape
    taps, shape = math.prod(kernel_size), tuple(offset.shape)
    if not weight.numel() or channels % share or outputs % (channels // share):
        refuse(f"a weight of shape {tuple(weight.shape)} does not fit {channels} input channels.")
    size = output_size(input, weight, stride, padding, dilation)
    groups, rest = divmod(offset.shape[1], 2 * taps)
    if rest or not groups or channels % groups or (shape[0], *shape[2:]) != (len(input), *size):
        needs = f"({len(input)}, 2 * {taps} * offset groups, {size[0]}, {size[1]})"
        refuse(f"offset has the shape {shape}; it needs {needs}, the offset groups dividing "
               f"{channels} channels.")  # fmt: skip
    if mask is not None and mask.shape != (len(input), groups * taps, *size):
        needs = f"with this offset it needs {(len(input), groups * taps, *size)}"
        refuse(f"mask has the shape {tuple(mask.shape)}; {needs}.")
    if bias is not None and len(bias) != outputs:
        refuse(f"bias has {len(bias)} entries for {outputs} output channels.")
    return size
