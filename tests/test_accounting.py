"""The accounting against PyTorch: parameters, operations, and fields from input gradients."""

import random

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from src import ProjectError
from src.accounting import WHOLE, Axis, ReceptiveField, output_size, regular_grid, summary, walk


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def seen_by_gradient(model: nn.Module, size: tuple[int, int, int], row: int, column: int):
    """((first, last), (first, last)) pixels per axis with a gradient from one output position."""
    x = torch.zeros(1, *size, dtype=torch.float64, requires_grad=True)
    model(x)[0, :, row, column].sum().backward()
    seen = x.grad[0].abs().sum(0)
    return tuple(
        (int(hit[0]), int(hit[-1]))
        for hit in (seen.sum(1 - axis).nonzero().flatten() for axis in (0, 1))
    )


def skeleton(model: nn.Module) -> nn.Module:
    """Make the network one of ones, with one channel, so that no gradient can cancel."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                child.weight = nn.Parameter(torch.ones(1, 1, *child.kernel_size))
                child.bias, child.groups, child.in_channels, child.out_channels = None, 1, 1, 1
            elif isinstance(child, (nn.BatchNorm2d, nn.ReLU, nn.ReLU6)):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return model.double().eval()


class Branches(nn.Module):
    def __init__(self, *paths: nn.Module, join: str = "add"):
        super().__init__()
        self.paths, self.join = nn.ModuleList(paths), join

    def forward(self, x):
        made = [path(x) for path in self.paths]
        return torch.cat(made, 1) if self.join == "cat" else sum(made[1:], made[0])


def ones(kernel, **options) -> nn.Conv2d:
    layer = nn.Conv2d(1, 1, kernel, bias=False, dtype=torch.float64, **options)
    nn.init.ones_(layer.weight)
    return layer


def compare(
    model: nn.Module, size: tuple[int, int, int], positions=((0, 0), (1, 2))
) -> ReceptiveField:
    """Field of the summary against gradients at a middle position and at neighbours of it."""
    account = summary(model, size)
    channels, height, width = account.output
    for down, right in positions:
        row, column = height // 2 + down, width // 2 + right
        spans = account.receptive_field.height.span(row), account.receptive_field.width.span(column)
        assert all(0 <= first and last < n for (first, last), n in zip(spans, size[1:])), (
            "test image too small"
        )
        assert seen_by_gradient(model, size, row, column) == spans
    return account.receptive_field


@pytest.mark.parametrize("seed", range(12))
def test_random_chains_match_gradients_sizes_and_parameters(seed):
    rng, layers = random.Random(seed), []
    for _ in range(rng.randint(2, 5)):

        def pair(low, high):
            return rng.randint(low, high), rng.randint(low, high)

        kind = rng.choice(["conv", "conv", "pool", "pad"])
        if kind == "conv":
            layers.append(
                ones(pair(1, 4), stride=pair(1, 2), padding=pair(0, 2), dilation=pair(1, 3))
            )
        elif kind == "pool":
            layers.append(nn.AvgPool2d(pair(2, 3), pair(1, 2), padding=1))
        else:
            layers.append(nn.ZeroPad2d((*pair(0, 2), *pair(0, 2))))
    model = nn.Sequential(*layers)
    account = summary(layers, (1, 230, 260))
    assert account.output == tuple(
        model(torch.zeros(1, 1, 230, 260, dtype=torch.float64)).shape[1:]
    )
    assert account.parameters == sum(p.numel() for p in model.parameters())
    compare(model, (1, 230, 260), ((0, 0), (1, 1)))


def test_the_strided_dilated_window_by_hand():
    assert walk([(3, 2, 1, 2)], 33) == [(output_size(33, 3, 2, 1, 2), Axis(5, 2, 1.0))]
    assert walk([(2, 2), (3, 1, 1)], 8) == [(4, Axis(2, 2, 0.5)), (4, Axis(6, 2, 0.5))]


def test_branches_give_the_hull():
    residual = Branches(
        nn.Sequential(ones(3, stride=2, padding=1), ones(3, padding=1)), ones(1, stride=2)
    )
    assert compare(residual, (1, 41, 41)).height == Axis(7, 2, 0.0)
    nested = Branches(
        nn.Sequential(ones(2), nn.ZeroPad2d((1, 0, 1, 0))), ones(5, padding=2), join="cat"
    )
    assert compare(nested, (1, 30, 30)).height == Axis(5, 1, 0.0)
    shifted = compare(
        Branches(nn.Sequential(ones(4), nn.ZeroPad2d((0, 3, 0, 3))), ones(3, padding=1)),
        (1, 30, 30),
    )
    assert shifted.height == Axis(5, 1, 1.0)  # from -1 (the second) to 3 (the first)


def test_misaligned_paths_are_an_error_that_names_the_place():
    model = nn.Sequential(ones(3, padding=1), Branches(nn.AvgPool2d(2), nn.Sequential(ones(17))))
    with pytest.raises(
        ProjectError, match="[Mm]isaligned paths meet in 1: their jumps are 2 and 1"
    ):
        summary(model, (1, 32, 32))


@pytest.mark.parametrize(
    "build, size", [(torchvision.models.resnet18, 435), (torchvision.models.resnet50, 427)]
)
def test_resnet_fields_match_gradients(build, size):
    assert (
        compare(
            skeleton(nn.Sequential(*list(build(weights=None).children())[:-2])), (1, 640, 640)
        ).height.size
        == size
    )
    trunk = nn.Sequential(*list(build(weights=None).children())[:-2])
    assert summary(trunk, (3, 64, 64)).receptive_field.width == Axis(size, 32, 0.0)


def test_efficientnet_lite_with_padding_inside_its_convolutions():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    account = summary(model, (3, 224, 224))
    assert (
        account.parameters
        == sum(p.numel() for p in model.parameters())
        == sum(row.parameters for row in account.rows)
    )
    assert account.macs == pytorch_macs(model, torch.zeros(1, 3, 224, 224))
    assert account.receptive_field == (WHOLE, WHOLE)
    model.forward = model.extract_features  # the map before pooling
    assert compare(skeleton(model), (1, 1216, 1216)) == account.modules["_bn1"].receptive_field


def pytorch_macs(model: nn.Module, *inputs) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "build",
    [torchvision.models.resnet18, torchvision.models.densenet121, torchvision.models.mobilenet_v2],
)
def test_parameters_and_macs_match_pytorch(build):
    model = build(weights=None)
    account = summary(model, (3, 96, 96))
    assert (
        account.parameters
        == sum(p.numel() for p in model.parameters())
        == sum(row.parameters for row in account.rows)
    )
    assert (
        account.macs
        == pytorch_macs(model, torch.zeros(1, 3, 96, 96))
        == sum(row.macs for row in account.rows)
    )
    assert account.output == (1000,) and str(account.receptive_field) == "whole image"


def test_grouped_transposed_and_batched_products_are_counted_as_pytorch_counts_them():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped, self.up = (
                nn.Conv2d(4, 8, 3, groups=2),
                nn.ConvTranspose2d(8, 6, 2, stride=2),
            )

        def forward(self, x):
            x = self.up(self.grouped(x)).flatten(2)
            return x.transpose(1, 2) @ x

    model = Products()
    account = summary(model, (4, 11, 9))
    assert account.macs == pytorch_macs(model, torch.zeros(1, 4, 11, 9))
    assert account.modules["grouped"].macs == 8 * 9 * 7 * 2 * 9
    assert account.modules["Products"].macs > 0  # what a module computes itself is in its own row


def test_two_inputs_and_shared_branches_count_parameters_once_and_macs_twice():
    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(2, 2)

        def forward(self, a, b):
            a, b = self.body(a), self.body(b)
            a, b = torch.cat([a, b]).chunk(2)  # both branches in one batch
            mask = torch.arange(8) % 2 == 0
            return torch.cat([torch.where(mask, b, a), torch.where(mask, a, b)], 1)

    account = summary(Twin(), [(3, 8, 8), (3, 8, 8)])
    body = account.rows[0]
    assert (body.parameters, body.calls, body.macs) == (112, 2, 2 * 4 * 64 * 27)
    assert account.output == (8, 8, 8) and account.receptive_field.height == Axis(3, 1, 0.0)
    assert account.parameters == 112 + 6 and account.rows[-1].output is None
    assert "called 2 times" in account.to_markdown() and "not run" in account.to_markdown()


def test_tied_weights_count_once():
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    second.weight = first.weight
    account = summary([first, second], (4, 8, 8))
    assert account.parameters == sum(row.parameters for row in account.rows) == 144 + 4 + 4


def test_a_rule_gives_a_module_its_field():
    class Sampler(nn.Module):
        """Samples where the data say, as a deformable convolution does."""

        def __init__(self):
            super().__init__()
            self.kernel_size, self.stride, self.padding, self.dilation = (3, 3), 2, 1, (2, 1)
            self.weight = nn.Parameter(torch.ones(5, 2, 3, 3))

        def forward(self, x):
            columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
            height, width = (output_size(n, 3, 2, 1, d) for n, d in zip(x.shape[2:], self.dilation))
            return (self.weight.flatten(1) @ columns).view(-1, 5, height, width)

    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), Sampler(), nn.Conv2d(5, 5, 3, padding=1))
    account = summary(model, (3, 21, 21), rules={Sampler: regular_grid})
    reference = summary(
        [model[0], nn.Conv2d(2, 5, 3, 2, 1, (2, 1), bias=False), model[2]], (3, 21, 21)
    )
    assert account.receptive_field == reference.receptive_field
    assert (account.parameters, account.macs, account.output) == (
        reference.parameters,
        reference.macs,
        reference.output,
    )
    with pytest.raises(
        ProjectError, match="unknown .im2col.: stop before that layer, or give a rule"
    ):
        _ = summary(model, (3, 21, 21)).receptive_field


@pytest.mark.parametrize(
    "layers",
    [[nn.Upsample(scale_factor=2)], [nn.ConvTranspose2d(3, 3, 2, 2)]],
    ids=["interpolation", "transposed convolution"],
)
def test_upsampling_has_no_one_window(layers):
    account = summary([nn.Conv2d(3, 3, 3), *layers], (3, 8, 8))
    assert account.output == (3, 12, 12) and "unknown" in account.to_markdown()
    with pytest.raises(
        ProjectError,
        match="unknown .(upsample_nearest2d|transposed convolution).: stop before that layer",
    ):
        _ = account.receptive_field


def test_writing_a_part_in_place_is_not_followed_silently():
    class Write(nn.Module):
        def forward(self, x):
            y = x.clone()
            y[..., ::2] = x[..., 1::2]
            return y

    with pytest.raises(ProjectError, match="unknown"):
        _ = summary(Write(), (1, 8, 8)).receptive_field


def test_slices_strides_and_dimension_order_are_followed():
    class Slices(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ones(3, padding=1)

        def forward(self, x):
            x = self.conv(x).permute(0, 2, 3, 1)  # channels last
            x = x[:, 3:, 1::2].contiguous().permute(0, 3, 1, 2)
            return self.conv(x.unsqueeze(1).squeeze(1)).transpose(2, 3).transpose(3, 2)

    assert compare(Slices(), (1, 24, 30), ((0, 0), (1, 1))) == (Axis(5, 1, 3.0), Axis(7, 2, 1.0))


def test_means_over_channels_keep_positions_and_broadcasting_counts_from_the_right():
    class Means(nn.Module):
        def forward(self, x):
            return F.conv2d(
                (x.mean(1) + x).mean(1).unsqueeze(1), torch.ones(1, 1, 3, 5, dtype=x.dtype)
            )

    assert compare(nn.Sequential(ones(3), Means()), (1, 24, 30)) == (
        Axis(5, 1, 2.0),
        Axis(7, 1, 3.0),
    )


def test_pooling_attention_and_flattening_see_the_whole_image():
    class Gate(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))

    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 8)

        def forward(self, x):
            return x + self.conv(x)  # one value added to every position

    for layers in (
        [Gate()],
        [Spread()],
        [nn.AdaptiveAvgPool2d(1)],
        [nn.Flatten(), nn.Linear(192, 2)],
    ):
        assert summary(layers, (3, 8, 8)).receptive_field == (WHOLE, WHOLE)
    assert (
        summary(
            [nn.Conv2d(1, 5, 8), nn.Flatten(), nn.Linear(5, 2)], (1, 8, 8)
        ).receptive_field.height.size
        == 8
    )


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), nn.ReLU())
    )
    model[2].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    summary(model, (3, 8, 8))
    with pytest.raises(ProjectError):
        summary(model, (1, 8, 8))
    assert model.training and not model[2].training and not model[2][0].training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_table_groups_as_finely_as_fits_and_adds_up():
    account = summary(torchvision.models.resnet18(weights=None), (3, 64, 64))
    lengths = []

    def number(cell):
        return int(cell.strip(" *").replace(",", ""))

    for limit in (10, 20, 200):
        lines = [line.split("|")[1:-1] for line in account.to_markdown(limit).splitlines()]
        assert len({len(line) for line in lines}) == 1
        rows, total = lines[2:-1], lines[-1]
        assert len(rows) <= limit
        assert (
            [sum(number(row[c]) for row in rows) for c in (2, 3)]
            == [number(total[2]), number(total[3])]
            == [account.parameters, account.macs]
        )
        lengths.append(len(rows))
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[2]
    assert "| `layer4` | 512 × 2 × 2 |" in account.to_markdown(
        10
    ) and "| 435 × 435 |" in account.to_markdown(10)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: output_size(4, 7), "A window of 7 pixels does not fit 4 pixels"),
        (lambda: output_size(4, 0), "Kernel 0, .* must be >= 1"),
        (lambda: walk([(3, 1, 1), (9,)], 4), "does not fit"),
        (
            lambda: summary([nn.Conv2d(3, 4, 3)], (1, 8, 8)),
            r"does not take an input of \(1, 8, 8\) \(in 0\)",
        ),
        (lambda: summary([nn.Conv2d(3, 4, 9)], (3, 8, 8)), "does not take"),
        (lambda: summary([nn.Conv2d(3, 4, 3)], (8, 8)), r"give \(channels, height, width\)"),
        (lambda: summary([nn.Conv2d(3, 4, 3)], (3, 0, 8)), "all at least 1"),
        (lambda: summary([nn.Conv2d(3, 4, 3)], ()), "give"),
    ],
)
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ProjectError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
