"""The definitions of notebooks/deformable_convolution.ipynb: the operator, the layer, the crops, the heads; and its benchmark."""

import ast
import copy
import json
import math
import random
import re
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from src import ROOT, ProjectError
from src.data import Source
from src.device import Runtime
from tools import bench, notebooks
from tools.notebooks import definitions

nb = definitions("deformable_convolution")
CPU = Runtime(torch.device("cpu"), autocast=False)


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
    """Random tensors {input, offset, weight, bias, mask} that fit together, and the settings {stride, padding, dilation}."""
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
    """Equations 1 to 4 of the papers, one corner of one tap of one position at a time, in Python's own (double) numbers."""
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


def test_many_blocks_and_float32_equal_torchvision(monkeypatch):
    """The columns are made block by block: with blocks shorter than the image, and a last one that is shorter still."""
    monkeypatch.setattr(nb, "BLOCK", 1)
    tensors, options = case(size=(9, 15), groups=2, offset_groups=2)
    assert len(nb.position_blocks(9 * 15, 10)) == 3
    assert_equals_torchvision(tensors, options, 1e-11)
    assert_equals_torchvision({name: t.float() for name, t in tensors.items()}, options, 1e-4)


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
    monkeypatch.setattr(nb.SampledProduct, "apply", nb.sampled_product)
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
    assert out.dtype == torch.bfloat16 and distance(out, layer(tensors["input"])) < 0.05


def smooth_case(**settings):
    """A case whose positions keep a tenth of a pixel from the integers, where the interpolation has kinks."""
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
        getattr(nb, name),
        list(tensors.values())[: 4 if name == "SampledProduct" else 5],
    )

    def call(*values):
        return function.apply(*values, 5, 1)

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


def test_offsets_are_bounded_where_asked():
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    free, bounded = (
        nb.DeformConv2d(4, 4, 3, padding=1, modulation=True, max_offset=bound)
        for bound in (None, 1.5)
    )
    for scale, close in ((100.0, False), (1e-3, True)):
        nn.init.normal_(free.offset_branch.weight, std=scale)
        bounded.load_state_dict(free.state_dict())
        (offset, mask), (limited, same_mask) = free.offsets_and_mask(x), bounded.offsets_and_mask(x)
        assert (
            limited.abs().max() <= 1.5
            and torch.equal(mask, same_mask)
            and 0 <= mask.min() <= mask.max() <= 1
        )
        assert torch.allclose(limited, offset, atol=1e-5) == close
        assert (limited.abs().max() > 1.49) != close and torch.equal(limited.sign(), offset.sign())


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


def small_network(factor):
    torch.manual_seed(0)
    deformable = nb.DeformConv2d(4, 4, 3, padding=1, modulation=True, offset_lr_factor=factor)
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
    network = small_network(factor)
    before = copy.deepcopy(dict(network.named_parameters()))
    optimiser = torch.optim.AdamW(nb.parameter_groups(network, lr=0.01, weight_decay=0.1))
    network(
        torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    ).square().sum().backward()
    optimiser.step()
    return {name: p.detach() - before[name].detach() for name, p in network.named_parameters()}


def test_the_offset_branch_learns_at_its_own_rate():
    full, tenth = step_of(1.0), step_of(0.1)
    for name in full:
        factor = 0.1 if "offset_branch" in name else 1.0
        assert full[name].abs().max() > 5e-3, name
        assert torch.allclose(tenth[name], factor * full[name], atol=1e-5), name


def test_weight_decay_is_only_on_matrices_and_kernels():
    network = small_network(0.3)
    network[0].weight.requires_grad_(False)
    groups = nb.parameter_groups(network, lr=0.01, weight_decay=0.1)
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(settings), "no parameter twice"
    for name, p in network.named_parameters():
        if name == "0.weight":
            assert id(p) not in settings, "frozen"
        else:
            decays = name in ("2.weight", "2.offset_branch.weight", "4.weight")
            rate = 0.003 if "offset_branch" in name else 0.01
            assert settings.pop(id(p)) == (pytest.approx(rate), 0.1 if decays else 0.0), name
    assert not settings


# --- refusals


def changed(**new):
    """A case of 4 channels, 6 outputs and a 3x3 kernel with some arguments replaced; a function changes the one there was."""
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
            "(2, 17, 6, 7); it needs (2, 2 * 9 * offset groups, 6, 7), the offset groups dividing 4",
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
        assert (
            "torchvision.ops" not in source and "torch.ops." not in source and "mmcv" not in source
        ), where
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


# --- crops and views


def test_cut_out_at_the_border():
    """A box of 32x16 in the upper left corner: the square of side 1.5 * 1.25 * 32 = 60 around it, at its own resolution."""
    photo = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    mask = np.zeros((80, 90), np.uint8)
    mask[:16, :32] = 1
    crop = nb.cut_out(photo, mask, (0, 0, 32, 16), 60)
    assert crop.shape == (4, 60, 60) and crop.dtype == torch.uint8
    outside = torch.ones(60, 60, dtype=torch.bool)
    outside[22:, 14:] = (
        False  # the box's centre (16, 8) lands in the middle, so the photo begins at row 22 and column 14
    )
    assert (crop[:3, outside] == nb.GREY).all() and not crop[3, outside].any()
    assert np.array_equal(crop[:3, 22:, 14:].permute(1, 2, 0).numpy(), photo[:38, :46])
    assert np.array_equal(crop[3, 22:, 14:].numpy(), 255 * mask[:38, :46])


@pytest.mark.parametrize(
    "box", [(50, 20, 32, 16), (20, 50, 16, 32), (300, 20, 32, 16), (0, 0, 120, 60)]
)
def test_cut_out_keeps_aspect_and_centre(box):
    photo, mask = np.zeros((80, 120, 3), np.uint8), np.zeros((80, 120), np.uint8)
    left, top, width, height = box
    mask[top : top + height, left : left + width] = 1
    side = 30
    crop = nb.cut_out(photo, mask, box, side)
    assert crop.shape == (4, side, side)
    rows, columns = ((crop[3] > 127).any(dim=d).nonzero().flatten() for d in (1, 0))
    if left < 120:  # else the box lies outside of the photo, and there is nothing but grey
        scale = side / (nb.ROOM * nb.CONTEXT * max(width, height))
        assert abs(len(rows) - scale * height) <= 1 and abs(len(columns) - scale * width) <= 1
        assert (
            abs(float(rows.float().mean()) - 14.5) <= 0.6
            and abs(float(columns.float().mean()) - 14.5) <= 0.6
        )
    else:
        assert not len(rows) and (crop[:3] == nb.GREY).all()


def crop_with_block(y, x, size=8, side=48):
    """A dark crop whose central part of 32 pixels has a bright block, also its mask, with the upper left corner at (y, x)."""
    crop = torch.zeros(1, 4, side, side, dtype=torch.uint8)
    crop[:, :, 8 + y : 8 + y + size, 8 + x : 8 + x + size] = 255
    return crop


def block(y, x, height=8, width=8):
    image = torch.zeros(32, 32)
    image[y : y + height, x : x + width] = 1
    return image


def test_the_plain_view_is_the_central_part():
    crops = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, 4, 48, 48), dtype=np.uint8)
    )
    crops[:, 3] = 255 * (crops[:, 3] > 127)
    images, masks = nb.make_views(crops, 32)
    assert (
        images.shape == (3, 3, 32, 32) and masks.shape == (3, 16, 16) and masks.dtype == torch.bool
    )
    centre = crops[:, :, 8:40, 8:40].float()
    assert torch.allclose(images, centre[:, :3] / 255, atol=1e-4)
    assert torch.equal(masks, F.avg_pool2d(centre[:, 3:], 2)[:, 0] > 127)


@pytest.mark.parametrize(
    "view, wanted",
    [
        (dict(), block(2, 4)),
        (
            dict(angle=90.0),
            block(4, 22),
        ),  # clockwise: left of the upper edge goes to the top of the right edge
        (dict(angle=-90.0), block(20, 2)),
        (dict(angle=180.0), block(22, 20)),
        (dict(mirror=-1.0), block(2, 20)),
        (dict(mirror=torch.tensor([-1.0]), angle=torch.tensor([90.0])), None),
    ],
)
def test_views_turn_clockwise_and_mirror(view, wanted):
    images, masks = nb.make_views(crop_with_block(2, 4), 32, **view)
    if wanted is None:  # turned and mirrored: the same as one of the two orders of the two
        turned = [block(4, 22).flip(1), block(20, 2).flip(1)]
        assert any(torch.allclose(images[0, 0], t, atol=1e-3) for t in turned)
        wanted = images[0, 0].round()
    assert torch.allclose(images[0], wanted.expand(3, -1, -1), atol=1e-3)
    assert torch.equal(masks[0], F.avg_pool2d(wanted[None], 2)[0] > 0.5), (
        "the mask goes with the image"
    )


def test_views_zoom_and_shear():
    images, masks = nb.make_views(crop_with_block(12, 12), 32, zoom=2.0)
    assert torch.allclose(images[0, :, 9:23, 9:23], torch.ones(()), atol=1e-3), (
        "a block of 8 pixels fills 16"
    )
    assert (
        not images[0, :, [*range(7), *range(25, 32)]].any()
        and not images[0, :, :, [*range(7), *range(25, 32)]].any()
    )
    assert torch.equal(masks[0], block(8, 8, 16, 16)[::2, ::2] > 0)
    smaller, _ = nb.make_views(crop_with_block(8, 8, 16), 32, zoom=0.5)
    assert torch.allclose(smaller[0, :, 6:26, 6:26], block(12, 12)[6:26, 6:26], atol=1e-3), (
        "a block of 16 pixels fills 8"
    )
    bar = torch.zeros(1, 4, 48, 48, dtype=torch.uint8)
    bar[..., 22:26] = 255
    sheared = nb.make_views(bar, 32, shear=0.5)[0][0, 0]
    centres = (sheared * torch.arange(32)).sum(dim=1) / sheared.sum(dim=1)
    assert torch.allclose((centres[1:] - centres[:-1]).abs(), torch.full((31,), 0.5), atol=0.02)
    assert abs(float(centres.mean()) - 15.5) < 0.01


def test_views_are_grey_outside_and_each_has_its_own_numbers():
    crops = torch.cat([crop_with_block(2, 4), crop_with_block(2, 4)])
    images, masks = nb.make_views(crops, 32, angle=torch.tensor([0.0, 90.0]))
    assert torch.allclose(images[:, 0], torch.stack([block(2, 4), block(4, 22)]), atol=1e-3)
    images, masks = nb.make_views(torch.full((1, 4, 48, 48), 255, dtype=torch.uint8), 32, zoom=0.5)
    assert (
        torch.allclose(images[0, :, 0, 0], torch.tensor(nb.GREY / 255), atol=1e-4)
        and not masks[0, 0, 0]
        and masks[0, 8, 8]
    )


def test_random_views_keep_to_their_bounds():
    config, seen = nb.CPU, []
    original = nb.make_views
    try:
        nb.make_views = lambda crops, side, *numbers: seen.append((side, *numbers))
        torch.manual_seed(0)
        nb.random_views(torch.zeros(500, 4, 8, 8, dtype=torch.uint8), config)
    finally:
        nb.make_views = original
    side, angle, zoom, shear, mirror = seen[0]
    assert side == config.crop_side and 25 < angle.abs().max() <= config.max_angle and shear == 0
    assert 1 / config.max_zoom <= zoom.min() < 0.8 and 1.2 < zoom.max() <= config.max_zoom * (
        1 + 1e-6
    )
    assert set(mirror.tolist()) == {-1.0, 1.0} and 0.4 < (mirror > 0).float().mean() < 0.6


def test_mask_iou_by_hand():
    rows, columns, nothing = torch.zeros(3, 4, 4).unbind()
    rows[:2], columns[:, :2] = 1, 1
    found = torch.stack([rows, rows, rows, nothing, nothing]) * 2 - 1
    masks = torch.stack([rows, columns, 1 - rows, rows, nothing]).bool()
    assert torch.allclose(nb.mask_iou(found, masks), torch.tensor([1.0, 4 / 12, 0.0, 0.0, 0.0]))
    large = columns.repeat_interleave(2, 0).repeat_interleave(2, 1).bool()[None]
    assert nb.mask_iou(columns[None] * 2 - 1, large) == 1, "the answer is enlarged to the mask"


def test_head_loss_by_hand():
    logits, foreground = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2, 2)
    masks, labels = torch.zeros(2, 4, 4, dtype=torch.bool), torch.tensor([0, 0])
    loss, parts = nb.head_loss((logits, foreground), masks, labels, 3.0)
    cross_entropy = (math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2
    assert float(parts["cross_entropy"]) == pytest.approx(cross_entropy, abs=1e-6)
    assert float(parts["mask_loss"]) == pytest.approx(
        math.log(2) + 1
    )  # nothing to find: the Dice loss is 1
    assert (
        float(loss) == pytest.approx(cross_entropy + 3 * (math.log(2) + 1), abs=1e-6)
        and float(parts["accuracy"]) == 0.5
    )
    masks[:, :2] = True  # half of each image; one half is found everywhere
    assert float(
        nb.head_loss((logits, foreground), masks, labels, 3.0)[1]["mask_loss"]
    ) == pytest.approx(math.log(2) + 0.5)


# --- COCO


def rectangle(left, top, width, height):
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def annotation(number, box, segmentation=None, **new):
    segmentation = rectangle(*box) if segmentation is None else segmentation
    return {
        "id": number,
        "image_id": 1,
        "category_id": 3,
        "segmentation": segmentation,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
    } | new


GOOD = annotation(1, (30, 20, 40, 30))


def coco_folder(folder, annotations, image=True):
    """A COCO folder with two images of 100x80 pixels."""
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 80} for n in (1, 2)],
        "categories": [
            {"id": 3, "name": "car", "supercategory": "vehicle"},
            {"id": 4, "name": "cat", "supercategory": "animal"},
        ],
        "annotations": annotations,
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    (folder / "val2017").mkdir()
    for n in (1, 2) if image else ():
        Image.new("RGB", (100, 80), (200, 100, 50)).save(folder / "val2017" / f"{n}.png")
    return Source("MS COCO", "HW3_DATA", folder)


def test_crops_are_collected_with_their_classes_and_images(tmp_path):
    source = coco_folder(
        tmp_path, [GOOD, annotation(2, (10, 10, 30, 60), category_id=4, image_id=2)]
    )
    found = nb.collect_crops("val2017", source, nb.CONFIGS["smoke"])
    assert found["crops"].shape == (2, 4, 96, 96) and found["crops"].dtype == torch.uint8
    assert found["classes"] == ["animal", "vehicle"] and found["labels"].tolist() == [1, 0]
    assert found["images"] == [1, 2] and not found["skipped"]
    assert (
        found["crops"][0, :3, 48, 48].tolist() == [200, 100, 50]
        and found["crops"][0, 3, 48, 48] == 255
    )
    inside = float((found["crops"][0, 3] > 127).float().mean())
    assert inside == pytest.approx(40 * 30 / (nb.ROOM * nb.CONTEXT * 40) ** 2, rel=0.08)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (
            annotation(2, (30, 20, 40, 30), {"size": [80, 100], "counts": [10, 7990]}, iscrowd=1),
            "crowd",
        ),
        (annotation(2, (30, 20, 23, 40)), "tiny or degenerate box"),
        (annotation(2, (30, 20, 0, 40)), "tiny or degenerate box"),
        (annotation(2, (30, 20, 40, -5)), "tiny or degenerate box"),
        (annotation(2, (30, 20, math.nan, 40)), "tiny or degenerate box"),
        (annotation(2, (30, 20, 40, 30), bbox=[30, 20, 40]), "tiny or degenerate box"),
        (annotation(2, (30, 20, 40, 30), [[30, 20, 70, 50]]), "degenerate polygon"),  # two points
        (annotation(2, (30, 20, 40, 30), [[30, 20]]), "degenerate polygon"),  # one
        (annotation(2, (30, 20, 40, 30), segmentation=[]), "degenerate polygon"),
        (
            annotation(2, (30, 20, 40, 30), [[30, 20, 30, 20, 30, 20]]),
            "degenerate polygon",
        ),  # no area
        (
            annotation(2, (30, 20, 40, 30), {"size": [8, 10], "counts": [10, 70]}),
            "degenerate polygon",
        ),  # a mask of another size
    ],
)
def test_unusable_annotations_are_left_out_and_counted(tmp_path, bad, reason):
    found = nb.collect_crops(
        "val2017", coco_folder(tmp_path / "one", [GOOD, bad]), nb.CONFIGS["smoke"]
    )
    assert len(found["crops"]) == 1 and found["skipped"] == {reason: 1}
    with pytest.raises(
        ProjectError, match=f"No object of val2017 can be used .*{reason}.*: check the annotations"
    ):
        nb.collect_crops(
            "val2017", coco_folder(tmp_path / "two", [bad, bad | {"id": 3}]), nb.CONFIGS["smoke"]
        )


def test_images_that_are_missing_or_corrupt_are_named(tmp_path):
    source = coco_folder(tmp_path, [GOOD], image=False)
    with pytest.raises(
        ProjectError,
        match=r"the image .*val2017/1\.png named in instances_val2017\.json is missing",
    ):
        nb.collect_crops("val2017", source, nb.CONFIGS["smoke"])
    for content in (b"no image", b""):
        (tmp_path / "val2017" / "1.png").write_bytes(content)
        with pytest.raises(ProjectError, match=r"cannot read the image .*val2017/1\.png"):
            nb.collect_crops("val2017", source, nb.CONFIGS["smoke"])
    Image.new("RGB", (100, 80)).save(tmp_path / "val2017" / "1.png")
    whole = (tmp_path / "val2017" / "1.png").read_bytes()
    (tmp_path / "val2017" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProjectError, match=r"cannot read the image .*val2017/1\.png"):
        nb.collect_crops("val2017", source, nb.CONFIGS["smoke"])


# --- the heads


def head(key, profile="smoke", in_channels=5, classes=3):
    torch.manual_seed(0)
    return nb.Head(nb.VARIANTS[key], in_channels, classes, nb.CONFIGS[profile])


def test_macs_by_hand():
    n, w = 6 * 6, nb.CONFIGS["smoke"].width
    ordinary = n * 9 * w * w
    plain = n * 5 * w + 3 * ordinary + w * 3 + n * w
    assert (
        nb.count_macs(head("plain"), (5, 6, 6))
        == nb.count_macs(head("plain_dilation_4"), (5, 6, 6))
        == plain
    )
    branch, sampling = n * 9 * w * 18, n * 9 * w * 4
    for layers in (1, 2, 3):
        assert nb.count_macs(head(f"deformable_{layers}"), (5, 6, 6)) == plain + layers * (
            branch + sampling
        )
    assert nb.count_macs(head("groups"), (5, 6, 6)) == plain + 2 * branch + sampling
    assert nb.count_macs(head("modulated"), (5, 6, 6)) == plain + 1.5 * branch + sampling
    assert nb.count_macs(head("points_5x5"), (5, 6, 6)) == plain - ordinary + n * 25 * w * (
        w + 50 + 4
    )


@pytest.mark.parametrize("key", ["plain", "deformable_3", "modulated"])
def test_macs_do_not_depend_on_the_path(key):
    """A GPU takes the readable path, whose matrix product is visible to the accounting; so does bfloat16 on any device."""
    assert nb.count_macs(head(key).bfloat16(), (5, 6, 6)) == nb.count_macs(head(key), (5, 6, 6))


@pytest.mark.parametrize("key", sorted(nb.VARIANTS))
def test_one_step_of_the_gpu_profile(key):
    """Small maps, as there may be no GPU; with bfloat16 autocast, as that profile has it."""
    config, generator = nb.CONFIGS["gpu"], torch.Generator().manual_seed(0)
    network = head(key, "gpu", 152, 12)
    maps, masks = (
        torch.randn(4, 152, 8, 8, generator=generator),
        torch.rand(4, 32, 32, generator=generator) < 0.5,
    )
    optimiser = torch.optim.AdamW(nb.parameter_groups(network, config.lr, config.weight_decay))
    before = copy.deepcopy(network.state_dict())
    with Runtime(torch.device("cpu"), autocast=True).precision():
        loss, parts = nb.head_loss(
            network(maps), masks, torch.tensor([0, 3, 5, 11]), config.mask_weight
        )
    loss.backward()
    optimiser.step()
    assert loss.isfinite() and torch.isclose(
        loss, parts["cross_entropy"] + config.mask_weight * parts["mask_loss"]
    )
    for name, p in network.named_parameters():
        frozen = nb.VARIANTS[key].offsets != "learned" and "offset_branch" in name
        assert p.isfinite().all() and torch.equal(p, before[name]) == frozen, name


def test_frozen_offsets_are_what_they_are_called():
    x = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    plain, zero = head("plain").eval(), head("zero").eval()
    shared = {name: p for name, p in zero.state_dict().items() if "offset_branch" not in name}
    plain.load_state_dict(shared)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain(x), zero(x)))
    offsets = nb.layer_offsets(head("random").eval(), x)
    assert all(
        o.shape == (2, 9, 2, 6, 6)
        and torch.equal(o, o[:1, :, :, :1, :1].expand_as(o))
        and o.std() > 0.5
        for o in offsets[2:]
    )
    assert (
        nb.layer_offsets(head("limited").eval(), x)[0].abs().max() <= 1
        and not nb.layer_offsets(plain, x)[0].any()
    )


def test_tracing_goes_back_through_all_layers():
    plain = head("plain").eval()
    offsets = nb.layer_offsets(plain, torch.zeros(1, 5, 16, 16))
    points = nb.trace(plain, offsets, 0, [8.0, 5.0])
    assert len(points) == 9**3
    assert points.min(dim=0).values.tolist() == [5.0, 2.0] and points.max(
        dim=0
    ).values.tolist() == [11.0, 8.0]
    moved = nb.trace(
        plain, [o + torch.tensor([1.0, 0.0])[:, None, None] for o in offsets], 0, [8.0, 5.0]
    )
    assert torch.allclose(moved, points + torch.tensor([3.0, 0.0])), "y before x: one row per layer"


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


def test_the_readable_contender_takes_the_readable_path(monkeypatch):
    taken = []
    contenders = bench.contenders()
    module = contenders["ours"].func.__globals__
    monkeypatch.setitem(
        module, "sampled_product", lambda *a: taken.append("ours") or nb.sampled_product(*a)
    )
    tensors = bench.inputs(TINY.shapes[0], TINY, CPU)
    contenders["ours"](*tensors)
    assert not taken
    monkeypatch.setattr(
        module["SampledProduct"], "apply", lambda *a: taken.append("fast") or nb.sampled_product(*a)
    )
    contenders["readable"](*tensors)
    assert not taken
    contenders["ours"](*tensors)
    assert taken == ["fast"]


def test_the_benchmark_stores_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("src.results.ROOT", tmp_path)
    path = bench.run(TINY, CPU, memory=False)
    stored = json.loads(path.read_text())
    assert path == tmp_path / "reports" / "results" / "deformable_benchmark.json"
    assert (
        stored["profile"] == "bench" and not stored["standin"] and stored["config"]["rounds"] == 1
    )
    values = {name: metric["value"] for name, metric in stored["metrics"].items()}
    output = capsys.readouterr().out
    printed = [
        line.strip("| ").split(" | ")
        for line in output.splitlines()
        if line.startswith("| 1x4x6x9")
    ]
    assert f"ours over conv: {values['geometric_mean.ours_over_conv']:.2f}\n" in output
    assert [row[1] for row in printed] == list(bench.contenders())
    for _, name, median, quartiles, peak, over_ours, over_conv in printed:
        prefix = f"1x4x6x9.{name}"
        assert median == f"{1000 * values[prefix + '_seconds']:.2f}" and peak == "–"
        assert (
            quartiles
            == f"{1000 * values[prefix + '_seconds_q1']:.2f} to {1000 * values[prefix + '_seconds_q3']:.2f}"
        )
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
    assert (
        metrics["1x1x1x1.ours_seconds"]["value"] == 4 and metrics["1x1x1x1.ours_seconds"]["n"] == 3
    )
    assert (
        metrics["1x1x1x1.ours_seconds_q1"]["value"],
        metrics["1x1x1x1.ours_seconds_q3"]["value"],
    ) == (3, 5)
    assert metrics["1x1x1x1.ours_over_conv"]["value"] == 3, (
        "the median of 2, 4 and 3, not the ratio of the medians"
    )
    assert metrics["1x1x1x1.torchvision_over_ours"]["value"] == 1
    assert (
        metrics["1x1x1x1.readable_seconds"]["n"] == 2
        and metrics["1x1x1x1.readable_over_ours"]["value"] == 3
    )
    assert metrics["geometric_mean.ours_over_conv"]["value"] == pytest.approx(6)


def test_peak_memory_of_a_fresh_process():
    """Ordinary convolution of 4.2 million numbers: output, its gradient and the input's are 16.8 MB each; inputs do not count."""
    peak = bench.peak_megabytes("conv", (4, 16, 16, 256), TINY, CPU)
    assert peak is None or 48 < peak < 300
