"""Hold the theory to its numbers, its questions and its sources."""

import re
from functools import cache

import pytest
import torch
import torchvision
from latex2mathml.converter import convert
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from src import ROOT
from theory import fields, make_figures

THEORY = ROOT / "theory"
QUESTIONS = (
    "1.1 2.1 2.2 2.3 2.4 3.1a 3.1b 3.1c 3.2a 3.2b 3.3a 3.3b 3.4a 3.4b 4.1 4.2 4.3 4.4".split()
)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.S)
# Digits that are no numbers of the argument: targets, code, tags; places in papers, years, sections
# of the theory; names such as ResNet-50.
STRUCTURE = re.compile(
    r"""\]\([^)]*\) | `[^`]*` | </?[a-z][^>]*> | \b(?:Sec|Eq|Fig)\.\ [\d.]+(?:\ and\ [\d.]+)?
    | \b20[012]\d[ab]?\b | \b[1-4]\.[1-5][a-c]?\b | \b[A-Za-z]+-?\d+\w*""",
    re.X,
)


def read(name: str) -> str:
    return (THEORY / name).read_text(encoding="utf-8")


PARTS = {path.name: read(path.name) for path in sorted(THEORY.glob("[1-4]_*.md"))}
WHOLE, FIRST_PAGE = "".join(PARTS.values()), read("0_answers.md")


@cache
def sections() -> dict[str, str]:
    """{number of a heading: the text below it}, without the blocks of code."""
    # Neither code, which is run, nor what stands above the first question of a file.
    left_out = r"^```python\n.+?^```$|^# .+?(?=^## )"
    text = re.sub(left_out, "", WHOLE, flags=re.M | re.S)
    pieces = re.split(r"^#+ (\d\.\d[a-c]?)\b.*$", text, flags=re.M)
    return dict(zip(pieces[1::2], pieces[2::2]))


# --- numbers --------------------------------------------------------------------------------------
def sides(formula: str) -> list[float]:
    """Values of the sides of an equation that consist of numbers alone."""
    for latex, python in (
        (r"\\left\\lfloor|\\right\\rfloor|\{,\}", ""),
        (r"\\frac\{(.+?)\}\{(.+?)\}", r"(\1) // (\2)"),
        (r"\\cdot", "*"),
        (r"\^", "**"),
    ):
        formula = re.sub(latex, python, formula)
    plain = [side.strip(" .,\n") for side in formula.split("=")]
    return [eval(side) for side in plain if re.fullmatch(r"[-+*/().\d\s]+", side)]


def numbers(text: str) -> set[float]:
    """All numbers but those in numeric equations; Persian digits count as well."""
    text = FORMULA.sub(lambda match: "" if len(sides(match[1] or match[2])) > 1 else match[0], text)
    tokens = re.findall(r"\d+(?:(?:,|\{,\})\d{3})*(?:\.\d+)?", STRUCTURE.sub(" ", text))
    return {float(re.sub("[{,}]", "", token)) for token in tokens}


def conv(channels: int, filters: int, kernel: int = 3) -> tuple[int, int]:
    """Parameters of PyTorch's layer, and its weights alone; `fields` must agree."""
    layer = nn.Conv2d(channels, filters, kernel)
    total, weights = layer.weight.numel() + layer.bias.numel(), layer.weight.numel()
    assert total == fields.parameters(kernel, channels, filters)
    return total, weights


def linear(inputs: int, outputs: int) -> int:
    return sum(p.numel() for p in nn.Linear(inputs, outputs).parameters())


def run(size: tuple[int, ...], *layers: nn.Module) -> tuple[torch.Tensor, int]:
    """The output on one image, a shape without memory, and the multiply-accumulates."""
    with FlopCounterMode(display=False) as counter:
        output = nn.Sequential(*layers).to("meta")(torch.zeros(1, *size, device="meta"))
    return output[0], counter.get_total_flops() // 2


def sizes(windows: list, n: int) -> list[int]:
    return [size for size, _ in fields.walk(windows, n)]


def gradient_span(windows: list, neuron: int, n: int = 128) -> tuple[int, int]:
    """First and last of `n` pixels along an axis that a neuron depends on, by the gradient."""
    layers = [nn.Conv2d(1, 1, *window) for window in windows]
    for layer in layers:
        nn.init.ones_(layer.weight)  # so that no gradient cancels
    x = torch.zeros(1, 1, n, n, requires_grad=True)
    nn.Sequential(*layers)(x)[0, 0, neuron, neuron].backward()
    seen = x.grad[0, 0].sum(0).nonzero()
    return int(seen.min()), int(seen.max())


def percent(part: float, whole: float) -> int:
    return round(100 * part / whole)


def question_1() -> dict[str, set]:
    gray, color, (small, _) = conv(1, 5, 10), conv(3, 5, 10), conv(1, 5)
    assert (gray[0], color[0]) == (linear(100, 5), linear(300, 5))
    maps, macs = run((1, 10, 10), nn.Conv2d(1, 5, 3))
    _, padded = run((1, 10, 10), nn.Conv2d(1, 5, 10, padding=1))
    flat, head = maps.numel(), linear(maps.numel(), 5)
    return {
        "1.1": {10, 100, 300, *gray, *color},
        "1.2": {10, 12, 100, 144, gray[0], color[0], linear(144, 5)},
        "1.3": {10, *gray, small, small + head, head, flat, flat / 5}
        | {macs, macs + 5 * flat, padded},
    }


def question_2() -> dict[str, set]:
    first, deep = conv(3, 16, 5), conv(16, 16, 5)
    total, bare = (one + 2 * other for one, other in zip(first, deep))
    layers = [nn.Conv2d(3, 16, 5, padding=2), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 16, 5, padding=2), nn.MaxPool2d(2)] * 2
    maps, macs = zip(*(run((3, 128, 128), *layers[:n]) for n in (1, 3, 5, 6)))
    early, flat = maps[2].numel(), maps[3].numel()
    head, windows = linear(flat, 10), make_figures.LAYERS
    spans = [gradient_span(windows, neuron) for neuron in range(16)]
    (low, high), unpooled = spans[8], gradient_span(windows[::2], 64)
    inside = [i for i, (first_, last) in enumerate(spans) if last - first_ == high - low]
    widths = [field.size for _, field in fields.walk(windows, 128)]
    assert inside[0] == 2 and widths[-1] == high - low + 1
    return {
        "2.1": {16, 128, *first, maps[0].numel()},
        "2.2": {128, *sizes(windows, 128), *first, *deep, total, bare, total - bare}
        | {macs[0], macs[1] - macs[0], macs[2] - macs[1]},
        "2.3": {10, flat, early, head, linear(early, 10), total, total + head, total + head - 10}
        | {bare + 10 * flat, total + linear(16, 10), percent(head, total + head)},
        "2.4": {*widths[2:], 64 - low, spans[0][1], *inside[-2:], len(inside), len(inside) ** 2}
        | {128, 16**2, percent(widths[-1], 128), len(make_figures.FIELD_SEEDS)}
        | {unpooled[1] - unpooled[0] + 1},
    }


def question_3() -> dict[str, set]:
    sides = [256, *sizes([(2, 2)] * 5, 256)]
    unpadded = sizes([(3,), (3,), (2, 2)] * 4, 256)
    crop = 2 * (2 * (unpadded[11] - 4) - 4)  # what the third level's skip has to fit
    one, two, three = conv(64, 64), conv(64, 128), conv(128, 128)
    inputs = [32 + 24 * layer for layer in range(12)]
    out, dense = inputs[3], [conv(channels, 24)[1] for channels in inputs[:3]]
    residual = [conv(width, width)[1] for width in (out, 32)]
    stored = inputs[2], sum(inputs[:3]), 3 * out, 3 * 32  # channels of 32 × 32 × 4 bytes
    with torch.device("meta"):
        networks = torchvision.models.resnet50(), torchvision.models.densenet121()
    total = [sum(p.numel() for p in network.parameters()) for network in networks]
    macs = [run((3, 224, 224), network)[1] for network in networks]
    millions = [float(f"{n / 10**power:.3g}") for n, power in zip(total + macs, (6, 6, 9, 9))]
    channels, depth = make_figures.CHANNELS, make_figures.DEPTH
    return {
        "3.1a": {64, 128, 256, 512, 1024, *sides[:5]},
        "3.1b": {16, 16**2},
        "3.1c": {30, 6**2, 16**2},
        "3.2a": {
            *sides[:5],
            *(n**2 for n in sides),
            1024,
            unpadded[2],
            unpadded[5],
            unpadded[7],
            crop,
        },
        "3.2b": {64, 128, 256, 512, *one, *two, two[0] + three[0], two[1] + three[1]},
        "3.3a": {24, *inputs[:4], *dense, sum(dense), *residual, *(3 * n for n in residual)}
        | {*stored, *(4 * n for n in stored), 12, sum(inputs), inputs[11], 224, *millions}
        | {percent(total[1], total[0]), percent(macs[1], macs[0])},
        "3.3b": {channels, depth, 16, 12, channels + (depth - 1) * make_figures.GROWTH}
        | {0.8, 10.2, 40, 95, 4 * 9, 4 * 9 / (9 - 4)},  # of the paper, and of the bottleneck
        "3.4": {24, *inputs[:4]},
        "3.4a": {64, 128, 256, 64 + 128, 64 + 128 + 3},
        "3.4b": {24, inputs[0], inputs[2], out},
    }


def deform(image: torch.Tensor, offsets: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Output in the middle of an image (N, N) by torchvision; offsets (9, 2), x before y."""
    n, image, kernel = len(image), image.double(), kernel.double().view(1, 1, 3, 3)
    moved = offsets.double().flip(1).reshape(1, 18, 1, 1).expand(-1, -1, n, n)
    out = torchvision.ops.deform_conv2d(image[None, None], moved, kernel, padding=1)
    return out[0, 0, n // 2, n // 2]


def turned(degrees: float, scale: float = 1) -> torch.Tensor:
    """Offsets (A - I) p of the nine taps for a rotation and a scale; y points downwards."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = torch.tensor(make_figures.TAPS.T)
    return torch.stack([(cos - 1) * x - sin * y, sin * x + (cos - 1) * y], dim=1)


def reach(bound: float) -> int:
    """Side of the square of pixels that offsets up to a bound can reach, by the gradient."""
    x = torch.ones(15, 15, requires_grad=True)
    for shift in torch.linspace(-bound, bound, 9):
        deform(x, shift.expand(9, 2), torch.ones(9)).backward()
    return int(x.grad.any(0).sum())


FILTER, DIAGONAL = torch.tensor(make_figures.BAR), torch.eye(9).flip(1)
UPRIGHT = torch.eye(9)[4].expand(9, 9)


def question_4() -> dict[str, set]:
    main, *branches, grouped = (conv(64, filters)[0] for filters in (64, 18, 27, 72))
    macs = [run((64, 16, 16), nn.Conv2d(64, n, 3, padding=1))[1] for n in (64, 18, 27)]
    sampling = 4 * 64 * 9 * 16**2  # four multiply-adds per channel, tap and position
    extra = [branch + sampling for branch in macs[1:]]
    shares = [percent(n, width * macs[0] / 64) for width in (64, 256) for n in extra]
    bounded = {bound: reach(bound) for bound in (0.5, 1, 2, 4)}
    assert bounded == {bound: 3 + 2 * -int(-bound // 1) for bound in bounded}
    moved = 2 * 40 * torch.tensor(15.0).deg2rad().sin()
    return {
        "4.2": {9 * 2},
        "4.3": {15, 30, 40, 45, 90, round(float(moved), 1)}
        | {round(float(deform(DIAGONAL, turned(45), FILTER)), 2)},
        "4.4": {main, *branches, *(main + n for n in branches), 72, grouped}
        | {*macs, *(macs[0] + n for n in extra), sampling, *shares[:2], shares[3]}
        | {18, 27, 18 + 4, 27 + 4, 64, 16, 16**2, 0.1, 0.25, 0.5, 10, 20, 30, 60, 22.5},
        "4.5": {0.5, 9**2, 9 * 4, bounded[4], *(bounded[b] ** 2 for b in (1, 2, 4))}
        | {1 + 3 * (bounded[2] - 1)},
    }


@cache
def computed() -> dict[str, set]:
    return question_1() | question_2() | question_3() | question_4()


@pytest.mark.parametrize("section", sections())
def test_every_number_of_two_digits_is_computed(section):
    stated = {n for n in numbers(sections()[section]) if n >= 10 or n % 1}
    assert stated == computed().get(section, set())


def test_equations_hold():
    equations = [sides("".join(groups)) for groups in FORMULA.findall(WHOLE)]
    equations = [values for values in equations if len(values) > 1]
    assert len(equations) > 50
    for values in equations:
        assert max(values) - min(values) < 1e-9, values


def test_the_first_page_repeats_the_answers():
    row = r"^\| \[.+?\]\(.+?#(\d)(\d)([a-c]?)-.+?\).*? \| (.+) \|$"
    rows = {f"{a}.{b}{c}": answer for a, b, c, answer in re.findall(row, FIRST_PAGE, re.M)}
    assert list(rows) == QUESTIONS
    for question, answer in rows.items():
        paragraph = re.search(r"^\*\*Answer\.\*\* .+$", sections()[question], re.M)[0]
        assert numbers(answer) <= numbers(paragraph), question


def test_the_code_to_check_it_yourself_runs():
    blocks = re.findall(r"^```python\n(.+?)^```$", WHOLE, re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})


# --- the arithmetic and the operator --------------------------------------------------------------
@pytest.mark.parametrize(
    "layers, size, field",
    [
        ([(3,)], 8, (3, 1, 1)),
        ([(3, 1, 1), (2, 2)], 5, (4, 2, 0.5)),
        ([(3, 2, 1), (3, 1, 2, 2)], 5, (11, 2, 0)),  # with dilation
    ],
)
def test_fields_of_tiny_networks(layers, size, field):
    assert fields.walk(layers, 10)[-1] == (size, field)
    first, last = fields.Field(*field).span(2)
    assert gradient_span(layers, 2, 10) == (max(first, 0), last)


def test_the_deformable_examples_worked_by_hand():
    still, quarter = torch.zeros(9, 2), turned(90)
    assert deform(UPRIGHT, still, FILTER) == 6 and deform(UPRIGHT.T, still, FILTER) == 0
    assert deform(UPRIGHT.T, quarter, FILTER).item() == pytest.approx(6)
    assert deform(DIAGONAL, turned(45, 2**0.5), FILTER).item() == pytest.approx(6)
    image, kernel = torch.randn(9, 9), torch.randn(9)  # clockwise: y points downwards
    restored = deform(image.rot90(-1), quarter, kernel)
    torch.testing.assert_close(restored, deform(image, still, kernel))
    rows = torch.tensor([[0, 0, 0], [0, 10, 20], [0, 30, 60]])
    offsets = torch.tensor([[0.5, 0.25]] * 9, requires_grad=True)
    value = deform(rows, offsets, torch.eye(9)[4])
    value.backward()
    assert [value.item(), *offsets.grad[4].tolist()] == [22.5, 15, 30]


def test_a_dense_block_has_as_many_paths_as_the_gradient_has_terms():
    first = torch.ones((), requires_grad=True)
    second = first + 0
    third = first + second
    (first + second + third).backward()  # every layer passes on the sum of what it reads
    assert first.grad == 4


# --- questions, sources, figures ------------------------------------------------------------------
@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_is_quoted_and_answered(question):
    section = sections()[question]
    persian = re.search(r'^<div lang="fa" dir="rtl">$(.+?)^</div>$', section, re.M | re.S)[1]
    # Sizes in Persian text need a direction of their own, or 10 × 5 reads as 5 × 10.
    assert not re.search(r"[0-9×=]", re.sub(r'<span dir="ltr">.+?</span>', "", persian))
    marks = ["> *", "**Answer.** ", "**Working", "**Common mistakes.**", "**Why it matters.**"]
    places = [section.find(f"\n{mark}") for mark in marks]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("path", sorted(THEORY.glob("*.md")), ids=lambda path: path.name)
def test_links_exist(path):
    for name, anchor in re.findall(r"\]\((?!https://)([^)#]+)#?([^)]*)\)", read(path.name)):
        assert (THEORY / name).exists(), name
        if anchor:
            headings = re.sub(r"[^\w \n-]", "", read(name).lower()).replace(" ", "-")
            assert f"-{anchor}\n" in headings


def test_figures_have_alt_text_and_captions_in_order():
    shown = re.findall(r"!\[.{100,}\]\(figures/(.+)\)\n\n\*Figure T(\d+)\. .+\*\n", WHOLE)
    assert [int(number) for _, number in shown] == [*range(1, 1 + len(make_figures.FIGURES))]
    files = {path.name for path in THEORY.glob("figures/*")}
    assert {name for name, _ in shown} == set(make_figures.FIGURES) == files


def test_all_figures_are_drawn(tmp_path):
    make_figures.draw_all(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(make_figures.FIGURES)


@pytest.mark.parametrize(
    "kind, normalized, low, high",  # log10 of the gradient at the first layer over the last one's
    [
        ("plain", False, -10, -6),
        ("residual", False, 0.5, 2),
        ("dense", False, -0.5, 0.5),
        ("plain", True, 1, 4),
        ("residual", True, -0.7, 0.7),
        ("dense", True, -0.7, 0.7),
    ],
)
def test_what_the_text_says_of_the_gradients(kind, normalized, low, high):
    assert low < make_figures.gradient_profile(kind, normalized, seed=8)[0] < high


@pytest.mark.parametrize("name", PARTS)
def test_formulas_convert_and_survive_a_repository_page(name):
    """Markdown would show "\\," as ","; a backslash before punctuation is therefore not used."""
    for formula in map("".join, FORMULA.findall(PARTS[name])):
        assert not re.search(r"\\[!-/:-@\[-`{-~]", formula)
        assert "\\" not in re.sub(r"<[^>]+>", "", convert(formula))


def test_papers_and_packages_are_among_the_sources():
    sources = read("SOURCES.md")
    short = re.findall(r"^- \*\*([^*]+):\*\*", sources, re.M)
    named = re.findall(r"([A-Z]\w+)(?: et al\.|(?:, [\w ]+)* & \w+)? (20[012]\d[ab]?)", WHOLE)
    assert len(set(named)) > 15
    for author, year in named:
        assert any(entry.startswith(author) and entry.endswith(year) for entry in short), author
    packages = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    assert not [name for name in packages if name not in sources.split("## Software")[1].lower()]
