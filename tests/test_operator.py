"""Deformable convolution: against a loop, the library, finite differences; its layer; timing."""

import functools
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

from src import ProjectError, fast_sampling, run
from tools import bench, notebooks

nb = notebooks.definitions("deformable_convolution")
deform_conv2d = nb.deform_conv2d


def case(seed, dtype=torch.float64, **fixed):
    """Random arguments of every kind: sizes, kernels, places, groups, offsets far and near."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=g))]

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    groups, offset_groups = (
        fixed.get("groups", pick(1, 2)),
        fixed.get("offset_groups", pick(1, 2, 3)),
    )
    channels, outputs = math.lcm(groups, offset_groups) * pick(1, 2), groups * pick(1, 2)
    kernel = fixed.get("kernel", (pick(1, 2, 3), pick(1, 2, 3)))
    place = [(pick(1, 2), pick(1, 2)), (pick(0, 1), pick(0, 1, 2)), (pick(1, 2), pick(1, 2))]
    batch, size = fixed.get("batch", pick(1, 2, 3)), (pick(5, 6, 9), pick(5, 7))
    x, weight = normal(batch, channels, *size), normal(outputs, channels // groups, *kernel)
    out = fast_sampling.output_size(x, weight, *place)
    taps = offset_groups * kernel[0] * kernel[1]
    offset = pick(0.5, 2.0, 6.0) * normal(batch, 2 * taps, *out)
    mask = normal(batch, taps, *out).sigmoid() if fixed.get("mask", pick(True, False)) else None
    bias = normal(outputs) if pick(True, False) else None
    return [x, offset, weight, bias, *place, mask]


def by_loop(x, offset, weight, bias, stride, padding, dilation, mask):
    """Equation 2 of Dai et al. (2017), number by number."""
    (batch, channels, height, width), (outputs, share, rows, columns) = x.shape, weight.shape
    taps = rows * columns
    groups, moved = channels // share, offset.shape[1] // (2 * taps)
    out = x.new_zeros(batch, outputs, *offset.shape[2:])
    for n, o, i, j in itertools.product(*map(range, out.shape)):
        total = 0.0 if bias is None else float(bias[o])
        for c, a, b in itertools.product(range(share), range(rows), range(columns)):
            channel, tap = o // (outputs // groups) * share + c, a * columns + b
            k = channel // (channels // moved) * taps + tap
            y = i * stride[0] - padding[0] + a * dilation[0] + float(offset[n, 2 * k, i, j])
            z = j * stride[1] - padding[1] + b * dilation[1] + float(offset[n, 2 * k + 1, i, j])
            value = 0.0
            for p, q in itertools.product(
                (math.floor(y), math.floor(y) + 1), (math.floor(z), math.floor(z) + 1)
            ):
                if 0 <= p < height and 0 <= q < width:
                    value += (1 - abs(y - p)) * (1 - abs(z - q)) * float(x[n, channel, p, q])
            total += (
                float(weight[o, c, a, b])
                * value
                * (1.0 if mask is None else float(mask[n, k, i, j]))
            )
        out[n, o, i, j] = total
    return out


def derivatives(function, arguments):
    """The result and its gradients with respect to all tensors, for one upstream gradient."""
    tensors = [a.clone().requires_grad_() if torch.is_tensor(a) else a for a in arguments]
    out = function(*tensors)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, [t for t in tensors if torch.is_tensor(t)], upstream)


def readable(*arguments):
    """The operator without its fast part."""
    module = notebooks.definitions("deformable_convolution")
    module.product = module.sampled_product
    return module.deform_conv2d(*arguments)


# --- the operator ---------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_it_is_equation_2(seed):
    arguments = case(seed, batch=1)
    assert torch.allclose(deform_conv2d(*arguments), by_loop(*arguments), atol=1e-10)


@pytest.mark.parametrize("seed", range(40))
def test_it_equals_the_library_and_its_readable_version(seed):
    arguments = case(100 + seed)
    ours = derivatives(deform_conv2d, arguments)
    for other in (torchvision.ops.deform_conv2d, readable):
        for mine, theirs in zip(ours, derivatives(other, arguments)):
            assert torch.allclose(mine, theirs, atol=1e-9, rtol=1e-9), other


@pytest.mark.parametrize("seed", range(3))
def test_gradients_agree_with_finite_differences(seed):
    x, offset, weight, bias, *place, mask = case(200 + seed, batch=1, kernel=(2, 2), mask=True)
    offset = offset.clamp(-1, 1).frac().abs() * 0.6 + 0.2  # away from whole pixels, and kinks
    tensors = [t.requires_grad_() for t in (x, offset, weight, mask)]

    def function(x, offset, weight, mask):
        return deform_conv2d(x, offset, weight, bias, *place, mask)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_zero_offsets_and_whole_pixels():
    x, weight = torch.randn(2, 4, 7, 6), torch.randn(5, 4, 3, 3)
    offset = torch.zeros(2, 18, 7, 6)
    assert torch.allclose(
        deform_conv2d(x, offset, weight, padding=1), F.conv2d(x, weight, padding=1), atol=1e-5
    )
    offset[:, 0::2] = 1.0  # rows
    shifted = F.conv2d(F.pad(x, (1, 1, 1, 2))[:, :, 1:], weight)
    assert torch.allclose(deform_conv2d(x, offset, weight, padding=1), shifted, atol=1e-5)


@pytest.mark.parametrize("far", [1e3, -1e9, math.inf, -math.inf, math.nan])
def test_far_away_is_zero_without_a_gradient(far):
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    offset = torch.full((1, 18, 5, 5), far)
    out, of_x, of_offset, _ = derivatives(
        functools.partial(deform_conv2d, padding=1), (x, offset, weight)
    )
    assert not out.any() and not of_x.any() and not of_offset.any()


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches_of_every_size_the_same_bits_and_the_callers_threads(batch):
    arguments = case(7, torch.float32, batch=batch)
    threads = torch.get_num_threads()
    first, second = (derivatives(deform_conv2d, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.get_num_threads() == threads and len(first[0]) == batch
    exact = derivatives(readable, [a.double() if torch.is_tensor(a) else a for a in arguments])
    assert all(torch.allclose(a.double(), b, atol=1e-3) for a, b in zip(first, exact))


def test_evaluation_gives_what_training_gives():
    arguments = case(5, torch.float32, batch=3)
    expected = deform_conv2d(*arguments)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(deform_conv2d(*arguments), expected)


def test_images_that_need_several_pieces(monkeypatch):
    arguments = case(11, batch=3, groups=1, offset_groups=1)
    whole = derivatives(deform_conv2d, arguments)
    monkeypatch.setattr(fast_sampling, "piece_size", lambda *_: 3)
    assert all(torch.allclose(a, b) for a, b in zip(whole, derivatives(deform_conv2d, arguments)))


def test_positions_stay_exact_under_autocast():
    x, weight = torch.rand(1, 1, 4, 400), torch.ones(1, 1, 1, 1)
    offset = torch.zeros(1, 2, 4, 400)
    offset[:, 1] = 0.25  # bfloat16 cannot tell 300.25 from 300
    with torch.autocast("cpu", torch.bfloat16):
        out = deform_conv2d(x, offset, weight)
    exact = 0.75 * x + 0.25 * F.pad(x, (0, 1))[..., 1:]
    assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), exact, atol=0.01)
    half = deform_conv2d(*(t.bfloat16() for t in (x, offset, weight)))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, position, shape",
    [
        ("offset", 1, (2, 16, 5, 5)),
        ("offset", 1, (2, 18, 5, 4)),
        ("weight", 2, (4, 3, 3, 3)),
        ("mask", 7, (2, 8, 5, 5)),
        ("groups", 1, (2, 54, 5, 5)),
    ],
)
def test_what_does_not_fit_is_named(name, position, shape):
    arguments = [
        torch.rand(2, 4, 5, 5),
        torch.rand(2, 18, 5, 5),
        torch.rand(4, 4, 3, 3),
        None,
        1,
        1,
        1,
        None,
    ]
    arguments[position] = torch.rand(shape)
    with pytest.raises(ProjectError, match=f"deform_conv2d: .*{name}") as error:
        deform_conv2d(*arguments)
    assert "\n" not in str(error.value)


# --- the layer ------------------------------------------------------------------------------------
def layer(**settings):
    torch.manual_seed(3)
    return nb.DeformConv2d(4, 6, 3, padding=1, **settings)


def test_the_layer_begins_as_an_ordinary_convolution():
    x = torch.randn(2, 4, 6, 5)
    plain = F.conv2d(x, layer().weight, layer().bias, padding=1)
    assert torch.allclose(layer()(x), plain, atol=1e-5)
    modulated = layer(modulation=True, bias=False)
    half = F.conv2d(x, 0.5 * modulated.weight, padding=1)
    assert torch.allclose(modulated(x), half, atol=1e-5)


def test_offsets_come_from_the_input_unless_they_are_static_or_absent():
    x, other = torch.randn(2, 2, 4, 6, 5)
    for kind, settings in {
        "own": {"offset_groups": 2},
        "static": {"static": True},
        "absent": {"offsets": False, "modulation": True},
    }.items():
        one = layer(**settings)
        torch.nn.init.normal_(one.offset_branch.bias)
        if kind != "static":
            torch.nn.init.normal_(one.offset_branch.weight)
        (offset, mask), (second, changed) = one.offsets_and_mask(x), one.offsets_and_mask(other)
        assert offset.shape == (2, 18 * settings.get("offset_groups", 1), 6, 5)
        assert torch.equal(offset, second) == (kind != "own")
        assert offset.any() == (kind != "absent")
        assert mask is None or not torch.equal(mask, changed)
        one(x).square().sum().backward()
        learns = one.offset_branch.weight.grad is not None
        assert learns == (kind != "static") and one.offset_branch.bias.grad is not None


def test_given_offsets_take_the_place_of_its_own():
    one, x = layer(), torch.randn(1, 4, 6, 5)
    torch.nn.init.normal_(one.offset_branch.weight)
    given = torch.randn(1, 18, 6, 5)
    assert torch.allclose(one(x, given), deform_conv2d(x, given, one.weight, one.bias, padding=1))
    assert torch.allclose(
        one(x, torch.zeros(1, 18, 6, 5)), F.conv2d(x, one.weight, one.bias, padding=1), atol=1e-5
    )
    assert not torch.allclose(one(x), one(x, given))


# --- the benchmark --------------------------------------------------------------------------------
def test_the_benchmark_runs_and_its_contenders_compute_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("HW3_PROFILE", "smoke")
    monkeypatch.setattr(run.Run, "reports", tmp_path)
    assert bench.main() == 0
    stored = json.loads((tmp_path / "results" / "deformable_benchmark.json").read_text())
    assert {"2x4x4x5.ours.milliseconds", "2x4x4x5.busy_torchvision_over_ours"} <= stored[
        "metrics"
    ].keys()
    tensors = bench.inputs((2, 4, 6, 5), bench.Config(), "cpu")
    results = {name: f(*tensors) for name, f in bench.contenders().items() if name != "conv"}
    assert all(torch.allclose(results["ours"], out, atol=1e-4) for out in results.values())
