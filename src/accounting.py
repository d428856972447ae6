"""Output sizes, parameters, multiply-accumulates (MACs) and receptive fields of convolutional networks.

The network runs once on a zero image while every tensor operation is watched, so functional calls, branches, padding inside
a layer and modules of one's own count like the standard layers.

Receptive field along one axis (Araujo, Norris & Sim, "Computing Receptive Fields of Convolutional Neural Networks",
Distill 2019, doi:10.23915/distill.00021): ``size`` input pixels, ``jump`` input pixels between neighbouring outputs, and
``start``, the centre of the first output's field, in pixel indices (the first pixel's centre is 0, negative is padding).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from src import ProjectError


def output_size(n: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Number of positions of a window along an axis of ``n`` pixels, ``padding`` added on both sides.

    Raises:
        ProjectError: no window has these numbers, or it is larger than the padded axis.
    """
    if min(kernel, stride, dilation) < 1 or padding < 0:
        raise ProjectError(
            f"Kernel {kernel}, stride {stride} and dilation {dilation} must be >= 1, padding {padding} >= 0."
        )
    reach = dilation * (kernel - 1) + 1
    if n + 2 * padding < reach:
        raise ProjectError(
            f"A window of {reach} pixels does not fit {n} pixels with padding {padding}: use a larger image."
        )
    return (n + 2 * padding - reach) // stride + 1


@dataclass(frozen=True)
class Axis:
    """Receptive field along one axis, in input pixels; ``note`` says why where no fixed window describes it."""

    size: float = 1
    jump: float = 1
    start: float = 0.0
    note: str = ""

    def slide(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Axis:
        """The field after a sliding window; ``padding`` is what is added before the first pixel."""
        reach, step = dilation * (kernel - 1), self.jump
        after = Axis(
            self.size + reach * step, step * stride, self.start + (reach / 2 - padding) * step
        )
        return self if self.note else after

    def shift(self, positions: int, step: int = 1) -> Axis:
        """The field when the first ``positions`` are cut off (negative: padded) and every ``step``-th is kept."""
        return (
            self
            if self.note
            else replace(self, start=self.start + positions * self.jump, jump=self.jump * step)
        )

    def span(self, index: int = 0) -> tuple[float, float]:
        """First and last input pixel that output ``index`` sees (outside the image: padding)."""
        centre, half = self.start + index * self.jump, (self.size - 1) / 2
        return centre - half, centre + half

    def merge(self, other: Axis, where: str = "the merge") -> Axis:
        """Hull of the fields of two paths that meet (addition, concatenation).

        Raises:
            ProjectError: the paths are misaligned: their jumps differ, so no one window describes both.
        """
        if self.note or other.note:
            return next((axis for axis in (self, other) if not axis.known), WHOLE)
        if self.jump != other.jump:
            raise ProjectError(
                f"Misaligned paths meet in {where}: their jumps are {self.jump:g} and {other.jump:g} input "
                "pixels; make the strides along all paths equal."
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
    """Output size and field after each (kernel, stride, padding, dilation) of a chain, along an axis of ``n`` pixels."""
    steps, axis = [], Axis()
    for window in windows:
        n, axis = output_size(n, *window), axis.slide(*window)
        steps.append((n, axis))
    return steps


def regular_grid(module: nn.Module, seen: ReceptiveField) -> ReceptiveField:
    """Rule for a module that samples as a convolution of its kernel_size, stride, padding and dilation would.

    For a deformable convolution this is the field at zero offsets.
    """
    pairs = [
        torch.nn.modules.utils._pair(getattr(module, key))
        for key in ("kernel_size", "stride", "padding", "dilation")
    ]
    return ReceptiveField(*(axis.slide(*window) for axis, window in zip(seen, zip(*pairs))))


class _Map(NamedTuple):
    """What is known of a tensor: which dimensions are height and width (None: gone), and their fields."""

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


def _pointwise(inputs: list[tuple[Tensor, _Map]], out: Tensor, where: str) -> _Map:
    """Broadcasting counts dimensions from the right; one value spread over a map mixes positions."""

    def aligned(tensor, tag):
        lead = out.dim() - tensor.dim()
        return tag.each(
            lambda d, a: (
                (None, a)
                if d is None
                else (d + lead, WHOLE if tensor.shape[d] < out.shape[d + lead] and a.known else a)
            )
        )

    return _merge([aligned(*pair) for pair in inputs], where)


def _reshape(tag: _Map, old: Sequence[int], new: Sequence[int]) -> _Map:
    """Follows height and width through a view: a dimension survives if it keeps its extent and what stands before it."""

    def follow(dim, axis):
        if dim is None:
            return dim, axis
        for candidate, extent in enumerate(new):
            if (
                extent == old[dim]
                and math.prod(new[:candidate]) == math.prod(old[:dim])
                and (extent > 1 or len(new) == len(old))
            ):
                return candidate, axis
        return None, axis if old[dim] == 1 else WHOLE if new[0] == old[0] else _unknown("reshaped")

    return tag.each(follow)


_KEEP = {
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "expand",
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "copy_",
    "zeros_like",
    "empty_like",
}


def _follow(
    name: str, args: Sequence, inputs: list[tuple[Tensor, _Map]], out: Tensor, where: str
) -> _Map | None:
    """The map after the operation ``aten::name``; None where no rule is known."""
    tensor, tag = inputs[0]
    rank = tensor.dim()

    def arg(i, default=None):
        return args[i] if len(args) > i else default

    def window(
        *numbers,
    ):  # kernel, stride, padding, dilation; each for both axes or for height and width
        per_axis = [dict(zip(tag.dims, list(number) * (2 // len(number)))) for number in numbers]
        return tag.each(lambda d, a: (d, a.slide(*(number[d] for number in per_axis))))

    if name == "convolution" and not args[6]:
        return window(args[1].shape[2:], *args[3:6])
    if name.startswith("max_pool2d"):
        return window(args[1], arg(2) or args[1], arg(3, [0]), arg(4, [1]))
    if name == "avg_pool2d":
        return window(args[1], arg(2) or args[1], arg(3, [0]))
    if name in ("constant_pad_nd", "reflection_pad2d", "replication_pad2d"):
        before = {rank - 1 - i: pad for i, pad in enumerate(args[1][::2])}
        return tag.each(lambda d, a: (d, a.shift(-before.get(d, 0))))
    if name == "slice":
        dim, start = arg(1, 0) % rank, arg(2) or 0
        start = max(start + tensor.shape[dim] if start < 0 else start, 0)
        return tag.each(lambda d, a: (d, a.shift(start, arg(4, 1)) if d == dim else a))
    if name in ("mean", "sum", "amax", "amin"):
        gone = {d % rank for d in arg(1) or range(rank)}
        left = [d for d in range(rank) if d not in gone or arg(2, False)]
        return tag.each(
            lambda d, a: (
                left.index(d) if d in left else None,
                WHOLE if d in gone and tensor.shape[d] > 1 and a.known else a,
            )
        )
    if name in ("view", "_unsafe_view", "squeeze", "unsqueeze"):
        return _reshape(tag, tensor.shape, out.shape)
    if name in ("permute", "transpose"):
        swap = (
            {args[1] % rank: args[2] % rank, args[2] % rank: args[1] % rank}
            if name == "transpose"
            else {}
        )
        order = [swap.get(d, d) for d in range(rank)] if swap else [d % rank for d in args[1]]
        return tag.each(lambda d, a: (None if d is None else order.index(d), a))
    if name in ("cat", "stack"):
        dim, merged = arg(1, 0) % out.dim(), _merge([pair[1] for pair in inputs], where)
        if name == "cat":
            return None if dim in merged.dims else merged
        return merged.each(lambda d, a: (None if d is None else d + (dim <= d), a))
    if name in ("split", "split_with_sizes", "_softmax", "_log_softmax"):
        return None if arg(1 if "softmax" in name else 2, 0) % rank in tag.dims else tag
    if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):  # mixes positions unless none are left
        return tag if tag.dims == (None, None) else None
    return _merge([pair[1] for pair in inputs], where) if name in _KEEP else None


def _macs(name: str, args: Sequence, out: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products; everything else counts as none."""
    if name == "convolution":
        return (args[0] if args[6] else out).numel() * math.prod(args[1].shape[1:])
    if name in ("mm", "bmm", "mv", "linear"):
        return out.numel() * args[0].shape[-1]
    return out.numel() * args[1].shape[-1] if name in ("addmm", "baddbmm", "addmv") else 0


class _Watch(TorchDispatchMode):
    """Follows the maps through all operations and counts MACs; ``path`` is the stack of the modules that are running."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.path, self.macs = WeakTensorKeyDictionary(), ["the network"], Counter()

    def tagged(self, value) -> list[tuple[Tensor, _Map]]:
        return [
            (t, self.maps[t])
            for t in tree_leaves(value)
            if isinstance(t, Tensor) and t in self.maps
        ]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = self.tagged((args, kwargs))
        out = func(*args, **(kwargs or {}))
        name, tensors = (
            func._schema.name.removeprefix("aten::"),
            [t for t in tree_leaves(out) if isinstance(t, Tensor)],
        )
        if tensors:
            self.macs[self.path[-1]] += _macs(name, args, tensors[0])
        if tensors and inputs:
            follow = (
                _pointwise
                if torch.Tag.pointwise in func.tags
                else lambda *rest: _follow(name, args, *rest)
            )
            reason = "transposed convolution" if name == "convolution" else name.strip("_")
            unknown = _Map((None, None), (_unknown(reason),) * 2)
            tag = follow(inputs, tensors[0], self.path[-1]) or unknown
            for tensor in tensors:
                self.maps[tensor] = tag
                if (
                    func._schema.is_mutable and tensor._base is not None
                ):  # written in part: the whole is not followed
                    self.maps[tensor._base] = unknown
        return out


@dataclass
class Row:
    """One layer; ``output`` is its shape without the batch, None where the layer did not run."""

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
    """Accounts of one network for one input size; see :func:`summary`."""

    rows: list[Row]
    modules: dict[str, Row] = field(repr=False)
    parameters: int
    macs: int
    output: tuple[int, ...]
    output_field: ReceptiveField

    @property
    def receptive_field(self) -> ReceptiveField:
        """Field of the output; raises ProjectError where no rule gives it."""
        if not all(axis.known for axis in self.output_field):
            raise ProjectError(
                f"The receptive field is {self.output_field}: stop before that layer, or give a rule for it."
            )
        return self.output_field

    def to_markdown(self, max_rows: int = 40) -> str:
        """Table of the layers, grouped by module name so finely as ``max_rows`` allows, and a line of totals."""
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
            shown = (
                self.modules[name]
                if name in self.modules and self.modules[name].calls
                else rows[-1]
            )
            totals = f"{sum(row.parameters for row in rows):,} | {sum(row.macs for row in rows):,}"
            times = f" (called {shown.calls} times)" if shown.calls > 1 else ""
            lines.append(
                f"| `{name}`{times} | {shape(shown.output)} | {totals} | {shown.receptive_field or '–'} |"
            )
        total = f"| **total** | {shape(self.output)} | **{self.parameters:,}** | **{self.macs:,}** | {self.output_field} |"
        return "\n".join([*lines, total])


def summary(
    model: nn.Module | Sequence[nn.Module],
    input_size: Sequence[int] | Sequence[Sequence[int]],
    rules: dict[type, Callable[[nn.Module, ReceptiveField], ReceptiveField]] | None = None,
) -> Summary:
    """Accounts of ``model`` (or of a list of layers) for one image.

    Args:
        model: a network, or layers to run one after another; it is left as it was.
        input_size: (channels, height, width), or one such triple for each input of a network with several.
        rules: for modules whose sampling their operations do not show (deformable convolution, exchange of positions): module
            class -> function of the module and the field of its inputs that gives the field of its outputs.

    Returns:
        Summary: rows for the layers that hold parameters, cost MACs, or change shape or field, in order of running.
        Parameters count once, MACs (of convolutions and matrix products) at every call. The network is in evaluation mode,
        and a flattened map counts as read whole.

    Raises:
        ProjectError: the input does not fit the network, or misaligned paths meet.
    """
    model = model if isinstance(model, nn.Module) else nn.Sequential(*model)
    sizes = [input_size] if input_size and isinstance(input_size[0], int) else list(input_size)
    if not sizes or any(len(size) != 3 or min(size) < 1 for size in sizes):
        raise ProjectError(
            f"The input size is {input_size!r}: give (channels, height, width), all at least 1."
        )
    sample, watch, rules = next(model.parameters(), torch.zeros(())), _Watch(), rules or {}
    names, records, counted = {module: name for name, module in model.named_modules()}, {}, set()

    def record(module: nn.Module) -> Row:
        if module not in records:
            own = {
                id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in counted
            }
            counted.update(own)
            records[module] = Row(
                names[module] or type(model).__name__, type(module).__name__, sum(own.values())
            )
        return records[module]

    def enter(module, inputs):
        watch.path.append(record(module).name)

    def leave(module, inputs, out):
        row, before = record(module), watch.tagged(inputs)
        watch.path.pop()
        rule = next((rules[kind] for kind in type(module).__mro__ if kind in rules), None)
        if rule and before:
            seen = rule(module, ReceptiveField(*_merge([tag for _, tag in before], row.name).axes))
            for tensor in tree_leaves(out):
                watch.maps[tensor] = _Map((tensor.dim() - 2, tensor.dim() - 1), tuple(seen))
        row.calls += 1
        for tensor, tag in watch.tagged(out)[:1]:
            row.output, row.receptive_field = tuple(tensor.shape[1:]), ReceptiveField(*tag.axes)
            row.changes |= (
                not before or before[0][0].shape != tensor.shape or before[0][1].axes != tag.axes
            )

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    modes = {module: module.training for module in names}
    try:
        model.eval()
        images = [torch.zeros(1, *size, dtype=sample.dtype, device=sample.device) for size in sizes]
        watch.maps.update({image: _Map((2, 3), (Axis(), Axis())) for image in images})
        with torch.no_grad(), watch:
            result = watch.tagged(model(*images))
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, ProjectError):
            raise
        raise ProjectError(
            f"The network does not take an input of {' and '.join(str(tuple(size)) for size in sizes)} (in "
            f"{watch.path[-1]}): {str(error).splitlines()[0]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not result:
        raise ProjectError(
            "The network's output does not depend on its input: there is nothing to account for."
        )
    for module in names:  # parameters that no call reached belong to the table as well
        record(module).macs = watch.macs[record(module).name]
    rows = [
        row
        for module, row in records.items()
        if row.parameters or row.macs or row.changes and not any(module.children())
    ]
    tensor, tag = result[0]
    return Summary(
        rows,
        {row.name: row for row in records.values()},
        sum(p.numel() for p in model.parameters()),
        watch.macs.total(),
        tuple(tensor.shape[1:]),
        ReceptiveField(*tag.axes),
    )
