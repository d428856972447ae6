"""The definitions of notebooks/detect_change.ipynb: pairs, exchanges, network, alignment, prediction."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from src import ProjectError, data, device
from src.training import save_model
from tools.notebooks import definitions


@pytest.fixture(scope="module")
def nb():
    return definitions("detect_change")


@pytest.fixture(scope="module")
def canvases():
    """Two canvases for images of 32 pixels: smooth colour noise with all scales."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        torch.nn.functional.interpolate(
            torch.rand(2, 3, n, n, generator=generator), size=96, mode="bicubic"
        )
        for n in (4, 8, 16, 32)
    ]
    return (sum(layers) / 4 * 255).clamp(0, 255).to(torch.uint8)


def one(*values):
    return [torch.tensor([float(value)]) for value in values]


# --- the pairs


def test_the_changes_move_points_as_documented(nb):
    pose = nb.displacement(
        nb.rotation(nb.scaling(torch.eye(3)[None], *one(2)), *one(90)), *one(5, 0)
    )
    # What image 1 shows at (1, 0) is enlarged to (2, 0), turned clockwise (y points down) to (0, 2), moved to (5, 2).
    assert torch.allclose(pose @ torch.tensor([5.0, 2, 1]), torch.tensor([[1.0, 0, 1]]), atol=1e-5)


@pytest.mark.parametrize("ranges", ["STANDARD", "SUBTLE", "TRAINED"])
def test_every_pose_stays_inside_the_canvas(nb, ranges):
    device.seed_everything(0)
    side = 32
    changes = nb.draw_changes(
        nb.draw_labels(2000, balanced=True), getattr(nb, ranges), side, logarithmic=False
    )
    corners = side / 2 * torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1], [2 / side] * 4])
    for pose in nb.draw_poses(changes, side):
        assert (pose @ corners)[:, :2].abs().max() <= nb.CANVAS_PER_SIDE * side / 2 + 1e-3


def test_no_image_has_a_black_corner(nb):
    device.seed_everything(0)
    white = torch.full((1, 3, 96, 96), 255, dtype=torch.uint8)
    first, second, _ = nb.make_pairs(white, nb.draw_labels(200, balanced=True), nb.STANDARD, 32)
    assert first.min() > 0.999 and second.min() > 0.999


def test_recorded_changes_say_where_things_went(nb, canvases):
    """Image 2 sampled at the recorded change is image 1 where they overlap."""
    device.seed_everything(1)
    first, second, changes = nb.make_pairs(
        canvases, nb.draw_labels(64, balanced=True), nb.SUBTLE, 32
    )
    back = nb.align_back(second, changes)[:, :, 8:-8, 8:-8]
    assert (back - first[:, :, 8:-8, 8:-8]).abs().mean() < 0.01
    changed = changes.abs().sum(dim=1) > 0
    assert (second - first)[changed].abs().mean() > 3 * (back - first[:, :, 8:-8, 8:-8])[
        changed
    ].abs().mean()


def test_strengths_and_combinations_are_those_asked_for(nb):
    device.seed_everything(0)
    labels = nb.draw_labels(4000, balanced=True)
    assert torch.bincount((labels @ torch.tensor([1.0, 2, 4])).long()).tolist() == [500] * 8
    found = nb.strengths(nb.draw_changes(labels, nb.STANDARD, 100, logarithmic=False))
    assert torch.equal((found > 0).float(), labels)
    for i, (low, high) in enumerate(((6, 20), (8, 45), (math.log(1.15), math.log(1.6)))):
        present = found[:, i][labels[:, i] > 0]
        assert (
            low - 1e-4 <= present.min() < low * 1.02 and high * 0.98 < present.max() <= high + 1e-4
        )
    counts = torch.bincount(nb.draw_labels(4000, balanced=False).sum(dim=1).long())
    assert counts.min() > 880 and len(counts) == 4


def test_an_unchanged_pair_is_twice_the_same_image(nb, canvases):
    device.seed_everything(0)
    first, second, changes = nb.make_pairs(canvases, torch.zeros(8, 3), nb.STANDARD, 32)
    assert torch.equal(first, second) and not changes.any()


def test_fresh_pairs_differ_in_every_pass_and_come_from_the_global_seed(nb, canvases):
    loader = nb.FreshPairs(canvases, steps=3, batch_size=8, side=32).loader()
    assert len(loader) == 3
    passes = []
    for seed in (0, None, 0):
        if seed is not None:
            device.seed_everything(seed)
        passes.append(list(loader))
    for first, second, labels, changes in passes[0]:
        assert first.shape == second.shape == (8, 3, 32, 32) and changes.shape == (8, 4)
        assert torch.equal((nb.strengths(changes) > 0).float(), labels)
    firsts = [torch.cat([batch[0] for batch in batches]) for batches in passes]
    assert torch.equal(firsts[0], firsts[2]) and not torch.equal(firsts[0], firsts[1])
    assert len(firsts[0].flatten(1).unique(dim=0)) == 24, "no pair comes twice"
    loader.dataset.out = 16
    assert next(iter(loader))[0].shape == (8, 3, 16, 16)


def test_fixed_pairs_stay_as_they_were_drawn(nb, canvases):
    pairs = nb.FixedPairs(canvases, 24, nb.STANDARD, 32, seed=5)
    torch.rand(7)  # whatever happens to the global generator in between
    again = nb.FixedPairs(canvases, 24, nb.STANDARD, 32, seed=5)
    other = nb.FixedPairs(canvases, 24, nb.STANDARD, 32, seed=6)
    assert torch.equal(pairs.first, again.first) and not torch.equal(pairs.first, other.first)
    for _ in range(2):  # every pass gives the same, in order
        batches = list(pairs.loader(batch_size=10))
        assert [len(batch[0]) for batch in batches] == [10, 10, 4]
        for k, whole in enumerate((pairs.first, pairs.second, pairs.labels, pairs.changes)):
            assert torch.equal(torch.cat([batch[k] for batch in batches]), whole)
    assert torch.equal(pairs[3][1], pairs.second[3]) and len(pairs) == 24
    assert torch.bincount((pairs.labels @ torch.tensor([1.0, 2, 4])).long()).tolist() == [3] * 8


# --- the network


@pytest.mark.parametrize("name, dim", [("SpatialExchange", 3), ("ChannelExchange", 1)])
def test_exchange_swaps_every_second_and_is_its_own_inverse(nb, name, dim):
    a, b = torch.randn(2, 2, 6, 4, 8).unbind()
    exchange = getattr(nb, name)(0.5)
    x, y = exchange(a, b)
    even = torch.arange(0, a.shape[dim], 2)
    odd = even + 1
    assert torch.equal(x.index_select(dim, even), b.index_select(dim, even)) and torch.equal(
        x.index_select(dim, odd), a.index_select(dim, odd)
    )
    assert torch.equal(y.index_select(dim, even), a.index_select(dim, even))
    assert all(torch.equal(p, q) for p, q in zip(exchange(x, y), (a, b)))
    quarter = getattr(nb, name)(0.25)(a, b)[0]
    assert torch.equal(
        (quarter != a).flatten(2).any(2).any(0)
        if dim == 1
        else (quarter != a).any(0).any(0).any(0),
        torch.arange(a.shape[dim]) % 4 == 0,
    )


def test_the_drawn_network(nb):
    network = nb.Changer().eval()
    assert sum(p.numel() for p in network.parameters()) == nb.count_parameters((64, 128, 256, 512))
    assert sum(p.numel() for p in nb.Changer(shared=False).parameters()) == nb.count_parameters(
        (64, 128, 256, 512), shared=False
    )
    shapes = []
    for step in network.first:
        step.register_forward_hook(
            lambda module, inputs, output: shapes.append(tuple(output.shape[1:]))
        )
    with torch.inference_mode():
        logits, estimates = network(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
    assert shapes == [(64, 16, 16), (128, 16, 16), (256, 16, 16), (512, 16, 16)]
    assert logits.shape == (1, 3) and estimates.shape == (1, 4)


@pytest.mark.parametrize("profile", ["smoke", "demo", "cpu", "gpu"])
def test_one_step_of_every_profile(nb, canvases, profile):
    """With bfloat16 autocast where the profile has it; on small images, as there may be no GPU."""
    config = nb.CONFIGS[profile]
    network = nb.Changer(config.channels, config.pool_after, config.dropout)
    device.seed_everything(0)
    labels = nb.draw_labels(4, balanced=False)
    first, second, changes = nb.make_pairs(canvases, labels, nb.STANDARD, 32, augmented=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=profile == "gpu"):
        loss, parts = nb.changer_loss(
            network(first, second), labels, changes, 32, config.estimate_weight
        )
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is not None and p.grad.isfinite().all() for p in network.parameters()
    )
    assert torch.isclose(
        loss, parts["label_loss"] + config.estimate_weight * parts["estimate_loss"]
    )


# --- the alignment and the prediction


class Oracle(torch.nn.Module):
    """Stands for a network that always estimates the same change."""

    def __init__(self, nb, change, side):
        super().__init__()
        self.answer = torch.tensor([change]) / nb.units(side, torch.zeros(1))

    def forward(self, a, b):
        return torch.zeros(len(a), 3), self.answer.expand(len(a), 4)


def test_the_eight_views_are_brought_back(nb):
    """A network that reads the true change of whatever pair it sees must give eight equal estimates."""
    change = [4.0, -2.0, 10.0, 0.1]
    marker = torch.zeros(1, 3, 9, 9)
    marker[:, :, 4 - 2, 4 + 4] = 1  # at (dx, dy) = (4, -2) from the centre
    sides = []

    class Reader(torch.nn.Module):
        def forward(self, a, b):
            y, x = (a[0, 0] > 0).nonzero()[0].tolist()
            mirrored = (
                len(sides) % 2
            )  # every second view is a mirror image, in which a turn goes the other way
            sides.append((x, y))
            truth = torch.tensor(
                [[x - 4.0, y - 4.0, -change[2] if mirrored else change[2], change[3]]]
            )
            return torch.zeros(1, 3), truth / nb.units(9, truth)

    _, estimates = nb.eight_views(Reader(), marker, marker, 9)
    assert len(set(sides)) == 8, "eight different views"
    assert torch.allclose(estimates[0], torch.tensor(change).expand(8, 4), atol=1e-4)


def test_alignment_finds_the_change_from_a_rough_guess(nb, canvases):
    device.seed_everything(2)
    big = (
        torch.nn.functional.interpolate(canvases.float(), size=288, mode="bicubic")
        .clamp(0, 255)
        .to(torch.uint8)
    )
    first, second, changes = nb.make_pairs(big, torch.ones(8, 3), nb.SUBTLE, 96)
    errors = []
    for i in range(8):
        guess = (changes[i] + torch.tensor([2.0, -2.0, 2.0, 0.03])).tolist()
        found = nb.measure(Oracle(nb, guess, 96), first[i : i + 1], second[i : i + 1])["aligned"]
        errors.append((found - changes[i : i + 1]).abs())
    median = torch.cat(errors).median(dim=0).values
    assert (median < torch.tensor([0.1, 0.1, 0.1, 0.002])).all(), median


def photo(size=(120, 90), seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="module")
def detector(nb):
    torch.manual_seed(0)
    return nb.Detector(nb.Changer((4, 8, 12, 16), (True, False, True)), 32).eval()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1"])
def test_identical_images_of_any_kind_have_no_change(detector, mode):
    answer = detector.predict(photo(mode=mode), photo(mode=mode))
    assert set(answer) == {"displacement", "rotation", "scaling", "dx", "dy", "angle_deg", "scale"}
    if mode != "1":
        assert all(answer[change] < 0.5 for change in ("displacement", "rotation", "scaling")), (
            answer
        )
    assert all(math.isfinite(value) for value in answer.values())


def test_the_interval_of_a_median_covers_95_percent_and_no_more(nb):
    metric = nb.median(
        torch.randperm(100, generator=torch.Generator().manual_seed(0)) + 1, "pixels"
    )  # the values are the ranks
    low, high = metric["ci95"]
    below = stats.binom(100, 0.5)  # how many of 100 values lie below the true median
    assert metric["value"] == 50.5 and metric["n"] == 100 and metric["unit"] == "pixels"
    assert below.cdf(high - 1) - below.cdf(low - 1) >= 0.95 > below.cdf(high - 2) - below.cdf(low)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (photo((120, 90)), photo((90, 120)), "different sizes, 120x90 and 90x120"),
        (photo((12, 40)), photo((12, 40)), "12x40 pixels; at least 16x16"),
        (5, photo(), "PIL image or a file name, not int"),
    ],
)
def test_bad_pairs_are_refused_in_one_line(detector, a, b, message):
    with pytest.raises(ProjectError, match=re.escape(message)):
        detector.predict(a, b)


def test_a_corrupt_file_is_named(detector, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(data.DataError, match="broken.jpg"):
        detector.predict(path, photo())


def test_a_saved_model_answers_alike(nb, detector, tmp_path):
    config = nb.CONFIGS["smoke"]
    save_model(detector, tmp_path / "model.pt")
    loaded = nb.load_model(tmp_path / "model.pt", config)
    a, b = photo(), photo(seed=1)
    before, after = detector.predict(a, b), loaded.predict(a, b)
    assert all(
        after[key] == pytest.approx(before[key], abs=0.05)
        for key in ("displacement", "rotation", "scaling")
    )


def test_the_committed_model_finds_changes_in_real_photos(nb, real_data):
    """The file in the repository, on photos cut by Pillow instead of this project's own sampling."""
    detector = nb.load_model(nb.ROOT / "reports" / "models" / "detect_change.pt")
    assert (nb.ROOT / "reports" / "models" / "detect_change.pt").stat().st_size < 8_000_000
    right, n = 0, 0
    for path in sorted((real_data / "coco" / "val2017").glob("*.jpg"))[:12]:
        image = data.read_image(path)
        centre, half = (image.width / 2, image.height / 2), 0.28 * min(image.size)
        for angle, moved in ((0, 0), (12, 0), (0, 0.2), (-20, -0.2)):
            changed = image.rotate(-angle, Image.Resampling.BICUBIC)
            first = image.crop([round(c + s) for s in (-half, half) for c in centre])
            second = changed.crop(
                [
                    round(c + s + (-moved * half if axis == 0 else 0))
                    for s in (-half, half)
                    for axis, c in enumerate(centre)
                ]
            )
            answer = detector.predict(first, second.resize(first.size))
            right += (
                ((answer["rotation"] > 0.5) == bool(angle))
                + ((answer["displacement"] > 0.5) == bool(moved))
                + (answer["scaling"] < 0.5)
            )
            n += 3
    assert right >= 0.93 * n, (right, n)
