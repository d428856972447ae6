"""The ideas of the transfer-learning notebook, from its own cells, against references."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_rel
from torch import nn
from torch.utils.data import DataLoader

from src import ProjectError, backbones, stats
from src.run import Run, load_results
from src.train import History
from tools.notebooks import definitions, read

nb = definitions("transfer_learning")
CELLS = [cell for cell in read("transfer_learning").cells if cell.cell_type == "code"]
CODE = [cell.source for cell in CELLS if "define" not in cell.metadata.get("tags", [])]


class TinyExtractor(nn.Module):
    """A convolution with BatchNorm, pooled: as much of a backbone as the tests need."""

    feature_size, name = 6, "tiny"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x):
        return self.body(x).mean(dim=(2, 3))


def tiny_network(seed=0):
    torch.manual_seed(seed)
    return nb.TransferNet(TinyExtractor(), dropout=0.2)


@pytest.fixture(autouse=True)
def small_run(monkeypatch, tmp_path):
    """What the cells take from the notebook: a run, its configuration, a network."""
    monkeypatch.setattr("src.train.CHECKPOINTS", tmp_path)
    monkeypatch.setattr(Run, "reports", tmp_path)
    config = replace(nb.CONFIGS["smoke"], study_lr=0.05, fc_lr=0.1, study_fc_steps=40)
    nb.run = Run("transfer_learning", "smoke", config, None, torch.device("cpu"))
    nb.config, nb.make_network = config, tiny_network


def images(n, seed=0):
    """Two classes that differ in brightness, with noise: (n, 3, 32, 32) uint8 and labels."""
    torch.manual_seed(seed)
    labels = torch.arange(n) % 2
    x = torch.randint(0, 120, (n, 3, 32, 32)) + 100 * labels.view(-1, 1, 1, 1)
    return x.to(torch.uint8), labels


def features(n, size=5, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, size, dtype=torch.float64)


# --- triplet loss ---------------------------------------------------------------------------------
@pytest.mark.parametrize("margin", [0.05, 0.3, 1.0, 5.0])
def test_triplet_loss_is_the_librarys(margin):
    a, p, n = features(27).chunk(3)
    loss, active = nb.triplet_loss(a, p, n, margin)
    each = nn.TripletMarginLoss(margin, reduction="none")(a, p, n)
    assert loss.item() == pytest.approx(each.mean().item(), abs=1e-5)  # it adds 1e-6 to distances
    assert active == (each > 0).float().mean()


def test_the_gradient_is_finite_at_zero_distance():
    a = features(9).requires_grad_()
    nb.triplet_loss(a, a, features(9, seed=1), 9.0)[0].backward()
    assert torch.isfinite(a.grad).all()


def test_a_triplet_that_meets_the_margin_has_no_loss_and_no_gradient():
    a = torch.zeros(1, 2, requires_grad=True)
    p, n = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 6.0]])  # 5 and 6 away
    loss, active = nb.triplet_loss(a, p, n, 1.0)
    loss.backward()
    assert loss == active == a.grad.abs().max() == 0
    assert nb.triplet_loss(a, p, n, 1.5)[0] == 0.5


# --- triplets -------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, first", [(60, 30), (61, 25), (6, 3), (50, 4)])
def test_triplets_have_their_roles_and_use_each_image_once(n, first):
    labels = (torch.arange(n) >= first).long()
    dataset = nb.TripletDataset(torch.arange(n), labels, seed=0)
    roles, classes = dataset[list(range(len(dataset)))]
    a, p, other = classes
    assert len(dataset) == 2 * (min(first, n - first) // 3)
    assert torch.equal(a, p) and torch.equal(other, 1 - a) and a.float().mean() == 0.5
    assert torch.equal(labels[torch.stack(roles)], torch.stack(classes))
    assert len(torch.cat(roles).unique()) == 3 * len(dataset)
    assert dataset[len(dataset) - 1] == tuple(tuple(x[-1] for x in y) for y in (roles, classes))


def test_a_loader_gives_batches_of_triplets_and_none_is_empty():
    batches = list(DataLoader(nb.TripletDataset(*images(64), seed=0), batch_size=7))
    assert [len(labels[0]) for _, labels in batches] == [7, 7, 6]
    for roles, (a, p, other) in batches:
        assert torch.stack(roles).shape == (3, len(a), 3, 32, 32) and torch.equal(other, 1 - p)


def test_a_length_beyond_one_pass_is_filled_with_further_passes():
    dataset = nb.TripletDataset(torch.arange(10), torch.arange(10) % 2, seed=0, length=25)
    (a, p, n), _ = dataset[:]
    assert len(dataset) == len(a) == 25 and (a != p).all()
    assert len(torch.cat([a, p, n]).unique()) == 10  # in the long run every image is used


def test_epochs_and_seeds_draw_new_triplets_and_the_same_ones_when_asked_again():
    dataset, other = (nb.TripletDataset(*images(60), seed=seed) for seed in (0, 1))
    first = dataset.triplets
    assert not torch.equal(first, other.triplets)
    dataset.draw(1)
    assert not torch.equal(first, dataset.triplets)
    dataset.draw(0)
    assert torch.equal(first, dataset.triplets)


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1], [0] * 6, [0, 0, 0, 1, 1, 1, 2, 2, 2]])
def test_too_few_images_for_triplets(labels):
    with pytest.raises(ProjectError, match="Triplets need two classes of at least 3 images"):
        nb.TripletDataset(torch.zeros(len(labels)), torch.tensor(labels), seed=0)


# --- the network ----------------------------------------------------------------------------------
def test_only_the_fully_connected_layer_is_new():
    pretrained = backbones.load("efficientnet_lite0")
    network = nb.TransferNet(copy.deepcopy(pretrained), 0.2)
    theirs = pretrained.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in network.extractor.state_dict().items())
    fc = network.head[1]
    assert fc.weight.shape == (2, 1280) and 0 < fc.weight.std() < 0.02


def test_freezing_keeps_parameters_and_buffers_bit_for_bit():
    network, (x, y) = tiny_network(), images(12)
    x = nb.prepare(x, 32)
    weights = [name for name, _ in network.extractor.named_parameters()]
    assert nb.changed_entries(network, x, y) == weights  # and no buffer
    nb.freeze(network.extractor)
    before = copy.deepcopy(network.state_dict())
    assert nb.changed_entries(network, x, y) == []
    F.cross_entropy(network.train()(x), y).backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    changed = [k for k, v in network.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["head.1.weight", "head.1.bias"]


# --- preparing images -----------------------------------------------------------------------------
def test_prepare_is_the_identity_at_the_images_own_size():
    x, _ = images(4)
    assert torch.allclose(nb.prepare(x, 32), x / 255, atol=1e-5)
    assert nb.prepare(x, 48).shape == (4, 3, 48, 48) and -0.5 < nb.prepare(x, 48).min()


def test_prepare_mirrors_half_and_shifts_within_bounds():
    x = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 16, 8] = 255  # one bright pixel, left of the middle
    torch.manual_seed(0)
    bright = nb.prepare(x, 32, max_shift=2.0)[:, 0].clamp_min(0)
    row, column = (bright.sum(d) @ torch.arange(32.0) / bright.sum((1, 2)) for d in (2, 1))
    mirrored = column > 16
    assert 0.4 < mirrored.float().mean() < 0.6
    for shift in (row - 16, torch.where(mirrored, 23 - column, column - 8)):
        assert 1.5 < shift.abs().max() < 2.3 and shift.mean().abs() < 0.2


# --- measuring ------------------------------------------------------------------------------------


def test_neighbor_vote_by_hand():
    """Directions in the plane, since features are scaled to length 1."""
    x = torch.polar(torch.full((6,), 3.0), torch.tensor([0.0, 0.1, 0.25, 1.0, 1.1, 1.25]))
    x, labels = torch.view_as_real(x), torch.tensor([0, 0, 1, 1, 1, 0])
    assert nb.neighbor_vote(x, x, labels, 3).tolist() == [0, 0, 0, 1, 1, 1]
    alone = nb.neighbor_vote(x, x, labels, 1, leave_out_self=True)
    assert alone.tolist() == [0, 0, 0, 1, 1, 1]


def test_principal_components_find_the_long_axis_and_keep_class_0_on_the_left():
    x = features(500, 3) * torch.tensor([10.0, 1.0, 0.1])
    for labels in ((x[:, 0] > 0).long(), (x[:, 0] < 0).long()):
        points = nb.principal_components(x, labels)
        assert abs(torch.corrcoef(torch.stack([points[:, 0], x[:, 0]]))[0, 1]) > 0.99
        assert points[labels == 0, 0].mean() < 0 < points[labels == 1, 0].mean()


def test_class_distances_by_hand():
    x, labels = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1])
    assert nb.class_distances(x, labels) == (1, 3.5)


# --- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nb.METHODS)
def test_each_loop_trains_what_it_is_for_and_learns(name):
    (code,) = [x for x in CODE if f'networks["{name}"].append(network)' in x]
    nb.config = replace(nb.config, image_sizes=(32,) * 8, lr=0.01, batch_size=6)
    space = vars(nb) | {"train": images(36), "val": images(24, 1), "side": 32, "epochs": 8}
    space |= {"histories": {}, "networks": {method: [] for method in nb.METHODS}}
    exec(code, space)
    new, old = space["networks"][name][0].state_dict(), tiny_network().state_dict()
    changed = {key.split(".")[0] for key in old if not torch.equal(old[key], new[key])}
    assert changed == ({"extractor"} if name == "triplet" else {"extractor", "head"})
    history = space["histories"][name]
    losses = history.column("val_loss")
    assert losses[-1] <= 0.9 * losses[0] and history.column("val_knn_accuracy")[-1] >= 0.9
    for row in history.epochs if name == "joint" else []:
        parts = row["train_triplet"] + row["train_cross_entropy"]
        assert row["train_loss"] == pytest.approx(parts, abs=1e-5)


def test_label_draws_are_balanced_nested_and_differ_between_seeds():
    labels = torch.arange(200) % 2
    small, large, other = (nb.draw_labels(labels, n, s) for n, s in ((5, 3), (20, 3), (5, 4)))
    assert set(small.tolist()) < set(large.tolist()) and len(set(large.tolist())) == 40
    assert labels[large].bincount().tolist() == [20, 20]
    assert set(small.tolist()) != set(other.tolist())


@pytest.mark.parametrize("method", nb.METHODS)
def test_training_on_few_takes_its_steps_and_classifies(method, monkeypatch):
    steps, step = [], nb.Training.step
    monkeypatch.setattr(nb.Training, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    network = nb.train_on_few(method, *images(10), 40, seed=0)
    assert len(steps) == 40 + (40 if method == "triplet" else 0)
    x, y = images(40, seed=1)
    logits = network.head(nb.extract_features(network.extractor, x, nb.config.study_size))
    assert not network.head.training and nb.accuracy(logits, y) >= 0.9


def test_paired_tests_by_hand():
    a, b = np.array([0.91, 0.93, 0.95, 0.90]), np.array([0.90, 0.91, 0.92, 0.90])
    gains = {i: a - b + 0.001 * i for i in range(20)}
    corrected, seen = nb.paired_tests(gains)
    assert corrected == stats.holm({i: ttest_rel(gains[i], 0 * a).pvalue for i in gains})
    error = np.std(100 * (a - b), ddof=1) / 2
    assert seen[0].value == pytest.approx((9.464780 + 0.978472) * error, abs=1e-4)
    for same in (a - a, np.full(4, 0.01), a[:1] - b[:1]):  # nothing varies
        (p,), (seen,) = (list(x.values()) for x in nb.paired_tests({"a": same}))
        assert p == 1 and f"{seen:short}" == "–"


# --- the cells that report, whatever came out -----------------------------------------------------
def reports(right, seeds, tested):
    """Execute the cells that draw, tabulate and conclude, of networks with these right answers."""
    n, levels, rng = len(tested), nb.config.study_labels, np.random.default_rng(0)

    def answers(rows):
        return rng.random((rows, n)) < {"all": 1, "none": 0, "some": 0.7}[right]

    history = History([{"train_accuracy": 0.5, "seconds": 1.0}], 1)
    names, heard = ("cross_entropy", "triplet", "triplet_classifier", "joint"), []
    correct = {name: answers(seeds if name in nb.METHODS else 1) for name in nb.NAMES}
    space = vars(nb) | {
        "correct": correct,
        "histories": dict.fromkeys(names, history),
        "metrics": {f"{m}.test_accuracy": stats.rate(x) for m, x in correct.items()},
        "test": (None, tested),
        "train": images(40),
        "side": 32,
        "active": 0.0,
        "test_features": dict.fromkeys(("pretrained", *nb.METHODS), features(n).float()),
        "study": {(k, m): list(answers(seeds)) for k in levels for m in nb.NAMES},
        "pretrained": TinyExtractor(),
    }
    space["answers"] = type("Answers", (), {"fill": lambda _, *texts: heard.extend(texts)})()
    first = next(i for i, code in enumerate(CODE) if code.startswith("rows = []\nfor name, title"))
    for code in CODE[first:]:
        if "study = {}" not in code:
            exec(code, space)
    return heard, space["metrics"]


@pytest.mark.parametrize("right", ["all", "none", "some"])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("tested", [[0, 1] * 20, [0] * 40, [1] * 40], ids=["both", "0", "1"])
def test_reports_hold_for_every_outcome(right, seeds, tested, tmp_path, capsys):
    heard, metrics = reports(right, seeds, torch.tensor(tested))
    questions = next(code for code in CODE if code.startswith("answers = Answers"))
    assert len(heard) == questions.count('        ("') and all(heard)
    said = capsys.readouterr().out
    stored = load_results(tmp_path / "results" / "transfer_learning.json")["metrics"]
    assert "nan" not in said and 0 < len(stored) <= len(metrics) <= 60
    if right != "some":
        assert heard[-2].startswith("beyond chance: none") and "0 are beyond" in heard[-1]
        assert heard[1].startswith("100" if right == "all" else "0")


@pytest.mark.parametrize("profile", nb.CONFIGS)
def test_every_profile_holds_together(profile):
    config = nb.CONFIGS[profile]
    assert len(config.study_labels) == len(config.study_steps) and config.batch_size % 3 == 0
    assert min(config.study_labels) >= config.neighbors and 0 < config.margin < math.sqrt(2)
    assert max(config.study_labels) <= (config.limit or 5000) * (1 - config.val_share)
