"""notebooks/deformable_convolution.ipynb: the operator, the layer, the heads; its benchmark."""

import ast
import copy
import functools
import json
import math
import random
import re
import types
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from src import (
    ROOT,
    ProjectError,
    backbones,
    comparison,
    fast_sampling,
    objects,
    results,
    training,
    trials,
)
from src.device import Runtime
from tools import bench, notebooks
from tools.notebooks import definitions

nb = definitions("deformable_convolution")
CPU = Runtime(torch.device("cpu"))


# --- the operator


def case(
    seed=0,
    batch=2,
    channels=4,
    out_channels=6,
    size=(6, 7),
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=1,
    offset_groups=1,
    mask=True,
    bias=True,
    dtype=torch.float64,
    spread=2.0,
):
    """Random tensors that fit together, and the settings {stride, padding, dilation}."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)
    ]
    taps = offset_groups * math.prod(kernel)
    tensors = {
        "input": normal(batch, channels, *size),
        "offset": spread * normal(batch, 2 * taps, *out),
        "weight": normal(out_channels, channels // groups, *kernel),
        "bias": normal(out_channels) if bias else None,
        "mask": normal(batch, taps, *out).sigmoid() if mask else None,
    }
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def by_hand(input, offset, weight, bias, mask, stride, padding, dilation):
    """Equations 1 to 4 of the papers, one corner of one tap at a time, in double."""
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_y, kernel_x = weight.shape
    taps = kernel_y * kernel_x
    offset_groups = offset.shape[1] // (2 * taps)
    out = torch.zeros(batch, out_channels, *offset.shape[2:], dtype=torch.float64)
    x, o, w, m = (None if t is None else t.tolist() for t in (input, offset, weight, mask))
    for n, c_out, i, j in product(*map(range, out.shape)):
        total = 0.0 if bias is None else bias[c_out].item()
        first = (
            c_out // (out_channels // (channels // group_channels)) * group_channels
        )  # input channel of the output's group
        for c, ky, kx in product(range(group_channels), range(kernel_y), range(kernel_x)):
            group, tap = (first + c) // (channels // offset_groups), ky * kernel_x + kx
            p_y = (
                i * stride[0] - padding[0] + ky * dilation[0] + o[n][2 * (group * taps + tap)][i][j]
            )
            p_x = (
                j * stride[1]
                - padding[1]
                + kx * dilation[1]
                + o[n][2 * (group * taps + tap) + 1][i][j]
            )
            sample = 0.0
            for q_y, q_x in product(
                (math.floor(p_y), math.floor(p_y) + 1), (math.floor(p_x), math.floor(p_x) + 1)
            ):
                if 0 <= q_y < height and 0 <= q_x < width:
                    sample += (
                        (1 - abs(q_y - p_y)) * (1 - abs(q_x - p_x)) * x[n][first + c][q_y][q_x]
                    )
            total += (
                w[c_out][c][ky][kx]
                * sample
                * (1.0 if m is None else m[n][group * taps + tap][i][j])
            )
        out[n, c_out, i, j] = total
    return out


def test_the_defaults_are_the_librarys():
    tensors, _ = case(padding=(0, 0), mask=False, bias=False)
    arguments = [tensors[name] for name in ("input", "offset", "weight")]
    wanted = torchvision.ops.deform_conv2d(*arguments)
    assert torch.allclose(nb.deform_conv2d(*arguments), wanted, atol=1e-12)


ASYMMETRIC = dict(
    kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2, offset_groups=2
)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        ASYMMETRIC,
        dict(size=(4, 3), channels=6, groups=2, offset_groups=3, batch=1),
        dict(kernel=(1, 1), padding=(0, 0)),
    ],
)
def test_equals_the_formula(settings, mask, bias):
    tensors, options = case(mask=mask, bias=bias, **settings)
    out = nb.deform_conv2d(**tensors, **options)
    assert torch.allclose(out, by_hand(**tensors, **options), atol=1e-12)


def gradients(function, tensors, options, seed=0):
    """Output and gradients {name: tensor} of a random linear function of the output."""
    leaves = {
        name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()
    }
    out = function(**leaves, **options)
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(out.dtype)
    names = [name for name, t in leaves.items() if t is not None]
    found = torch.autograd.grad((out * weights).sum(), [leaves[name] for name in names])
    return {"output": out.detach()} | dict(zip(names, found))


def assert_same(found, wanted, tolerance, message=""):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].shape == wanted[name].shape, (name, message)
        error = (found[name] - wanted[name]).abs().max() if wanted[name].numel() else 0.0
        assert error <= tolerance * (1 + wanted[name].abs().max() if wanted[name].numel() else 1), (
            name,
            float(error),
            message,
        )


def assert_equals_torchvision(tensors, options, tolerance, message=""):
    found, wanted = (
        gradients(function, tensors, options)
        for function in (nb.deform_conv2d, torchvision.ops.deform_conv2d)
    )
    assert_same(found, wanted, tolerance, message)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2), (5, 5)])
def test_equals_torchvision_on_random_configurations(kernel):
    draw = random.Random(str(kernel))
    for number in range(80):
        groups, offset_groups = draw.choice(
            [(1, 1), (2, 1), (1, 2), (2, 2), (2, 3), (3, 2), (1, 3), (4, 2), (2, 4)]
        )
        stride, padding, dilation = (
            (draw.randint(low, high), draw.randint(low, high))
            for low, high in ((1, 3), (0, 2), (1, 2))
        )
        size = [
            max(draw.randint(3, 7), d * (k - 1) + 1 - 2 * p)
            for k, p, d in zip(kernel, padding, dilation)
        ]
        settings = dict(
            batch=draw.randint(1, 3),
            channels=math.lcm(groups, offset_groups) * draw.randint(1, 2),
            size=size,
            out_channels=groups * draw.randint(1, 3),
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            offset_groups=offset_groups,
            mask=draw.random() < 0.6,
            bias=draw.random() < 0.6,
            spread=draw.choice([0.3, 1.0, 3.0]),
        )
        assert_equals_torchvision(*case(number, **settings), 1e-11, settings)


@pytest.mark.parametrize("block, sampled", [(1, 1), (1, 2**26), (2**26, 1), (400, 700)])
def test_many_blocks_and_float32_equal_torchvision(monkeypatch, block, sampled):
    """Blocks of one image, of all, and cut within an image, the last one shorter."""
    monkeypatch.setattr(fast_sampling, "BLOCK", {"cpu": block, "other": block})
    monkeypatch.setattr(fast_sampling, "SAMPLED", {"cpu": sampled, "other": sampled})
    tensors, options = case(batch=3, size=(9, 15), groups=2, offset_groups=2)
    assert_equals_torchvision(tensors, options, 1e-11)
    assert_equals_torchvision({name: t.float() for name, t in tensors.items()}, options, 1e-4)


def test_slices_cover_everything_once():
    for length, size in product((0, 1, 7, 64), (0, 1, 3, 7, 100)):
        found = [i for part in fast_sampling.slices(length, size) for i in range(length)[part]]
        assert found == list(range(length))


def test_the_general_way_equals_the_one_of_the_cpu(monkeypatch):
    """Other devices have no product of a sparse pattern; they read the corners piece by piece."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    by_sample = torch.randn(70, 3, dtype=torch.float64, generator=generator)
    corners = torch.randint(0, 42, (70, 1), generator=generator).int() + torch.tensor([0, 1, 7, 8])
    wanted = fast_sampling.corner_products(by_sample, table, corners.int())
    by_hand = (by_sample[:, None] * table[corners.long()]).sum(dim=2)
    assert torch.allclose(wanted, by_hand, atol=1e-12)
    monkeypatch.setattr(fast_sampling, "FakeTensor", torch.Tensor)  # take the general way
    for numbers in (1, 8 * 4 * 3 * 9, 2**26):  # pieces of one sample, of nine, of all
        monkeypatch.setattr(fast_sampling, "BLOCK", {"cpu": numbers})
        found = fast_sampling.corner_products(by_sample, table, corners.int())
        assert torch.allclose(found, by_hand, atol=1e-12)
    tensors, options = case(groups=2, offset_groups=3, channels=6)
    assert_equals_torchvision(tensors, options, 1e-11)


# --- devices without numbers, determinism, memory


def arguments(device, dtype=torch.float32):
    """Arguments of `SampledProduct` with two images, two sections, one offset group."""
    sizes = dict(
        table=(2, 2, 72, 8), base=(2, 1, 49, 9), weight=(2, 1, 49, 9, 4), kernel=(2, 72, 5)
    )
    tensors = {
        name: torch.zeros(size, device=device, dtype=torch.int32 if name == "base" else dtype)
        for name, size in sizes.items()
    }
    leaves = [t if name == "base" else t.requires_grad_() for name, t in tensors.items()]
    return [*leaves, 9, 1, nb.sampled_product]


def assert_shapes(tensors):
    out = fast_sampling.SampledProduct.apply(*tensors)
    assert out.shape == (2, 1, 5, 49)
    leaves = [t for t in tensors[:4] if t.requires_grad]
    found = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in found] == [t.shape for t in leaves]


def test_shapes_without_numbers():
    assert_shapes(arguments("meta"))
    with FakeTensorMode():
        assert_shapes(arguments("cpu"))


@pytest.mark.parametrize("modulation", [False, True])
def test_the_layer_on_meta_and_fake_tensors(modulation):
    def forward(device):
        with torch.device(device):
            layer = nb.DeformConv2d(4, 6, 3, padding=1, offset_groups=2, modulation=modulation)
        x = torch.zeros(2, 4, 6, 7, device=device, requires_grad=True)
        out = layer(x)
        assert out.shape == (2, 6, 6, 7) and out.device.type == device
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.shape == x.shape

    forward("meta")
    with FakeTensorMode():
        forward("cpu")


def test_the_same_gradient_bits_twice():
    tensors, options = case(
        batch=4, channels=16, size=(20, 21), groups=2, offset_groups=2, dtype=torch.float32
    )
    tensors["offset"] = tensors["offset"].round()  # many samples read the same pixels
    first, again = (gradients(nb.deform_conv2d, tensors, options) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, without those that were there before."""

    def __init__(self, before):
        super().__init__()
        self.known, self.now, self.peak = {t.untyped_storage()._cdata for t in before}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.layout is torch.strided:
                storage, size = t.untyped_storage(), t.untyped_storage().nbytes()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, storage._cdata, size)
        return out

    def forget(self, number, size):
        self.known.discard(number)
        self.now -= size


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("images", [1, 5])
def test_memory_is_that_of_one_block_of_columns(monkeypatch, device, images):
    batch, positions, taps, channels, outputs = 16, 256, 9, 64, 64
    columns = images * positions * taps * channels
    monkeypatch.setattr(fast_sampling, "BLOCK", {"cpu": columns, "other": columns})
    monkeypatch.setattr(fast_sampling, "SAMPLED", {"cpu": columns, "other": columns})
    table = torch.zeros(batch, 1, 18 * 18, channels, device=device)
    base = torch.zeros(batch, 1, positions, taps, dtype=torch.int32, device=device)
    weight = torch.zeros(batch, 1, positions, taps, 4, device=device)
    kernel = torch.zeros(1, taps * channels, outputs, device=device)
    grad = torch.zeros(batch, 1, outputs, positions, device=device)
    given = [table, base, weight, kernel]
    for function, tensors in (
        (fast_sampling.SampledProduct, given),
        (fast_sampling.SampledProductGradient, [*given, grad]),
    ):
        with LiveBytes(tensors) as live:
            out = function.forward(*tensors, 18, 1, nb.sampled_product)
        out = out if isinstance(out, tuple) else (out,)
        beside = live.peak - sum(t.untyped_storage().nbytes() for t in out)
        assert 0.5 * 4 * columns < beside <= 1.5 * 4 * columns, beside / (4 * columns)
    with LiveBytes(given) as live:
        nb.sampled_product(*given, 18, 1)
    assert live.peak > 4 * 4 * batch * positions * taps * channels, "the readable one, to compare"


@pytest.mark.parametrize("images, most", [(8, 80), (800, 400)])
def test_a_block_is_a_few_operations(images, most):
    """On a GPU the launch of an operation takes as long as the work of a small one."""
    sizes = (images, 1, 400, 64), (images, 1, 400, 9), (images, 1, 400, 9, 4), (1, 576, 64)
    table, base, weight, kernel = (torch.zeros(size, device="meta") for size in sizes)
    grad = torch.zeros(images, 1, 64, 400, device="meta")
    blocks = len(list(fast_sampling.image_blocks(table, base)))
    with Operations() as seen:
        fast_sampling.SampledProductGradient.forward(
            table, base.int(), weight, kernel, grad, 20, 1, nb.sampled_product
        )
    assert seen.count <= most * blocks, (seen.count, blocks)


class Operations(TorchDispatchMode):
    """Counts what is called, views too."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def distance(found, wanted):
    return float(
        (found.double() - wanted.double()).norm().detach() / wanted.double().norm().detach()
    )


def test_half_precision_takes_the_readable_path_and_is_close():
    tensors, options = case(
        dtype=torch.bfloat16, size=(9, 8), channels=6, groups=2, offset_groups=3
    )
    exact = {name: t.float() for name, t in tensors.items()}
    found, wanted = (
        gradients(nb.deform_conv2d, tensors, options),
        gradients(nb.deform_conv2d, exact, options),
    )
    assert all(t.dtype == torch.bfloat16 for t in found.values())
    for name in wanted:
        assert distance(found[name], wanted[name]) < 0.03, name
    turned = exact | {
        "offset": exact["offset"].unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    }  # x before y
    for broken in (
        turned,
        exact | {"offset": -exact["offset"]},
        exact | {"mask": torch.ones_like(exact["mask"])},
    ):
        assert distance(nb.deform_conv2d(**broken, **options), wanted["output"]) > 0.2, (
            "the tolerance would not notice"
        )


def test_readable_and_fast_versions_agree(monkeypatch):
    tensors, options = case(channels=6, groups=2, offset_groups=3)
    fast = gradients(nb.deform_conv2d, tensors, options)
    monkeypatch.setattr(nb, "fast_product", nb.sampled_product)
    assert_same(gradients(nb.deform_conv2d, tensors, options), fast, 1e-12)


def test_autocast_computes_in_single_precision():
    tensors, options = case(dtype=torch.float32, offset_groups=2)
    wanted = gradients(nb.deform_conv2d, tensors, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(nb.deform_conv2d, tensors, options)
    assert found["output"].dtype == torch.bfloat16
    error = (found["output"].float() - wanted["output"]).abs()
    assert (error <= 2**-8 * wanted["output"].abs() + 1e-6).all(), "more than one rounding"
    for name in tensors:
        assert found[name].dtype == torch.float32 and distance(found[name], wanted[name]) < 0.01, (
            name
        )
    layer = nb.DeformConv2d(4, 5, 3, padding=1, modulation=True)
    nn.init.normal_(layer.offset_branch.weight, std=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(tensors["input"])
    assert out.dtype == torch.bfloat16 and distance(out, layer(tensors["input"])) < 0.005


@pytest.mark.parametrize("static", [False, True])
def test_the_offset_branch_stays_in_single_precision(static):
    """In training as in evaluation: the offsets are the same numbers with and without autocast."""
    torch.manual_seed(0)
    layer = nb.DeformConv2d(4, 5, 3, padding=1, modulation=True, static=static)
    nn.init.normal_(layer.offset_branch.weight, std=0.3)
    nn.init.normal_(layer.offset_branch.bias)
    x = torch.randn(2, 4, 8, 9)
    for module in (layer.train(), layer.eval()):
        wanted = module.offsets_and_mask(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = module.offsets_and_mask(x)
            half = module.offsets_and_mask(x.bfloat16())
        for a, b, c in zip(found, wanted, half):
            assert a.dtype == c.dtype == torch.float32
            assert torch.equal(a, b) and (static or 0 < distance(c, b) < 0.01)


def smooth_case(**settings):
    """A case whose positions keep a tenth of a pixel from the integers, where there are kinks."""
    tensors, options = case(**settings)
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(-2, 3, tensors["offset"].shape, generator=generator)
    tensors["offset"] = (
        whole + 0.1 + 0.8 * torch.rand(whole.shape, generator=generator, dtype=torch.float64)
    )
    return tensors, options


@pytest.mark.parametrize(
    "settings",
    [
        dict(
            batch=1,
            channels=2,
            out_channels=2,
            size=(4, 4),
            kernel=(2, 2),
            padding=(0, 1),
            offset_groups=2,
        ),
        dict(
            batch=2,
            channels=4,
            out_channels=2,
            size=(4, 3),
            kernel=(2, 1),
            stride=(2, 1),
            groups=2,
            offset_groups=2,
        ),
    ],
)
def test_derivatives_equal_finite_differences(settings):
    tensors, options = smooth_case(**settings)
    names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

    def function(*values):
        return nb.deform_conv2d(**dict(zip(names, values)), **options)

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_second_derivatives_entry_by_entry():
    sizes = dict(batch=1, channels=2, out_channels=1, size=(2, 2), kernel=(2, 2), padding=(0, 0))
    tensors, options = smooth_case(**sizes, offset_groups=2)
    values = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradgradcheck(
        lambda *v: nb.deform_conv2d(**dict(zip(tensors, v)), **options), values
    )


def test_only_the_gradients_that_are_asked_for():
    tensors, options = case(groups=2)
    wanted = gradients(nb.deform_conv2d, tensors, options)
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        out = nb.deform_conv2d(**tensors | {name: leaf}, **options)
        weights = torch.randn(
            out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        (out * weights).sum().backward()
        assert torch.allclose(leaf.grad, wanted[name], atol=1e-11), name


@pytest.mark.parametrize("settings", [dict(), ASYMMETRIC | dict(offset_groups=1)])
def test_zero_offsets_are_the_ordinary_convolution(settings):
    tensors, options = case(mask=False, spread=0.0, **settings)
    groups = tensors["input"].shape[1] // tensors["weight"].shape[1]
    wanted = F.conv2d(
        tensors["input"], tensors["weight"], tensors["bias"], **options, groups=groups
    )
    assert torch.allclose(nb.deform_conv2d(**tensors, **options), wanted, atol=1e-12)
    plain = nb.deform_conv2d(
        tensors["input"], tensors["offset"], tensors["weight"], None, *map(list, options.values())
    )
    assert torch.allclose(plain, wanted - tensors["bias"][:, None, None], atol=1e-12), (
        "settings as lists"
    )


@pytest.mark.parametrize("down, right", [(1, 0), (0, 1), (-2, 1), (3, -3)])
def test_whole_offsets_see_the_shifted_image(down, right):
    """The offset's even channels move rows, its odd ones columns: a mixed-up order fails here."""
    tensors, options = case(mask=False)
    tensors["offset"] = (
        torch.tensor([down, right], dtype=torch.float64)
        .repeat(9)[:, None, None]
        .expand(2, 18, 6, 7)
    )
    far = F.pad(tensors["input"], (4, 4, 4, 4))[
        :, :, 3 + down : 11 + down, 3 + right : 12 + right
    ]  # with a border of one
    assert torch.allclose(
        nb.deform_conv2d(**tensors, **options),
        F.conv2d(far, tensors["weight"], tensors["bias"]),
        atol=1e-12,
    )


def test_each_offset_group_moves_its_own_channels():
    tensors, options = case(channels=4, offset_groups=2)
    moved = tensors | {"offset": tensors["offset"].clone(), "mask": tensors["mask"].clone()}
    moved["offset"][:, 18:] += 0.7  # the second group's
    moved["mask"][:, 9:] *= 0.5
    for channels, changes in ((slice(0, 2), False), (slice(2, 4), True)):
        weight = torch.zeros_like(tensors["weight"])
        weight[:, channels] = tensors["weight"][:, channels]
        before, after = (
            nb.deform_conv2d(**t | {"weight": weight}, **options) for t in (tensors, moved)
        )
        assert torch.equal(before, after) != changes


def test_each_offset_moves_its_own_tap():
    tensors, options = case()
    for tap in (0, 5, 8):
        weight = torch.zeros_like(tensors["weight"])
        weight.flatten(2)[..., tap] = tensors["weight"].flatten(2)[..., tap]
        leaf = tensors["offset"].clone().requires_grad_()
        nb.deform_conv2d(**tensors | {"weight": weight, "offset": leaf}, **options).sum().backward()
        assert leaf.grad.abs().amax(dim=(0, 2, 3)).nonzero().flatten().tolist() == [
            2 * tap,
            2 * tap + 1,
        ]


def strided(t):
    """The same numbers with gaps between them in memory."""
    return None if t is None else torch.stack([t, t + 1], dim=-1)[..., 0]


@pytest.mark.parametrize("layout", ["gaps", "channels_last", "transposed", "expanded"])
def test_any_memory_layout(layout):
    tensors, options = case(groups=2, offset_groups=2, size=(6, 6))
    if layout == "gaps":
        other = {name: strided(t) for name, t in tensors.items()}
    elif layout == "channels_last":
        other = {
            name: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
            for name, t in tensors.items()
        }
    elif layout == "transposed":
        other = {
            name: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t
            for name, t in tensors.items()
        }
    else:
        tensors["input"], tensors["offset"] = (
            tensors["input"][:1].repeat(2, 1, 1, 1),
            tensors["offset"][:1].repeat(2, 1, 1, 1),
        )
        other = tensors | {
            name: tensors[name][:1].expand(2, -1, -1, -1) for name in ("input", "offset")
        }
    assert not other["input"].is_contiguous()
    assert_same(
        gradients(nb.deform_conv2d, other, options),
        gradients(nb.deform_conv2d, tensors, options),
        1e-12,
    )
    out = nb.deform_conv2d(**{name: t.requires_grad_() for name, t in tensors.items()}, **options)
    weights = torch.randn(
        out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for grad in (
        strided(weights),
        weights.contiguous(memory_format=torch.channels_last),
    ):  # the gradient may lie anyhow as well
        for a, b in zip(
            *(
                torch.autograd.grad(out, list(tensors.values()), g, retain_graph=True)
                for g in (grad, weights)
            )
        ):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch(dtype):
    tensors, options = case(batch=0, groups=2, offset_groups=2, dtype=dtype)
    found = gradients(nb.deform_conv2d, tensors, options)
    assert found["output"].shape == (0, 6, 6, 7) and found["input"].shape == (0, 4, 6, 7)
    assert not found["weight"].any() and not found["bias"].any()


def test_a_batch_is_its_images_one_by_one():
    tensors, options = case(batch=3, groups=2, offset_groups=2)
    whole = nb.deform_conv2d(**tensors, **options)
    for n in range(3):
        single = tensors | {name: tensors[name][n : n + 1] for name in ("input", "offset", "mask")}
        assert torch.allclose(nb.deform_conv2d(**single, **options), whole[n : n + 1], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_offsets_that_are_no_numbers_or_huge(dtype):
    tensors, options = case(dtype=dtype, groups=2, offset_groups=2)
    wild = torch.tensor(
        [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 1e9], dtype=dtype
    )
    chosen = torch.rand(tensors["offset"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors["offset"] = torch.where(
        chosen, wild.repeat(chosen.numel() // 8).view(chosen.shape), tensors["offset"]
    )
    found = gradients(nb.deform_conv2d, tensors, options)
    assert all(t.isfinite().all() for t in found.values())
    assert not found["offset"][chosen].any(), "nothing pulls at a sample that is outside"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 8.0, -9.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_samples_far_outside_are_zero(value, axis):
    tensors, options = case(bias=False)
    tensors["offset"] = torch.zeros_like(tensors["offset"])
    tensors["offset"][:, axis::2] = value
    found = gradients(nb.deform_conv2d, tensors, options)
    assert not any(t.any() for t in found.values())


def test_an_image_thinner_than_the_kernel():
    tensors, options = case(size=(1, 2), padding=(1, 1))
    assert_equals_torchvision(tensors, options, 1e-12)


# --- compilers and transforms


def learned_layer(**settings):
    torch.manual_seed(0)
    layer = nb.DeformConv2d(4, 4, 3, padding=1, offset_groups=2, modulation=True, **settings)
    nn.init.normal_(layer.offset_branch.weight, std=0.3)
    return layer


def test_compiled_and_exported_layers_compute_the_same():
    torch._dynamo.reset()
    layer, x = learned_layer(), torch.randn(2, 4, 6, 7, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(layer(leaf).square().sum(), [leaf, *layer.parameters()])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(leaf).square().sum(), [leaf, *layer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found, wanted))
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), layer(x), atol=1e-5)
    torch._dynamo.reset()


def test_vmap_equals_the_loop():
    tensors, options = case(batch=3, groups=2, offset_groups=2)

    def single(x, offset, mask, weight):
        return nb.deform_conv2d(
            x[None], offset[None], weight, tensors["bias"], mask=mask[None], **options
        )[0]

    per_image = tensors["input"], tensors["offset"], tensors["mask"]
    wanted = torch.stack([single(*parts, tensors["weight"]) for parts in zip(*per_image)])
    assert torch.allclose(
        torch.func.vmap(single, (0, 0, 0, None))(*per_image, tensors["weight"]), wanted, atol=1e-12
    )
    weights = torch.stack(
        [tensors["weight"] * factor for factor in (1, 2, -1)], dim=1
    )  # mapped along another dimension
    wanted = torch.stack([single(*parts, weights[:, i]) for i, parts in enumerate(zip(*per_image))])
    assert torch.allclose(
        torch.func.vmap(single, (0, 0, 0, 1))(*per_image, weights), wanted, atol=1e-12
    )


@pytest.mark.parametrize("name", ["SampledProduct", "SampledProductGradient"])
def test_vmap_along_any_dimension(name):
    generator = torch.Generator().manual_seed(0)
    sizes = dict(
        table=(2, 1, 20, 3),
        base=(2, 1, 4, 2),
        weight=(2, 1, 4, 2, 4),
        kernel=(1, 6, 5),
        grad=(2, 1, 5, 4),
    )
    tensors = {
        key: torch.randn(3, *size, generator=generator, dtype=torch.float64)
        for key, size in sizes.items()
    }
    tensors["base"] = torch.randint(
        0, 14, (3, *sizes["base"]), generator=generator, dtype=torch.int32
    )
    function, given = (
        getattr(fast_sampling, name),
        list(tensors.values())[: 4 if name == "SampledProduct" else 5],
    )

    def call(*values):
        return function.apply(*values, 5, 1, nb.sampled_product)

    wanted, found = (
        [call(*parts) for parts in zip(*given)],
        torch.func.vmap(call, 2)(*(t.movedim(0, 2) for t in given)),
    )
    wanted = (
        [torch.stack(parts) for parts in zip(*wanted)]
        if isinstance(found, tuple)
        else [torch.stack(wanted)]
    )
    for a, b in zip(found if isinstance(found, tuple) else [found], wanted, strict=True):
        assert torch.equal(a, b)


def test_gradients_per_sample_equal_the_loop():
    layer, x = (
        learned_layer().double(),
        torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        wanted = torch.autograd.grad(layer(x[i : i + 1]).square().sum(), list(layer.parameters()))
        assert all(
            torch.allclose(found[name][i], grad, atol=1e-10)
            for name, grad in zip(parameters, wanted)
        )


# --- the layer


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(stride=2, dilation=(2, 1), groups=2, padding=(2, 1)),
        dict(bias=False),
        dict(offset_groups=2),
    ],
)
@pytest.mark.parametrize("modulation", [False, True])
def test_a_fresh_layer_is_an_ordinary_convolution(settings, modulation):
    torch.manual_seed(0)
    layer, x = (
        nb.DeformConv2d(4, 6, (3, 2), modulation=modulation, **settings),
        torch.randn(2, 4, 7, 8),
    )
    factor = 0.5 if modulation else 1.0
    of_convolution = {
        key: value for key, value in settings.items() if key not in ("bias", "offset_groups")
    }
    wanted = factor * F.conv2d(x, layer.weight, **of_convolution)
    wanted = wanted if layer.bias is None else wanted + layer.bias[:, None, None]
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert (layer.bias is None) == (settings.get("bias") is False)
    torch.manual_seed(0)
    assert torch.equal(
        layer.weight, nn.Conv2d(4, 6, (3, 2), groups=settings.get("groups", 1)).weight
    ), "the usual ones at first"


def test_the_layer_hands_its_settings_to_the_operator():
    torch.manual_seed(0)
    layer = nb.DeformConv2d(
        4, 6, (3, 2), (2, 1), (1, 0), (2, 1), 2, offset_groups=2, modulation=True
    )
    nn.init.normal_(layer.offset_branch.weight, std=0.5)
    x = torch.randn(2, 4, 6, 7)
    branch = F.conv2d(
        x, layer.offset_branch.weight, layer.offset_branch.bias, (2, 1), (1, 0), (2, 1)
    )
    tensors = [
        t.double() for t in (x, branch[:, :24], layer.weight, layer.bias, branch[:, 24:].sigmoid())
    ]
    assert torch.allclose(layer(x).double(), by_hand(*tensors, (2, 1), (1, 0), (2, 1)), atol=1e-4)


def test_the_offset_branch_has_what_is_needed_and_no_more():
    for modulation, offset_groups, channels in ((False, 1, 18), (True, 1, 27), (True, 2, 54)):
        layer = nb.DeformConv2d(4, 6, 3, offset_groups=offset_groups, modulation=modulation)
        assert layer.offset_branch.weight.shape == (channels, 4, 3, 3)
    x = torch.randn(1, 1, 5, 5)
    layer = nb.DeformConv2d(1, 1, 3)  # the fewest channels there are
    assert torch.allclose(layer(x), F.conv2d(x, layer.weight, layer.bias), atol=1e-6)


def small_network():
    torch.manual_seed(0)
    deformable = nb.DeformConv2d(4, 4, 3, padding=1, modulation=True)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        deformable,
        nn.Flatten(),
        nn.Linear(4 * 25, 2),
    )
    nn.init.normal_(network[2].offset_branch.weight, std=0.1)
    return network


def step_of(factor):
    """How far one AdamW step moves every parameter, {name: tensor}."""
    network = small_network()
    before = copy.deepcopy(dict(network.named_parameters()))
    parts = nb.with_own_rates(network, 0.01, factor)
    optimizer, _ = training.make_optimizer(parts, weight_decay=0.1, total_steps=10)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"]
    network(
        torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    ).square().sum().backward()
    optimizer.step()
    return {name: p.detach() - before[name].detach() for name, p in network.named_parameters()}


def test_the_offset_branch_learns_at_its_own_rate():
    full, tenth = step_of(1.0), step_of(0.1)
    for name in full:
        factor = 0.1 if "offset_branch" in name else 1.0
        assert full[name].abs().max() > 5e-3, name
        assert torch.allclose(tenth[name], factor * full[name], atol=1e-5), name


def test_every_parameter_is_in_one_part():
    network = small_network()
    (others, lr), (branches, slow) = nb.with_own_rates(network, 0.01, 0.3)
    assert (lr, slow) == (0.01, pytest.approx(0.003))
    of_branch = {id(p) for p in network[2].offset_branch.parameters()}
    assert {id(p) for p in branches} == of_branch
    assert {id(p) for p in others} == {id(p) for p in network.parameters()} - of_branch
    optimizer, _ = training.make_optimizer(nb.with_own_rates(network, 0.01, 0.3), 0.1, 10)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in network.named_parameters():
        wanted = name in ("0.weight", "2.weight", "2.offset_branch.weight", "4.weight")
        assert decays.pop(id(p)) == (0.1 if wanted else 0.0), name
    assert not decays


def test_static_offsets_learn_but_do_not_depend_on_the_input():
    torch.manual_seed(0)
    layer = nb.DeformConv2d(4, 6, 3, padding=1, static=True)
    x = torch.randn(2, 4, 6, 7)
    assert torch.allclose(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-5)
    optimizer, _ = training.make_optimizer(nb.with_own_rates(layer, 0.1, 1.0), 0.1, 10)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    offset, _ = layer.offsets_and_mask(x)
    assert offset.abs().min() > 1e-3 and torch.equal(
        offset, offset[:1, :, :1, :1].expand_as(offset)
    )
    assert not layer.offset_branch.weight.any()


# --- refusals


def changed(**new):
    """A case with some arguments replaced; a function changes the one there was."""
    tensors, options = case(dtype=torch.float32)
    arguments = tensors | options
    return arguments | {
        name: value(arguments[name]) if callable(value) else value for name, value in new.items()
    }


@pytest.mark.parametrize(
    "new, message",
    [
        (dict(input=lambda t: t[0]), "input has the shape (4, 6, 7); it needs 4 dimensions."),
        (
            dict(offset=lambda t: t[None]),
            "offset has the shape (1, 2, 18, 6, 7); it needs 4 dimensions.",
        ),
        (
            dict(weight=lambda t: t[..., 0]),
            "weight has the shape (6, 4, 3); it needs 4 dimensions.",
        ),
        (dict(bias=lambda t: t[:, None]), "bias has the shape (6, 1); it needs 1 dimension."),
        (dict(mask=lambda t: t[0]), "mask has the shape (9, 6, 7); it needs 4 dimensions."),
        (
            dict(weight=lambda t: t.double()),
            "weight is torch.float64 on cpu: give all tensors one floating-point type and one d",
        ),
        (
            dict(offset=lambda t: t.bfloat16()),
            "input is torch.float32 on cpu, offset is torch.bfloat16 on cpu",
        ),
        (
            dict(mask=lambda t: t.long()),
            "input is torch.float32 on cpu, mask is torch.int64 on cpu",
        ),
        (
            dict(bias=lambda t: t.to("meta")),
            "input is torch.float32 on cpu, bias is torch.float32 on meta",
        ),
        (
            dict(offset=lambda t: t.to("meta")),
            "input is torch.float32 on cpu, offset is torch.float32 on meta",
        ),
        (
            {name: (lambda t: t.long()) for name in ("input", "offset", "weight", "bias", "mask")},
            "input is torch.int64 on cpu",
        ),
        (dict(stride=0), "stride is (0, 0); it needs one or two integers of at least 1."),
        (
            dict(stride=(1, 2, 3)),
            "stride is (1, 2, 3); it needs one or two integers of at least 1.",
        ),
        (dict(padding=(-1, 1)), "padding is (-1, 1); it needs one or two integers of at least 0."),
        (dict(dilation=(1, 0)), "dilation is (1, 0); it needs one or two integers of at least 1."),
        (
            dict(weight=lambda t: t[:, :3]),
            "a weight of shape (6, 3, 3, 3) does not fit 4 input channels.",
        ),
        (
            dict(weight=lambda t: t[:5, :2]),
            "a weight of shape (5, 2, 3, 3) does not fit 4 input channels.",
        ),
        (
            dict(weight=lambda t: t[:, :0]),
            "a weight of shape (6, 0, 3, 3) does not fit 4 input channels.",
        ),
        (
            dict(weight=lambda t: t[..., :0]),
            "a weight of shape (6, 4, 3, 0) does not fit 4 input channels.",
        ),
        (
            dict(weight=lambda t: t.repeat(1, 2, 1, 1)),
            "a weight of shape (6, 8, 3, 3) does not fit 4 input channels.",
        ),
        (dict(dilation=5), "A window of 11 pixels does not fit 6 pixels with padding 1"),
        (
            dict(offset=lambda t: t[:, :17]),
            "(2, 17, 6, 7); it needs (2, 2 * 9 * offset groups, 6, 7), the offset groups divid",
        ),
        (dict(offset=lambda t: t[:, :0]), "offset has the shape (2, 0, 6, 7)"),
        (dict(offset=lambda t: t.repeat(1, 3, 1, 1)), "offset has the shape (2, 54, 6, 7)"),
        (dict(offset=lambda t: t[:1]), "offset has the shape (1, 18, 6, 7)"),
        (dict(offset=lambda t: t[..., :6]), "offset has the shape (2, 18, 6, 6)"),
        (dict(stride=2), "it needs (2, 2 * 9 * offset groups, 3, 4)"),
        (
            dict(mask=lambda t: t[:, :8]),
            "mask has the shape (2, 8, 6, 7); with this offset it needs (2, 9, 6, 7).",
        ),
        (
            dict(mask=lambda t: t[:1]),
            "mask has the shape (1, 9, 6, 7); with this offset it needs (2, 9, 6, 7).",
        ),
        (dict(bias=lambda t: t[:5]), "bias has 5 entries for 6 output channels."),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(new, message):
    with pytest.raises(ProjectError, match=re.escape(message)) as caught:
        nb.deform_conv2d(**changed(**new))
    assert "\n" not in str(caught.value)


def test_no_ready_made_operator():
    """Neither the notebook nor src/ takes deformable convolution from anywhere."""
    code = {
        path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").glob("*.py"))
    }
    for name in notebooks.names():
        cells = enumerate(notebooks.read(name).cells)
        code |= {f"{name}, cell {i}": cell.source for i, cell in cells if cell.cell_type == "code"}
    assert any("def deform_conv2d" in source for source in code.values()), (
        "the test looks at the right cells"
    )
    for where, source in code.items():
        assert not re.search(r"torchvision\.ops|torch\.ops\.(?!aten\b)|mmcv", source), where
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                origins = [getattr(node, "module", None) or ""] + [
                    alias.name for alias in node.names
                ]
                assert not any(
                    re.search(r"deform|(^|\.)ops($|\.)", name.lower()) for name in origins
                ), (where, origins)
            elif isinstance(node, ast.Attribute):
                assert node.attr not in ("deform_conv2d", "DeformConv2d"), where
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in ("deform_conv2d", "DeformConv2d"), where


# --- the heads


def levels(batch, classes=3, side=8, channels=(5, 6, 7)):
    """Feature maps of three strides, masks and labels."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(batch, c, side >> i, side >> i, generator=generator)
        for i, c in enumerate(channels)
    ]
    masks = torch.rand(batch, 4 * side, 4 * side, generator=generator) < 0.5
    return maps, masks, torch.arange(batch) % classes


def head(key, profile="smoke"):
    torch.manual_seed(0)
    return nb.Head(nb.VARIANTS[key], (5, 6, 7), 3, nb.CONFIGS[profile])


def test_the_question_is_crossed():
    crossed = {f"{kind}_{k}" for kind in ("ordinary", "static", "deformable") for k in (1, 9, 25)}
    assert crossed <= set(nb.VARIANTS)
    assert 10 <= len(nb.VARIANTS) <= 12
    for key in crossed:
        layer, kind = head(key).layers[-1][0], key.split("_")[0]
        assert math.prod(layer.kernel_size) == int(key.split("_")[1])
        assert isinstance(layer, nb.DeformConv2d) == (kind != "ordinary")
        if kind != "ordinary":
            assert layer.offset_branch.weight.requires_grad == (kind == "deformable")
            assert layer.offset_branch.bias.requires_grad
        assert len(head(key).layers) == 1
    assert [type(block[0]) for block in head("stacked").layers] == 2 * [nb.DeformConv2d]
    assert head("dilated").layers[-1][0].dilation == (2, 2)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_all_kinds_start_alike(side):
    """With zero offsets the three kinds are the same function of the same weights."""
    maps, _, _ = levels(2)
    ordinary = head(f"ordinary_{side**2}").eval()
    wanted = ordinary(maps)
    for kind in ("static", "deformable"):
        other = head(f"{kind}_{side**2}").eval()
        missing = other.load_state_dict(ordinary.state_dict(), strict=False)
        assert all("offset_branch" in name for name in missing.missing_keys)
        assert not missing.unexpected_keys
        for a, b in zip(other(maps), wanted):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("key", sorted(nb.VARIANTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_step_of_the_gpu_profile(key, dtype):
    """Small maps, as there may be no GPU; with autocast, as that profile has it."""
    config, network = nb.CONFIGS["gpu"], head(key, "gpu")
    maps, masks, labels = levels(4)
    parts = nb.with_own_rates(network, config.lr, config.offset_lr_factor)
    optimizer, _ = training.make_optimizer(parts, config.weight_decay, 10)
    before = copy.deepcopy(network.state_dict())
    with Runtime(torch.device("cpu"), autocast=dtype).precision():
        parts = nb.losses(*network(maps), masks, labels)
    loss = parts["loss"].mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(len(value) == 4 for value in parts.values())
    for name, p in network.named_parameters():
        still = not p.requires_grad or p.numel() == 0
        assert p.isfinite().all() and torch.equal(p, before[name]) == still, name


def test_losses_by_hand():
    logits, foreground = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2, 2)
    masks, labels = torch.zeros(2, 4, 4, dtype=torch.bool), torch.tensor([0, 0])
    parts = nb.losses(logits, foreground, masks, labels)
    wanted = torch.tensor([math.log(1 + math.exp(-2)), math.log(1 + math.e)])
    assert torch.allclose(parts["cross_entropy"], wanted)
    assert torch.allclose(parts["mask_loss"], torch.tensor(math.log(2) + 1)), "nothing to find"
    assert torch.allclose(parts["loss"], parts["cross_entropy"] + parts["mask_loss"])
    assert parts["accuracy"].tolist() == [1.0, 0.0]
    masks[:, :2] = True  # half of each image; one half is found everywhere
    parts = nb.losses(logits, foreground, masks, labels)
    assert torch.allclose(parts["mask_loss"], torch.tensor(math.log(2) + 0.5))
    pixel = torch.ones(1, 1, 1, dtype=torch.bool)  # a single one, found by half: 1 - 2 * 0.5 / 1.5
    for logit, iou in ((0.0, 0.0), (0.5, 1.0)):
        parts = nb.losses(logits[:1], torch.full((1, 1, 1), logit), pixel, labels[:1])
        share = 1 / (1 + math.exp(-logit))
        wanted = -math.log(share) + 1 - 2 * share / (1 + share)
        assert parts["mask_loss"].item() == pytest.approx(wanted)
        assert parts["mask_iou"].item() == iou, "above 0 is foreground"


def test_the_mean_is_weighted_with_the_foreground():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    everywhere = nb.foreground_mean(x, torch.full((1, 1, 2, 2), 50.0))
    assert torch.allclose(everywhere, x.sum(dim=(2, 3)) / 5)
    corner = torch.full((1, 1, 2, 2), -50.0)
    corner[..., 1, 0] = 50.0
    assert torch.allclose(nb.foreground_mean(x, corner), x[:, :, 1, 0] / 2)


def test_macs_by_hand():
    w, shapes = nb.CONFIGS["smoke"].width, [(5, 8, 8), (6, 4, 4), (7, 2, 2)]
    layer = 64 * 9 * w * w
    reduce = w * (64 * 5 + 16 * 6 + 4 * 7)
    plain = reduce + layer + 64 * w + 3 * w
    count = functools.partial(trials.count_macs, shapes=shapes)
    assert count(head("ordinary_9")) == count(head("dilated")) == plain
    branch, sampling = 64 * 9 * w * 18, 64 * 4 * 9 * w
    assert count(head("static_9")) == plain + sampling, "its offsets are constants"
    assert count(head("deformable_9")) == plain + sampling + branch
    assert count(head("stacked")) == plain + layer + 2 * (sampling + branch)
    assert count(head("grouped")) == plain + sampling + 3 * branch  # 2 groups of 27
    smaller = plain - layer + 64 * w * w
    assert count(head("ordinary_1")) == smaller
    assert count(head("deformable_1")) == smaller + 64 * w * (2 + 4)
    assert count(head("deformable_25")) == plain - layer + 64 * 25 * w * (w + 50 + 4)


class FewViews(objects.Views):
    """Views whose class and mask can be told from the features."""

    @classmethod
    def make(cls, n=48, seed=0):
        generator = torch.Generator().manual_seed(seed)
        labels, side = torch.arange(n) % 3, 8
        masks = torch.zeros(n, 32, 32, dtype=torch.bool)
        maps = [0.1 * torch.randn(n, c, side >> i, side >> i, generator=generator)
                for i, c in enumerate((5, 6, 7))]  # fmt: skip
        for k in range(n):
            y, x = (4 * torch.randint(0, 5, (2,), generator=generator)).tolist()
            masks[k, y : y + 16, x : x + 16] = True
            maps[0][k, labels[k], y // 4 : y // 4 + 4, x // 4 : x // 4 + 4] += 2
        return cls([m.half() for m in maps], masks, labels, torch.arange(n) // 2)


@pytest.fixture
def checkpoints(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path)


@pytest.mark.parametrize("key", ["ordinary_9", "static_1", "deformable_9"])
def test_heads_learn_and_repeat(key, checkpoints):
    config = nb.replace(nb.CONFIGS["smoke"], epochs=12, batch_size=16, dropout=(0.0, 0.0))
    sets = {"train": [FewViews.make(seed=0), FewViews.make(seed=1)], "val": FewViews.make(seed=2)}

    def train():
        network, history = nb.train_head("few", nb.VARIANTS[key], sets, 3, config, CPU, 0)
        return network, history, nb.score_views(network, sets["val"], CPU)

    (network, history, scores), (again, _, _) = train(), train()
    assert history.column("train_loss")[-1] < 0.6 * history.column("train_loss")[0]
    assert scores["accuracy"].mean() > 0.9 and scores["mask_iou"].mean() > 0.5
    assert scores["found"].dtype == torch.int64 and len(scores["loss"]) == 48
    for a, b in zip(network.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_scores_are_taken_sample_by_sample():
    network, views = head("deformable_9").eval(), FewViews.make(20)
    whole, pieces = (
        trials.score(network, nb.losses, lambda i: views.batch(i, CPU), 20, size=size)
        for size in (20, 7)
    )
    assert whole.keys() == pieces.keys()
    assert all(torch.allclose(whole[k].float(), pieces[k].float(), atol=1e-5) for k in whole)


# --- the backbone that learns


@pytest.mark.parametrize("kind", ["ordinary", "dilated", "deformable"])
def test_the_last_stage_keeps_its_resolution_and_weights(kind):
    torch.manual_seed(0)
    plain = torchvision.models.resnet18()
    weights = [m.weight for m in plain.layer4.modules() if isinstance(m, nn.Conv2d)]
    nb.change_last_stage(plain, kind)
    kinds = (nn.Conv2d, nb.DeformConv2d)
    changed = [m for m in plain.layer4.modules() if isinstance(m, kinds) and len(m.weight) == 512]
    assert len(changed) == 5 and all(m.stride == (1, 1) for m in changed)
    assert {id(m.weight) for m in changed} == {id(weight) for weight in weights}
    large = [m for m in changed if m.kernel_size == (3, 3)]
    assert len(large) == 4
    assert {isinstance(m, nb.DeformConv2d) for m in large} == {kind == "deformable"}
    assert {m.dilation for m in large} == {(1, 1) if kind == "ordinary" else (2, 2)}
    x = torch.randn(2, 256, 4, 4)
    assert plain.layer4(x).shape == (2, 512, 4, 4)


def test_the_deformable_stage_starts_as_the_dilated_one():
    torch.manual_seed(0)
    dilated = torchvision.models.resnet18().eval()
    deformable = copy.deepcopy(dilated)
    nb.change_last_stage(dilated, "dilated")
    nb.change_last_stage(deformable, "deformable")
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(deformable(x), dilated(x), atol=1e-4)


def test_the_fine_tuned_network_learns_on_a_few_images():
    torch.manual_seed(0)
    model = nb.FineTuned(backbones.load_backbone("resnet18", pretrained=False), "deformable", 2)
    images, masks = torch.rand(8, 3, 32, 32), torch.zeros(8, 16, 16, dtype=torch.bool)
    images[::2] *= 0.3
    masks[:, 4:12, 4:12] = True
    labels = torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    found = []
    for _ in range(8):
        loss = nb.losses(*model(images), masks, labels)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.7 * found[0]
    assert any(m.offset_branch.weight.any() for m in model.modules()
               if isinstance(m, nb.DeformConv2d)), "the offsets have moved"  # fmt: skip


def cell_with(text):
    """The one code cell of the notebook that holds a text."""
    (cell,) = [c for c in notebooks.read("deformable_convolution").cells
               if c.cell_type == "code" and text in c.source]  # fmt: skip
    return cell.source


@pytest.mark.parametrize(
    "profile, found, fetched",
    [
        ("smoke", "resnet18", [False]),
        ("demo", "resnet18", [False]),
        ("cpu", "resnet18", [True]),
        ("cpu", "efficientnet_lite0", [True, False]),  # the download failed
    ],
)
def test_small_profiles_download_no_weights(profile, found, fetched):
    asked = []

    def load_backbone(name, pretrained=True):
        asked.append(pretrained)
        return types.SimpleNamespace(name=found if pretrained else name)

    space = {
        "run": types.SimpleNamespace(profile=profile),
        "backbones": types.SimpleNamespace(load_backbone=load_backbone),
        "config": types.SimpleNamespace(fine_seeds=()),
    }
    exec(cell_with("pretrained = "), space)
    assert asked == fetched and space["resnet"].name == "resnet18"
    assert space["pretrained"] is (fetched == [True])


# --- what is said of the comparison


@pytest.mark.parametrize("lead, little", [(1.5, True), (-1.5, True), (8.0, False), (-8.0, False)])
def test_every_difference_is_said_with_interval_and_verdict(monkeypatch, lead, little):
    names = ("mask_iou_gain", "reach_gain", "adaptation_gain", "dilation_gain")
    metrics = {
        name: results.Metric(shift, 9, (shift - 1, shift + 1), results.POINTS)
        for name, shift in zip((*names, "gain_over_dilated", "accuracy_gain"), (3, 2, 0, -4, 5, -6))
    }
    ahead = results.Metric(lead, 9, (lead - 1, lead + 1), results.POINTS)
    monkeypatch.setattr(comparison, "lead", lambda *_: ("deformable_9", ahead, 1))
    baseline = dict.fromkeys(("linear_probe_accuracy", "mean_mask_iou", "filled_box_iou"))
    heard = []

    def say(text, **values):
        heard.append(" ".join(results.render(text, metrics, **values).split()))

    space = vars(nb) | {"comparison": comparison, "results": results, "metrics": metrics}
    space |= {"baseline": baseline, "scores": {}, "photos": None}
    exec(cell_with("**Reading.**"), space | {"run": types.SimpleNamespace(say=say)})
    (text,) = heard
    for name, verdict in {
        "mask_iou_gain": "a gain",
        "reach_gain": "a gain",
        "adaptation_gain": "whether it pays to see the input",
        "dilation_gain": "a loss",
        "gain_over_dilated": "a gain",
        "accuracy_gain": "a loss",
    }.items():
        assert f"{metrics[name]}: {verdict}" in text, name
    assert (": little, as section 4" in text) is little


@pytest.mark.parametrize("lost", [1, slice(None)])
def test_offsets_are_followed_only_where_the_object_has_positions(lost):
    """Of six objects, one is nowhere inside in one view; or all are, and then all count."""
    n, seeds = 6, (0, 1)
    masks = torch.ones(4, n, 8, 8, dtype=torch.bool)
    masks[2, lost] = False
    angle = torch.tensor([0.0, 0.25, 0.0, 0.0])[:, None].repeat(1, n) * math.radians(90)
    size = torch.tensor([1.0, 1.0, 0.5, 1.0])[:, None].repeat(1, n)
    if lost == 1:
        angle[1, 1] = size[2, 1] = 7.0  # what must not count
    views = iter(types.SimpleNamespace(number=i, masks=masks[i]) for i in range(4))

    def over_views(head, view, *_):
        return [angle[view.number], size[view.number]]

    class Test(list):
        photos = torch.arange(n)

    metrics = {}
    space = vars(nb) | {
        "objects": types.SimpleNamespace(
            extract=lambda *_, **__: next(views), shrink=objects.shrink
        ),
        "offsets": types.SimpleNamespace(over_views=over_views, fitted_map=None),
        "config": types.SimpleNamespace(seeds=seeds, crop_side=64),
        "turned_heads": {("deformable_9", seed): None for seed in seeds},
        "crops": {"test": Test(range(n))},
        "shapes": [(3, 8, 8)],
        **dict(backbone=None, runtime=None, metrics=metrics, results=results),
    }
    exec(cell_with("changes = "), space)
    assert space["kept"].tolist() == [lost != 1 or i != 1 for i in range(n)]
    turn, zoom = metrics["turned.turn_followed"], metrics["turned.zoom_followed"]
    assert (turn.value, zoom.value) == (pytest.approx(0.25), pytest.approx(0.5))
    assert turn.n == zoom.n == (5 if lost == 1 else 6)


# --- the benchmark


TINY = bench.Config(shapes=((1, 4, 6, 9),), rounds=1, threads=torch.get_num_threads())


def test_the_contenders_compute_the_same():
    tensors = bench.inputs(TINY.shapes[0], TINY, CPU)
    found = {name: function(*tensors) for name, function in bench.contenders().items()}
    assert set(found) == {"ours", "torchvision", "conv", "readable", "grid_sample"}
    conv = found.pop("conv")
    assert (
        all(torch.allclose(out, found["ours"], atol=1e-5) for out in found.values())
        and conv.shape == found["ours"].shape
    )
    still = bench.contenders()["grid_sample"](tensors[0], torch.zeros_like(tensors[1]), tensors[2])
    assert torch.allclose(still, conv, atol=1e-5)


def test_the_contenders_take_their_own_paths(monkeypatch):
    taken = []
    contenders = bench.contenders()
    apply = fast_sampling.SampledProduct.apply

    def spy(*arguments):
        taken.append("fast")
        return apply(*arguments)

    monkeypatch.setattr(fast_sampling.SampledProduct, "apply", spy)
    tensors = bench.inputs(TINY.shapes[0], TINY, CPU)
    for name in ("torchvision", "conv", "readable", "grid_sample"):
        contenders[name](*tensors)
        assert not taken, name
    contenders["ours"](*tensors)
    assert taken == ["fast"]


def test_the_benchmark_stores_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("src.results.ROOT", tmp_path)
    monkeypatch.setattr(bench, "peak_megabytes", lambda *_: None)
    path = bench.run(TINY, CPU)
    stored = json.loads(path.read_text())
    assert path == tmp_path / "reports" / "results" / "deformable_benchmark.json"
    assert (
        stored["profile"] == "bench" and not stored["standin"] and stored["config"]["rounds"] == 1
    )
    values = {name: metric["value"] for name, metric in stored["metrics"].items()}
    output = capsys.readouterr().out
    printed = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.splitlines()
        if "1x4x6x9 |" in line
    ]
    assert f"ours over conv: {values['geometric_mean.ours_over_conv']:.2f}\n" in output
    assert [row[1] for row in printed] == list(bench.contenders())
    for _, name, median, quartiles, peak, over_ours, over_conv in printed:
        prefix = f"1x4x6x9.{name}"
        assert median == f"{1000 * values[prefix + '_seconds']:.2f}" and peak == "–"
        q1, q3 = (f"{1000 * values[f'{prefix}_seconds_{q}']:.2f}" for q in ("q1", "q3"))
        assert quartiles == f"{q1} to {q3}"
        assert over_ours == ("1" if name == "ours" else f"{values[prefix + '_over_ours']:.2f}")
        assert over_conv == ("1" if name == "conv" else f"{values[prefix + '_over_conv']:.2f}")
    assert values["1x4x6x9.ours_over_conv"] == pytest.approx(
        values["1x4x6x9.ours_seconds"] / values["1x4x6x9.conv_seconds"]
    )
    assert values["geometric_mean.ours_over_conv"] == pytest.approx(
        values["1x4x6x9.ours_over_conv"]
    )
    assert not any(name.endswith("peak_mb") for name in values)


def test_medians_quartiles_and_geometric_mean():
    shapes = ((1, 1, 1, 1), (2, 2, 2, 2))
    seconds = {
        "1x1x1x1": {
            "ours": [2.0, 4.0, 6.0],
            "torchvision": [4.0] * 3,
            "conv": [1.0, 1.0, 2.0],
            "readable": [9, None, 9],
        },
        "2x2x2x2": {"ours": [12.0], "torchvision": [24.0], "conv": [1.0], "readable": [12.0]},
    }
    metrics = bench.measures(shapes, seconds, {})
    assert metrics["1x1x1x1.ours_seconds"].value == 4 and metrics["1x1x1x1.ours_seconds"].n == 3
    assert (
        metrics["1x1x1x1.ours_seconds_q1"].value,
        metrics["1x1x1x1.ours_seconds_q3"].value,
    ) == (3, 5)
    assert metrics["1x1x1x1.ours_over_conv"].value == 3, (
        "the median of 2, 4 and 3, not the ratio of the medians"
    )
    assert metrics["1x1x1x1.torchvision_over_ours"].value == 1
    assert (
        metrics["1x1x1x1.readable_seconds"].n == 2
        and metrics["1x1x1x1.readable_over_ours"].value == 3
    )
    assert metrics["geometric_mean.ours_over_conv"].value == pytest.approx(6)


def test_peak_memory_of_a_fresh_process():
    """Of 4.2 million numbers: output, its gradient and the input's are 16.8 MB each."""
    peak = bench.peak_megabytes("conv", (4, 16, 16, 256), TINY, CPU)
    assert peak is None or 48 < peak < 300
