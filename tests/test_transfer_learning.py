"""The ideas of the transfer-learning notebook, from its own cells, against references."""

import copy
import math
import types
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from src import ProjectError, backbones, plotting, results
from src.device import Runtime
from tools.notebooks import definitions, read

nb = definitions("transfer_learning")
CPU = Runtime(torch.device("cpu"))
GPU_ON_CPU = Runtime(torch.device("cpu"), autocast=torch.bfloat16)


class TinyExtractor(nn.Module):
    """A convolution with BatchNorm, pooled: as much of a backbone as the tests need."""

    feature_size = 6

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )

    def forward(self, x):
        return self.body(x).mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def checkpoints_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr("src.training.CHECKPOINTS", tmp_path)


def tiny_network(*_, **__):
    torch.manual_seed(0)
    return nb.TransferNet(TinyExtractor())


def images(n, seed=0):
    """Two classes that differ in brightness, with noise: (n, 3, 32, 32) uint8 and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    x = torch.randint(0, 120, (n, 3, 32, 32), generator=generator) + 100 * labels.view(-1, 1, 1, 1)
    return x.to(torch.uint8), labels


def config(**changes):
    return replace(nb.CONFIGS["smoke"], **changes)


def random_features(n, size=4, seed=0, unit=False):
    x = torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1) if unit else x


# --- triplet loss


def by_hand(anchor, positive, negative, margin):
    """The formula, one triplet and one coordinate at a time: every triplet's loss."""
    losses = []
    for a, p, n in zip(anchor.tolist(), positive.tolist(), negative.tolist()):
        to_p = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, p)))
        to_n = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, n)))
        losses.append(max(0.0, to_p - to_n + margin))
    return losses


@pytest.mark.parametrize("margin", [0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_triplet_loss_is_its_formula_and_the_librarys(margin, seed):
    a, p, n = random_features(27, 5, seed).chunk(3)
    loss, active = nb.triplet_loss(a, p, n, margin)
    losses = by_hand(a, p, n, margin)
    assert loss.item() == pytest.approx(sum(losses) / 9, abs=1e-12)
    # the library adds 1e-6 to every difference
    assert loss.item() == pytest.approx(nn.TripletMarginLoss(margin)(a, p, n).item(), abs=1e-5)
    assert active.item() == pytest.approx(sum(x > 0 for x in losses) / 9)


def test_triplet_gradient_is_the_librarys_and_finite_at_zero_distance():
    a, p, n = random_features(27, 5).chunk(3)
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    nb.triplet_loss(ours, p, n, 1.0)[0].backward()
    nn.TripletMarginLoss(1.0)(theirs, p, n).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    same = a.clone().requires_grad_()
    nb.triplet_loss(same, same, n, 9.0)[0].backward()
    assert torch.isfinite(same.grad).all()


def test_a_triplet_that_meets_the_margin_has_no_gradient():
    a = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss, active = nb.triplet_loss(a, torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 1.0]]), 0.7)
    loss.backward()
    assert loss.item() == 0 and active.item() == 0 and a.grad.abs().max() == 0
    just = [torch.tensor([x]) for x in ([0.0, 0.0], [3.0, 4.0], [0.0, 6.0])]  # 5 and 6 away
    assert [float(x) for x in nb.triplet_loss(*just, 1.0)] == [0, 0]


# --- objectives


def test_objectives_are_their_library_losses_and_the_joint_one_is_the_sum():
    network, settings = tiny_network().eval(), config(margin=0.4)
    features, labels = random_features(12, 6).float(), torch.tensor([0, 1, 0, 1] * 3)
    cross_entropy, means = nb.cross_entropy_objective(network, features, labels, settings)
    logits = network.head(features)
    assert cross_entropy.item() == pytest.approx(nn.CrossEntropyLoss()(logits, labels).item())
    assert means["accuracy"] == (logits.argmax(dim=1) == labels).float().mean()
    triplet, _ = nb.triplet_objective(network, features, labels, settings)
    a, p, n = F.normalize(features, dim=1).chunk(3)
    assert triplet.item() == pytest.approx(nn.TripletMarginLoss(0.4)(a, p, n).item(), abs=1e-5)
    joint, parts = nb.joint_objective(network, features, labels, settings)
    assert joint.item() == pytest.approx(triplet.item() + cross_entropy.item())
    assert set(parts) == {"triplet", "cross_entropy", "active", "accuracy"}


def test_the_gradient_of_the_sum_reaches_extractor_and_head_that_of_triplet_loss_only_one():
    x, y = images(12)
    for objective, reached in ((nb.joint_objective, True), (nb.triplet_objective, False)):
        network = tiny_network()
        features = network.extractor(nb.prepare(x, 32))
        objective(network, features, y, config())[0].backward()
        assert network.extractor.body[0].weight.grad.abs().max() > 0
        assert (network.head[1].weight.grad is not None) == reached


# --- triplets


@pytest.mark.parametrize("n, air", [(60, 30), (61, 25), (6, 3), (50, 4)])
def test_triplets_have_their_roles_and_no_image_has_two(n, air):
    x, labels = torch.arange(n).view(n, 1), (torch.arange(n) >= air).long()
    dataset = nb.TripletDataset(x, labels, seed=0)
    (a, p, n_), (ya, yp, yn) = dataset[list(range(len(dataset)))]
    assert len(dataset) == 2 * (min(air, n - air) // 3)
    assert torch.equal(ya, yp) and torch.equal(yn, 1 - ya) and ya.float().mean() == 0.5
    assert torch.equal(labels[a[:, 0]], ya) and torch.equal(labels[n_[:, 0]], yn)
    used = torch.cat([a, p, n_]).flatten()
    assert len(used.unique()) == len(used)


def test_a_length_beyond_one_pass_is_filled_with_further_passes():
    x, labels = torch.arange(10).view(10, 1), torch.arange(10) % 2
    dataset = nb.TripletDataset(x, labels, seed=0, length=25)
    (a, p, n), (ya, yp, yn) = dataset[:]
    assert len(dataset) == 25 and len(nb.TripletDataset(x, labels, seed=0)) == 2
    assert (a != p).all() and torch.equal(ya, yp) and torch.equal(yn, 1 - ya)
    assert len(torch.cat([a, p, n]).unique()) == 10  # in the long run every image is used


def test_epochs_draw_new_triplets_and_the_same_epoch_the_same():
    dataset = nb.TripletDataset(*images(60), seed=0)
    first = dataset.triplets.clone()
    dataset.reshuffle(1)
    second = dataset.triplets.clone()
    dataset.reshuffle(0)
    assert torch.equal(dataset.triplets, first) and not torch.equal(first, second)


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1], [0] * 6, [0, 0, 0, 1, 1, 1, 2, 2, 2]])
def test_too_few_images_for_triplets(labels):
    with pytest.raises(ProjectError, match="Triplets need two classes of at least 3 images"):
        nb.TripletDataset(torch.zeros(len(labels), 1), torch.tensor(labels), seed=0)


def test_batches_of_triplets_are_those_of_the_data_set_and_a_third_as_many_as_images():
    train, settings = images(60), config(batch_size=12)
    batches = list(nb.triplet_batches(train, settings, seed=3)(0))
    dataset = nb.TripletDataset(*train, seed=3)
    assert all(len(batch[0]) == 3 and len(batch[0][0]) <= 4 for batch in batches)
    assert sum(len(batch[0][0]) for batch in batches) == len(dataset)
    single, _ = dataset[3]
    assert all(torch.equal(batches[0][0][role][3], single[role]) for role in range(3))
    assert len(nb.triplet_batches(train, settings, 0, steps=7)(0)) == 7


def test_a_pass_of_images_uses_each_once_and_steps_are_as_many_as_asked_for():
    train, settings = (torch.arange(20), torch.arange(20) % 2), config(batch_size=8)
    (batches, steps) = (nb.image_batches(train, settings, steps=k)(0) for k in (None, 7))
    assert torch.cat([x for (x,), _ in batches]).sort().values.tolist() == list(range(20))
    assert len(steps) == 7 and all(len(x) == 8 for (x,), _ in steps)
    assert np.bincount(torch.cat([x for (x,), _ in steps])).min() >= 2


# --- mining


def line(*points):
    """Distances of points on a line."""
    x = torch.tensor(points, dtype=torch.float64)
    return (x[:, None] - x[None, :]).abs()


def test_batch_hard_takes_the_farthest_positive_and_the_nearest_negative():
    distances, labels = line(0, 1, 3, 4, 9), torch.tensor([0, 0, 0, 1, 1])
    anchors, positives, negatives = nb.mine(distances, labels, "batch_hard")
    assert anchors.tolist() == [0, 1, 2, 3, 4]
    assert positives.tolist() == [2, 2, 0, 4, 3] and negatives.tolist() == [3, 3, 3, 2, 2]


def test_semi_hard_takes_the_nearest_negative_beyond_the_positive_or_else_the_farthest():
    # each class has two images, so the positive is certain
    distances, labels = line(0, 4, 3, 6), torch.tensor([0, 0, 1, 1])
    _, positives, negatives = nb.mine(distances, labels, "semi_hard")
    assert positives.tolist() == [1, 0, 3, 2]
    # 0: positive at 4, negatives at 3 and 6 -> 6; 1: positive at 4, negatives at 1 and 2, none
    # beyond -> the farthest, 6; 3: positive at 3, negatives at 3 and 1, none beyond -> 0;
    # 6: positive at 3, negatives at 6 and 2 -> 0
    assert negatives.tolist() == [3, 3, 0, 0]
    # 0: positive at 2, negatives at 2 and 3, only 3 is beyond; positive at 1, both are, 2 is nearer
    assert nb.mine(line(0, 2, -2, 3), labels, "semi_hard")[2][0] == 3
    assert nb.mine(line(0, 1, -2, 3), labels, "semi_hard")[2][0] == 2


@pytest.mark.parametrize("how", ["random", "semi_hard", "batch_hard"])
@pytest.mark.parametrize("seed", range(5))
def test_mined_triplets_have_their_roles(how, seed):
    x = random_features(12, 4, seed, unit=True)
    labels = torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(seed))
    distances = torch.cdist(x, x)
    anchors, positives, negatives = nb.mine(distances, labels, how)
    assert (anchors != positives).all() and torch.equal(labels[anchors], labels[positives])
    assert (labels[anchors] != labels[negatives]).all()
    counts = torch.bincount(labels, minlength=2)
    assert len(anchors) == sum(int(c) for c in counts if c >= 2 and c < 12)
    if how == "batch_hard":
        for a, p, n in zip(anchors, positives, negatives):
            same = (labels == labels[a]) & (torch.arange(12) != a)
            assert distances[a, p] == distances[a, same].max()
            assert distances[a, n] == distances[a, labels != labels[a]].min()


def test_random_mining_reaches_every_pair():
    labels, seen = torch.tensor([0, 0, 0, 1, 1]), set()
    torch.manual_seed(0)
    for _ in range(60):
        _, positives, negatives = nb.mine(torch.rand(5, 5), labels, "random")
        seen |= {(int(positives[0]), int(negatives[0]))}
    assert seen == {(p, n) for p in (1, 2) for n in (3, 4)}


def test_images_without_positive_or_negative_are_not_anchors():
    anchors, positives, _ = nb.mine(line(0, 1, 2), torch.tensor([0, 0, 1]), "batch_hard")
    assert anchors.tolist() == [0, 1] and positives.tolist() == [1, 0]
    assert len(nb.mine(line(0, 1, 2), torch.tensor([0, 0, 0]), "random")[0]) == 0


def test_mined_loss_is_that_of_the_mined_triplets_of_unit_vectors():
    x, labels = 3 * random_features(12, 4), torch.arange(12) % 2
    loss, means = nb.mined_objective("batch_hard")(None, x, labels, config(margin=0.3))
    unit = F.normalize(x, dim=1)
    distances = torch.cdist(unit, unit)
    a, p, n = nb.mine(distances, labels, "batch_hard")
    wanted = nn.TripletMarginLoss(0.3)(unit[a], unit[p], unit[n])
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    same, others = labels[:, None] == labels, ~torch.eye(12, dtype=torch.bool)
    assert means["within"].item() == pytest.approx(distances[same & others].mean().item())
    assert means["between"].item() == pytest.approx(distances[~same].mean().item())


def test_mined_loss_of_a_collapsed_batch_is_the_margin():
    x, labels = torch.ones(8, 4) + 1e-6 * torch.randn(8, 4), torch.arange(8) % 2
    loss, means = nb.mined_objective("batch_hard")(None, x, labels, config(margin=0.7))
    assert loss.item() == pytest.approx(0.7, abs=1e-4) and means["active"] == 1
    assert means["between"] < 1e-4


# --- preparation


def test_prepare_without_augmentation_is_bicubic_enlargement():
    x, _ = images(3)
    ours = nb.prepare(x, 64)
    library = F.interpolate(x.float() / 255, size=64, mode="bicubic", align_corners=False)
    inner = slice(8, -8)  # at the border the two pad differently
    assert torch.allclose(ours[..., inner, inner], library[..., inner, inner], atol=1e-4)


def test_augmentation_mirrors_and_shifts_within_its_bounds():
    x = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 12:20, 20:28] = 255  # a square right of the centre: its place tells mirroring and shift
    torch.manual_seed(0)
    y = nb.prepare(x, 32, max_shift=2.0)[:, 0]
    grid = torch.arange(32.0)
    centre_x, centre_y = (
        (y * g).sum(dim=(1, 2)) / y.sum(dim=(1, 2)) for g in (grid, grid[:, None])
    )
    mirrored = centre_x < 15.5
    assert 0.35 < mirrored.float().mean() < 0.65
    offset = torch.where(mirrored, centre_x - 7.5, centre_x - 23.5)
    for shift in (offset, centre_y - 15.5):
        assert 1.5 < shift.abs().max() < 2.3


def test_prepare_changes_nothing_but_the_copy():
    x, _ = images(2)
    before = x.clone()
    nb.prepare(x, 40, max_shift=2.0)
    assert torch.equal(x, before)


# --- freezing and dropout


def test_frozen_means_frozen():
    network, (x, y) = tiny_network(), images(12)
    assert nb.changed_entries(network, x, y, 32) == [
        "body.0.weight", "body.1.weight", "body.1.bias",
    ]  # fmt: skip
    before = copy.deepcopy(network.state_dict())
    nb.freeze(network.extractor)
    assert nb.changed_entries(network, x, y, 32) == []
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_training_keeps_the_pretrained_statistics_and_trains_the_affine_part():
    network = tiny_network()
    before = network.extractor.body[1].running_mean.clone()
    network.train()(torch.rand(4, 3, 16, 16))
    assert torch.equal(network.extractor.body[1].running_mean, before)
    assert network.extractor.body[1].weight.requires_grad and network.head.training


def test_the_check_notices_batchnorm_in_training_mode(monkeypatch):
    monkeypatch.setattr(nb.TransferNet, "train", nn.Module.train)
    network, (x, y) = tiny_network(), images(12)
    network.extractor.requires_grad_(False)
    changed = {name.rsplit(".", 1)[1] for name in nb.changed_entries(network, x, y, 32)}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("dropout, differs", [(0.5, True), (0.0, False)])
def test_dropout_is_active_in_stage_two_even_after_stage_one(dropout, differs):
    """Stage one ends in evaluation mode; the head must leave it while it trains."""
    network = nb.TransferNet(TinyExtractor(), dropout).eval()
    features, labels = torch.ones(8, 6), torch.arange(8) % 2
    seen = []
    network.head[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    nb.train_head("t", network.head, features, labels, None, config(), CPU, 0, steps=3)
    assert any((x == 0).any() for x in seen) == differs
    assert not network.head.training


def test_classifier_training_leaves_the_extractor_alone():
    network, (x, y), (vx, vy) = tiny_network(), images(40), images(12, seed=1)
    before = copy.deepcopy(network.state_dict())
    features, val_features = (
        nb.extract_features(nb.freeze(network.extractor), z, 32, CPU) for z in (x, vx)
    )
    settings = config(fc_epochs=30, fc_lr=0.1)
    history = nb.train_head("t", network.head, features, y, (val_features, vy), settings, CPU, 0)
    changed = {key for key, value in network.state_dict().items() if not value.equal(before[key])}
    assert changed == {"head.1.weight", "head.1.bias"} and len(history.epochs) == 30
    assert history.column("val_accuracy")[history.best_epoch - 1] >= 0.9


# --- trainings


def fit(method, network, settings, val=None, runtime=CPU):
    objective, batches, train_head = nb.TRAIN[method]
    train = images(90)
    if val and not train_head or val and method == "joint":
        val = tuple(torch.cat(part) for part in nb.TripletDataset(*val, seed=0)[:])
    return nb.fit_network(
        method, network, objective, batches(train, settings, 0), val, settings, runtime, 0,
        train_head, quiet=True,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["cross_entropy", "triplet", "joint"])
def test_each_training_learns_what_it_is_for(method):
    network = tiny_network()
    before = copy.deepcopy(network.state_dict())
    settings = config(image_sizes=(32,) * 4, lr=0.02, batch_size=12)
    history = fit(method, network, settings, images(30, seed=1))
    changed = {
        name.split(".")[0]
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    alone = method == "triplet"
    assert changed == ({"extractor"} if alone else {"extractor", "head"})
    score = history.column("val_knn_accuracy" if alone else "val_accuracy")
    assert score[history.best_epoch - 1] >= 0.9
    if method == "joint":
        for row in history.epochs:
            for split in ("train", "val"):
                parts = row[f"{split}_triplet"] + row[f"{split}_cross_entropy"]
                assert row[f"{split}_loss"] == pytest.approx(parts, abs=1e-5)


@pytest.mark.parametrize("backbone", backbones.BACKBONES)
def test_the_gpu_networks_take_a_training_step_on_the_cpu(backbone):
    """At a small size, in half-width precision: nothing may break where no GPU is at hand."""
    settings = replace(nb.CONFIGS["gpu"], backbone=backbone, image_sizes=(32,), batch_size=30)
    network = nb.make_network(settings, GPU_ON_CPU, seed=0, pretrained=False)
    assert network.extractor.name == backbone
    assert network.head[1].in_features == network.extractor.feature_size
    history = fit("joint", network, settings, images(6), GPU_ON_CPU)
    assert all(math.isfinite(value) for value in history.epochs[0].values())


def test_only_the_fully_connected_layer_is_new():
    network = nb.make_network(nb.CONFIGS["cpu"], CPU, seed=0)
    reference = backbones.load_backbone("efficientnet_lite0")
    ours, theirs = network.extractor.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert network.head[1].out_features == 2 and network.head[1].weight.std() < 0.02


def test_same_seed_same_network_and_another_seed_another():
    first, second, other = (
        nb.make_network(nb.CONFIGS["smoke"], CPU, seed).head[1].weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


# --- the label study


def test_label_draws_are_balanced_nested_and_differ_between_seeds():
    labels = torch.arange(200) % 2
    small, large = (nb.draw_labels(labels, n, seed=3) for n in (5, 20))
    assert set(small.tolist()) < set(large.tolist()) and len(set(large.tolist())) == 40
    assert torch.bincount(labels[large]).tolist() == [20, 20]
    assert set(small.tolist()) != set(nb.draw_labels(labels, 5, seed=4).tolist())


def test_label_draws_never_meet_the_validation_images():
    """They are indices of the training part, whose images are not in the validation part."""
    labels = torch.arange(100) % 2
    train_index, val_index = nb.data.train_val_split(labels, 0.2, 0)
    drawn = train_index[nb.draw_labels(labels[train_index], 10, seed=0)]
    assert not set(drawn.tolist()) & set(val_index.tolist())
    source = "\n".join(cell.source for cell in read("transfer_learning").cells)
    assert "draw_labels(train[1]" in source and "draw_labels(val" not in source


@pytest.mark.parametrize("method", ["cross_entropy", "triplet", "joint"])
def test_training_on_few_takes_the_steps_it_is_given_and_classifies(method, monkeypatch):
    monkeypatch.setattr(nb, "make_network", tiny_network)
    drawn, (x, y), steps = images(10), images(40, seed=1), []
    optimizer_step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *a, **k: steps.append(1) or optimizer_step(*a, **k)
    )
    settings = config(study_lr=0.05, fc_lr=0.1, fc_steps=40, study_size=32, batch_size=9)
    network = nb.train_on_few(method, drawn, 40, settings, CPU, seed=0)
    assert len(steps) == 40 + (40 if method == "triplet" else 0)
    pred = nb.predict(network.head, nb.extract_features(network.extractor, x, 32, CPU))
    assert not network.training and (pred == y).float().mean() >= 0.9


def test_controls_classify_separated_features():
    y = torch.arange(40) % 2
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    x[:, 0] += 2.0 * y - 1
    settings = config(fc_lr=0.1)
    pred = nb.predict_with_controls(x[:10], y[:10], x[10:], settings, CPU, seed=0)
    assert set(pred) == set(nb.CONTROLS)
    assert all((classes == y[10:]).float().mean() > 0.95 for classes in pred.values())


def test_paired_comparison_by_hand():
    a, b = np.array([0.91, 0.93, 0.95, 0.90]), np.array([0.90, 0.91, 0.92, 0.90])
    difference, p, detectable = nb.paired_comparison(a, b)
    points = 100 * (a - b)
    assert difference.value == pytest.approx(1.5) and difference.unit == "percentage points"
    assert p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    spread = math.sqrt(sum((x - 1.5) ** 2 for x in points) / 3)
    assert detectable == pytest.approx((3.182446 + 0.978472) * spread / 2, abs=1e-4)
    strictest = nb.paired_comparison(a, b, comparisons=20)[2]
    assert strictest == pytest.approx((9.464780 + 0.978472) * spread / 2, abs=1e-4)
    assert nb.paired_comparison(a, a)[1:] == (1.0, 0.0)
    assert nb.paired_comparison(a, a - 0.01)[1:] == (0.0, 0.0)


def test_the_verdict_corrects_over_all_comparisons():
    rng = np.random.default_rng(0)
    accuracies = {(n, m): 0.9 + 0.01 * rng.standard_normal(5) for n in (5, 20) for m in "abc"}
    accuracies[5, "a"] = accuracies[5, "b"] + 0.05 + 1e-3 * rng.standard_normal(5)
    compared = [("a", "b"), ("c", "b")]
    verdict = nb.study_verdict(accuracies, (5, 20), compared)
    raw = {
        (n, a, b): stats.ttest_rel(accuracies[n, a], accuracies[n, b]).pvalue
        for n in (5, 20)
        for a, b in compared
    }
    least = min(raw, key=raw.get)
    assert least == (5, "a", "b") and verdict[least][1] == pytest.approx(4 * raw[least])
    assert all(verdict[key][1] >= raw[key] for key in raw)
    assert verdict[least][0].value == pytest.approx(5, abs=0.2)
    for (n, a, b), (_, _, detectable) in verdict.items():
        alone = nb.paired_comparison(accuracies[n, a], accuracies[n, b], len(raw))[2]
        assert detectable == alone


@pytest.mark.parametrize(
    "errors, said",
    [
        ((30, 32, 2), ["*{joint}* errs less often than *{cross_entropy}*",
                       "*{joint}* errs less often than *{triplet}*"]),
        ((4, 4, 4), ["nothing; these images do not settle the order of the three"]),
    ],
)  # fmt: skip
def test_pairs_that_differ_are_named_with_the_better_one_first(errors, said):
    logits = {}
    for method, n in zip(("cross_entropy", "triplet", "joint"), errors):
        pred = (torch.arange(200) < n).long()  # all labels are 0
        logits[method] = F.one_hot(pred, 2)[None].float()
    names = ("val_accuracy", "test_accuracy", "training_minutes")
    metrics = {f"{m}.{key}": results.Metric(0.9, 5, (0.8, 1.0)) for m in logits for key in names}
    heard = []
    run = types.SimpleNamespace(table=lambda *_: None, say=heard.append)
    (cell,) = [c for c in read("transfer_learning").cells if "results.holm" in c.source
               and "METHODS =" in c.source]  # fmt: skip
    (labels,) = [c for c in read("transfer_learning").cells if c.source.startswith("LABEL = {")]
    test = (None, torch.zeros(200, dtype=torch.long))
    space = {**vars(nb), "plotting": plotting, "results": results, "run": run, "test": test}
    space |= {"test_logits": logits, "metrics": metrics}
    exec(labels.source + "\n" + cell.source, space)
    assert heard == [f"Beyond chance: {'; '.join(said).format(**space['LABEL'])}."]


# --- measuring


def test_features_do_not_depend_on_the_batch_or_the_mode():
    network, (x, _) = tiny_network().train(), images(10)
    whole = nb.extract_features(network.extractor, x, 32, CPU)
    parts = nb.extract_features(network.extractor, x, 32, CPU, batch_size=3)
    assert torch.allclose(whole, parts, atol=1e-6) and network.extractor.training


def test_neighbour_vote_by_hand():
    """Directions in the plane, since features are scaled to length 1."""
    angles = torch.tensor([0.0, 0.1, 0.25, 1.0, 1.1, 1.25])
    references = torch.stack([angles.cos(), angles.sin()], dim=1) * 3
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    queries = torch.tensor([[1.0, 0.0], [math.cos(1.05), math.sin(1.05)]])
    assert nb.neighbour_vote(queries, references, labels, 3).tolist() == [0, 1]
    alone = nb.neighbour_vote(references, references, labels, 1, leave_out_self=True)
    assert alone.tolist() == [0, 0, 0, 1, 1, 1]


def test_principal_components_find_the_long_axis_and_keep_class_0_on_the_left():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator) * torch.tensor([10.0, 1.0, 0.1])
    for labels in ((x[:, 0] > 0).long(), (x[:, 0] < 0).long()):
        points, share = nb.principal_components(x, labels)
        assert points.shape == (500, 2) and share > 0.99
        assert abs(torch.corrcoef(torch.stack([points[:, 0], x[:, 0]]))[0, 1]) > 0.99
        assert points[labels == 0, 0].mean() < 0 < points[labels == 1, 0].mean()


def test_class_distances_by_hand():
    within, between = nb.class_distances(
        torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1])
    )
    assert within == 1 and between == 3.5


def test_calibration_error_by_hand():
    # two bins of ten: 0.95 twice, once right: gap 0.45; 0.55 twice, both right: gap 0.45
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, False, True, True])
    assert nb.calibration_error(confidence, correct, bins=10) == pytest.approx(0.45)
    # gaps of one bin cancel, those of two bins do not
    assert nb.calibration_error([0.9, 0.9], [True, False], 1) == pytest.approx(0.4)
    assert nb.calibration_error([1.0, 1.0], [True, True]) == 0
    assert nb.calibration_error([0.5, 0.5], [True, False]) == pytest.approx(0)


def test_calibration_metric_holds_the_error_and_an_interval_that_shrinks():
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 10_000):
        confidence = rng.uniform(0.5, 1, n)
        metric = nb.calibration_metric(confidence, rng.random(n) < confidence - 0.2, draws=200)
        assert metric.n == n and metric.value == pytest.approx(0.2, abs=5 / math.sqrt(n))
        assert metric.ci95[0] < metric.ci95[1]
        widths.append(metric.ci95[1] - metric.ci95[0])
    assert widths[1] < widths[0] / 4


def test_grad_cam_finds_what_a_toy_network_looks_at():
    """Channel 0 answers to red, channel 1 to blue; class 0 is red, class 1 is blue."""
    extractor = TinyExtractor()
    extractor.feature_size, extractor.body = 2, nn.Conv2d(3, 2, 1, bias=False)
    extractor.body.weight.data = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]).view(2, 3, 1, 1)
    network = nb.TransferNet(extractor)
    network.head[1].weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    x = torch.zeros(1, 3, 8, 8)
    x[0, 0, 1, 2], x[0, 2, 5, 6] = 1.0, 0.5  # a red and a blue pixel
    for target, place in ((0, (1, 2)), (1, (5, 6))):
        cam, logits = nb.grad_cam(network, x, target)
        assert cam.shape == (8, 8) and torch.allclose(logits, network(x)[0])
        assert cam[place] == 1 and cam.count_nonzero() == 1
    assert not extractor.body._forward_hooks


def test_grad_cam_is_the_class_activation_map_of_the_real_network():
    """Global pooling and one layer: the maps weighed by the layer's weights (Zhou et al. 2016)."""
    network = nb.make_network(nb.CONFIGS["smoke"], CPU, seed=0)
    nb.freeze(network.extractor)  # as after stage two
    network.head[1].weight.data[1].abs_()  # so that some of the map is positive
    x = nb.prepare(images(1)[0], 64)
    cam, _ = nb.grad_cam(network, x, 1)
    with torch.no_grad():
        body = network.extractor
        maps = body.body.network.extract_features((x - body.mean) / body.std)[0]
        expected = F.relu(torch.einsum("c,chw->hw", network.head[1].weight[1], maps))
    assert torch.allclose(cam, expected / expected.max(), atol=1e-4)


# --- the configurations


def test_every_field_of_the_config_is_explained_and_every_profile_is_there():
    cells = read("transfer_learning").cells
    source = next(cell.source for cell in cells if "class Config" in cell.source)
    lines = {line.split(":")[0].strip(): line for line in source.splitlines()}
    assert all("#" in lines[field.name] for field in fields(nb.Config))
    assert set(nb.CONFIGS) == {"smoke", "demo", "cpu", "gpu", "gpu_full"}


@pytest.mark.parametrize("profile", ["smoke", "demo", "cpu", "gpu", "gpu_full"])
def test_every_profile_holds_together(profile):
    settings = nb.CONFIGS[profile]
    assert len(settings.study_labels) == len(settings.study_steps) and len(settings.seeds) >= 1
    assert settings.batch_size % 3 == 0 and settings.mining_epochs % 2 == 0
    assert len(settings.study_seeds) >= (5 if profile in ("cpu", "gpu", "gpu_full") else 2)
    available = (settings.limit or 5000) * (1 - settings.val_fraction)
    assert max(*settings.study_labels, settings.mining_labels) <= available
    assert 0 < settings.margin < math.sqrt(2)
