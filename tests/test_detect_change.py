"""The definitions of notebooks/detect_change.ipynb: pairs, network, decision, prediction."""

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from src import ProjectError, data, datasets, device, registration, results, training, views
from tools import drawn
from tools.notebooks import definitions


@pytest.fixture(scope="module")
def nb():
    return definitions("detect_change")


def smooth(n, side, seed=0):
    """Smooth colour noise with all scales, (n, 3, side, side) uint8."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(
            torch.rand(n, 3, cells, cells, generator=generator), size=side, mode="bicubic"
        )
        for cells in (4, 8, 16, 32)
    ]
    return (sum(layers) / 4 * 255).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def canvases():
    return smooth(4, 192)  # for images of 64 pixels


OWNERS = torch.tensor([0, 0, 1, 2])


def photo(size=(120, 90), seed=0, mode="RGB"):
    image = smooth(1, 256, seed)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert(mode)


# --- the six functions ----------------------------------------------------------------------------
def view(canvases, side=64):
    return views.View(canvases, torch.tensor([0]), torch.eye(3)[None], side)


def test_the_changes_move_points_as_documented(nb, canvases):
    changed = nb.displacement(nb.rotation(nb.scaling(view(canvases), 2.0), 90.0), 5.0, 0.0)
    # What was at (1, 0) is enlarged to (2, 0), turned clockwise (y down) to (0, 2), moved to (5, 2)
    found = changed.pose @ torch.tensor([5.0, 2, 1])
    assert torch.allclose(found, torch.tensor([[1.0, 0, 1]]), atol=1e-5)


@pytest.mark.parametrize("change", ["displacement", "rotation", "scaling"])
def test_the_changes_warp_images_as_by_hand(nb, canvases, change):
    """Every pixel of the sampled image is read off the canvas point by point."""
    arguments = {"displacement": (5.0, -3.0), "rotation": (20.0,), "scaling": (1.25,)}[change]
    image = views.sample(getattr(nb, change)(view(canvases), *arguments))[0][0]
    canvas, side = canvases[0].double().numpy() / 255, 64
    theta = math.radians(20.0)
    for row, column in ((3, 7), (31, 32), (60, 20)):
        expected = np.zeros(3)
        for sub_y in (-0.25, 0.25):
            for sub_x in (-0.25, 0.25):
                x, y = column + 0.5 - side / 2 + sub_x, row + 0.5 - side / 2 + sub_y
                if change == "displacement":
                    x, y = x - 5, y + 3
                elif change == "rotation":
                    x, y = (
                        x * math.cos(theta) + y * math.sin(theta),
                        -x * math.sin(theta) + y * math.cos(theta),
                    )
                else:
                    x, y = x / 1.25, y / 1.25
                u, v = x + 96 - 0.5, y + 96 - 0.5  # pixel centres are at half-integers
                i, j = math.floor(v), math.floor(u)
                p, q = v - i, u - j
                patch = canvas[:, i : i + 2, j : j + 2]
                weights = np.outer([1 - p, p], [1 - q, q])
                expected += (patch * weights).sum(axis=(1, 2)) / 4
        assert np.allclose(image[:, row, column], expected, atol=1e-5)


def test_sampling_in_windows_gives_the_same_as_sampling_whole_canvases(nb, canvases):
    device.seed_everything(0)
    changes = nb.draw_changes(torch.ones(40, 3), nb.STANDARD, 64)
    first, second = nb.draw_views(canvases, changes, 64)
    together = views.sample(first, second, resolution=48)
    theta = second.pose[:, :2] * torch.tensor([32 / 96, 32 / 96, 1 / 96])
    grid = F.affine_grid(theta, (40, 3, 96, 96), align_corners=False)
    whole = F.grid_sample(canvases[second.index].float() / 255, grid, align_corners=False)
    assert torch.allclose(together[1], F.avg_pool2d(whole, 2), atol=1e-4)
    assert torch.allclose(together[0], views.sample(first, resolution=48)[0], atol=1e-4)


def test_brightness_blur_and_noise(nb):
    images = torch.full((2, 3, 8, 8), 0.5)
    assert torch.allclose(nb.brightness(images, 1.2, -0.1), torch.full_like(images, 0.5))
    assert torch.allclose(nb.blurring(images, 1.0), images), "a flat image stays flat at its edges"
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 16
    blurred = nb.blurring(point, 1.0)[0, 0, 1:4, 1:4]
    assert blurred.tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert nb.blurring(point, 0.5)[0, 0, 2, 2] == 10
    device.seed_everything(0)
    noise = nb.gaussian_noise(torch.zeros(1, 3, 100, 100), 0.05)
    assert abs(float(noise.std()) - 0.05) < 0.002 and abs(float(noise.mean())) < 0.002


def test_augmentation_leaves_points_in_their_place_and_stays_in_range(nb):
    device.seed_everything(0)
    images = torch.zeros(200, 3, 9, 9)
    images[:, :, 4, 4] = 0.6
    augmented = nb.augment(images)
    assert augmented.min() >= 0 and augmented.max() <= 1
    brightest = augmented.mean(dim=1).flatten(1).argmax(dim=1)
    assert (brightest == 40).float().mean() > 0.95


def test_augmentation_draws_every_strength_from_its_range(nb, monkeypatch):
    drawn = {}
    for name in ("brightness", "blurring", "gaussian_noise"):
        monkeypatch.setattr(
            nb,
            name,
            lambda images, *strengths, name=name: drawn.update({name: strengths}) or images,
        )
    device.seed_everything(0)
    nb.augment(torch.full((2000, 3, 2, 2), 0.5))
    (gain, shift), (amount,), (sigma,) = drawn.values()
    for strength, low, high in (
        (gain, 0.8, 1.2),
        (shift, -0.1, 0.1),
        (amount, 0, 1),
        (sigma, 0, 0.06),
    ):
        assert strength.shape == (2000, 1, 1, 1), "each image has its own"
        assert low - 1e-6 <= strength.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < strength.max() <= high + 1e-6
    for strength in (amount, sigma):  # three images of ten
        assert abs(float((strength > 0).float().mean()) - 0.3) < 0.04
    assert abs(float(torch.corrcoef(torch.stack([gain, shift]).flatten(1))[0, 1])) < 0.1


# --- pairs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["STANDARD", "SUBTLE"])
def test_every_view_stays_inside_the_canvas(nb, canvases, name):
    device.seed_everything(0)
    labels = nb.COMBINATIONS.repeat(250, 1)
    for seen in nb.draw_views(canvases, nb.draw_changes(labels, getattr(nb, name), 64), 64):
        assert seen.corners().abs().max() <= 96 + 1e-3


def test_views_are_zoomed_turned_and_mirrored_without_shear(nb, canvases):
    device.seed_everything(0)
    changes = nb.draw_changes(nb.COMBINATIONS.repeat(250, 1), nb.STANDARD, 64)
    views_of_pairs = nb.draw_views(canvases, changes, 64)
    poses = [seen.pose[:, :2, :2] for seen in views_of_pairs]
    zooms = [pose.det().abs().sqrt() for pose in poses]
    for pose, zoom in zip(poses, zooms):
        expected = zoom[:, None, None] ** 2 * torch.eye(2)
        assert torch.allclose(pose @ pose.mT, expected, atol=1e-5)
    assert torch.allclose(zooms[0] / zooms[1], changes[:, 3].exp(), rtol=1e-4)
    middle = (zooms[0] * zooms[1]).sqrt().log()  # of the two, uniform between the ends' logarithms
    low, high = map(math.log, nb.ZOOM)
    assert low - 1e-4 <= middle.min() < low + 0.01 and high - 0.01 < middle.max() <= high + 1e-4
    assert abs(float(middle.mean()) - (low + high) / 2) < 0.02
    mirrored = [pose.det() < 0 for pose in poses]
    assert torch.equal(*mirrored) and abs(float(mirrored[0].float().mean()) - 0.5) < 0.05
    upwards = F.normalize(poses[0][:, :, 1], dim=1)
    assert upwards.mean(dim=0).abs().max() < 0.05
    assert torch.equal(views_of_pairs[0].index.unique(), torch.arange(4))


def test_a_change_that_leaves_the_canvas_is_refused(nb, canvases):
    with pytest.raises(ValueError, match="too strong for the canvas"):
        nb.draw_views(canvases, torch.tensor([[200.0, 0, 0, 0]]), 64)


def test_no_image_has_a_black_area(nb):
    white = torch.full((1, 3, 192, 192), 255, dtype=torch.uint8)
    pairs = nb.FixedPairs(white, torch.tensor([0]), 200, nb.STANDARD, 64, seed=0)
    assert pairs.first.min() == 255 and pairs.second.min() == 255


def test_recorded_changes_say_where_things_went(nb, canvases):
    """Image 2 brought back by the recorded change is image 1 where they overlap."""
    pairs = nb.FixedPairs(canvases, OWNERS, 64, nb.STANDARD, 64, seed=1)
    first, second = pairs.first / 255, pairs.second / 255
    back, mask = registration.align_back(second, pairs.changes)
    changed = pairs.labels.any(dim=1)

    def distance(x):
        return ((x - first).abs() * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)) / 3

    assert distance(back).max() < 0.02
    assert (distance(second)[changed] > 2 * distance(back)[changed]).float().mean() > 0.9


def test_strengths_are_those_asked_for(nb):
    device.seed_everything(0)
    labels = nb.COMBINATIONS.repeat(500, 1)
    changes = nb.draw_changes(labels, nb.STANDARD, 100)
    found = registration.log_strengths(changes).exp()
    assert torch.equal((found > 1e-5).float(), labels)
    for i, (low, high) in enumerate(((6, 20), (8, 45), (math.log(1.15), math.log(1.6)))):
        present = found[:, i][labels[:, i] > 0]
        assert low - 1e-4 <= present.min() < low * 1.03
        assert high * 0.97 < present.max() <= high + 1e-4
    both_ways = changes[labels.all(dim=1)]
    assert ((both_ways > 0).float().mean(dim=0) - 0.5).abs().max() < 0.1
    agree = (both_ways[:, 2] > 0) == (both_ways[:, 3] > 0)
    assert abs(float(agree.float().mean()) - 0.5) < 0.1, "a turn says nothing about the scale"


@pytest.mark.parametrize("log", [False, True])
def test_strengths_and_directions_are_uniform(nb, log):
    device.seed_everything(0)
    ranges = torch.tensor([[0.02, 0.2], [2.0, 45.0], [1.1, 3.0]])
    changes = nb.draw_changes(torch.ones(4000, 3), ranges, 100, log)
    strength = registration.log_strengths(changes).exp()  # pixels, degrees, logarithm of the factor
    strength = torch.stack([strength[:, 0] / 100, strength[:, 1], strength[:, 2].exp()], dim=1)
    low, high = ranges.unbind(dim=1)
    middle = (low * high).sqrt() if log else (low + high) / 2
    assert torch.allclose(strength.median(dim=0).values, middle, rtol=0.05)
    assert F.normalize(changes[:, :2], dim=1).mean(dim=0).abs().max() < 0.05


def test_all_changes_of_a_training_pair_come_from_one_range(nb, canvases):
    config = nb.replace(nb.Config(), image_side=64, steps=8, batch_size=64, subtle_share=0.4)
    device.seed_everything(0)
    loader = nb.FreshPairs(canvases, config, 16).loader()
    labels, changes = (torch.cat(x) for x in list(zip(*loader))[2:])
    strength = registration.log_strengths(changes / torch.tensor([64, 64, 1, 1])).exp()
    border = torch.tensor([0.06, 8.0, math.log(1.15)])
    standard = ((strength > border) & (labels > 0)).any(dim=1)
    subtle = ((strength < border) & (labels > 0)).any(dim=1)
    assert not (standard & subtle).any()
    assert abs(float(subtle.sum() / (standard | subtle).sum()) - 0.4) < 0.07


def test_the_labels_are_three_independent_coins(nb, canvases):
    config = nb.replace(nb.Config(), image_side=64, steps=40, batch_size=64)
    device.seed_everything(0)
    labels = torch.cat([batch[2] for batch in nb.FreshPairs(canvases, config, 8)])
    counts = torch.bincount((labels @ torch.tensor([1.0, 2, 4])).long(), minlength=8)
    assert (counts / len(labels) - 1 / 8).abs().max() < 0.03


def test_an_unchanged_pair_is_twice_the_same_image(nb, canvases):
    pairs = nb.FixedPairs(canvases, OWNERS, torch.zeros(8, 3), nb.STANDARD, 64, seed=0)
    assert torch.equal(pairs.first, pairs.second) and not pairs.changes.any()


def test_fresh_pairs_differ_in_every_pass_and_come_from_the_global_seed(nb, canvases):
    config = nb.replace(nb.Config(), image_side=64, steps=3, batch_size=8)
    loader = nb.FreshPairs(canvases, config, 32).loader()
    assert len(loader) == 3
    passes = []
    for seed in (0, None, 0):
        if seed is not None:
            device.seed_everything(seed)
        passes.append(torch.cat([first for first, *_ in loader]))
    assert passes[0].shape == (24, 3, 32, 32) and 0 <= passes[0].min() <= passes[0].max() <= 1
    assert torch.equal(passes[0], passes[2]) and not torch.equal(passes[0], passes[1])
    assert len(passes[0].flatten(1).unique(dim=0)) == 24, "no pair comes twice"


def test_fixed_pairs_stay_as_they_were_drawn(nb, canvases):
    pairs = nb.FixedPairs(canvases, OWNERS, 24, nb.STANDARD, 64, seed=5)
    torch.rand(7)  # whatever happens to the global generator in between
    again = nb.FixedPairs(canvases, OWNERS, 24, nb.STANDARD, 64, seed=5)
    other = nb.FixedPairs(canvases, OWNERS, 24, nb.STANDARD, 64, seed=6)
    assert torch.equal(pairs.first, again.first) and not torch.equal(pairs.first, other.first)
    batches = list(pairs.loader(batch_size=10))
    assert [len(batch[0]) for batch in batches] == [10, 10, 4]
    for k, whole in enumerate((pairs.first, pairs.second, pairs.labels, pairs.changes)):
        assert torch.equal(torch.cat([batch[k] for batch in batches]), whole)
    assert pairs.first.dtype == torch.uint8 and len(pairs) == 24
    assert torch.bincount((pairs.labels @ torch.tensor([1.0, 2, 4])).long()).tolist() == [3] * 8


def test_the_images_of_unrelated_pairs_are_of_different_photos(nb):
    grey = torch.stack([torch.full((3, 192, 192), 60 * i, dtype=torch.uint8) for i in range(4)])
    pairs = nb.FixedPairs(grey, OWNERS, 40, nb.STANDARD, 64, seed=0, unrelated=True)
    of_image = [
        OWNERS[(images[:, 0, 32, 32] / 60).long()] for images in (pairs.first, pairs.second)
    ]
    assert torch.equal(of_image[0], pairs.photos) and (of_image[0] != of_image[1]).all()


def test_canvases_know_their_photos(tmp_path):
    for name, size in (("wide.jpg", (300, 120)), ("square.jpg", (130, 120))):
        photo(size).save(tmp_path / name)
    canvases, owners = views.make_canvases([tmp_path / "wide.jpg", tmp_path / "square.jpg"], 32)
    assert canvases.shape == (3, 3, 96, 96) and owners.tolist() == [0, 0, 1]
    assert not torch.equal(canvases[0], canvases[1])


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize(
    "length, side, begins", [(240, 32, [0, 144]), (104, 32, [4]), (60, 16, [0, 12]), (54, 15, [4])]
)
def test_canvases_come_from_both_ends_or_the_middle(tmp_path, upright, length, side, begins):
    """A pixel's value is its place along the longer side; the shorter one needs no resizing."""
    ramp = np.tile(np.arange(length, dtype=np.uint8), (3 * side, 1))
    Image.fromarray(ramp.T if upright else ramp).convert("RGB").save(tmp_path / "ramp.png")
    canvases, owners = views.make_canvases([tmp_path / "ramp.png"], side)
    assert owners.tolist() == [0] * len(begins)
    for canvas, begin in zip(canvases, begins, strict=True):
        line = torch.arange(begin, begin + 3 * side, dtype=torch.uint8).expand(3, 3 * side, -1)
        assert torch.equal(canvas, line.mT if upright else line)


def test_a_view_of_the_whole_canvas_is_the_canvas(canvases):
    """Up to the last pixel at every edge; each of its points is a quarter of a pixel inside."""
    whole = views.View(canvases, torch.tensor([1]), torch.eye(3)[None], 192)
    grid = F.affine_grid(torch.eye(2, 3)[None], (1, 3, 384, 384), align_corners=False)
    points = F.grid_sample(canvases[1:2] / 255, grid, padding_mode="border", align_corners=False)
    assert torch.allclose(views.sample(whole)[0], F.avg_pool2d(points, 2), atol=1e-4)
    corner = views.View(canvases, torch.tensor([1]), views.matrix(1, 0, -64, 0, 1, -64), 64)
    expected = views.sample(whole)[0][..., :64, :64]
    assert torch.allclose(views.sample(corner)[0], expected, atol=1e-4)


def test_bytes_are_rounded_and_stay_in_range():
    values = torch.tensor([-0.2, 0.0, 0.5, 0.9979, 1.0, 1.2])
    assert views.as_bytes(values).tolist() == [0, 0, 128, 254, 255, 255]


# --- the network ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name, dim", [("SpatialExchange", 3), ("ChannelExchange", 1)])
def test_exchange_swaps_every_second_and_is_its_own_inverse(nb, name, dim):
    a, b = torch.randn(2, 2, 6, 4, 8).unbind()
    exchange = getattr(nb, name)(0.5)
    x, y = exchange(a, b)
    even = torch.arange(0, a.shape[dim], 2)
    odd = even + 1
    assert torch.equal(x.index_select(dim, even), b.index_select(dim, even))
    assert torch.equal(x.index_select(dim, odd), a.index_select(dim, odd))
    assert torch.equal(y.index_select(dim, even), a.index_select(dim, even))
    assert all(torch.equal(p, q) for p, q in zip(exchange(x, y), (a, b)))
    quarter = getattr(nb, name)(0.25)(a, b)[0] != a
    other = [axis for axis in range(4) if axis != dim]
    assert torch.equal(quarter.sum(dim=other) > 0, torch.arange(a.shape[dim]) % 4 == 0)
    assert torch.equal(getattr(nb, name)(1)(a, b)[0], b), "the whole is the most"
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            getattr(nb, name)(share)


def test_a_block_adds_its_two_branches(nb):
    torch.manual_seed(0)
    block, x = nb.Block(2, 3).eval(), torch.randn(2, 2, 5, 5)
    assert torch.equal(block(x), (block.main(x) + block.parallel(x)).clamp_min(0))
    assert not torch.equal(block(x), block.main(x).clamp_min(0))


def test_the_parts_are_as_drawn_by_default(nb):
    """The stem by its layers: a 7x7 convolution and a 3x3 maximum, each at every second place."""
    convolution, _, _, _, pool = stem = nb.Stem()
    assert convolution.weight.shape == (64, 3, 7, 7)
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    for part in (stem, nb.Block(4, 4), nb.Stage(4, 4)):
        assert {m.p for m in part.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}


def test_the_seed_draws_the_network(nb):
    first, again, other = (
        nb.build(nb.replace(nb.CONFIGS["smoke"], seed=seed)).fc.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_loss_by_hand(nb):
    assert nb.units(50).tolist() == [5, 5, 20, 0.25]
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    changes = torch.tensor([[5.0, -10.0, 20.0, 0.5], [0.0] * 4])  # in units: 1, -2, 1, 2
    estimates = torch.tensor([[1.05, -2.0, 1.5, 2.0], [0.0, 0.02, 0.0, -1.0]])
    loss, parts = nb.changer_loss((logits, estimates), labels, changes, 50, 0.5)
    wrong_way = [-2.0, -1.0, -0.5, 0.0, 3.0, 2.0]  # a logit that points away from its label
    label_loss = sum(math.log1p(math.exp(x)) for x in wrong_way) / 6
    # Errors of up to 0.1 count as 5 e^2, larger ones as e - 0.05.
    estimate_loss = (5 * 0.05**2 + 0.45 + 5 * 0.02**2 + 0.95) / 8
    assert parts["label_loss"].item() == pytest.approx(label_loss)
    assert parts["estimate_loss"].item() == pytest.approx(estimate_loss, rel=1e-4)
    assert loss.item() == pytest.approx(label_loss + 0.5 * estimate_loss, rel=1e-4)
    assert parts["accuracy"].item() == pytest.approx(4 / 6), "a logit of 0 says no"


def by_hand(channels):
    """The drawn network's parameters: convolutions with biases, BatchNorms, the linear layer."""
    count = 7 * 7 * 3 * channels[0] + channels[0] + 2 * channels[0]
    for before, after in zip((channels[0], *channels), channels):
        for b in (before, after):
            weights = 9 * b * after + 9 * after * after + b * after
            count += weights + 3 * after + 3 * 2 * after
    return count + 2 * channels[-1] * 3 + 3


def test_the_drawn_network(nb):
    network = nb.Changer().eval()
    extra = sum(p.numel() for p in network.estimate.parameters())
    count = sum(p.numel() for p in network.parameters()) - extra
    assert count == by_hand((64, 128, 256, 512)) == 11_539_715
    shapes = []
    for stage in network.stages:
        stage.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape[1:])))
    with torch.inference_mode():
        logits, estimates = network(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
    assert shapes == [(64, 16, 16), (128, 16, 16), (256, 16, 16), (512, 16, 16)]
    assert logits.shape == (1, 3) and estimates.shape == (1, 4)
    kinds = [type(exchange).__name__ for exchange in network.exchanges]
    assert kinds == ["NoneType", "SpatialExchange", "ChannelExchange", "ChannelExchange"]
    assert [type(pool).__name__ for pool in network.pools] == ["Identity"] * 4
    assert sum(isinstance(m, torch.nn.Dropout) and m.p == 0.2 for m in network.modules()) == 17


@pytest.fixture(scope="module")
def small(nb):
    torch.manual_seed(0)
    network = nb.Changer((4, 8, 12, 16), (True, False, True), 0.0)
    for module in network.modules():  # as after a training: no BatchNorm is the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network.double().eval()


def test_without_exchange_the_logits_are_a_sum_of_the_two_images(nb, small):
    """f(a, b) = u(a) + v(b) for all images, exactly if the mixed difference is zero everywhere."""
    apart = nb.copy.deepcopy(small)
    apart.exchanges = [None] * 4
    images = torch.rand(4, 3, 64, 64, dtype=torch.double)
    assert nb.interaction(apart, images).abs().max() < 1e-12
    assert nb.interaction(small, images).abs().max() > 1e-7
    # u and v written out: half of the classifier's columns for each image
    left, right = apart.fc.weight.chunk(2, dim=1)
    a, b = images[:1], images[1:2]

    def features(image):
        x = apart.stem(4 * (image - 0.45))
        for stage, pool in zip(apart.stages, apart.pools):
            x = pool(stage(x))
        return x.mean(dim=(2, 3))

    expected = features(a) @ left.T + features(b) @ right.T + apart.fc.bias
    assert torch.allclose(apart(a, b)[0], expected, atol=1e-12)


def test_the_last_channel_exchange_only_permutes_columns_of_the_classifier(nb, small):
    other = copy.deepcopy(small)
    other.exchanges = [None, None, nb.SpatialExchange(), nb.ChannelExchange(0.25)]
    for network in (small, other):
        plain = nb.without_last_exchange(network)
        assert plain.exchanges[-1] is None and network.exchanges[-1] is not None
        a, b = torch.rand(2, 5, 3, 64, 64, dtype=torch.double)
        for found, expected in zip(plain(a, b), network(a, b)):
            assert torch.allclose(found, expected, atol=1e-12)
        for ours, theirs in zip(plain.fc.weight, network.fc.weight):
            assert torch.equal(ours.sort().values, theirs.sort().values)


@pytest.mark.parametrize("profile", ["smoke", "demo", "cpu", "gpu", "gpu_full"])
def test_one_step_of_every_profile(nb, canvases, profile):
    """With bfloat16 autocast where the profile has it; on small images, as there may be no GPU."""
    config = nb.replace(nb.CONFIGS[profile], image_side=64, steps=1, batch_size=4)
    network = nb.build(config)
    device.seed_everything(0)
    first, second, labels, changes = next(iter(nb.FreshPairs(canvases, config, 64)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=profile.startswith("gpu")):
        output = network(first, second)
        loss, parts = nb.changer_loss(output, labels, changes, 64, config.estimate_weight)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    total = parts["label_loss"] + config.estimate_weight * parts["estimate_loss"]
    assert torch.isclose(loss, total)


def test_the_trial_of_the_drawn_network_crosses_pooling_and_dropout(nb, monkeypatch, tmp_path):
    trained = {}

    def train(network, train_loaders, val_loaders, config, runtime):
        trained[config.pool_after, config.dropout] = network
        assert list(train_loaders) == [config.small_side] == [config.image_side]
        assert set(val_loaders) == {"standard", "subtle"}
        return training.History([{"val_loss": 1.0}], 1, 2.0)

    monkeypatch.setattr("src.results.ROOT", tmp_path)
    monkeypatch.setattr(drawn, "definitions", lambda name: nb)
    monkeypatch.setattr(nb, "train_changer", train)
    source = data.find_source(datasets.PHOTOS, "smoke")
    path = drawn.run(drawn.SMOKE, source, device.start(torch.device("cpu"), "cpu"))
    pools = nb.Config().pool_after, nb.DRAWN.pool_after
    assert set(trained) == {(pool, dropout) for pool in pools for dropout in (0.0, 0.2)}
    for (pool, dropout), network in trained.items():
        assert sum(isinstance(part, torch.nn.MaxPool2d) for part in network.pools) == sum(pool)
        assert {part.p for part in network.modules() if isinstance(part, torch.nn.Dropout)} == {
            dropout
        }
    stored = results.load_results(path)["metrics"]
    for key in (
        "pooling_dropout.standard.exact_match",
        "no_pooling_no_dropout.subtle.per_label_accuracy",
    ):
        assert key in stored
    assert len(stored) == 4 * 2 * 2


# --- the decision ---------------------------------------------------------------------------------
def test_a_threshold_lies_in_the_middle_of_the_widest_gap_with_most_right_answers(nb):
    scores = torch.tensor([0.0, 1, 2, 10, 11, 12.0])
    labels = torch.tensor([0.0, 0, 0, 1, 1, 1])
    several = torch.stack([scores, scores, -scores], dim=1)
    truth = torch.stack([labels, torch.tensor([0.0, 1, 0, 1, 1, 1]), 1 - labels], dim=1)
    assert nb.choose_thresholds(several, truth).tolist() == [6.0, 6.0, -6.0]


def test_slopes_recover_the_probabilities_that_made_the_labels(nb):
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(20_000, 3, generator=generator)
    slopes, thresholds = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([0.0, 1.0, -2.0])
    chance = torch.sigmoid(slopes * (scores - thresholds))
    labels = (torch.rand(20_000, 3, generator=generator) < chance).float()
    found = nb.choose_slopes(scores, labels, thresholds)
    assert torch.allclose(found, slopes, rtol=0.15)


@pytest.fixture(scope="module")
def detector(nb):
    torch.manual_seed(0)
    detector = nb.Detector(nb.CONFIGS["smoke"]).eval()
    detector.refined_thresholds = torch.tensor([0.3, 0.5, 0.01]).log()
    detector.refined_slopes = torch.full((3,), 4.0)
    return detector


KEYS = {"displacement", "rotation", "scaling", "dx", "dy", "angle_deg", "scale", "score", "verdict"}


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "LA"])
def test_identical_images_of_any_kind_have_no_change(detector, mode):
    answer = detector.predict(photo(mode=mode), photo(mode=mode), refine=True)
    assert set(answer) == KEYS and answer["verdict"] == "no change"
    assert all(answer[change] < 0.5 for change in ("displacement", "rotation", "scaling"))
    assert all(math.isfinite(v) for k, v in answer.items() if k != "verdict")


def test_the_network_alone_answers_unless_refined(nb, detector):
    a, b = photo(), photo(seed=1)
    images = [data.central_square(image, 32)[0] for image in (a, b)]
    with torch.inference_mode():
        logits, estimates = detector.network(*images)
    answer = detector.predict(a, b)
    expected = torch.sigmoid(detector.slopes * (logits - detector.thresholds))[0]
    assert [answer[change] for change in nb.CHANGES] == pytest.approx(expected.tolist(), abs=1e-5)
    assert answer["angle_deg"] == pytest.approx(20 * float(estimates[0, 2]), abs=1e-3)
    assert answer["dx"] == pytest.approx(90 * 0.1 * float(estimates[0, 0]), abs=1e-3)


def test_a_moved_photo_is_refined_in_its_own_pixels(detector):
    big = photo((900, 700))
    a, b = big.crop((100, 100, 500, 500)), big.crop((90, 104, 490, 504))  # content 10 right, 4 up
    answer = detector.predict(a, b, refine=True)
    assert answer["verdict"] == "changes" and answer["displacement"] > 0.5
    assert answer["dx"] == pytest.approx(10, abs=0.5) and answer["dy"] == pytest.approx(-4, abs=0.5)
    halved = b.resize((200, 200), Image.Resampling.LANCZOS)  # sizes differ: in pixels of b
    answer = detector.predict(a, halved, refine=True)
    assert answer["dx"] == pytest.approx(5, abs=0.3)


def test_exif_orientation_16_bit_and_transparency(detector, tmp_path):
    upright = photo((160, 120))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    grey = np.asarray(upright.convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    for a, b in ((tmp_path / "turned.png", upright), (tmp_path / "8.png", tmp_path / "16.png")):
        assert detector.predict(a, b, refine=True)["verdict"] == "no change"
    clear = upright.convert("RGBA")
    clear.putalpha(0)
    assert detector.predict(clear, clear)["verdict"] == "cannot tell"  # all white


def test_twelve_megapixels(detector):
    image = photo((4000, 3000))
    assert detector.predict(image, image.resize((1000, 750)), refine=True)["verdict"] == "no change"


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_images_tell_nothing(detector, level):
    blank = Image.new("RGB", (100, 100), (level,) * 3)
    for refine in (False, True):
        answer = detector.predict(blank, blank, refine=refine)
        assert answer["verdict"] == "cannot tell" and answer["score"] == 0


def test_unrelated_mirrored_and_turned_photos_cannot_be_told(detector):
    """The alignment's score, with a threshold as a training chooses it."""
    strict = copy.deepcopy(detector)
    strict.lowest_score = torch.tensor(1.0)
    a = photo((300, 300))
    others = [photo((300, 300), seed=1), a.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    others += [a.rotate(90), a.rotate(180)]
    assert [strict.predict(a, b)["verdict"] for b in others] == ["cannot tell"] * 4


def test_a_change_beyond_the_trained_range_cannot_be_told(nb, detector):
    side = detector.config.image_side
    changes = torch.tensor([
        [0.2 * side, 0, 0, 0], [0.3 * side, 0, 0, 0], [0, 0, 45, 0], [0, 0, -60, 0],
        [0, 0, 0, math.log(1.6)], [0, 0, 0, -math.log(2)], [0, 0, 0, 0],
    ])  # fmt: skip
    refused = nb.cannot_tell(detector, changes, torch.tensor([2.0] * 6 + [-1.0]))
    assert refused.tolist() == [False, True, False, True, False, True, True]


@pytest.mark.parametrize(
    "a, message",
    [
        (photo((12, 40)), "12x40 pixels; at least 16x16"),
        (5, "Pillow image or a file name, not int"),
        (None, "Pillow image or a file name, not NoneType"),
        ("no such file.jpg", "no such file.jpg"),
    ],
)
def test_bad_images_are_refused_in_one_line(detector, a, message):
    with pytest.raises(ProjectError, match=re.escape(message)) as error:
        detector.predict(photo(), a)
    assert "\n" not in str(error.value)


def test_a_corrupt_file_is_named(detector, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(data.DataError, match="broken.jpg"):
        detector.predict(tmp_path / "broken.jpg", photo())


@pytest.mark.parametrize("profile", ["smoke", "gpu"])
def test_a_saved_model_carries_its_configuration(nb, tmp_path, profile):
    config = nb.CONFIGS[profile]
    torch.manual_seed(0)
    detector = nb.Detector(config).eval()
    detector.thresholds = torch.tensor([0.1, 0.2, 0.3])
    detector.lowest_score = torch.tensor(0.7)
    training.save_model(detector, tmp_path / "model.pt", config)
    loaded = nb.load_model(tmp_path / "model.pt")
    assert loaded.config.channels == list(config.channels) and not loaded.training
    assert loaded.thresholds.tolist() == detector.thresholds.tolist()
    a, b = photo(), photo(seed=1)
    before, after = detector.predict(a, b), loaded.predict(a, b)
    assert after["rotation"] == pytest.approx(before["rotation"], abs=0.05)
    assert after["verdict"] == before["verdict"]


def test_bad_model_files_are_refused_in_one_line(nb, detector, tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(ProjectError, match=r"There is no model file model\.pt"):
        nb.load_model(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ProjectError, match="not a model file"):
        nb.load_model(path)
    training.save_model(detector, path, nb.CONFIGS["demo"])
    with pytest.raises(ProjectError, match="another model"):
        nb.load_model(path)
    training.save_model(detector.network, path)
    with pytest.raises(ProjectError):
        nb.load_model(path)


def test_the_committed_model_finds_changes_in_real_photos(nb, real_data):
    """The file in the repository, on photos cut by Pillow instead of by this project."""
    path = data.ROOT / "reports" / "models" / "detect_change.pt"
    try:
        detector = nb.load_model(path)
    except ProjectError as error:
        pytest.skip(f"no committed model of this notebook: {error}")
    assert path.stat().st_size < 8_000_000
    correct, told = [], []
    for path in sorted((real_data / "coco" / "val2017").glob("*.jpg"))[:12]:
        image = data.read_image(path)
        x, y, half = image.width / 2, image.height / 2, 0.28 * min(image.size)
        for angle, moved in ((0, 0), (12, 0), (0, 0.2), (-20, -0.2)):
            turned = image.rotate(-angle, Image.Resampling.BICUBIC)
            first = image.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
            left = round(x - half - moved * half)
            box = (left, round(y - half), left + first.width, round(y - half) + first.height)
            answer = detector.predict(first, turned.crop(box))
            truth = {"displacement": bool(moved), "rotation": bool(angle), "scaling": False}
            correct += [(answer[change] > 0.5) == truth[change] for change in truth]
            told.append(answer["verdict"] != "cannot tell")
    assert np.mean(correct) > 0.93 and np.mean(told) > 0.93


def test_the_differences_of_question_3_are_those_of_two_rates():
    """From the stored answers: each draw of photos gives two rates and their difference."""
    stored = results.load_results(data.ROOT / "reports" / "results" / "detect_change.json")
    arrays = np.load(data.ROOT / "reports" / "results" / "detect_change.npz")
    labels, photos = arrays["standard_labels"], arrays["standard_photos"]
    right = (arrays["standard_network_yes"] == (labels > 0)).all(axis=1)
    number, group = labels.sum(axis=1), np.unique(photos, return_inverse=True)[1]
    draws = np.random.default_rng(1).integers(0, group.max() + 1, (2000, group.max() + 1))

    def rates(n):
        found, all_of_it = (
            np.bincount(group, x, group.max() + 1)[draws].sum(axis=1)
            for x in (right * (number == n), number == n)
        )
        return found / all_of_it

    words = {"one_change": 1, "two_changes": 2, "three_changes": 3}
    names = [name.split(".")[1] for name in stored["metrics"] if name.startswith("question_3.")]
    assert len(names) == 2
    for name in names:
        more, less = (words[word] for word in name.split("_over_"))
        low, high = 100 * np.percentile(rates(more) - rates(less), [2.5, 97.5])
        found = stored["metrics"][f"question_3.{name}"].ci95
        assert found == pytest.approx((low, high), abs=0.15 * (high - low))
