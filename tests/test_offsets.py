"""What offsets do: measured, fitted, and drawn, on fields whose answers are known."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from src import backbones, objects, offsets
from src.device import Runtime
from tools.notebooks import definitions

CPU = Runtime(torch.device("cpu"))
SIDE = 16


@pytest.fixture(scope="module")
def nb():
    return definitions("deformable_convolution")


def field_of(matrix, side=3, batch=2):
    """The offsets (B, K, 2, s, s) that turn every tap p into A p."""
    taps = offsets.regular_taps(side)
    moved = taps @ torch.tensor(matrix).t() - taps
    return moved[None, ..., None, None].expand(batch, -1, -1, SIDE, SIDE)


def inside(batch=2):
    masks = torch.zeros(batch, SIDE, SIDE, dtype=torch.bool)
    masks[:, 4:9, 5:12] = True
    return masks


def turned(degrees, size=1.0):
    """A clockwise turn, for pairs with y (downwards) first."""
    cos, sin = (size * f(math.radians(degrees)) for f in (math.cos, math.sin))
    return [[cos, sin], [-sin, cos]]


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("degrees, size", [(0, 1.0), (30, 1.0), (-90, 1.0), (0, 2.0), (100, 0.5)])
def test_the_map_behind_a_field_is_found(side, degrees, size):
    angle, found = offsets.fitted_map(field_of(turned(degrees, size), side), inside())
    assert torch.allclose(angle, torch.tensor(math.radians(degrees)), atol=1e-5)
    assert torch.allclose(found, torch.tensor(size), atol=1e-4)


def test_a_clockwise_turn_moves_the_upper_tap_to_the_right():
    """The convention of the fit is that of the views: rows grow downwards."""
    taps = offsets.regular_taps(3) @ torch.tensor(turned(90)).t()
    assert torch.allclose(taps[1], torch.tensor([0.0, 1.0]), atol=1e-6), "(-1, 0) is the upper one"


def test_only_positions_inside_count():
    field = field_of(turned(90)).clone()
    where = inside()
    field[:, :, :, ~where[0]] = 100.0
    angle, _ = offsets.fitted_map(field, where)
    assert torch.allclose(angle, torch.tensor(math.pi / 2), atol=1e-5)


def test_a_mean_shift_is_neither_a_turn_nor_a_zoom():
    field = torch.zeros(1, 9, 2, SIDE, SIDE)
    field[:, :, 0], field[:, :, 1] = 1.5, -0.7
    angle, size = offsets.fitted_map(field, inside(1))
    assert float(angle.abs()) < 1e-6 and float(size) == pytest.approx(1)


def test_a_field_that_folds_or_collapses_has_a_small_size():
    fold = [[1.0, 0.0], [0.0, -1.0]]  # mirrored: no turn with a zoom comes near
    for matrix in (fold, [[0.0, 0.0], [0.0, 0.0]]):
        _, size = offsets.fitted_map(field_of(matrix), inside())
        assert torch.allclose(size, torch.tensor(0.1))


def described(field, where):
    return dict(zip(offsets.MEASURES, offsets.describe(field, where)))


def test_the_regular_grid_by_hand():
    where = inside()
    found = described(torch.zeros(2, 9, 2, SIDE, SIDE), where)
    assert not any(found[name].any() for name in found if name.startswith("length"))
    mean = (4 + 4 * math.sqrt(2)) / 9
    assert torch.allclose(found["spread"], torch.tensor(mean))
    # Of 5 x 7 positions the 3 x 5 inner ones have all nine points inside, the others 6 or 4.
    hits = 3 * 5 * 9 + (2 * 3 + 2 * 5) * 6 + 4 * 4
    assert torch.allclose(found["on_object"], torch.tensor(hits / (35 * 9)))


def test_lengths_are_told_apart_by_place():
    where, field = inside(1), torch.zeros(1, 9, 2, SIDE, SIDE)
    field[:, :, 0, where[0]] = 2.0
    found = described(field, where)
    assert found["length_inside"] == 2 and found["length_outside"] == 0
    rim = 35 - 15 + 7 * 9 - 35  # positions inside with a neighbour outside, and the other way
    assert float(found["length_rim"]) == pytest.approx(2 * 20 / rim)
    assert found["length_edge"] == 0 and found["length_centre"] > 0
    field = torch.zeros(1, 9, 2, SIDE, SIDE)
    field[..., 0, :] = field[..., -1, :] = field[..., 0] = field[..., -1] = 1.0
    found = described(field, where)
    assert float(found["length_edge"]) == pytest.approx(math.sqrt(2))
    assert found["length_centre"] == 0
    assert described(field, where & False)["length_inside"].isnan()


def test_points_that_leave_the_object_or_the_map_do_not_count():
    where, field = inside(1), torch.zeros(1, 9, 2, SIDE, SIDE)
    field[:, :, 1] = 20.0
    assert described(field, where)["on_object"] == 0
    everything = torch.ones_like(where)
    assert described(field, everything)["on_object"] == 0


def head(nb, key):
    torch.manual_seed(0)
    network = nb.Head(nb.VARIANTS[key], (4, 5, 6), 3, nb.CONFIGS["smoke"]).eval()
    for module in network.modules():
        if isinstance(module, nb.DeformConv2d):
            nn.init.normal_(module.offset_branch.bias)
            if module.offset_branch.weight.requires_grad:
                nn.init.normal_(module.offset_branch.weight, std=0.1)
    return network


def few_views(n=5):
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(n, c, 8 >> i, 8 >> i, generator=generator).half()
        for i, c in enumerate((4, 5, 6))
    ]
    masks = torch.zeros(n, 32, 32, dtype=torch.bool)
    masks[:, 8:20, 4:16] = True
    return objects.Views(maps, masks, torch.arange(n) % 3, torch.arange(n))


@pytest.mark.parametrize("key", ["ordinary_9", "static_25", "deformable_9", "grouped", "stacked"])
def test_offsets_of_the_last_layer(nb, key):
    network, views = head(nb, key), few_views()
    found = offsets.last_offsets(network, views.batch(torch.arange(5), CPU)[0])
    assert found.shape == (5, 25 if "25" in key else 9, 2, 8, 8)
    assert bool(found.any()) == (key != "ordinary_9")
    same = torch.allclose(found, found[:1, :, :, :1, :1].expand_as(found))
    assert same == (key in ("ordinary_9", "static_25"))
    whole = offsets.over_views(network, views, CPU, offsets.describe)
    parts = offsets.over_views(network, views, CPU, offsets.describe, size=2)
    assert len(whole) == len(offsets.MEASURES)
    assert all(torch.allclose(a, b, equal_nan=True, atol=1e-5) for a, b in zip(whole, parts))


def test_mean_distance_is_taken_from_the_position_s_own_centre():
    field = torch.zeros(128, 128)
    field[67:69, 67:69] = 1.0  # around 67.5, the centre of position 8 of 16
    assert offsets.mean_distance(field, 16) == pytest.approx(math.sqrt(0.5))
    assert 48 < offsets.mean_distance(torch.ones(128, 128), 16) < 51


def test_the_gradient_lies_around_the_middle(nb):
    backbone = backbones.load_backbone("efficientnet_lite0", pretrained=False).eval()
    torch.manual_seed(0)
    network = nb.Head(nb.VARIANTS["ordinary_9"], (40, 112, 1280), 3, nb.CONFIGS["smoke"]).eval()
    images = torch.rand(2, 3, 64, 64)
    radii, figure = offsets.plot_fields({"ordinary": [network]}, backbone, images)
    assert len(radii["ordinary"]) == 1 and radii["ordinary"][0] < radii["uniform"][0]
    assert figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel()
    plt.close(figure)


def test_pictures_draw_what_they_say(nb):
    views = few_views()
    crops = torch.zeros(5, 4, 72, 72, dtype=torch.uint8)
    crops = objects.Crops(crops, views.labels, views.photos, ("a", "b", "c"), {})
    config = nb.replace(nb.CONFIGS["smoke"], crop_side=64)
    heads = {"ordinary": head(nb, "ordinary_9"), "deformable": head(nb, "deformable_9")}
    figure = offsets.plot_arrows(heads, views, crops, config, CPU, count=2)
    assert len(figure.axes) == 4
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["a: ordinary", "b: ordinary", "a: deformable", "b: deformable"]
    plt.close(figure)
    figure = offsets.plot_views(crops, config)
    assert len(figure.axes) == 6
    plt.close(figure)


def test_positions_on_the_object_and_beside_it():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[8:40, 8:32] = True
    (y, x), (other_y, other_x) = offsets.two_positions(mask, 16)
    assert mask[4 * y + 2, 4 * x + 2] and not mask[4 * other_y + 2, 4 * other_x + 2]
    assert 2 <= other_y <= 13 and 2 <= other_x <= 13
