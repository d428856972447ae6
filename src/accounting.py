"""Count parameters, multiply-accumulates (MACs), output sizes and receptive fields of a network.

The network runs once on a zero image while every tensor operation is watched, so functional calls,
branches, padding inside a layer and modules of one's own count like the standard layers.

Receptive field along one axis (recurrence: Dang Ha The Hien 2017, "A guide to receptive field
arithmetic for Convolutional Neural Networks"; branches: Araujo, Norris & Sim 2019, "Computing
Receptive Fields of Convolutional Neural Networks", doi:10.23915/distill.00021): `size` input
pixels, `jump` input pixels between neighbouring outputs, and `start`, the centre of the first
output's field, in pixel indices (the first pixel's centre is 0, negative is padding).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Private names of PyTorch, checked with every version that requirements.txt allows by the tests.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from src import ProjectError


def output_size(n: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Count the positions of a window along an axis of `n` pixels, with `padding` on both sides.

    Raises:
        ProjectError: No window has these numbers, or it is larger than the padded axis.
    """
    if min(kernel, stride, dilation) < 1 or padding < 0:
        raise ProjectError(
            f"Kernel {kernel}, stride {stride} and dilation {dilation} must be >= 1, "
            f"padding {padding} >= 0."
        )
    reach = dilation * (kernel - 1) + 1
    if n + 2 * padding < reach:
        raise ProjectError(
            f"A window of {reach} pixels does not fit {n} pixels with padding {padding}: "
            "use a larger image."
        )
    return (n + 2 * padding - reach) // stride + 1


@dataclass(frozen=True)
class Axis:
    """Receptive field along one axis, in input pixels; `note` says why no fixed window has it."""

    size: float = 1
    jump: float = 1
    start: float = 0.0
    note: str = ""

    def slide(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Axis:
        """Give the field after a sliding window; `padding` is added before the first pixel."""
        reach, step = dilation * (kernel - 1), self.jump
        after = Axis(
            self.size + reach * step, step * stride, self.start + (reach / 2 - padding) * step
        )
        return self if self.note else after

    def shift(self, positions: int, step: int = 1) -> Axis:
        """Give the field after cutting off `positions` (negative: padded), with stride `step`."""
        start, jump = self.start + positions * self.jump, self.jump * step
        return self if self.note else replace(self, start=start, jump=jump)

    def span(self, index: int = 0) -> tuple[float, float]:
        """Give the first and last input pixel that output `index` sees (outside: padding)."""
        centre, half = self.start + index * self.jump, (self.size - 1) / 2
        return centre - half, centre + half

    def merge(self, other: Axis, where: str = "the merge") -> Axis:
        """Give the hull of the fields of two paths that meet (addition, concatenation).

        Raises:
            ProjectError: The paths are misaligned: no one window describes both jumps.
        """
        if self.note or other.note:
            return next((axis for axis in (self, other) if not axis.known), WHOLE)
        if self.jump != other.jump:
            raise ProjectError(
                f"Misaligned paths meet in {where}: their jumps are {self.jump:g} and "
                f"{other.jump:g} input pixels; make the strides along all paths equal."
            )
        first, last = zip(self.span(), other.span())
        return Axis(max(last) - min(first) + 1, self.jump, (min(first) + max(last)) / 2)

    @property
    def known(self) -> bool:
        return not self.note or self is WHOLE

    def __str__(self) -> str:
        return self.note or f"{self.size:g}"


WHOLE = Axis(math.inf, math.nan, math.nan, "whole image")  # after global pooling or flattening


def _unknown(reason: str) -> Axis:
    return Axis(math.nan, math.nan, math.nan, f"unknown ({reason})")


class ReceptiveField(NamedTuple):
    """The fields along the image's two axes."""

    height: Axis = Axis()
    width: Axis = Axis()

    def __str__(self) -> str:
        return (
            str(self.height)
            if self.height.note and self.height == self.width
            else f"{self.height} × {self.width}"
        )


def walk(windows: Iterable[Sequence[int]], n: int) -> list[tuple[int, Axis]]:
    """Give output size and field after each (kernel, stride, padding, dilation) on `n` pixels."""
    steps, axis = [], Axis()
    for window in windows:
        n, axis = output_size(n, *window), axis.slide(*window)
        steps.append((n, axis))
    return steps


def regular_grid(module: nn.Module, seen: ReceptiveField) -> ReceptiveField:
    """Give the field after a module that samples as a convolution of its kernel and stride does.

    For a deformable convolution this is the field at zero offsets.
    """
    pairs = [
        torch.nn.modules.utils._pair(getattr(module, key))
        for key in ("kernel_size", "stride", "padding", "dilation")
    ]
    return ReceptiveField(*(axis.slide(*window) for axis, window in zip(seen, zip(*pairs))))


class _Map(NamedTuple):
    """What is known of a tensor: the dimensions of height and width (None: gone), their fields."""

    dims: tuple[int | None, int | None]
    axes: tuple[Axis, Axis]

    def each(self, change: Callable[[int | None, Axis], tuple[int | None, Axis]]) -> _Map:
        return _Map(*zip(*map(change, *self)))


def _merge(maps: Sequence[_Map], where: str) -> _Map:
    merged, *others = maps
    for other in others:
        merged = _Map(
            tuple(a if a is not None else b for a, b in zip(merged.dims, other.dims)),
            tuple(a.merge(b, where) for a, b in zip(merged.axes, other.axes)),
        )
    return merged


@dataclass
class _Operation:
    """One tensor operation while the network runs, as the rules see it."""

    args: Sequence
    inputs: list[tuple[Tensor, _Map]]  # those of its tensors that are followed
    out: Tensor
    where: str

    @property
    def tensor(self) -> Tensor:
        return self.inputs[0][0]

    @property
    def map(self) -> _Map:
        return self.inputs[0][1]

    @property
    def rank(self) -> int:
        return self.tensor.dim()

    def arg(self, i: int, default=None):
        return self.args[i] if len(self.args) > i else default

    def merged(self) -> _Map:
        return _merge([one for _, one in self.inputs], self.where)

    def window(self, *numbers: Sequence[int]) -> _Map:
        """Slide a window: kernel, stride, padding, dilation, each for both axes or for each."""
        per_axis = [dict(zip(self.map.dims, list(n) * (2 // len(n)))) for n in numbers]
        return self.map.each(lambda d, axis: (d, axis.slide(*(n[d] for n in per_axis))))


# Adding an operation is adding a function: it gives the map after the operation, or None where
# no fixed window describes it.
RULES: dict[str, Callable[[_Operation], _Map | None]] = {}


def _rule(*names: str):
    """Register the decorated function as the rule of these operations."""

    def register(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@_rule("convolution")
def _convolution(op):
    transposed = op.args[6]
    return None if transposed else op.window(op.args[1].shape[2:], *op.args[3:6])


@_rule("max_pool2d", "max_pool2d_with_indices")
def _max_pool(op):
    return op.window(op.args[1], op.arg(2) or op.args[1], op.arg(3, [0]), op.arg(4, [1]))


@_rule("avg_pool2d")
def _avg_pool(op):
    return op.window(op.args[1], op.arg(2) or op.args[1], op.arg(3, [0]))


@_rule("constant_pad_nd", "reflection_pad2d", "replication_pad2d")
def _pad(op):
    before = {op.rank - 1 - i: pad for i, pad in enumerate(op.args[1][::2])}
    return op.map.each(lambda d, axis: (d, axis.shift(-before.get(d, 0))))


@_rule("slice")
def _slice(op):
    dim, start = op.arg(1, 0) % op.rank, op.arg(2) or 0
    start = max(start + op.tensor.shape[dim] if start < 0 else start, 0)
    return op.map.each(lambda d, a: (d, a.shift(start, op.arg(4, 1)) if d == dim else a))


@_rule("mean", "sum", "amax", "amin")
def _reduce(op):
    gone = {d % op.rank for d in op.arg(1) or range(op.rank)}
    left = [d for d in range(op.rank) if d not in gone or op.arg(2, False)]

    def follow(d, axis):
        whole = d in gone and op.tensor.shape[d] > 1 and axis.known
        return left.index(d) if d in left else None, WHOLE if whole else axis

    return op.map.each(follow)


@_rule("view", "_unsafe_view", "squeeze", "unsqueeze")
def _reshape(op):
    """Follow a dimension that keeps its extent and what stands before it."""
    old, new = op.tensor.shape, op.out.shape

    def follow(d, axis):
        if d is None:
            return d, axis
        for candidate, extent in enumerate(new):
            same_place = math.prod(new[:candidate]) == math.prod(old[:d])
            if extent == old[d] and same_place and (extent > 1 or len(new) == len(old)):
                return candidate, axis
        return None, axis if old[d] == 1 else WHOLE if new[0] == old[0] else _unknown("reshaped")

    return op.map.each(follow)


@_rule("permute")
def _permute(op):
    order = [d % op.rank for d in op.args[1]]
    return op.map.each(lambda d, axis: (None if d is None else order.index(d), axis))


@_rule("transpose")
def _transpose(op):
    a, b = op.args[1] % op.rank, op.args[2] % op.rank
    return op.map.each(lambda d, axis: ({a: b, b: a}.get(d, d), axis))


@_rule("cat")
def _cat(op):
    merged = op.merged()
    return None if op.arg(1, 0) % op.out.dim() in merged.dims else merged


@_rule("stack")
def _stack(op):
    dim = op.arg(1, 0) % op.out.dim()
    return op.merged().each(lambda d, axis: (None if d is None else d + (dim <= d), axis))


@_rule("split", "split_with_sizes")
def _split(op):
    return None if op.arg(2, 0) % op.rank in op.map.dims else op.map


@_rule("_softmax", "_log_softmax")
def _softmax(op):
    return None if op.args[1] % op.rank in op.map.dims else op.map


@_rule("mm", "addmm", "bmm", "baddbmm", "linear")
def _product(op):
    """A product mixes positions, unless none are left."""
    return op.map if op.map.dims == (None, None) else None


@_rule("clone", "detach", "alias", "_to_copy", "expand", "copy_", "zeros_like", "empty_like")
@_rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _keep(op):
    return op.merged()


def _pointwise(op):
    """Broadcasting aligns dimensions from the right; a value spread over a map mixes positions."""

    def aligned(tensor, known):
        lead = op.out.dim() - tensor.dim()

        def follow(d, axis):
            if d is None:
                return None, axis
            spread = tensor.shape[d] < op.out.shape[d + lead] and axis.known
            return d + lead, WHOLE if spread else axis

        return known.each(follow)

    return _merge([aligned(*pair) for pair in op.inputs], op.where)


def _macs(func, args: Sequence, kwargs: dict, out: Tensor) -> int:
    """Multiply-accumulates: half of the operations that PyTorch counts, and matrix times vector."""
    operation = func._overloadpacket
    if operation in flop_registry:
        return flop_registry[operation](*args, **kwargs, out_val=out) // 2
    matrix = {torch.ops.aten.mv: 0, torch.ops.aten.addmv: 1, torch.ops.aten.linear: 0}
    if operation in matrix:
        return out.numel() * args[matrix[operation]].shape[-1]
    return 0


@dataclass
class Row:
    """One layer; `output` is its shape without the batch, None where the layer did not run."""

    name: str
    kind: str
    parameters: int
    output: tuple[int, ...] | None = None
    macs: int = 0
    calls: int = 0
    receptive_field: ReceptiveField | None = None
    changes: bool = False  # the shape or the field


@dataclass
class Summary:
    """Accounts of one network for one input size; see `summary`."""

    rows: list[Row]
    modules: dict[str, Row] = field(repr=False)
    parameters: int
    macs: int
    output: tuple[int, ...]
    output_field: ReceptiveField

    @property
    def receptive_field(self) -> ReceptiveField:
        """The field of the output.

        Raises:
            ProjectError: No rule gives it.
        """
        if not all(axis.known for axis in self.output_field):
            raise ProjectError(
                f"The receptive field is {self.output_field}: stop before that layer, or give a "
                "rule for it."
            )
        return self.output_field

    def to_markdown(self, max_rows: int = 40) -> str:
        """Tabulate layers, grouped by module name as finely as `max_rows` allows, with totals."""
        for depth in range(max((row.name.count(".") for row in self.rows), default=0) + 1, 0, -1):
            groups: dict[str, list[Row]] = {}
            for row in self.rows:
                groups.setdefault(".".join(row.name.split(".")[:depth]), []).append(row)
            if len(groups) <= max_rows:
                break

        def shape(size):
            return " × ".join(map(str, size)) if size is not None else "not run"

        lines = [
            "| layer | output | parameters | MACs | receptive field |",
            "|---|---|--:|--:|---|",
        ]
        for name, rows in groups.items():
            own = self.modules.get(name)
            shown = own if own and own.calls else rows[-1]
            times = f" (called {shown.calls} times)" if shown.calls > 1 else ""
            parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
            lines.append(
                f"| `{name}`{times} | {shape(shown.output)} | {parameters:,} | {macs:,} "
                f"| {shown.receptive_field or '–'} |"
            )
        return "\n".join(lines) + (
            f"\n| **total** | {shape(self.output)} | **{self.parameters:,}** | **{self.macs:,}** "
            f"| {self.output_field} |"
        )


class _Watch(TorchDispatchMode):
    """Follow the maps through all operations, count MACs, and keep a row for each module."""

    def __init__(self, model: nn.Module, rules: dict) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.rules, self.maps = rules, WeakTensorKeyDictionary()
        self.path, self.macs = ["the network"], Counter()  # the modules that are running
        self.records: dict[nn.Module, Row] = {}
        self.counted: set[int] = set()  # parameters, by identity: tied ones count once

    def followed(self, value) -> list[tuple[Tensor, _Map]]:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return [(tensor, self.maps[tensor]) for tensor in tensors if tensor in self.maps]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs, out = self.followed((args, kwargs)), func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            return out
        self.macs[self.path[-1]] += _macs(func, args, kwargs, tensors[0])
        if inputs:
            name = func._schema.name.removeprefix("aten::")
            rule = _pointwise if torch.Tag.pointwise in func.tags else RULES.get(name)
            known = rule and rule(_Operation(args, inputs, tensors[0], self.path[-1]))
            reason = "transposed convolution" if name == "convolution" else name.strip("_")
            unknown = _Map((None, None), (_unknown(reason),) * 2)
            for tensor in tensors:
                self.maps[tensor] = known or unknown
                if func._schema.is_mutable and tensor._base is not None:
                    self.maps[tensor._base] = unknown  # written in part: not followed
        return out

    def record(self, module: nn.Module) -> Row:
        if module not in self.records:
            sizes = {id(p): p.numel() for p in module.parameters(recurse=False)}
            new = sum(size for key, size in sizes.items() if key not in self.counted)
            self.counted.update(sizes)
            kind = type(module).__name__
            self.records[module] = Row(self.names[module] or kind, kind, new)
        return self.records[module]

    def enter(self, module: nn.Module, inputs) -> None:
        self.path.append(self.record(module).name)

    def leave(self, module: nn.Module, inputs, out) -> None:
        row, before = self.record(module), self.followed(inputs)
        self.path.pop()
        rule = next((self.rules[kind] for kind in type(module).__mro__ if kind in self.rules), None)
        if rule and before:
            axes = _merge([known for _, known in before], row.name).axes
            seen = tuple(rule(module, ReceptiveField(*axes)))
            for tensor in tree_leaves(out):
                self.maps[tensor] = _Map((tensor.dim() - 2, tensor.dim() - 1), seen)
        row.calls += 1
        for tensor, known in self.followed(out)[:1]:
            row.output, row.receptive_field = tuple(tensor.shape[1:]), ReceptiveField(*known.axes)
            row.changes |= (
                not before or before[0][0].shape != tensor.shape or before[0][1].axes != known.axes
            )

    def run(self, model: nn.Module, sizes: Sequence[Sequence[int]]) -> list[tuple[Tensor, _Map]]:
        """Run the network once on zeros, in evaluation mode; give the outputs that are followed."""
        sample = next(model.parameters(), torch.zeros(()))
        images = [torch.zeros(1, *size, dtype=sample.dtype, device=sample.device) for size in sizes]
        self.maps.update({image: _Map((2, 3), (Axis(), Axis())) for image in images})
        handles = [module.register_forward_pre_hook(self.enter) for module in self.names]
        handles += [module.register_forward_hook(self.leave) for module in self.names]
        modes = {module: module.training for module in self.names}
        try:
            model.eval()
            with torch.no_grad(), self:
                return self.followed(model(*images))
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes.items():
                module.training = training


def summary(
    model: nn.Module | Sequence[nn.Module],
    input_size: Sequence[int] | Sequence[Sequence[int]],
    rules: dict[type, Callable[[nn.Module, ReceptiveField], ReceptiveField]] | None = None,
) -> Summary:
    """Account for `model` (or a list of layers) on one image.

    Args:
        model: A network, or layers to run one after another; it is left as it was.
        input_size: (channels, height, width), or one such triple for each of several inputs.
        rules: For modules whose sampling their operations do not show (deformable convolution,
            exchange of positions): module class -> function of the module and the field of its
            inputs that gives the field of its outputs.

    Returns:
        Rows for the layers that hold parameters, cost MACs, or change shape or field, in order of
        running. Parameters count once, MACs (of convolutions and matrix products) at every call.
        The network is in evaluation mode, and a flattened map counts as read whole.

    Raises:
        ProjectError: The input does not fit the network, or misaligned paths meet.
    """
    model = model if isinstance(model, nn.Module) else nn.Sequential(*model)
    sizes = [input_size] if input_size and isinstance(input_size[0], int) else list(input_size)
    if not sizes or any(len(size) != 3 or min(size) < 1 for size in sizes):
        raise ProjectError(
            f"The input size is {input_size!r}: give (channels, height, width), all at least 1."
        )
    watch = _Watch(model, rules or {})
    try:
        result = watch.run(model, sizes)
    except ProjectError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ProjectError(
            f"The network does not take an input of {' and '.join(str(tuple(s)) for s in sizes)} "
            f"(in {watch.path[-1]}): {str(error).splitlines()[0]}"
        ) from error
    if not result:
        raise ProjectError(
            "The network's output does not depend on its input: there is nothing to account for."
        )
    for module in watch.names:  # parameters that no call reached belong to the table as well
        watch.record(module).macs = watch.macs[watch.record(module).name]
    rows = [
        row
        for module, row in watch.records.items()
        if row.parameters or row.macs or row.changes and not any(module.children())
    ]
    tensor, known = result[0]
    return Summary(
        rows,
        {row.name: row for row in watch.records.values()},
        sum(p.numel() for p in model.parameters()),
        watch.macs.total(),
        tuple(tensor.shape[1:]),
        ReceptiveField(*known.axes),
    )
