"""Hold every number in theory/*.md against a computed one, and show that each digit is checked."""

import ast
import inspect
import json
import re
import shutil
import subprocess
from functools import cache

import pytest
import torch
import torchvision
from latex2mathml.converter import convert
from torch import nn

from src import ROOT, ProjectError
from src.accounting import output_size, summary, walk
from src.results import load_results
from theory import make_figures
from tools.html import browser, theory_to_html

THEORY = ROOT / "theory"
QUESTIONS = (
    "1.1 2.1 2.2 2.3 2.4 3.1a 3.1b 3.1c 3.2a 3.2b 3.3a 3.3b 3.4a 3.4b 4.1 4.2 4.3 4.4".split()
)

# What is not a number of the argument: targets of links, code, tags, years, indices in formulas.
STRUCTURE = re.compile(
    r"""\]\([^)]*\) | `[^`]*` | </?[a-z][^>]*> | \b20[012]\d[ab]?\b | _\d | _\{\d(,\d)?\}
    | ^\#+\ (?:Question\ \d | \d\.\d[a-c]?)""",
    re.X | re.M,
)
NUMBER = re.compile(r"\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+(?:\.\d+)?")
MARKUP = "|>#*-! [$–"


@cache
def blanked(line: str) -> str:
    return STRUCTURE.sub(lambda match: " " * len(match[0]), line)


@cache
def numbers(line: str) -> list[str]:
    """Read the numbers of a line; Persian digits as Latin ones, without the grouping commas."""
    read = []
    for token in NUMBER.findall(blanked(line)):
        plain = re.sub(r",|\{,\}", "", token)
        if "." not in plain:
            plain = str(int(plain))
            grouped = f"{int(plain):,}" if int(plain) > 9999 else plain
            if token.isascii() and token.replace("{,}", ",") != grouped:
                plain = f"{token} (grouped: {grouped})"
        read.append(plain)
    return read


def without_code(text: str) -> str:
    """Blank the blocks of code, which a test runs, keeping every place."""
    block = re.compile(r"^```python\n.+?^```$", re.M | re.S)
    return block.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def sections(text: str) -> dict[str, list[str]]:
    """Split at the headings: {number of the heading ("" before the first): lines}."""
    parts, section = {"": []}, ""
    for line in text.split("\n"):
        if heading := re.match(r"#+ (\d\.\d[a-c]?)\b", line):
            section = heading[1]
        parts.setdefault(section, []).append(line)
    return parts


def check(text: str, expected: dict[str, list[tuple]]) -> list[str]:
    """Compare the numbers of each line with those computed for it; give the disagreements.

    A line belongs to the first entry of its section that begins with the same words.
    """
    wrong = []
    parts = sections(text).items()
    found = {name: lines for name, lines in parts if any(map(numbers, lines))}
    for section in found.keys() | expected.keys():
        waiting = list(expected.get(section, []))
        for line in filter(numbers, found.get(section, [])):
            begin = line.lstrip(MARKUP)
            entry = next((entry for entry in waiting if begin.startswith(entry[0])), None)
            if entry is None:
                wrong.append(f"{section}: nothing is computed for {begin[:40]!r}")
                continue
            waiting.remove(entry)
            computed = list(map(str, entry[1]))
            if computed != numbers(line):
                wrong.append(f"{section}, {begin[:40]!r}: {numbers(line)}, computed {computed}")
        wrong += [f"{section}: no line begins with {entry[0]!r}" for entry in waiting]
    return wrong


def cite(places: str) -> list[str]:
    """Give the numbers of places in papers or in the theory, and of names that hold some."""
    return NUMBER.findall(places)


# What papers say in numbers, in the units of the text.
QUOTED = {
    "DenseNet-BC, millions": 0.8,
    "ResNet-1001, millions": 10.2,
    "DenseNet-201, millions": 20,
    "ResNet-101, millions": 40,
    "images of U-Net's training": 30,
    "learning rate of the branch, Dai": 1,
    "learning rate of the branch, Zhu": 0.1,
}


def count(*layers: nn.Module) -> int:
    return sum(p.numel() for layer in layers for p in layer.parameters())


def conv(c_in: int, c_out: int, kernel: int, bias: bool = True) -> int:
    """Count the parameters of a real layer (meta device: no memory)."""
    return count(nn.Conv2d(c_in, c_out, kernel, bias=bias, device="meta"))


def positions(account) -> int:
    """Count those of the output map."""
    return account.output[1] * account.output[2]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}"


def gradient_span(layers: list[nn.Module], n: int, index: int) -> tuple[int, int]:
    """Give the first and last of `n` pixels that output `index` depends on, by the gradient."""
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


def expected_0() -> dict[str, list[tuple]]:
    """The first page repeats the answers of the parts."""
    two, three = expected_2(), expected_3()

    def answer(part, section):
        return next(row for anchor, row in part[section] if anchor.startswith("Answer"))

    fc = expected_1()["1.1"]
    grey = next(row for anchor, row in fc if anchor.startswith("Answer"))
    return {
        "": [
            ("یادگیری", [1401]),
            ("Deep Learning", [1401, 3]),
            ("1.1]", [*cite("1.1"), *grey]),
            ("2.1]", [*cite("2.1"), *answer(two, "2.1")[:4]]),
            ("2.2]", [*cite("2.2"), *answer(two, "2.2")[:4]]),
            ("2.3]", [*cite("2.3"), answer(two, "2.3")[0]]),
            ("2.4]", [*cite("2.4"), *answer(two, "2.4")[:2], *answer(two, "2.4")[3:]]),
            *((f"3.1{part}]", cite("3.1")) for part in "abc"),
            ("3.2a]", [*cite("3.2"), *answer(three, "3.2a")]),
            ("3.2b]", [*cite("3.2"), answer(three, "3.2b")[0]]),
            *((f"3.3{part}]", cite("3.3")) for part in "ab"),
            ("3.4a]", [*cite("3.4"), answer(three, "3.4a")[0]]),
            ("3.4b]", [*cite("3.4"), *answer(three, "3.4b")]),
            *((f"P2 {part}]", [2]) for part in "abcd"),
        ]
    }


def expected_1() -> dict[str, list[tuple]]:
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
    bordered = sum(
        gradient_span([ones_conv(side, padding=1)], side, i) != (0, side - 1) for i in range(3)
    )
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
    larger_full = count(nn.Linear(12 * 12, classes))
    bias = [account.parameters - n for account, n in zip((grey, colour), bare)]
    inner = positions(padded) - (3 - bordered) ** 2
    return {
        "1.1": [
            ("یک مسئله", [classes, *size]),
            ("یک لایه کانولوشن", [classes, *size]),
            ("Images of", [*size, classes, classes, *size]),
            ("Answer", [grey.parameters]),
            ("Readings", [1, 3, 1, classes, *cite("1.2")]),
            ("Working", [side, classes]),
            ("A filter of", [1, grey.output[1], 1, grey.output[2], 0]),
            ("A linear classifier", cite("CS231n")),
            ("Above", [values[0], classes, classes, *size]),
            ("Figure", cite("T1")),
            ("formula", [1, 3]),
            ("input values", values),
            ("output of (a)", [classes, classes]),
            ("output of (b)", [1, 1, *grey.output, *colour.output]),
            ("weights of each", bare),
            ("biases of each", bias),
            ("parameters of each", [1, grey.parameters, colour.parameters]),
            ("multiply-accumulates", [grey.macs, colour.macs]),
            ("Forgetting the channels", [values[1], values[0]]),
        ],
        "1.2": [
            ("Answer", size),
            (
                "Larger images",
                [12, 12, larger.parameters, *larger.output, positions(larger), values[0], 12 * 12]
                + [larger_full, *cite("Sec. 3.1")],
            ),
            (
                "Padding 1",
                [1, *size, *padded.output, padded.parameters, positions(padded), inner, classes],
            ),
            ("Colour", [grey.parameters, colour.parameters]),
        ],
        "1.3": [
            ("Answer", [classes, 3, 3, saved, positions(small), classes]),
            ("fully connected |", [positions(grey), grey.parameters, grey.macs]),
            (
                "5 filters 10 × 10 |",
                [classes, *size, *grey.output, positions(grey), grey.parameters, grey.macs],
            ),
            (
                "5 filters 10 × 10, padding",
                [classes, *size, 1, *padded.output, positions(padded), padded.parameters]
                + [padded.macs],
            ),
            *(
                (
                    f"5 filters 3 × 3, ReLU, {name}",
                    [classes, 3, 3, *small.output, positions(small), net.parameters, net.macs],
                )
                for name, net in (("mean", pooled), ("fully", read))
            ),
            ("With the **mean", [saved, 1, nn.Conv2d(1, 1, 3).weight.numel()]),
            (
                "With a **fully",
                [hidden, count(nn.Linear(hidden, classes)), read.parameters, grey.parameters],
            ),
            ("The price", [pooled.macs, grey.macs]),
            ("Why it matters", cite("Question 2")),
        ],
    }


def expected_2() -> dict[str, list[tuple]]:
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
    convs = [row for row in body.rows if row.kind == "Conv2d"]
    pools = [row for row in body.rows if row.kind == "MaxPool2d"]
    early = convs[-1].output[0] * convs[-1].output[1] * convs[-1].output[2]  # before the last pool
    first = convs[0].output[0] * convs[0].output[1] * convs[0].output[2]
    weights = [row.parameters for row in bare.rows if row.kind == "Conv2d"]
    per_filter = kernel * kernel * colours
    table = []
    for layer, (c, p, w) in enumerate(zip(convs, pools, weights), 1):
        biases = c.parameters - w
        table += [
            (f"{layer} | convolution", [layer, *c.output, w, biases, c.parameters]),
            (f"{layer} | max", [layer, *p.output, *[p.parameters] * 3]),
        ]
    # receptive field: by the recurrences, and by the gradient of a network with the same windows
    windows = [(kernel, 1, padding), (2, 2, 0)] * 3
    steps = walk(windows, n)
    same = [ones_conv(kernel, padding=padding), nn.AvgPool2d(2)] * 3
    for depth, (size, axis) in enumerate(steps, 1):
        spans = [gradient_span(same[:depth], n, size // 2 + i) for i in (0, 1)]
        assert spans[0] == axis.span(size // 2)
        assert axis.jump == spans[1][0] - spans[0][0]
    (_, before), (last, after) = steps[-2:]
    assert whole.rows[-3].receptive_field.height == after == body.receptive_field.width
    low, high = (int(edge) for edge in after.span(0))
    inside = [i for i in range(last) if after.span(i)[0] >= 0 and after.span(i)[1] < n]
    spans = [gradient_span(same, n, i) for i in range(last)]
    assert inside == [i for i, (a, b) in enumerate(spans) if b - a + 1 == after.size]
    sizes, jumps, starts = (
        [f"{getattr(axis, key):g}" for _, axis in steps] for key in ("size", "jump", "start")
    )
    closed, recurrences, r, j, a = [1], [], "1", "1", "0"
    names = [f"{part} {layer}" for layer in (1, 2, 3) for part in ("convolution", "max pooling")]
    for name, (k, s, p), *new in zip(names, windows, sizes, jumps, starts):
        closed += [k - 1, j]
        row = [*cite(name), k, s, p, r, k - 1, j, new[0], j, s, new[1]]
        recurrences.append((name, row + [a, f"{(k - 1) / 2:g}", p, j, new[2]]))
        r, j, a = new
    field, jump = sizes[-1], jumps[-1]
    assert int(field) == 1 + sum(k * int(j) for k, j in zip(closed[1::2], closed[2::2]))
    unpooled = f"{walk([(kernel, 1, padding)] * 3, n)[-1][1].size:g}"
    no_strides = [1, *[kernel - 1, 1] * 3]
    spread = [kernel, kernel]
    seeds = len(make_figures.FIELD_SEEDS)
    by_hand = n + 2 * padding - kernel
    return {
        "": [("The input", [colours, n, n]), ("n' =", [2, 1]), ("N =", [2])],
        "2.1": [
            ("فرض", [n, n, filters, *spread, padding, 1]),
            ("Colour images", [n, n, filters, *spread, padding, 1]),
            ("Answer", [*convs[0].output, convs[0].parameters, weights[0]]),
            (
                "n' =",
                [n, 2, padding, kernel, 1, 1, by_hand, 1, output_size(n, kernel, 1, padding)],
            ),
            (
                "N =",
                [kernel, 2, colours, filters, filters]
                + [per_filter * filters, filters, convs[0].parameters],
            ),
            (
                "Forgetting the 3",
                [colours, kernel, 2, filters, filters, conv(1, filters, kernel)],
            ),
            ("Forgetting the padding", [n, kernel, 1, output_size(n, kernel)]),
            ("One bias", [first, filters]),
            ("Why it matters", [1, 1, 2]),
        ],
        "2.2": [
            ("فرض", [3, filters, *spread, 1, padding, 2, 2, 2, 3, 3]),
            ("Each layer", [filters, *spread, 1, padding, 2, 2, 2]),
            ("Answer", [*body.output, body.parameters, bare.parameters]),
            (
                "Working",
                [n, 2, 2, 1, *(row.output[1] for row in pools), filters, kernel, 2, filters]
                + [filters, filters, convs[1].parameters],
            ),
            *table,
            (
                "three layers",
                [*body.output, bare.parameters, body.parameters - bare.parameters]
                + [body.parameters],
            ),
            (
                "Counting every",
                [3, convs[0].parameters, 3 * convs[0].parameters, filters, colours],
            ),
            ("Letting", [padding]),
            (
                "Why it matters",
                [2, 3, 2, convs[1].macs, 3, convs[2].macs, 1, convs[0].macs],
            ),
        ],
        "2.3": [
            ("فرض", [classes]),
            ("The goal", [classes]),
            (
                "Answer",
                [whole.parameters, body.parameters, head, flat, classes]
                + [bare.parameters + bare_head],
            ),
            ("Working", cite("2.4")),
            ("16 \\cdot", [*body.output, flat]),
            ("4096 \\cdot", [flat, classes, classes, head]),
            ("14{,}048", [body.parameters, head, whole.parameters]),
            ("Softmax", [bare.parameters, bare_head, bare.parameters + bare_head]),
            ("Flattening", [early, count(nn.Linear(early, classes))]),
            ("Forgetting", [classes, whole.parameters - classes]),
            (
                "Why it matters",
                [percent(head, whole.parameters), filters, classes, classes]
                + [count(nn.Linear(filters, classes))]
                + [body.parameters + count(nn.Linear(filters, classes))],
            ),
        ],
        "2.4": [
            ("Answer", [field, field, colours, f"{before.size:g}", f"{before.size:g}"]),
            ("Working", [1]),
            ("r = 1 + \\sum", [1, 1]),
            ("r = 1 + 4", [*closed, field]),
            ("Layer by layer", [0, 0, 1, 1, 0]),
            ("r' =", [1]),
            ("a' =", [1, 2]),
            ("input", [1, 1, 0]),
            *recurrences,
            ("The field of", sizes),
            ("Figure", cite("T2")),
            (
                "Where it lies",
                [0, 1, 2, 1, 2, jump, -low, jump, high, 0, -low, high, -low, field]
                + [inside[0], inside[-1], len(inside), last, len(inside) ** 2, last**2]
                + [field, field, colours, int(after.size) ** 2 * colours],
            ),
            ("A drawn photo", [n, n, field, field, -low]),
            ("Figure", [*cite("T3"), n, n, seeds, *cite("2.2")]),
            ("Stopping", [f"{before.size:g}", sizes[3]]),
            (
                "Adding kernel",
                [*no_strides, sum(no_strides), 1, 3, kernel - 1, unpooled],
            ),
            ("Taking the jump", [jump]),
            ("<summary>", cite("2.1 to 2.4")),
            (
                "Why it matters",
                [unpooled, unpooled, field, percent(after.size, n), *cite("Sec. 1 and 2")],
            ),
        ],
    }


def expected_3() -> dict[str, list[tuple]]:
    levels, bottom, n, colours, k3 = [64, 128, 256, 512], 1024, 256, 3, 3
    area = nn.Conv2d(1, 1, k3).weight.numel()
    first, second, third, fourth = levels
    halves, sides = [nn.MaxPool2d(2)] * 5, [n]
    sides += [summary(halves[:d], (1, n, n)).output[-1] for d in range(1, 6)]
    deepest = sides[4]
    per_position = int(summary(halves[:4], (1, n, n)).receptive_field.height.size)

    def shrunk(side):  # two unpadded convolutions
        return output_size(output_size(side, k3), k3)

    one = shrunk(n)
    two = shrunk(one // 2)
    odd = shrunk(two // 2)  # what the third pooling meets
    lowest = shrunk(shrunk(odd // 2) // 2)
    met = 2 * shrunk(2 * lowest)  # by the skip of the third level
    assert one % 2 == two % 2 == 0 and odd % 2 and (odd - met) % 2
    unpadded = [n, n, n - one, one, one // 2, one // 2, one // 2 - two, two]
    unpadded += [two // 2, two // 2, two // 2 - odd, odd, odd, met]
    answer, bare = conv(first, second, k3), conv(first, second, k3, bias=False)

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

    def kibibytes(channels):
        return torch.zeros(channels, side, side).nbytes // 1024

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
    stack = make_figures.Stack("dense", False)
    depth, seeds = len(stack.layers), len(make_figures.SEEDS)
    narrowest, grown = stack.layers[0][0].in_channels, stack.layers[0][0].out_channels
    widest, classes = stack.layers[-1][0].in_channels, stack.head.out_features
    assert make_figures.Stack("plain", False).layers[0][0].out_channels == narrowest

    def bottleneck(channels, k):
        return conv(channels, 4 * k, 1, bias=False) + conv(4 * k, k, k3, bias=False)

    assert bottleneck(8 * growth, growth) < conv(8 * growth, growth, k3, bias=False)
    assert bottleneck(7 * growth, growth) > conv(7 * growth, growth, k3, bias=False)
    assert bottleneck(500, growth) == 4 * 500 * growth + 4 * area * growth**2

    def rounded(value):
        return f"{value:.3g}"

    quoted = {key: f"{value:g}" for key, value in QUOTED.items()}
    figure_3, figure_4 = cite("Sec. 4.4, Fig. 3"), cite("Sec. 5, Fig. 4")
    return {
        "3.1a": [
            ("Answer", cite("Sec. 1")),
            ("Working", cite("Sec. 2, Fig. 1")),
            ("Contracting", [k3, k3, 2, 2, 2, *levels, bottom]),
            ("Expanding", [2, 2, k3, k3]),
            ("Output", [1, 1, first, *cite("Sec. 1, Fig. 2")]),
            ("U-Net with", [n, n, *levels, *sides[:4], bottom, deepest, deepest, 1, 1]),
            ("Figure", [*cite("T4"), n, n]),
        ],
        "3.1b": [
            ("Information", [per_position, per_position, per_position**2, *cite("Sec. 1")]),
            (
                "Concatenation",
                [area, 2 * first, first, first, conv(2 * first, first, k3)]
                + [area, first, first, first, conv(first, first, k3)],
            ),
            ("Cropping", cite("Sec. 2, 3.2")),
        ],
        "3.1c": [
            ("Small structures", [6, 6 * 6, per_position**2]),
            ("Outlines", cite("Sec. 3, Eq. 2")),
            ("Few images", [quoted["images of U-Net's training"], *cite("Sec. 4, Sec. 3.1")]),
        ],
        "3.2a": [
            ("تصور", [n, n]),
            ("Input", [n, n]),
            ("Answer", [deepest, deepest, deepest**2]),
            ("Working", [n, 2, *cite("Sec. 2, Fig. 1")]),
            *((f"{d}", [d, s, s * s]) for d, s in enumerate(sides)),
            (
                "With the paper's",
                [bottom, bottom, deepest, deepest, bottom * deepest**2]
                + [*unpadded, *cite("Sec. 2")],
            ),
            ("Stopping", [sides[3], sides[3], sides[3] ** 2]),
            ("Giving", [deepest, deepest**2]),
            ("Why it matters", [2, n // deepest]),
        ],
        "3.2b": [
            ("در U-Net", [*levels, k3, k3]),
            ("The encoder", [*levels, k3, k3]),
            ("Answer", [answer, first, second, bare]),
            ("Working", [2]),
            ("N =", [area, first, second, second, bare, second, answer]),
            ("Reading", [second, first]),
            ("taken", [first, second, answer, bare]),
            (
                "second convolution",
                [first, first, conv(first, first, k3), conv(first, first, k3, bias=False)],
            ),
            (
                "whole second",
                [first, second, second, answer + conv(second, second, k3)]
                + [bare + conv(second, second, k3, bias=False)],
            ),
            ("Forgetting", [area, second, second, conv(1, second, k3)]),
            (
                "Taking the image",
                [colours, area, colours, second, second, conv(colours, second, k3)],
            ),
            ("Adding one", [second]),
            ("Why it matters", [conv(second, third, k3, bias=False) // bare]),
        ],
        "3.3a": [
            ("Working", cite("Sec. 3, Eq. 1 and 2, Eq. 1")),
            ("\\mathrm{ResNet:}", [1, 1]),
            ("\\mathrm{DenseNet:}", [1]),
            ("Figure", cite("T5")),
            ("connections", [1, 2, layers * (layers + 1) // 2, layers]),
            ("weights of a", [k3, k3, area, 2, area, 1]),
            ("memory in", [1]),
            ("<summary>", cite("3.4")),
            ("Three layers", [k3, k3, start, growth, side, side]),
            ("layer", [out, start]),
            *(
                (f"{i} |", [i, c, growth, w, wide, narrow])
                for i, (c, w) in enumerate(zip(inputs, dense), 1)
            ),
            ("sum", [out, sum(dense), layers * wide, layers * narrow]),
            (
                "To output",
                [out, f"{layers * wide / sum(dense):.1f}", out, *cite("ResNet-50"), area, 2]
                + [start, start],
            ),
            ("inputs stored", cite("float32")),
            ("dense, each map", [start, layers - 1, growth, stored[0], kibibytes(stored[0])]),
            ("dense, each concatenated", [*inputs, stored[1], kibibytes(stored[1])]),
            ("residual, width 104", [out, layers, out, stored[2], kibibytes(stored[2])]),
            ("residual, width 32", [start, layers, start, stored[3], kibibytes(stored[3])]),
            ("The copies", [1, 2, len(long), sum(long), long[-1]]),
            (
                "On images",
                [224, 224, *cite("ResNet-50"), rounded(resnet.parameters / 1e6)]
                + [rounded(resnet.macs / 1e9), *cite("DenseNet-121")]
                + [rounded(densenet.parameters / 1e6), rounded(densenet.macs / 1e9)]
                + [percent(densenet.parameters, resnet.parameters)]
                + [percent(densenet.macs, resnet.macs)],
            ),
        ],
        "3.3b": [
            ("Answer", [*figure_4, *figure_3]),
            ("Plain stack", [1, 1]),
            ("g_l = J", [1, 2]),
            ("\\lVert", [1]),
            ("If the norms", [1]),
            ("Residual stack", [1, 1, 1, 1]),
            ("g_l = \\left", [1, 1]),
            ("(He et al.", cite("Eq. 5")),
            ("Dense block", [1]),
            ("g_l = e_l", [1]),
            ("For $L", [layers]),
            ("that is", [*paths, 2, *cite("Sec. 5")]),
            (
                "Measured",
                [*cite("T6"), depth, k3, k3, narrowest, narrowest, grown, widest, 16]
                + [narrowest, 12, 12, classes, seeds],
            ),
            ("Norm of", [depth]),
            ("Figure", [*cite("T6"), *cite("95 %"), seeds]),
            (
                "DenseNet-BC",
                [quoted["DenseNet-BC, millions"], *cite("ResNet-1001")]
                + [quoted["ResNet-1001, millions"], *cite("CIFAR-10"), *figure_4],
            ),
            (
                "DenseNet-201",
                [*cite("DenseNet-201"), quoted["DenseNet-201, millions"], *cite("ResNet-101")]
                + [quoted["ResNet-101, millions"], *figure_3],
            ),
            ("one that", [*cite("ResNet-50 ResNet-101"), *figure_3]),
            (
                "Bottleneck",
                [*cite("Sec. 3"), 1, 1, 4, k3, k3, 4, 4 * area, 2, area]
                + [f"{4 * area / (area - 4):.1f}"],
            ),
            ("Compression", [*cite("Sec. 3"), 1, 1, 2, 2]),
            ("Less overfitting", cite("Sec. 4.3")),
        ],
        "3.4": [
            ("Dense block", [start, growth, *inputs, out]),
            ("Figure", [*cite("T7, 3.4"), growth]),
        ],
        "3.4a": [
            ("در یک DenseNet", [first, second, third]),
            ("A dense block", [first, second, third]),
            ("Answer", [given, first, second, given]),
            ("C_{", [first, second, given]),
            (
                "Reading",
                [*cite("Sec. 3, Eq. 2"), given, colours, joined(colours), first, joined(first)],
            ),
            ("Counting", [first, second, third, given + third, third]),
            ("Passing", [second]),
            (
                "Why it matters",
                [given, k3, k3, third, area, given, third, conv(given, third, k3, bias=False)],
            ),
        ],
        "3.4b": [
            ("3.4b", [growth]),
            ("با در نظر", [start, growth]),
            ("Growth rate", [start, growth]),
            ("Answer", [out, growth]),
            ("Working", [1, *cite("Sec. 3")]),
            *(
                (
                    f"{i} |",
                    [i, start, i - 1, growth, c, growth, start, i, growth, c + growth],
                )
                for i, c in enumerate(inputs, 1)
            ),
            ("Reading", [growth, start, out]),
            ("Giving", [inputs[-1], layers, layers - 1]),
            ("Forgetting", [layers, growth, layers * growth]),
            ("<summary>", cite("3.2 and 3.4")),
        ],
    }


# Taps of a 3 × 3 filter row by row, x before y.
GRID = [(u, v) for v in (-1, 0, 1) for u in (-1, 0, 1)]


def hat(a, b):
    """Give g(a, b) of Dai et al. 2017, Eq. 4."""
    return (1 - (a - b).abs()).clamp(min=0)


def sample(image, x, y):
    """Interpolate as the sum over all pixels (Eq. 3); positions count from the image's middle."""
    row, column = (torch.arange(n, dtype=image.dtype) - n // 2 for n in image.shape)
    return (
        hat(row, torch.as_tensor(y, dtype=image.dtype))
        @ image
        @ hat(column, torch.as_tensor(x, dtype=image.dtype))
    )


def turned_by(degrees, scale=1):
    """Give the linear map A: scale times the rotation; y points downwards."""
    angle = torch.deg2rad(torch.tensor(float(degrees), dtype=torch.float64))
    return scale * torch.tensor(
        [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64
    )


def affine_offsets(a):
    """Give (A - I) p for the taps of the grid, (K, 2), x before y."""
    return torch.tensor(GRID, dtype=a.dtype) @ (a - torch.eye(2, dtype=a.dtype)).T


def response(image, weights, offsets):
    """Apply the filter at the image's middle, its taps moved by the offsets (Eq. 2)."""
    return sum(
        w * sample(image, u + dx, v + dy)
        for w, (u, v), (dx, dy) in zip(weights, GRID, offsets.tolist())
    )


def bars():
    """Give the filter for upright bars, and a long bar: upright, turned by 90 and by 45 degrees."""
    upright = torch.zeros(9, 9, dtype=torch.float64)
    upright[:, 4] = 1
    return (
        [2 if u == 0 else -1 for u, _ in GRID],
        upright,
        upright.rot90(),
        torch.eye(9, dtype=torch.float64).flip(1),
    )


def deformable_field(bound: float, n: int = 31) -> int:
    """Give the side of the square that offsets up to `bound` can reach, by the input's gradient."""
    values = torch.linspace(-bound, bound, 33, dtype=torch.float64)
    offsets = torch.zeros(len(values), 2 * len(GRID), n, n, dtype=torch.float64)
    offsets[:, 1::2] = values[:, None, None, None]
    x = torch.ones(1, 1, n, n, dtype=torch.float64, requires_grad=True)
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    y = torchvision.ops.deform_conv2d(x.expand(len(values), -1, -1, -1), offsets, kernel, padding=1)
    y[:, 0, n // 2, n // 2].sum().backward()
    seen = (x.grad[0, 0].abs().sum(0) > 1e-12).nonzero().flatten()
    return int(seen[-1] - seen[0] + 1)


def expected_4() -> dict[str, list[tuple]]:
    k, channels, side, groups = 3, 64, 16, 4
    taps = nn.Conv2d(1, 1, k).weight.numel()
    weights, upright, flat, diagonal = bars()
    turn = affine_offsets(turned_by(90))
    still = torch.zeros_like(turn)
    before, lost, restored = (
        f"{float(response(image, weights, offsets)):g}"
        for image, offsets in ((upright, still), (flat, still), (flat, turn))
    )
    row = [abs(w) for w, (_, v) in zip(weights, GRID) if v == 0]  # what the flat bar lies under
    column = [w for w in weights if w > 0]
    between = response(diagonal, weights, affine_offsets(turned_by(45)))
    stretched = response(diagonal, weights, affine_offsets(turned_by(45, 2**0.5)))
    tap = (0, -1)
    offset = [int(part) for part in turn[GRID.index(tap)].round()]
    sampled = [part + moved for part, moved in zip(tap, offset)]
    radius, angle = 40, 30
    start = torch.tensor([radius, 0], dtype=torch.float64)
    moved = (turned_by(angle) @ start - start).norm()
    corners = torch.tensor([[10, 20], [30, 60]], dtype=torch.float64)
    rho, tau = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 0.25)
    )
    pixel = torch.arange(2, dtype=torch.float64)
    value = hat(pixel, tau) @ corners @ hat(pixel, rho)
    slopes = torch.autograd.grad(value, (rho, tau))
    rho, tau, value = rho.item(), tau.item(), value.item()
    example = [*corners.flatten(), rho, tau, value]
    example += [1 - tau, corners[0, 1] - corners[0, 0], tau, corners[1, 1] - corners[1, 0]]
    example += [slopes[0], 1 - rho, corners[1, 0] - corners[0, 0]]
    example += [rho, corners[1, 1] - corners[0, 1], slopes[1]]

    def layer(out):
        return summary([nn.Conv2d(channels, out, k, padding=1)], (channels, side, side))

    main, branches = layer(channels), [layer(2 * taps), layer(3 * taps)]
    spots = positions(main)
    parameters = [main.parameters, *(main.parameters + branch.parameters for branch in branches)]
    corner_count = len(corners.flatten())
    read = corner_count * channels * taps * spots
    macs = [main.macs, *(main.macs + branch.macs + read for branch in branches)]
    extra = [percent(total - main.macs, main.macs) for total in macs[1:]]
    wide = summary([nn.Conv2d(channels, 256, k, padding=1)], (channels, side, side)).macs
    fields = {d: int(walk([(k, 1, d, d)], side)[0][1].size) for d in (1, 2, 4)}
    bounded = {b: deformable_field(b) for b in (0.5, 1, 2, 4)}
    most = 4 * taps

    def stacked(field):
        return 1 + 3 * (field - 1)

    assert stacked(fields[1]) == walk([(k, 1, 1)] * 3, side)[-1][1].size
    small = max(weights), abs(min(weights))
    return {
        "": [("Deformable", cite("Practical 2")), ("Papers", [taps, k, k])],
        "4.1": [
            ("Working", [k, k, 1]),
            ("\\mathcal{R}", [abs(part) for pair in GRID for part in pair]),
            ("The ordinary", cite("Eq. 1")),
            ("The deformable", [*cite("Eq. 2"), 0, 1, *cite("Eq. 1")]),
            ("With all", [0, 1, *cite("Eq. 3 and 4")]),
            ("G(q, p)", [0, 1]),
            ("At most", [corner_count, 0, 1, 0]),
            ("Sampling", [k, k, 2]),
            ("Figure", [*cite("T8"), 2]),
            ("weights, $C$", [2, 2, 3, 2]),
            ("multiply-accumulates", [2, 2, 4, 3, 2, 4]),
            ("Why it matters", cite("Sec. 2.3, 4.4")),
        ],
        "4.2": [
            ("Answer", cite("Fig. 1")),
            *((name, [1, 1]) for name in ("dilation", "aspect", "rotation")),
            ("More than affine", [turn.numel() // taps * 3, turn.numel()]),
            ("Different", cite("Sec. 4.2, Table 2")),
            ("Stacking", [*cite("Sec. 3, Fig. 5"), taps, 3, taps**3, *cite("Fig. 6")]),
            ("Modulation", [0, *cite("Sec. 3.2")]),
        ],
        "4.3": [
            ("Equivariance", [1]),
            ("One field", cite("Sec. 1")),
            (
                "Pooling",
                [2, 2, 1, radius, angle, 2, radius, angle // 2, f"{moved:.1f}"],
            ),
            ("The usual", cite("Sec. 1")),
            (
                "Worked",
                [*small, 1, 0, 90, *map(abs, tap), *offset, *sampled],
            ),
            ("Three panels", [k, k, small[0], *row, small[0]]),
            ("Figure", [*cite("T9"), *column, before, *row, lost, *column, restored]),
            (
                "The plain",
                [lost, 0, 45, f"{between:.2f}", before, 2, f"{stretched:g}"],
            ),
        ],
        "4.4": [
            ("The input map", [k, k, 2]),
            ("Figure", cite("T10, Fig. 2")),
            ("Channels", [2, *cite("Sec. 2.1"), 3, *cite("Sec. 3.2"), 2, 3]),
            ("Start", [0, f"{torch.zeros(()).sigmoid():g}"]),
            (
                "Learning rate",
                [QUOTED["learning rate of the branch, Dai"], *cite("Sec. 2.3")]
                + [QUOTED["learning rate of the branch, Zhu"], *cite("Sec. 3.2")],
            ),
            ("Gradient", cite("Eq. 7")),
            ("\\frac{\\partial x(p)}", [1]),
            ("\\frac{\\partial x(p)}", [1]),
            ("with $g'", [1, 1, 1, 1, 0, 1]),
            ("an offset", [f"{float(number):g}" for number in example]),
            ("3 × 3", [k, k, channels, channels, side, side, spots, 1, 1, corner_count]),
            ("branch channels", [0, *(branch.output[0] for branch in branches)]),
            ("parameters, main", [main.parameters] * 3),
            ("parameters, branch", [0, *(branch.parameters for branch in branches)]),
            ("parameters**", parameters),
            ("multiply-accumulates, main", [main.macs] * 3),
            ("multiply-accumulates, branch", [0, *(branch.macs for branch in branches)]),
            ("sampling", [0, read, read]),
            ("multiply-accumulates**", macs),
            (
                "Relative",
                [2, 4, 2 * taps + 4, channels, extra[0], 3, 4, 3 * taps + 4, channels, extra[1]]
                + [256, *(percent(branch.macs + read, wide) for branch in branches)]
                + [groups, 2 * taps * groups, layer(2 * taps * groups).parameters],
            ),
            ("K$ channels", [2]),
        ],
        "4.5": [
            ("Answer", [k, k, fields[1], 2, most]),
            ("A sample", [1, 1, 2, 1]),
            ("r =", [2, 1, 1, 1, 2]),
            ("The branch's", [1, 1]),
            ("one layer", [k, k]),
            *(
                (f"ordinary, dilation {d}", [d, field, field, taps, field**2])
                for d, field in fields.items()
            ),
            *(
                (
                    f"deformable, offsets up to {b} |",
                    [b, field, field, min(most, field**2)] + [field**2] * (field**2 > most),
                )
                for b, field in bounded.items()
            ),
            ("deformable, free", [most]),
            (
                "(The last",
                [1, 1, 2, *[stacked(bounded[2])] * 2, *[stacked(fields[1])] * 2],
            ),
        ],
    }


FILES = {
    "0_answers.md": expected_0,
    "1_fully_connected_vs_convolution.md": expected_1,
    "2_parameters_and_receptive_field.md": expected_2,
    "3_unet_and_densenet.md": expected_3,
    "4_deformable_convolution.md": expected_4,
}
# Numbers that the questions give, sizes of the examples, and the small constants of the formulas.
GIVEN = {
    "0_answers.md": {1401},
    "1_fully_connected_vs_convolution.md": {10, 12},
    "2_parameters_and_receptive_field.md": {10, 16, 128},
    "3_unet_and_densenet.md": {6, 7, 8, 12, 16, 24, 32, 64, 128, 224, 256, 500, 512, 1024}
    | {1e6, 1e9},
    "4_deformable_convolution.md": {0.25, 0.5, 10, 16, 20, 30, 40, 45, 60, 64, 90, 256},
}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict]:
    torch.set_num_threads(1)
    return {name: compute() for name, compute in FILES.items()}


def read(name: str) -> str:
    return (THEORY / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    return without_code(read(name))


@pytest.mark.parametrize("name", FILES)
def test_every_number_is_what_pytorch_and_the_accounting_compute(name, expected):
    assert not check(prose(name), expected[name])


@pytest.mark.parametrize("name", FILES)
def test_every_changed_digit_is_noticed(name, expected):
    text = prose(name)
    tokens = NUMBER.finditer("\n".join(map(blanked, text.split("\n"))))
    digits = [i for match in tokens for i in range(*match.span()) if text[i].isdigit()]
    missed = [
        text[i - 20 : i + 5]
        for i in digits
        if not check(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :], expected[name])
    ]
    print(f"{name}: {len(digits)} digits changed one by one, {len(digits) - len(missed)} noticed")
    assert len(digits) > 90 and not missed


def test_a_new_sentence_disturbs_its_own_line_only(expected):
    name = "2_parameters_and_receptive_field.md"
    text = prose(name).replace("Softmax has", "A new sentence with 7.\n\nSoftmax has")
    assert check(text, expected[name]) == ["2.3: nothing is computed for 'A new sentence with 7.'"]


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
    text = re.sub(r"\[\d_\w+\.md\]\([^)]*\)|Practical 2", "", read("README.md"))
    assert not NUMBER.findall(blanked(text))


def test_every_paper_named_in_the_text_is_among_the_sources():
    short = re.findall(r"^- \*\*([^*]+):\*\*", read("SOURCES.md"), re.M)
    assert len(short) == len(set(short)) > 30
    name = r"([A-Z]\w+)(?: et al\.|(?:, [\w ]+)* & \w+)? (20[012]\d[ab]?)"
    named = {match for part in FILES for match in re.findall(name, read(part))}
    assert len(named) > 15
    for author, year in named:
        assert any(one.startswith(author) and one.endswith(year) for one in short), (author, year)


def test_every_package_used_is_among_the_sources():
    packages = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    software = read("SOURCES.md").split("## Software")[1].lower()
    assert len(packages) > 10 and not [name for name in packages if name not in software]


@pytest.mark.parametrize("path", sorted(THEORY.glob("*.md")), ids=lambda path: path.name)
def test_no_formula_holds_what_a_repository_page_shows_wrongly(path):
    """Markdown takes the backslash before punctuation, so that "k\\,C" would show as "k,C"."""
    text = re.sub(r"`[^`]*`", "", path.read_text(encoding="utf-8"))
    for formula in re.findall(r"\$\$.+?\$\$|\$.+?\$", text, re.S):
        assert not re.search(r"\\[!-/:-@\[-`{-~]", formula), formula


@pytest.mark.parametrize("path", sorted(THEORY.glob("*.md")), ids=lambda path: path.name)
def test_links_and_figures_exist_and_have_alt_text_and_caption(path):
    text = path.read_text(encoding="utf-8")
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
        assert len(alt) > 40 and target.endswith((".svg", ".png"))
        assert re.search(re.escape(f"]({target})") + r"\n\n\*Figure T\d+\. .+\*\n", text), target
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert target.startswith("https://") or (path.parent / file).exists(), target
        if anchor and not target.startswith("https://"):
            headings = re.findall(r"^#+ (.+)$", (path.parent / file).read_text("utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


def test_figures_are_numbered_in_order_and_all_shown():
    text = "".join(map(read, FILES))
    shown = re.findall(r"^\*Figure T(\d+)\.", text, re.M)
    assert shown == [str(n) for n in range(1, len(make_figures.FIGURES) + 1)]
    assert set(re.findall(r"\]\(figures/([^)]+)\)", text)) == set(make_figures.FIGURES)


@pytest.mark.parametrize("name", FILES)
def test_every_formula_converts_to_mathml_without_leftovers(name):
    text = read(name)
    formulas = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.S)
    assert text.count("$") % 2 == 0 and (len(formulas) > 10 or name.startswith("0"))
    for display, inline in formulas:
        mathml = convert(display or inline)
        shown = re.sub(r"<[^>]+>", "", mathml)
        assert "\\" not in shown and "merror" not in mathml, display or inline


def test_every_question_has_its_parts_in_order():
    parts = {}
    for name in list(FILES)[1:]:
        parts |= {key: "\n".join(lines) for key, lines in sections(read(name)).items()}
    assert [key for key in parts if key in QUESTIONS] == QUESTIONS
    for key in QUESTIONS:
        order = ['<div lang="fa" dir="rtl">', "\n\n</div>\n\n> *", "\n**Answer.** "]
        order += ["\n**Common mistakes.**\n\n- *", "\n**Why it matters.** "]
        places = [parts[key].find(mark) for mark in order]
        assert -1 not in places and places == sorted(places), (key, places)
        assert all(parts[key].count(mark) == 1 for mark in order), key
    links = re.findall(r"^\| \[([^\]]+)\]\(", read("0_answers.md"), re.M)
    assert links == [*QUESTIONS[:14], "P2 a", "P2 b", "P2 c", "P2 d"]


def persian() -> list[str]:
    return re.findall(
        r'<div lang="fa" dir="rtl">\n\n(.+?)\n\n</div>', "".join(map(read, FILES)), re.S
    )


def test_sizes_and_signs_in_persian_text_stand_in_their_own_direction():
    """In a paragraph from right to left, "3 × 5" would show as "5 × 3", "k = 2" as "2 = k"."""
    assert len(persian()) == len(QUESTIONS) + 1
    for text in persian():
        bare = re.sub(r'<span dir="ltr">[^<]*</span>', "", text)
        assert not re.search(r"[$×=→−+<]", bare) and not re.search(r"[0-9]", bare), bare
        assert not re.search("[يك]", bare) and " ها " not in bare.replace("connection ها", "")


# Where each character of an isolate stands, before and after its own direction is taken away.
DIRECTIONS = """
<script>
const places = (isolate) => {
  const text = isolate.firstChild, range = document.createRange();
  return [...text.data].map((_, i) => {
    range.setStart(text, i);
    range.setEnd(text, i + 1);
    return range.getBoundingClientRect().left;
  });
};
const isolates = [...document.querySelectorAll("[dir=rtl] [dir=ltr]")];
const kept = isolates.map(places);
isolates.forEach((isolate) => isolate.removeAttribute("dir"));
const lost = isolates.map(places);
const boxes = [...document.querySelectorAll("[dir=rtl] blockquote")].map((quote) => {
  const range = document.createRange(), outer = quote.getBoundingClientRect();
  range.selectNodeContents(quote.querySelector("p"));
  return outer.right - Math.max(...[...range.getClientRects()].map((box) => box.right));
});
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify({ kept, lost, boxes });
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The theory's page, where a browser is at hand."""
    if not any(map(shutil.which, browser.BROWSERS)):
        pytest.skip("no Chromium or Chrome is installed")
    path = tmp_path_factory.mktemp("page") / "theory.html"
    theory_to_html(path)
    return path


def test_a_browser_shows_sizes_in_persian_text_from_left_to_right(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv[^>]*>", "", text)  # which forbids scripts
    (tmp_path / "page.html").write_text(text + DIRECTIONS, encoding="utf-8")
    dom = browser.run_chromium("--dump-dom", (tmp_path / "page.html").as_uri()).stdout
    result = json.loads(re.search(r'<pre id="result">(.+?)</pre>', dom)[1])
    isolates = "".join(persian()).count('<span dir="ltr">')
    assert len(result["kept"]) == isolates > 15
    assert all(places == sorted(places) for places in result["kept"])
    # Without a direction of their own, sizes such as 10 × 10 are scrambled.
    assert sum(places != sorted(places) for places in result["lost"]) > 5
    assert all(0 < gap < 40 for gap in result["boxes"])  # text begins at the right edge


def test_the_printed_page(page, tmp_path):
    """At most 20 sheets, none empty, each question on the sheet of its answer, one math font."""
    if not all(map(shutil.which, ("pdftotext", "pdffonts"))):
        pytest.skip("no poppler-utils are installed")
    pdf = tmp_path / "theory.pdf"
    browser.run_chromium("--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.as_uri())
    command = ["pdftotext", "-layout", str(pdf), "-"]
    sheets = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sheets = [re.sub(r"\s+", " ", sheet) for sheet in sheets.split("\f")][:-1]
    assert len(sheets) <= 20 and min(map(len, sheets)) > 500
    quotes = re.findall(r"^> \*([^*].{20})", "".join(map(read, FILES)), re.M)
    assert len(quotes) == len(QUESTIONS)
    for quote in quotes:
        (sheet,) = [sheet for sheet in sheets if quote in sheet.replace("\u00a0", " ")]
        assert "Answer." in sheet.replace("\u00a0", " ").split(quote)[1], quote
    fonts = subprocess.run(["pdffonts", str(pdf)], capture_output=True, text=True, check=True)
    assert set(re.findall(r"\+(\w*Math\w*)", fonts.stdout)) == {"CourseworkMath"}


def test_the_code_to_check_it_yourself_runs():
    blocks = re.findall(r"^```python\n(.+?)^```$", "".join(map(read, FILES)), re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        torch.manual_seed(0)
        assert block.count("assert") >= 2
        exec(compile(block, "theory", "exec"), {})


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
    """Give offsets (K, 2), x before y, to torchvision: y before x, the same at all positions."""
    return offsets.flip(1).flatten()[None, :, None, None].expand(1, -1, n, n)


def test_the_grid_of_the_text_and_of_the_figures_is_that_of_the_formulas():
    grid = re.search(r"\\lbrace (.+) \\rbrace", read("4_deformable_convolution.md"))[1]
    assert [tuple(map(int, pair)) for pair in re.findall(r"\((-?\d),(-?\d)\)", grid)] == GRID
    assert make_figures.TAPS.tolist() == [list(tap) for tap in GRID]
    assert make_figures.BAR == bars()[0]


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


def drawn(name):
    with make_figures.plt.rc_context(make_figures.STYLE):
        return make_figures.FIGURES[name]()


def shown(fig) -> list[str]:
    return [text.get_text() for text in fig.findobj(make_figures.matplotlib.text.Text)]


@pytest.fixture(scope="module")
def figures():
    torch.set_num_threads(1)
    figures = {name: drawn(name) for name in make_figures.FIGURES}
    yield figures
    make_figures.plt.close("all")


def test_the_figures_show_the_computed_numbers(figures):
    fields = [f"{axis.size:g}" for _, axis in walk([(5, 1, 2), (2, 2)] * 3, 128)]
    labels = shown(figures["2_receptive_field.svg"])
    assert [label for label in labels if label.isdigit()][: len(fields)] == fields
    assert f"{fields[-1]} × {fields[-1]}" in shown(figures["2_field_on_photo.png"])
    unet = "\n".join(shown(figures["3_unet.svg"]))
    for channels, side in zip((64, 128, 256, 512, 1024), (256 // 2**d for d in range(5))):
        assert f"{channels} × {side} × {side}" in unet
    block = [label for label in shown(figures["3_dense_block.svg"]) if label.isdigit()]
    assert {str(32 + 24 * layer) for layer in range(4)} | {"24"} == set(block)
    weights, upright, flat, _ = bars()
    still = torch.zeros(9, 2, dtype=torch.float64)
    pairs = ((upright, still), (flat, still), (flat, affine_offsets(turned_by(90))))
    responses = [f"response {float(response(bar, weights, moved)):g}" for bar, moved in pairs]
    assert [axis.get_xlabel() for axis in figures["4_turned_bar.png"].axes] == responses


def test_no_text_of_a_figure_is_below_9_pixels_on_a_screen_of_390(figures):
    """The page leaves 350 pixels, a dark one 334; exponents are drawn at 0.7 of the size."""
    for name, fig in figures.items():
        fig.canvas.draw()
        scale = 334 / (72 * fig.get_size_inches()[0])
        for text in fig.findobj(make_figures.matplotlib.text.Text):
            if text.get_text().strip() and text.get_visible():
                raised = re.search(r"\$.*[\^_].*\$", text.get_text())
                size = scale * text.get_size() * (0.7 if raised else 1)
                assert size >= 9, (name, text.get_text(), size)


def test_no_two_texts_of_a_figure_overlap_and_none_is_cut_off(figures):
    for name, fig in figures.items():
        fig.canvas.draw()
        whole = fig.bbox
        boxes = {}
        for text in fig.findobj(make_figures.matplotlib.text.Text):
            if text.get_text().strip() and text.get_visible():
                box = text.get_window_extent()
                assert whole.x0 <= box.x0 and box.x1 <= whole.x1, (name, text.get_text())
                assert whole.y0 <= box.y0 and box.y1 <= whole.y1, (name, text.get_text())
                boxes[text] = box
        for one, a in boxes.items():
            for other, b in boxes.items():
                if one is not other:
                    words = one.get_text(), other.get_text()
                    assert not (a.overlaps(b) and words[0] != words[1]), (name, *words)


def test_the_field_shrinks_to_its_middle_on_the_photo():
    """What the caption says: the gradient stays in the square and is weaker at its edge."""
    (_, axis) = walk([(5, 1, 2), (2, 2)] * 3, 128)[-1]
    (middle,) = make_figures.field_gradients(make_figures.photo(), [8], range(10))
    first, last = (int(edge) for edge in axis.span(8))
    inside = middle[first : last + 1, first : last + 1]
    torch.testing.assert_close(inside.sum(), middle.sum())
    assert inside[12:24, 12:24].mean() > 5 * inside[0].mean()


def test_the_figures_are_those_of_the_code_and_reproducible(tmp_path, monkeypatch):
    assert {path.name for path in THEORY.glob("figures/*")} == set(make_figures.FIGURES)
    name = "3_dense_block.svg"
    monkeypatch.setattr(make_figures, "FIGURES", {name: make_figures.dense_block})
    for _ in range(2):
        make_figures.draw_all(tmp_path)
        first = (tmp_path / name).read_bytes()
    assert first == (tmp_path / name).read_bytes()


def test_the_measured_claims_about_gradients_hold():
    """What the text says of the figure in words, from the stored measurement and a fresh seed."""
    torch.set_num_threads(1)
    metrics = load_results(ROOT / "reports" / "results" / "theory_gradients.json")["metrics"]
    stored = {
        (setting, kind): metrics[f"{setting}.{kind}.layer_01"]
        for setting in ("default", "batchnorm_he")
        for kind in ("plain", "residual", "dense")
    }
    assert stored["default", "plain"].ci95[1] < -6
    assert abs(stored["default", "dense"].value) < 0.3
    assert stored["default", "residual"].ci95[0] > 0.5
    assert stored["batchnorm_he", "plain"].ci95[0] > 1
    assert all(abs(stored["batchnorm_he", kind].value) < 0.6 for kind in ("residual", "dense"))
    for (setting, kind), metric in stored.items():
        fresh = make_figures.gradient_profile(kind, setting == "batchnorm_he", seed=100)[0]
        low, high = metric.ci95  # a single seed scatters more than the mean of several
        assert abs(fresh - metric.value) < 6 * (high - low)


def test_a_missing_measurement_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(make_figures, "ROOT", tmp_path)
    with pytest.raises(ProjectError, match="theory_gradients.json"):
        make_figures.gradients()
