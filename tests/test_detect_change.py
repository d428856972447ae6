"""The definitions of notebooks/detect_change.ipynb: pairs, network, decision, prediction."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from src import ROOT, data, device, registration, run, train
from src import photo_views as pv
from tools import drawn
from tools.notebooks import definitions


@pytest.fixture(scope="module")
def nb():
    return definitions("detect_change")


def smooth(n, side, seed=0):
    """Smooth color noise with all scales, (n, 3, side, side) uint8."""
    torch.manual_seed(seed)
    layers = [
        F.interpolate(torch.rand(n, 3, k, k), size=side, mode="bicubic") for k in (4, 8, 16, 32)
    ]
    return pv.as_bytes(sum(layers) / 4)


CANVASES, PHOTOS = smooth(4, 192), torch.tensor([0, 0, 1, 2])  # for images of 64 pixels


def photo(seed=0):
    return Image.fromarray(smooth(1, 400, seed)[0].permute(1, 2, 0).numpy())


def fixed(nb, strength="standard", seed=1, canvases=CANVASES):
    return nb.FixedPairs(canvases, PHOTOS, nb.RANGES[strength].expand(64, 3, 2), 64, seed)


# --- functions and pairs --------------------------------------------------------------------------
def test_brightness_blur_noise_and_all_of_them(nb):
    device.seed_everything(0)
    flat = torch.full((200, 3, 9, 9), 0.5)
    assert torch.allclose(nb.brightness(flat, 1.2, -0.1), flat)
    assert torch.allclose(nb.blurring(flat, 1.0), flat), "a flat image stays flat at its edges"
    assert abs(float(nb.gaussian_noise(flat, 0.05).std()) - 0.05) < 0.002
    point = torch.zeros_like(flat)
    point[:, :, 4, 4] = 0.6
    assert (nb.blurring(point, 1.0)[0, 0, 4, 3:] / 0.0375).allclose(
        torch.tensor([2.0, 4, 2, 0, 0, 0])
    )
    augmented = nb.augment(point)  # points stay in their place
    assert augmented.min() >= 0 and augmented.max() <= 1
    assert (augmented.mean(dim=1).flatten(1).argmax(dim=1) == 40).float().mean() > 0.95


@pytest.mark.parametrize("strength", ["standard", "subtle"])
def test_image_2_shows_what_the_changes_say_and_the_labels_name_them(nb, strength):
    """What view 1 shows at x, view 2 shows at factor * R x + d, y down; by hand."""
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    for first, second, label, (dx, dy, angle, log_factor) in fixed(nb, strength):
        assert label.tolist() == [bool(dx or dy), bool(angle), bool(log_factor)]
        factor, turn = log_factor.exp(), torch.deg2rad(angle)
        u = factor * (turn.cos() * x - turn.sin() * y) + dx
        v = factor * (turn.sin() * x + turn.cos() * y) + dy
        grid, pair = torch.stack([u, v], dim=2)[None] / 32, torch.stack([first, second]).float()
        back = F.grid_sample(pair[1:], grid, align_corners=False)
        inside = grid.abs().amax(dim=3) < 0.95
        error, still = (((x - pair[0]).abs() * inside).mean() for x in (back, pair[1]))
        assert error < 0.3 * still if label.any() else torch.equal(first, second)


def test_strengths_are_those_asked_for(nb):
    device.seed_everything(0)
    labels = nb.COMBINATIONS.repeat(500, 1)
    changes = nb.draw_changes(labels, nb.both_ranges(2000), 100)
    strengths = registration.log_strengths(changes).exp()
    halves, bounds = strengths.view(2, 2000, 3).amax(dim=1), [20, 45, 0.47, 6, 8, 0.14]
    assert halves.flatten().tolist() == pytest.approx(bounds, rel=0.03), "standard, then subtle"
    both_ways = changes[labels.all(dim=1)].sign()
    assert both_ways.mean(dim=0).abs().max() < 0.2
    assert torch.corrcoef(both_ways.T).fill_diagonal_(0).abs().max() < 0.2, "none tells another"


def test_no_image_has_a_black_area(nb):
    """Every view stays inside its canvas, whatever the changes; a white one stays white."""
    changes = nb.draw_changes(nb.COMBINATIONS.repeat(500, 1), nb.both_ranges(2000), 64)
    for view in nb.draw_views(CANVASES, changes, 64):
        assert view.corners().abs().max() <= 96 + 1e-3
    pairs = fixed(nb, canvases=torch.full_like(CANVASES, 255))
    assert pairs.first.min() == pairs.second.min() == 255


def test_fresh_pairs(nb):
    config = nb.Config(64, steps=20, batch_size=64, subtle_share=0.4)
    loader, passes = DataLoader(nb.FreshPairs(CANVASES, config, 16), batch_size=None), []
    for seed in (0, 1, 0):
        device.seed_everything(seed)
        passes.append([torch.cat(values) for values in zip(*loader)])
    (first, _, labels, changes), (other, *_), (again, *_) = passes
    assert torch.equal(first, again) and not torch.equal(first, other)
    counts = labels.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 8 and (counts - 160).abs().max() < 40, "three independent coins"
    strengths = registration.log_strengths(changes / torch.tensor([64, 64, 1, 1])).exp()
    weak = ((strengths < torch.tensor([0.06, 8, math.log(1.15)])) & (labels > 0)).sum(dim=1)
    assert ((weak == 0) | (weak == labels.sum(dim=1))).all(), "one range in each pair"
    assert abs(float((weak > 0).float().mean()) - 0.4 * 7 / 8) < 0.05


def test_fixed_pairs_stay_as_they_were_drawn(nb):
    flat = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 192, 192).to(torch.uint8)
    pairs, again = fixed(nb, canvases=flat), fixed(nb, canvases=flat)
    assert all(map(torch.equal, pairs[:], again[:]))
    assert not torch.equal(pairs.changes, fixed(nb, seed=2).changes)
    assert torch.equal(pairs.photos, PHOTOS[pairs.first[:, 0, 0, 0].long()])
    assert pairs.labels.unique(dim=0, return_counts=True)[1].tolist() == [8] * 8


# --- the network ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name, dim", [("SpatialExchange", 3), ("ChannelExchange", 1)])
def test_exchange_swaps_every_second_and_is_its_own_inverse(nb, name, dim):
    a, b = torch.randn(2, 2, 6, 4, 8)
    exchange, expected = getattr(nb, name)(), a.clone()
    expected.transpose(0, dim)[::2] = b.transpose(0, dim)[::2]
    x, y = exchange(a, b)
    assert torch.equal(x, expected) and torch.equal(x + y, a + b)
    assert all(map(torch.equal, exchange(x, y), (a, b)))


def test_the_drawn_network(nb):
    """Parameters by hand: convolutions with biases, BatchNorms, the linear layer; and its parts."""
    count = 7 * 7 * 3 * 64 + 3 * 64 + 2 * 512 * 3 + 3
    for before, c in ((64, 64), (64, 128), (128, 256), (256, 512)):
        count += sum(9 * b * c + 9 * c * c + b * c + 9 * c for b in (before, c))
    network = nb.build(nb.DRAWN).eval()
    assert nb.count_parameters(network) == count == 11_539_715
    kinds = [type(exchange).__name__ for exchange in network.exchanges]
    assert kinds == ["NoneType", "SpatialExchange", "ChannelExchange", "ChannelExchange"]
    assert sum(isinstance(m, torch.nn.Dropout) and m.p == 0.2 for m in network.modules()) == 17
    block, x = network.stages[0][0], network.stem(torch.randn(2, 3, 64, 64))
    assert x.shape == (2, 64, 16, 16)
    assert torch.equal(block(x), (block.main(x) + block.parallel(x)).clamp_min(0))


def test_two_facts_about_the_exchanges(nb):
    network = nb.build(nb.CONFIGS["smoke"]).double().eval()
    apart, images = copy.deepcopy(network), torch.rand(4, 3, 64, 64, dtype=torch.double)
    apart.exchanges = [None] * 4
    assert nb.interaction(apart, images).abs().max() < 1e-12
    assert nb.interaction(network, images).abs().max() > 1e-7
    first, second = images.chunk(2)
    plain = nb.without_last_exchange(network)
    assert plain.exchanges[-1] is None and network.exchanges[-1] is not None
    assert torch.allclose(plain(first, second)[0], network(first, second)[0], atol=1e-12)


def test_the_loss_by_hand(nb):
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    estimates = torch.tensor([[1.05, -2.0, 1.5, 2.0]])
    changes = torch.tensor([[5.0, -10.0, 20.0, 0.5]])  # in units: 1, -2, 1, 2
    loss, means = nb.changer_loss(logits, estimates, labels, changes, 50)
    label_loss = sum(math.log1p(math.exp(x)) for x in (-2, 1, 0)) / 3
    # Errors of up to 0.1 count as 5 e^2, larger ones as e - 0.05.
    assert loss.item() == pytest.approx(label_loss + (5 * 0.05**2 + 0.45) / 4, rel=1e-4)
    assert means["accuracy"].item() == pytest.approx(2 / 3), "a logit of 0 says no"


def test_the_drawn_network_is_trained_as_drawn(nb, monkeypatch, tmp_path):
    built, build = [], nb.build
    monkeypatch.setenv("HW3_PROFILE", "smoke")
    monkeypatch.setattr(run.Run, "reports", tmp_path)
    monkeypatch.setattr(drawn, "definitions", lambda name: nb)
    monkeypatch.setattr(nb, "build", lambda config: built.append(config) or build(config))
    drawn.main()
    settings = [(any(config.pool_after), config.dropout) for config in built]
    assert settings == [(False, 0.2), (True, 0.2), (True, 0.0)]
    stored = run.load_results(tmp_path / "results" / "drawn_network.json")
    assert {"drawn.per_label_accuracy", "pooled.exact_match"} <= set(stored["metrics"])
    assert all(len(curve["epochs"]) == 8 for curve in stored["curves"].values())


# --- the decision ---------------------------------------------------------------------------------
def test_a_threshold_lies_in_the_middle_of_the_widest_gap_with_most_right_answers(nb):
    scores = torch.tensor([0.0, 1, 2, 10, 11, 12.0])
    labels = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).T
    thresholds = nb.choose_thresholds(torch.stack([scores, scores, -scores], dim=1), labels)
    assert thresholds.tolist() == [6.0, 6.0, -6.0]


def test_question_3_on_answers_with_a_known_dependence(nb):
    """All pairs of a photo fail together: the spread is that of photos, not of pairs."""
    photos, number = torch.arange(60).repeat_interleave(16), torch.arange(4).repeat(240)
    fails = np.random.default_rng(0).random((2, 60)) < 0.3
    right = ~torch.from_numpy(fails)[(number == 3).long(), photos]
    differences, p = nb.compare_groups(right, number, photos)
    gain, spread = differences["one_over_three"], np.std(fails[1] * 1.0 - fails[0]) / math.sqrt(60)
    assert gain.value == pytest.approx(fails[1].mean() - fails[0].mean())
    assert gain.ci95[1] - gain.ci95[0] == pytest.approx(2 * 1.96 * spread, rel=0.1)
    alone = math.erfc(abs(gain.value) / spread / math.sqrt(2))
    assert p["one_over_three"] == pytest.approx(min(1, 6 * alone), rel=0.4)
    assert differences["none_over_one"].value == 0 and p["none_over_one"] == 1


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("groups", [(0, 1, 2, 3), (1, 2)])
def test_reports_hold_for_every_outcome(nb, right, groups):
    number = torch.tensor(groups).repeat(6)
    labels = (torch.arange(3) < number[:, None]).float()
    rates = nb.score_labels((labels > 0) == right, labels, number)
    assert rates["exact_match"].value == right
    differences, p = nb.compare_groups(torch.full_like(number, right), number, number // 4)
    assert all(0 <= value <= 1 for value in p.values())
    assert "nan" not in " ".join(map(str, (*rates.values(), *differences.values())))


def test_a_figure_holds_for_few_pairs(nb, monkeypatch):
    figures = []
    shown = SimpleNamespace(figure=lambda *texts: figures.append(texts))
    monkeypatch.setattr(nb, "run", shown, raising=False)
    pairs = fixed(nb)
    nb.show_pairs(train=pairs[:3], test=pairs[:0])
    assert all(figures[0][1:])


# --- prediction -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def toy(nb, tmp_path_factory):
    """A detector, saved and loaded; its labels mean nothing, but what alignment measures does."""
    config, path = nb.CONFIGS["smoke"], tmp_path_factory.mktemp("model") / "model.pt"
    toy = nb.Detector(config)
    toy.thresholds, toy.lowest_score = torch.tensor([-9.0, 0, 9]), torch.tensor(1.0)
    train.save_model(toy, path, config)
    return load(nb, path)


def load(nb, path):
    return train.load_model(lambda stored: nb.Detector(nb.Config(**stored)), path)


def cut_out(image, angle=0, shift=(0, 0)):
    """The middle of a photo that is turned clockwise and moved by Pillow, in shares of its side."""
    half = 0.28 * min(image.size)
    moved = [2 * half * x for x in shift]
    image = image.rotate(-angle, Image.Resampling.BICUBIC, translate=moved)
    x, y = image.width / 2, image.height / 2
    return image.crop((x - half, y - half, x + half, y + half))


def test_a_moved_photo_is_measured(toy):
    a, b = cut_out(photo()), cut_out(photo(), 6, (0.05, -0.03))
    for second in (b, b.resize((120, 120), Image.Resampling.BICUBIC)):
        answer = toy.predict(a, second)
        assert answer["displacement"] is True and answer["scaling"] is False
        assert answer["verdict"] == "changes" and answer["angle"] == pytest.approx(6, abs=0.2)
        measured = [answer[key] for key in ("dx", "dy", "factor")]
        assert measured == pytest.approx([0.05, -0.03, 1], abs=0.004)


def test_what_cannot_be_told(toy):
    image, blank = photo(), Image.new("RGB", (100, 100), "white")
    others = [photo(1), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.rotate(180), blank]
    for pair in ((blank, blank), *((image, other) for other in others)):
        assert toy.predict(*pair)["verdict"] == "cannot tell"


def test_the_committed_model_finds_changes_in_real_photos(nb, real_data):
    try:
        detector = load(nb, ROOT / "reports" / "models" / "detect_change.pt")
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"no committed model of this notebook: {error}")
    correct = []
    for path in sorted((real_data / "coco" / "val2017").glob("*.jpg"))[:12]:
        image = data.read_image(path)
        for angle, moved in ((0, 0), (12, 0), (0, 0.1), (-20, -0.1)):
            answer = detector.predict(cut_out(image), cut_out(image, angle, (moved, 0)))
            truth = [bool(moved), bool(angle), False]
            correct += [answer[change] == true for change, true in zip(nb.CHANGES, truth)]
    assert np.mean(correct) > 0.93
