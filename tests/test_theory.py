"""Every number in theory/*.md against a value computed from PyTorch and the accounting, and proof that each digit is checked."""

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from latex2mathml.converter import convert
from torch import nn

from src import ROOT
from src.accounting import output_size, summary, walk

THEORY = ROOT / "theory"
sys.path.insert(0, str(THEORY))

# What is not a number of the argument: numbers of headings, citations, names, indices in formulas.
STRUCTURE = re.compile(
    r"""^\#+\ \d(\.\d[a-c]?)?
    | \]\([^)]*\) | `[^`]*`
    | \b(?:in|of|as)\ \d\.\d[a-c]?\b | (?:Question|Practical)\ \d
    | \b(?:Sec|Fig)\.\ \d(\.\d)? | \bEq\.\ \d(\ and\ \d)?
    | \b20[12]\d[ab]?\b | ResNet-50 | DenseNet-121 | float32
    | _\d | _\{\d(,\d)?\}""",
    re.X | re.M,
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@cache
def blanked(line: str) -> str:
    return STRUCTURE.sub(lambda match: " " * len(match[0]), line)


def check(text: str, expected: list[list]) -> list[str]:
    """Compares the numbers of the lines that hold any, in order, with what is expected; returns the disagreements."""
    lines = [
        (n, found)
        for n, line in enumerate(text.split("\n"), 1)
        if (found := NUMBER.findall(blanked(line)))
    ]
    wrong = [
        f"line {n}: {found} in the file, {list(map(str, row))} computed"
        for (n, found), row in zip(lines, expected)
        if found != list(map(str, row))
    ]
    if len(lines) != len(expected):
        wrong.append(f"{len(lines)} lines with numbers in the file, {len(expected)} computed")
    return wrong


def count(*layers: nn.Module) -> int:
    return sum(p.numel() for layer in layers for p in layer.parameters())


def conv(c_in: int, c_out: int, kernel: int, bias: bool = True) -> int:
    """Parameters of a real layer (meta device: no memory)."""
    return count(nn.Conv2d(c_in, c_out, kernel, bias=bias, device="meta"))


def positions(account) -> int:
    """Of the output map."""
    return account.output[1] * account.output[2]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}"


def gradient_span(layers: list[nn.Module], n: int, index: int) -> tuple[int, int]:
    """First and last pixel along an axis of ``n`` pixels that output ``index`` depends on, by the input's gradient."""
    x = torch.zeros(1, 1, n, n, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y)
    y[0, 0, y.shape[2] // 2, index].backward()
    seen = x.grad[0, 0].abs().sum(0).nonzero().flatten()
    return int(seen[0]), int(seen[-1])


def ones_conv(kernel: int, **options) -> nn.Conv2d:
    layer = nn.Conv2d(1, 1, kernel, bias=False, dtype=torch.float64, **options)
    nn.init.ones_(layer.weight)
    return layer


def expected_1() -> list[list]:
    side, classes = 10, 5
    size = (side, side)
    accounts = {}
    for channels in (1, 3):
        for bias in (True, False):
            full = summary(
                [nn.Flatten(), nn.Linear(channels * side * side, classes, bias=bias)],
                (channels, *size),
            )
            slid = summary([nn.Conv2d(channels, classes, side, bias=bias)], (channels, *size))
            assert (full.parameters, full.macs) == (slid.parameters, slid.macs)
            assert full.output == slid.output[:1]
            accounts[channels, bias] = slid
    grey, colour = accounts[1, True], accounts[3, True]
    bare = [accounts[channels, False].parameters for channels in (1, 3)]
    values = [channels * side * side for channels in (1, 3)]
    larger = summary([nn.Conv2d(1, classes, side)], (1, 12, 12))
    padded = summary([nn.Conv2d(1, classes, side, padding=1)], (1, *size))
    small = summary([nn.Conv2d(1, classes, 3)], (1, *size))
    hidden = small.output[0] * small.output[1] * small.output[2]
    pooled = summary(
        [nn.Conv2d(1, classes, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()], (1, *size)
    )
    read = summary(
        [nn.Conv2d(1, classes, 3), nn.ReLU(), nn.Flatten(), nn.Linear(hidden, classes)], (1, *size)
    )
    assert pooled.parameters == small.parameters and pooled.output == read.output == (classes,)
    saved = conv(1, classes, 3)
    return [
        [side, side, classes, classes, side, side],
        [grey.parameters],
        [1, 3],
        [1, classes],
        [side, classes],
        [1, grey.output[1], 1, grey.output[2], 0],
        [0, 0],
        [values[0], classes, classes, side, side],
        [1, 3],
        values,
        [classes, classes],
        [1, 1, *grey.output, *colour.output],
        bare,
        [grey.parameters - bare[0], colour.parameters - bare[1]],
        [1, grey.parameters, colour.parameters],
        bare,
        [grey.macs, colour.macs],
        [positions(grey)],
        [
            12,
            12,
            larger.parameters,
            *larger.output,
            positions(larger),
            values[0],
            12 * 12,
            count(nn.Linear(12 * 12, classes)),
        ],
        [grey.parameters, colour.parameters],
        [classes, 3, 3, saved, positions(small), classes],
        [positions(grey), grey.parameters, grey.macs],
        [classes, side, side, *grey.output, positions(grey), grey.parameters, grey.macs],
        [classes, side, side, 1, *padded.output, positions(padded), padded.parameters, padded.macs],
        [classes, 3, 3, *small.output, positions(small), pooled.parameters, pooled.macs],
        [classes, 3, 3, *small.output, positions(small), read.parameters, read.macs],
        [saved, 1, nn.Conv2d(1, 1, 3).weight.numel()],
        [hidden, count(nn.Linear(hidden, classes)), read.parameters, grey.parameters],
        [pooled.macs, grey.macs],
    ]


def expected_2() -> list[list]:
    n, kernel, filters, classes, colours, padding = 128, 5, 16, 10, 3, 2

    def network(bias: bool) -> list[nn.Module]:
        layers = []
        for channels in (colours, filters, filters):
            layers += [
                nn.Conv2d(channels, filters, kernel, padding=padding, bias=bias),
                nn.MaxPool2d(2),
                nn.ReLU(),
            ]
        return layers

    body, bare = summary(network(True), (colours, n, n)), summary(network(False), (colours, n, n))
    flat = body.output[0] * body.output[1] * body.output[2]
    head, bare_head = count(nn.Linear(flat, classes)), count(nn.Linear(flat, classes, bias=False))
    whole = summary([*network(True), nn.Flatten(), nn.Linear(flat, classes)], (colours, n, n))
    convs, pools = (
        [row for row in body.rows if row.kind == "Conv2d"],
        [row for row in body.rows if row.kind == "MaxPool2d"],
    )
    first = convs[0].output[0] * convs[0].output[1] * convs[0].output[2]
    weights = [row.parameters for row in bare.rows if row.kind == "Conv2d"]
    table = []
    for layer, (c, p, w) in enumerate(zip(convs, pools, weights), 1):
        table += [
            [layer, *c.output, w, c.parameters - w, c.parameters, c.macs],
            [layer, *p.output, p.parameters, p.parameters, p.parameters, p.macs],
        ]
    # receptive field: by the recurrences, and by the gradient of a network with the same windows
    windows = [(kernel, 1, padding), (2, 2, 0)] * 3
    steps = walk(windows, n)
    same = [ones_conv(kernel, padding=padding), nn.AvgPool2d(2)] * 3
    for depth, (size, axis) in enumerate(steps, 1):
        index = size // 2
        assert gradient_span(same[:depth], n, index) == axis.span(index)
        assert (
            axis.jump
            == gradient_span(same[:depth], n, index + 1)[0]
            - gradient_span(same[:depth], n, index)[0]
        )
    (_, before), (last, after) = steps[-2:]
    assert whole.rows[-3].receptive_field.height == after == body.receptive_field.width
    low, high = (int(edge) for edge in after.span(0))
    inside = [i for i in range(last) if after.span(i)[0] >= 0 and after.span(i)[1] < n]
    spans = [gradient_span(same, n, i) for i in range(last)]
    assert inside == [i for i, (a, b) in enumerate(spans) if b - a + 1 == after.size]
    recurrences, r, j, a = [], "1", "1", "0"
    for step, ((k, s, p), (_, axis)) in enumerate(zip(windows, steps)):
        new = [f"{axis.size:g}", f"{axis.jump:g}", f"{axis.start:g}"]
        recurrences.append(
            [
                step // 2 + 1,
                k,
                s,
                p,
                r,
                k - 1,
                j,
                new[0],
                j,
                s,
                new[1],
                a,
                f"{(k - 1) / 2:g}",
                p,
                j,
                new[2],
            ]
        )
        r, j, a = new
    sizes = [f"{axis.size:g}" for _, axis in steps]
    field, jump = sizes[-1], f"{after.jump:g}"
    unpooled = f"{walk([(kernel, 1, padding)] * 3, n)[-1][1].size:g}"
    per_filter = kernel * kernel * colours
    return [
        [n, n, colours, n, n],
        [2, 1],
        [2],
        [filters, kernel, kernel, padding, 1],
        [*convs[0].output, convs[0].parameters, weights[0]],
        [
            n,
            2,
            padding,
            kernel,
            1,
            1,
            n + 2 * padding - kernel,
            1,
            output_size(n, kernel, 1, padding),
        ],
        [
            kernel,
            2,
            colours,
            filters,
            filters,
            per_filter,
            filters,
            filters,
            per_filter * filters,
            filters,
            convs[0].parameters,
        ],
        [1, 1, 2, colours, first, filters],
        [filters, kernel, kernel, 1, padding, 2, 2, 2],
        [*body.output, body.parameters, bare.parameters],
        [
            n,
            2,
            2,
            1,
            *(row.output[1] for row in pools),
            filters,
            kernel,
            2,
            filters,
            filters,
            filters,
            convs[1].parameters,
        ],
        *table,
        [
            *body.output,
            bare.parameters,
            body.parameters - bare.parameters,
            body.parameters,
            body.macs,
        ],
        [2, 3, 2, convs[1].macs // convs[2].macs, (convs[1].output[1] // convs[2].output[1]) ** 2],
        [classes],
        [whole.parameters, body.parameters, head, flat, classes, bare.parameters + bare_head],
        [*body.output, flat],
        [flat, classes, classes, head],
        [body.parameters, head, whole.parameters],
        [bare.parameters, bare_head, bare.parameters + bare_head],
        [
            percent(head, whole.parameters),
            filters,
            classes,
            classes,
            count(nn.Linear(filters, classes)),
            body.parameters + count(nn.Linear(filters, classes)),
            first,
            count(nn.Linear(first, classes, device="meta")),
        ],
        [field, field, colours, f"{before.size:g}", f"{before.size:g}"],
        [0, 1, 1, 0],
        [1, 1, 2],
        [1, 1, 2],
        [1, 1, 0],
        *recurrences,
        sizes,
        [
            0,
            1,
            2,
            1,
            2,
            jump,
            -low,
            jump,
            high,
            0,
            -low,
            high,
            -low,
            field,
            inside[0],
            inside[-1],
            len(inside),
            last,
            len(inside) ** 2,
            last**2,
            field,
            field,
            colours,
            int(after.size) ** 2 * colours,
        ],
        [kernel, kernel, unpooled, unpooled, field, percent(after.size, n)],
    ]


def expected_3() -> list[list]:
    levels, bottom, n, colours, k3 = [64, 128, 256, 512], 1024, 256, 3, 3
    area = nn.Conv2d(1, 1, k3).weight.numel()
    first, second, third, fourth = levels
    halves, sides = [nn.MaxPool2d(2)] * 5, [n]
    sides += [summary(halves[:d], (1, n, n)).output[-1] for d in range(1, 6)]
    deepest = sides[4]
    per_position = int(summary(halves[:4], (1, n, n)).receptive_field.height.size)

    def shrunk(side):  # two unpadded convolutions
        return output_size(output_size(side, k3), k3)

    valid = [shrunk(n), shrunk(n) // 2, shrunk(shrunk(n) // 2), shrunk(shrunk(n) // 2) // 2]
    answer, bare = conv(first, second, k3), conv(first, second, k3, bias=False)
    listed = [
        (c, d, conv(c, d, k3, bias=False), d, conv(c, d, k3))
        for c, d in zip([colours, *levels], levels)
    ]
    totals = [sum(row[column] for row in listed) for column in (2, 3, 4)]

    start, growth, layers, side = 32, 24, 3, 32
    inputs = [start + growth * i for i in range(layers)]

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Conv2d(c, growth, k3, padding=1, bias=False) for c in inputs
            )

        def forward(self, x):
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x

    block = summary(Dense(), (start, side, side))
    out = block.output[0]
    dense = [row.parameters for row in block.rows]
    wide, narrow = conv(out, out, k3, bias=False), conv(start, start, k3, bias=False)

    def size_of(channels):
        return torch.zeros(channels, side, side).nbytes

    def bottleneck(channels):
        return conv(channels, 4 * growth, 1, bias=False) + conv(4 * growth, growth, k3, bias=False)

    def joined(channels):
        return torch.cat([torch.zeros(1, m, 1, 1) for m in (channels, first, second)], 1).shape[1]

    stored = [inputs[-1], sum(inputs), layers * out, layers * start]
    long = [start + growth * i for i in range(12)]
    resnet, densenet = (
        summary(build(weights=None), (3, 224, 224))
        for build in (torchvision.models.resnet50, torchvision.models.densenet121)
    )
    paths = [1]  # from each map to the block's output, from the last map backwards
    for _ in range(layers - 1):
        paths.append(1 + sum(paths))
    given = first + second
    return [
        [k3, k3, 2, 2, 2, *levels, bottom],
        [2, 2, k3, k3],
        [1, 1, first],
        [n, n, *levels, *sides[:4], bottom, deepest, deepest],
        [per_position, per_position, per_position**2],
        [
            area,
            2 * first,
            first,
            first,
            conv(2 * first, first, k3),
            area,
            first,
            first,
            first,
            conv(first, first, k3),
        ],
        [6, 6 * 6, per_position**2],
        [30],
        [n, n],
        [deepest, deepest, deepest**2],
        [n, 2],
        *([d, s, s * s] for d, s in enumerate(sides)),
        [
            bottom,
            bottom,
            deepest,
            deepest,
            bottom * deepest**2,
            n,
            n,
            n - valid[0],
            *valid[:2],
            valid[1],
            valid[1] - valid[2],
            *valid[2:],
        ],
        [2, n // deepest],
        [*levels, k3, k3],
        [answer, first, second, bare],
        [2],
        [area, first, second, second, bare, second, answer],
        [second, first],
        [first, second, answer, bare],
        [first, first, conv(first, first, k3), conv(first, first, k3, bias=False)],
        [
            first,
            second,
            second,
            answer + conv(second, second, k3),
            bare + conv(second, second, k3, bias=False),
        ],
        *listed,
        totals,
        [listed[2][2] // listed[1][2], percent(listed[3][4], totals[2])],
        [1, 1, 1],
        [1, 2, layers * (layers + 1) // 2, layers],
        [area, 2, k3, k3, area, 1],
        [1, 1, 2],
        [k3, k3, start, growth, side, side],
        [out, start],
        *([i, c, growth, w, wide, narrow] for i, (c, w) in enumerate(zip(inputs, dense), 1)),
        [out, sum(dense), layers * wide, layers * narrow],
        [start, layers - 1, growth, stored[0], size_of(stored[0])],
        [*inputs, stored[1], size_of(stored[1])],
        [out, layers, out, stored[2], size_of(stored[2])],
        [start, layers, start, stored[3], size_of(stored[3])],
        [out, f"{layers * wide / sum(dense):.1f}", start, start, len(long), sum(long), long[-1]],
        [
            224,
            224,
            resnet.parameters,
            resnet.macs,
            densenet.parameters,
            densenet.macs,
            percent(densenet.parameters, resnet.parameters),
            percent(densenet.macs, resnet.macs),
        ],
        [1, 1],
        [1, 2, 1],
        [1],
        [1, 1, 1, 1],
        [1, 1],
        [1],
        [1],
        [layers],
        [*paths, 2],
        [sum(dense), layers * wide, out],
        [
            1,
            1,
            4,
            k3,
            k3,
            4,
            4 * area,
            2,
            area,
            f"{4 * area / (area - 4):.1f}",
            growth,
            inputs[-1],
            bottleneck(inputs[-1]),
            dense[-1],
            512,
            bottleneck(512),
            conv(512, growth, k3, bias=False),
        ],
        [1, 1],
        [start, growth, *inputs, out],
        [first, second, third],
        [given, first, second, given],
        [first, second, given],
        [given, colours, joined(colours), first, joined(first), third, second],
        [given, k3, k3, third, area, given, third, conv(given, third, k3, bias=False)],
        [growth],
        [start, growth],
        [out, growth],
        [1],
        *(
            [i, start, i - 1, growth, c, growth, start, i, growth, c + growth]
            for i, c in enumerate(inputs, 1)
        ),
        [growth, start, out, layers, growth, layers * growth],
    ]


GRID = [
    (u, v) for v in (-1, 0, 1) for u in (-1, 0, 1)
]  # taps of a 3 × 3 filter row by row, x before y


def hat(a, b):
    """g(a, b) of Dai et al. 2017, Eq. 4."""
    return (1 - (a - b).abs()).clamp(min=0)


def sample(image, x, y):
    """Bilinear interpolation as the sum over all pixels (Eq. 3); positions count from the middle of the image."""
    row, column = (torch.arange(n, dtype=image.dtype) - n // 2 for n in image.shape)
    return (
        hat(row, torch.as_tensor(y, dtype=image.dtype))
        @ image
        @ hat(column, torch.as_tensor(x, dtype=image.dtype))
    )


def turned_by(degrees, scale=1):
    """The linear map A: scale times the rotation; y points downwards."""
    angle = torch.deg2rad(torch.tensor(float(degrees), dtype=torch.float64))
    return scale * torch.tensor(
        [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64
    )


def affine_offsets(a):
    """(A - I) p for the taps of the grid, (K, 2), x before y."""
    return torch.tensor(GRID, dtype=a.dtype) @ (a - torch.eye(2, dtype=a.dtype)).T


def response(image, weights, offsets):
    """The filter at the middle of the image, its taps moved by the offsets (Eq. 2)."""
    return sum(
        w * sample(image, u + dx, v + dy)
        for w, (u, v), (dx, dy) in zip(weights, GRID, offsets.tolist())
    )


def bars():
    """Weights of the filter for upright bars, and a long bar: upright, flat, diagonal (turned clockwise by 90 and 45 degrees)."""
    upright = torch.zeros(9, 9, dtype=torch.float64)
    upright[:, 4] = 1
    return (
        [2 if u == 0 else -1 for u, _ in GRID],
        upright,
        upright.rot90(),
        torch.eye(9, dtype=torch.float64).flip(1),
    )


def bar_table() -> list[list[int]]:
    """Rows of the worked example: tap, weight, upright and flat bar there, offset, sampled position, flat bar there."""
    weights, upright, flat, _ = bars()
    rows = []
    for weight, (u, v), (dx, dy) in zip(
        weights, GRID, affine_offsets(turned_by(90)).round().int().tolist()
    ):
        x, y = u + dx, v + dy
        rows.append(
            [
                u,
                v,
                weight,
                sample(upright, u, v),
                sample(flat, u, v),
                dx,
                dy,
                x,
                y,
                sample(flat, x, y),
            ]
        )
    return [[int(value) for value in row] for row in rows]


def deformable_field(bound: float, n: int = 31) -> int:
    """Side of the square of pixels that one output can depend on through offsets up to ``bound``, by the input's gradient."""
    values = torch.linspace(-bound, bound, 33, dtype=torch.float64)
    offsets = torch.zeros(len(values), 2 * len(GRID), n, n, dtype=torch.float64)
    offsets[:, 1::2] = values[:, None, None, None]
    x = torch.ones(1, 1, n, n, dtype=torch.float64, requires_grad=True)
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    y = torchvision.ops.deform_conv2d(x.expand(len(values), -1, -1, -1), offsets, kernel, padding=1)
    y[:, 0, n // 2, n // 2].sum().backward()
    seen = (x.grad[0, 0].abs().sum(0) > 1e-12).nonzero().flatten()
    return int(seen[-1] - seen[0] + 1)


def expected_4() -> list[list]:
    k, channels, side, groups = 3, 64, 16, 4
    taps = nn.Conv2d(1, 1, k).weight.numel()
    weights, upright, flat, diagonal = bars()
    table, turn = bar_table(), affine_offsets(turned_by(90))
    still = torch.zeros_like(turn)
    before, lost, restored = (
        f"{float(response(image, weights, offsets)):g}"
        for image, offsets in ((upright, still), (flat, still), (flat, turn))
    )
    middle = [abs(w) for w, (_, v) in zip(weights, GRID) if v == 0]  # what the flat bar lies under
    column = [w for w in weights if w > 0]
    between = response(diagonal, weights, affine_offsets(turned_by(45)))
    stretched = response(diagonal, weights, affine_offsets(turned_by(45, 2**0.5)))
    radius, angle = 40, 30
    start = torch.tensor([radius, 0], dtype=torch.float64)
    moved = (turned_by(angle) @ start - start).norm()
    corners = torch.tensor([[10, 20], [30, 60]], dtype=torch.float64)
    rho, beta = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 0.25)
    )
    pixel = torch.arange(2, dtype=torch.float64)
    value = hat(pixel, beta) @ corners @ hat(pixel, rho)
    slopes = torch.autograd.grad(value, (rho, beta))
    rho, beta, value = rho.item(), beta.item(), value.item()

    def layer(out):
        return summary([nn.Conv2d(channels, out, k, padding=1)], (channels, side, side))

    main, branches = layer(channels), [layer(2 * taps), layer(3 * taps)]
    spots = positions(main)
    parameters = [main.parameters, *(main.parameters + branch.parameters for branch in branches)]
    read = len(corners.flatten()) * channels * taps * spots
    macs = [main.macs, *(main.macs + branch.macs + read for branch in branches)]
    extra = [percent(total - main.macs, main.macs) for total in macs[1:]]
    wide = summary([nn.Conv2d(channels, 256, k, padding=1)], (channels, side, side)).macs
    fields = {d: int(walk([(k, 1, d, d)], side)[0][1].size) for d in (1, 2, 4)}
    bounded = {b: deformable_field(b) for b in (0.5, 1, 2, 4)}
    most = 4 * taps

    def stacked(field):
        return 1 + 3 * (field - 1)

    assert stacked(fields[1]) == walk([(k, 1, 1)] * 3, side)[-1][1].size
    return [
        [taps, k, k],
        [k, k, 1],
        [abs(part) for tap in GRID for part in tap],
        [0, 1],
        [0, 1],
        [0, 1],
        [len(corners.flatten()), 0, 1, 0],
        [k, k, 2],
        [2, 2, 3, 2],
        [2, 2, 4, 3, 2, 4],
        [1, 1],
        [1, 1],
        [1, 1],
        [turn.numel() // taps * 3, turn.numel()],
        [taps, 3, taps**3],
        [0],
        [1],
        [2, 2, 1, radius, angle, 2, radius, angle // 2, f"{moved:.1f}"],
        [max(weights), abs(min(weights)), 1, 0, 90],
        *([abs(value) for value in row] for row in table),
        [*column, before],
        [*middle, lost],
        [*column, restored],
        [lost, 0, 45, f"{between:.2f}", before, 2, f"{stretched:g}"],
        [2, 3, 2, 3],
        [0, f"{torch.zeros(()).sigmoid():g}"],
        [1, 0.1],
        [1, 1, 1, 1, 0, 1],
        [1],
        [1],
        [
            f"{float(number):g}"
            for number in (
                *corners.flatten(),
                rho,
                beta,
                value,
                1 - beta,
                corners[0, 1] - corners[0, 0],
                beta,
                corners[1, 1] - corners[1, 0],
                slopes[0],
                1 - rho,
                corners[1, 0] - corners[0, 0],
                rho,
                corners[1, 1] - corners[0, 1],
                slopes[1],
            )
        ],
        [k, k, channels, channels, side, side, spots, 1, 1, 4],
        [0, *(branch.output[0] for branch in branches)],
        [main.parameters] * 3,
        [0, *(branch.parameters for branch in branches)],
        parameters,
        [main.macs] * 3,
        [0, *(branch.macs for branch in branches)],
        [0, read, read],
        macs,
        [
            n
            for out in (main, *branches)
            for n in (taps, channels, out.output[0], out.output[0], out.parameters)
        ]
        + [n for out in (main, *branches) for n in (spots, taps, channels, out.output[0], out.macs)]
        + [spots, taps, channels, 4, read],
        [
            2,
            4,
            2 * taps + 4,
            channels,
            extra[0],
            3,
            4,
            3 * taps + 4,
            channels,
            extra[1],
            256,
            *(percent(branch.macs + read, wide) for branch in branches),
            groups,
            2 * taps * groups,
            layer(2 * taps * groups).parameters,
        ],
        [1, 1, 2, 1],
        [2, 1, 1, 1, 2, k, k, 1, fields[1], 2],
        [1, 1],
        [k, k],
        *([d, field, field, taps, field**2] for d, field in fields.items()),
        *(
            [b, field, field, min(most, field**2)] + [field**2] * (field**2 > most)
            for b, field in bounded.items()
        ),
        [most],
        [1, 1, 2, stacked(bounded[2]), stacked(bounded[2]), stacked(fields[1]), stacked(fields[1])],
    ]


FILES = {
    "1_fully_connected_vs_convolution.md": expected_1,
    "2_parameters_and_receptive_field.md": expected_2,
    "3_unet_and_densenet.md": expected_3,
    "4_deformable_convolution.md": expected_4,
}
# Numbers that the questions or the papers give, sizes of the examples, and the small constants of the formulas.
GIVEN = {
    "1_fully_connected_vs_convolution.md": {10, 12},
    "2_parameters_and_receptive_field.md": {10, 16, 128},
    "3_unet_and_densenet.md": {6, 12, 24, 30, 32, 64, 128, 224, 256, 512, 1024},
    "4_deformable_convolution.md": {0.1, 0.25, 0.5, 10, 16, 20, 30, 40, 45, 60, 64, 90, 256},
}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list]]:
    torch.set_num_threads(1)
    return {name: compute() for name, compute in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_number_is_what_pytorch_and_the_accounting_compute(name, expected):
    assert not check((THEORY / name).read_text(encoding="utf-8"), expected[name])


@pytest.mark.parametrize("name", FILES)
def test_every_changed_digit_is_noticed(name, expected):
    text = (THEORY / name).read_text(encoding="utf-8")
    numbers = NUMBER.finditer("\n".join(map(blanked, text.split("\n"))))
    digits = [i for match in numbers for i in range(*match.span()) if text[i].isdigit()]
    missed = [
        text[i - 20 : i + 5]
        for i in digits
        if not check(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :], expected[name])
    ]
    print(f"{name}: {len(digits)} digits changed one by one, {len(digits) - len(missed)} noticed")
    assert len(digits) > 100 and not missed


@pytest.mark.parametrize("name", FILES)
def test_no_derived_number_is_typed_into_this_test(name):
    allowed = GIVEN[name] | set(range(6))
    typed = {
        node.value
        for node in ast.walk(ast.parse(inspect.getsource(FILES[name])))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, (int, float))
        and not isinstance(node.value, bool)
    }
    assert typed <= allowed


def test_the_readme_types_no_derived_number():
    text = (THEORY / "README.md").read_text(encoding="utf-8")
    assert not NUMBER.findall(blanked(re.sub(r"\[\d_\w+\.md\]\([^)]*\)", "", text)))


@pytest.mark.parametrize("path", sorted(THEORY.glob("*.md")), ids=lambda path: path.name)
def test_links_and_figures_exist_and_have_alt_text(path):
    text = path.read_text(encoding="utf-8")
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
        assert len(alt) > 40 and target.endswith((".svg", ".png"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("name", FILES)
def test_every_formula_converts_to_mathml_without_leftovers(name):
    text = (THEORY / name).read_text(encoding="utf-8")
    formulas = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.S)
    assert text.count("$") % 2 == 0 and len(formulas) > 10
    for display, inline in formulas:
        mathml = convert(display or inline)
        shown = re.sub(r"<[^>]+>", "", mathml)
        assert "\\" not in shown and "merror" not in mathml, display or inline


@pytest.mark.parametrize(
    "name, parts",
    [
        ("1_fully_connected_vs_convolution.md", 3),
        ("2_parameters_and_receptive_field.md", 4),
        ("3_unet_and_densenet.md", 9),
        ("4_deformable_convolution.md", 4),
    ],
)
def test_every_part_has_answer_and_reason(name, parts):
    text = (THEORY / name).read_text(encoding="utf-8")
    sections = re.split(r"^#+ (?=\d\.\d)", text, flags=re.M)[1:]
    answered = [section for section in sections if "**Answer.**" in section]
    assert len(answered) == parts
    if parts > 3:
        assert all(
            section.count("\n> *") == 1 and "**Why it matters.**" in section for section in answered
        )


def test_both_layers_of_question_1_are_the_same_function_and_learn_alike():
    torch.manual_seed(0)
    for channels in (1, 3):
        full = nn.Linear(channels * 100, 5, dtype=torch.float64)
        slid = nn.Conv2d(channels, 5, 10, dtype=torch.float64)
        with torch.no_grad():
            slid.weight.copy_(full.weight.view(5, channels, 10, 10))
            slid.bias.copy_(full.bias)
        images, labels = (
            torch.randn(32, channels, 10, 10, dtype=torch.float64),
            torch.randint(5, (32,)),
        )
        optimisers = [torch.optim.Adam(layer.parameters(), 0.01) for layer in (full, slid)]
        for _ in range(5):
            scores = full(images.flatten(1)), slid(images).flatten(1)
            torch.testing.assert_close(*scores)
            for optimiser, score in zip(optimisers, scores):
                optimiser.zero_grad()
                nn.functional.cross_entropy(score, labels).backward()
                optimiser.step()
        torch.testing.assert_close(slid.weight.flatten(1), full.weight)
        with pytest.raises(RuntimeError):
            full(torch.zeros(1, channels * 144, dtype=torch.float64))


def test_without_a_nonlinearity_the_pooled_filter_sees_the_mean_patch_alone():
    torch.manual_seed(0)
    layer, images = (
        nn.Conv2d(1, 5, 3, dtype=torch.float64),
        torch.randn(4, 1, 10, 10, dtype=torch.float64),
    )
    patch = nn.functional.unfold(images, 3).mean(2)
    torch.testing.assert_close(
        layer(images).mean((2, 3)), patch @ layer.weight.flatten(1).T + layer.bias
    )


def test_the_dense_gradient_is_the_sum_over_all_paths():
    torch.manual_seed(0)
    a, b, c = (torch.randn(4, 4 * width, dtype=torch.float64) for width in (1, 2, 3))
    x0 = torch.randn(4, dtype=torch.float64)
    x1 = (a @ x0).requires_grad_()
    x2 = torch.tanh(b @ torch.cat([x0, x1]))
    x3 = torch.tanh(c @ torch.cat([x0, x1, x2]))
    e1, e2, e3 = torch.randn(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(e1 @ x1 + e2 @ x2 + e3 @ x3, x1)
    j21 = (1 - x2**2)[:, None] * b[:, 4:8]
    j31, j32 = ((1 - x3**2)[:, None] * c[:, part] for part in (slice(4, 8), slice(8, 12)))
    torch.testing.assert_close(gradient, e1 + j21.T @ e2 + j31.T @ e3 + j21.T @ j32.T @ e3)


def torchvision_offsets(offsets, n):
    """(K, 2), x before y, as torchvision takes them for every position of an n × n map: y before x."""
    return offsets.flip(1).flatten()[None, :, None, None].expand(1, -1, n, n)


def test_the_table_of_the_turned_bar_has_the_computed_signs():
    text = (THEORY / "4_deformable_convolution.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("\n") if re.match(r"\| \(−?\d, −?\d\) \|", line)]
    assert [
        [int(n) for n in re.findall(r"-?\d+", row.replace("−", "-"))] for row in rows
    ] == bar_table()
    assert all([-u - v, u - v] == [dx, dy] for u, v, *_, dx, dy, _, _, _ in bar_table())
    grid = re.search(r"\\lbrace (.+) \\rbrace", text)[1]
    assert [tuple(map(int, pair)) for pair in re.findall(r"\((-?\d),(-?\d)\)", grid)] == GRID


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_offsets_of_the_rotation_restore_any_response_exactly(quarters):
    torch.manual_seed(0)
    image, kernel = (
        torch.randn(1, 2, 9, 9, dtype=torch.float64),
        torch.randn(4, 2, 3, 3, dtype=torch.float64),
    )
    turned = image.rot90(
        -quarters, (2, 3)
    )  # clockwise: with y downwards, the positive direction of the angle
    offsets = torchvision_offsets(affine_offsets(turned_by(90 * quarters)), 9)
    plain, seen = (nn.functional.conv2d(x, kernel, padding=1) for x in (image, turned))
    restored = torchvision.ops.deform_conv2d(turned, offsets, kernel, padding=1)
    torch.testing.assert_close(
        restored[..., 1:-1, 1:-1], plain.rot90(-quarters, (2, 3))[..., 1:-1, 1:-1]
    )
    assert (seen - plain.rot90(-quarters, (2, 3))).abs()[..., 1:-1, 1:-1].mean() > 1


def test_the_closed_forms_of_the_offsets_and_the_claims_about_the_bar():
    torch.manual_seed(0)
    image, kernel = (
        torch.randn(1, 2, 13, 13, dtype=torch.float64),
        torch.randn(4, 2, 3, 3, dtype=torch.float64),
    )
    for x_scale, y_scale in ((2, 2), (4, 4), (3, 1)):
        offsets = affine_offsets(torch.diag(torch.tensor([x_scale, y_scale], dtype=torch.float64)))
        assert offsets.tolist() == [[(x_scale - 1) * u, (y_scale - 1) * v] for u, v in GRID]
        torch.testing.assert_close(
            torchvision.ops.deform_conv2d(
                image, torchvision_offsets(offsets, 13), kernel, padding=1
            ),
            nn.functional.conv2d(
                image, kernel, padding=(y_scale, x_scale), dilation=(y_scale, x_scale)
            ),
        )
    a = turned_by(33)
    for (u, v), offset in zip(GRID, affine_offsets(a)):
        cos, sin = a[0, 0], a[1, 0]
        torch.testing.assert_close(
            offset, torch.stack([(cos - 1) * u - v * sin, u * sin + (cos - 1) * v])
        )
    weights, upright, flat, diagonal = bars()
    kernel = torch.tensor(weights, dtype=torch.float64).view(1, 1, 3, 3)
    assert nn.functional.conv2d(flat[None, None], kernel).abs().max() == 0  # no position responds
    for degrees, image, scale in (
        (0, upright, 1),
        (90, flat, 1),
        (45, diagonal, 1),
        (45, diagonal, 2**0.5),
    ):
        offsets = affine_offsets(turned_by(degrees, scale))
        seen = torchvision.ops.deform_conv2d(
            image[None, None], torchvision_offsets(offsets, 9), kernel, padding=1
        )[0, 0, 4, 4]
        torch.testing.assert_close(seen, response(image, weights, offsets))


def test_the_derivatives_of_a_deformable_convolution_are_those_of_the_text():
    torch.manual_seed(0)
    image, kernel = (
        torch.randn(7, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(9, dtype=torch.float64),
    )
    offsets = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(9, dtype=torch.float64, requires_grad=True)
    given = dict(
        offset=torchvision_offsets(offsets, 7),
        mask=mask[None, :, None, None].expand(1, 9, 7, 7),
        padding=1,
    )
    y = torchvision.ops.deform_conv2d(image[None, None], weight=kernel.view(1, 1, 3, 3), **given)[
        0, 0, 3, 3
    ]
    by_offset, by_mask, by_image = torch.autograd.grad(y, (offsets, mask, image))
    with torch.no_grad():
        spread, q = torch.zeros_like(image), torch.arange(7, dtype=torch.float64) - 3
        for k, (u, v) in enumerate(GRID):
            (px, py), factor = torch.tensor([u, v]) + offsets[k], kernel[k] * mask[k]
            torch.testing.assert_close(by_mask[k], kernel[k] * sample(image, px, py))
            spread += factor * hat(q, py)[:, None] * hat(q, px)
            slope_x, slope_y = (
                (p < q) * (q < p + 1) * 1.0 - (p - 1 < q) * (q < p) * 1.0 for p in (px, py)
            )
            for direction, by_cases in enumerate(
                (hat(q, py) @ image @ slope_x.double(), slope_y.double() @ image @ hat(q, px))
            ):
                torch.testing.assert_close(by_offset[k, direction], factor * by_cases)
        torch.testing.assert_close(by_image, spread)


@pytest.mark.parametrize("bound", [0, 0.5, 1, 1.5, 2, 3.25, 4])
def test_the_field_of_bounded_offsets(bound):
    assert deformable_field(bound) == 3 + 2 * -int(-bound // 1)


def test_the_figures_show_the_computed_numbers_and_are_reproducible(tmp_path, monkeypatch):
    import make_figures

    def shown(name):
        with make_figures.plt.rc_context(make_figures.STYLE):
            fig = make_figures.FIGURES[name]()
        labels = [text.get_text() for text in fig.findobj(make_figures.matplotlib.text.Text)]
        make_figures.plt.close(fig)
        return labels

    fields = [f"{axis.size:g}" for _, axis in walk([(5, 1, 2), (2, 2)] * 3, 128)]
    assert [label for label in shown("2_receptive_field") if label.isdigit()][:6] == fields
    unet = "\n".join(shown("3_unet"))
    for channels, side in zip((64, 128, 256, 512, 1024), (256 // 2**d for d in range(5))):
        assert f"{channels} × {side} × {side}" in unet
    assert [label for label in shown("3_dense_block") if label.endswith("channels")] == [
        f"{32 + 24 * layer} channels" for layer in range(4)
    ]
    assert {"regular grid", "dilation 2", "free offsets"} <= set(shown("deformable_sampling"))
    make_figures.draw_all(tmp_path)
    assert sorted(path.name for path in THEORY.glob("figures/*")) == sorted(
        path.name for path in tmp_path.iterdir()
    )
    first = (tmp_path / "3_dense_block.svg").read_bytes()
    monkeypatch.setattr(make_figures, "FIGURES", {"3_dense_block": make_figures.dense_block})
    make_figures.draw_all(tmp_path)
    assert (tmp_path / "3_dense_block.svg").read_bytes() == first


def test_the_measured_claims_about_gradients_hold():
    """What the text says of the figure in words, from the stored measurement and from one fresh seed."""
    import make_figures

    from src.results import load_results

    torch.set_num_threads(1)
    metrics = load_results(ROOT / "reports" / "results" / "theory_gradients.json")["metrics"]
    stored = {
        (setting, kind): metrics[f"{setting}.{kind}.layer_01"]
        for setting in ("default", "batchnorm_he")
        for kind in ("plain", "residual", "dense")
    }
    assert stored["default", "plain"]["ci95"][1] < -6
    assert (
        abs(stored["default", "dense"]["value"]) < 0.3
        and stored["default", "residual"]["ci95"][0] > 0.5
    )
    assert stored["batchnorm_he", "plain"]["ci95"][0] > 1
    assert all(abs(stored["batchnorm_he", kind]["value"]) < 0.6 for kind in ("residual", "dense"))
    for (setting, kind), metric in stored.items():
        fresh = make_figures.gradient_profile(kind, setting == "batchnorm_he", seed=100)[0]
        low, high = metric["ci95"]
        assert abs(fresh - metric["value"]) < 6 * (
            high - low
        )  # a single seed scatters more than the mean of several


def test_a_missing_measurement_is_reported_in_one_line(tmp_path, monkeypatch):
    import make_figures

    from src import ProjectError

    monkeypatch.setattr(make_figures, "ROOT", Path(tmp_path))
    with pytest.raises(ProjectError, match="theory_gradients.json"):
        make_figures.gradients()
