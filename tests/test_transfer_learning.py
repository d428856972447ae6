"""The ideas of the transfer-learning notebook, taken from its own cells and held against references."""

import copy
import math
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src import ProjectError, backbones
from src.device import Runtime
from tools.notebooks import definitions

nb = definitions("transfer_learning")
CPU = Runtime(torch.device("cpu"), autocast=False)
GPU_ON_CPU = Runtime(torch.device("cpu"), autocast=True)


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


def tiny_network():
    torch.manual_seed(0)
    return nb.TransferNet(TinyExtractor())


def images(n, seed=0):
    """Two classes that differ in brightness, with noise: (n, 3, 32, 32) uint8 and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    x = torch.randint(0, 120, (n, 3, 32, 32), generator=generator) + 100 * labels.view(-1, 1, 1, 1)
    return x.to(torch.uint8), labels


def config(**changes):
    return nb.Config(**asdict(nb.CONFIGS["smoke"]) | changes)


# --- losses


def by_hand(anchor, positive, negative, margin):
    """The formula, one triplet and one coordinate at a time."""
    total = 0.0
    for a, p, n in zip(anchor.tolist(), positive.tolist(), negative.tolist()):
        to_p = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, p)))
        to_n = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, n)))
        total += max(0.0, to_p - to_n + margin)
    return total / len(anchor)


@pytest.mark.parametrize("margin", [0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_triplet_loss_is_its_formula_and_the_librarys(margin, seed):
    a, p, n = torch.randn(
        3, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    loss, right_order = nb.triplet_loss(a, p, n, margin)
    library = nn.TripletMarginLoss(margin)(a, p, n)
    assert loss.item() == pytest.approx(by_hand(a, p, n, margin), abs=1e-12)
    assert loss.item() == pytest.approx(
        library.item(), abs=1e-5
    )  # the library adds 1e-6 to every difference
    assert right_order.item() == pytest.approx(
        ((a - p).norm(dim=1) < (a - n).norm(dim=1)).double().mean().item()
    )


def test_triplet_gradient_is_the_librarys_and_finite_at_zero_distance():
    a, p, n = torch.randn(3, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    nb.triplet_loss(ours, p, n, 1.0)[0].backward()
    nn.TripletMarginLoss(1.0)(theirs, p, n).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    same = a.clone().requires_grad_()
    nb.triplet_loss(same, same, n, 9.0)[0].backward()
    assert torch.isfinite(same.grad).all()


def test_each_triplet_is_used_both_ways():
    features = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, p, n = (F.normalize(x.float(), dim=1) for x in (features[:4], features[4:8], features[8:]))
    both = nb.triplet_loss(*nb.both_ways(features), 0.7)
    one, other = nb.triplet_loss(a, p, n, 0.7), nb.triplet_loss(p, a, n, 0.7)
    assert one[0] != other[0]
    for k in (0, 1):
        assert both[k].item() == pytest.approx(((one[k] + other[k]) / 2).item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_batch_hard_is_the_naive_search(seed):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(12, 4, dtype=torch.float64, generator=generator), dim=1)
    y = torch.randint(0, 2, (12,), generator=generator)
    losses, right = [], []
    for i in range(12):
        positives = [(x[i] - x[j]).norm().item() for j in range(12) if j != i and y[j] == y[i]]
        negatives = [(x[i] - x[j]).norm().item() for j in range(12) if y[j] != y[i]]
        if positives and negatives:
            losses.append(max(0.0, max(positives) - min(negatives) + 0.5))
            right.append(max(positives) < min(negatives))
    loss, right_order = nb.batch_hard_loss(x, y, 0.5)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-9)
    assert right_order.item() == pytest.approx(sum(right) / len(right))


def test_batch_hard_without_any_triplet_is_zero_and_differentiable():
    x = torch.randn(4, 3, requires_grad=True)
    loss, _ = nb.batch_hard_loss(x, torch.zeros(4, dtype=torch.int64), 1.0)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(x.grad).all()


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


def test_epochs_draw_new_triplets_and_the_same_epoch_the_same():
    x, y = images(60)
    dataset = nb.TripletDataset(x, y, seed=0)
    first = dataset.triplets.clone()
    dataset.reshuffle(1)
    second = dataset.triplets.clone()
    dataset.reshuffle(0)
    assert torch.equal(dataset.triplets, first) and not torch.equal(first, second)


def test_one_triplet_and_batches_agree():
    x, y = images(60)
    dataset = nb.TripletDataset(x, y, seed=0)
    single, _ = dataset[3]
    batches = list(dataset.batches(8))
    assert single[0].shape == (3, 32, 32) and sum(len(b[0][0]) for b in batches) == len(dataset)
    assert all(torch.equal(batches[0][0][role][3], single[role]) for role in range(3))


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1], [0] * 6, [0, 0, 0, 1, 1, 1, 2, 2, 2]])
def test_too_few_images_for_triplets(labels):
    with pytest.raises(ProjectError, match="Triplets need two classes with at least 3 images each"):
        nb.TripletDataset(torch.zeros(len(labels), 1), torch.tensor(labels), seed=0)


# --- preparation


def test_prepare_without_augmentation_is_bicubic_enlargement():
    x, _ = images(3)
    ours = nb.prepare(x, 64, False, config())
    library = F.interpolate(x.float() / 255, size=64, mode="bicubic", align_corners=False)
    inner = slice(8, -8)  # at the border the two pad differently
    assert torch.allclose(ours[..., inner, inner], library[..., inner, inner], atol=1e-4)


def test_augmentation_mirrors_and_shifts_within_its_bounds():
    x = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 12:20, 20:28] = 255  # a square right of the centre: its place tells mirroring and shift
    torch.manual_seed(0)
    y = nb.prepare(x, 32, True, config(max_shift=2.0))[:, 0]
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
    nb.prepare(x, 40, True, config())
    assert torch.equal(x, before)


# --- freezing


def test_frozen_means_frozen_batchnorm_included():
    network, (x, y) = tiny_network(), images(12)
    assert nb.changed_entries(network, x, y, config(), 32)
    network.freeze_extractor()
    assert nb.changed_entries(network, x, y, config(), 32) == []
    network.train()
    assert network.fc.training and not any(m.training for m in network.extractor.modules())


def test_a_half_frozen_network_is_noticed():
    """Gradients stopped, BatchNorm left in training mode: the check must see the statistics move."""
    network, (x, y) = tiny_network(), images(12)
    network.extractor.requires_grad_(False)
    changed = nb.changed_entries(network, x, y, config(), 32)
    assert {name.rsplit(".", 1)[1] for name in changed} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_training_keeps_the_pretrained_statistics_unless_told_otherwise():
    x = torch.rand(4, 3, 16, 16)
    for keeps, network in (
        (True, tiny_network()),
        (False, nb.TransferNet(TinyExtractor(), train_statistics=True)),
    ):
        before = network.extractor.body[1].running_mean.clone()
        network.train()(x)
        assert torch.equal(network.extractor.body[1].running_mean, before) == keeps
        assert network.extractor.body[1].weight.requires_grad and network.dropout.training


def test_batch_statistics_are_those_of_the_images_and_no_weight_moves():
    extractor, (x, _) = tiny_network().extractor.eval(), images(20)
    adapted = nb.with_batch_statistics(extractor, x, 32, config(), batch_size=20)
    with torch.no_grad():
        maps = extractor.body[0](nb.prepare(x, 32, False, config()))
    assert torch.allclose(adapted.body[1].running_mean, maps.mean(dim=(0, 2, 3)), atol=1e-5)
    assert (
        torch.equal(adapted.body[0].weight, extractor.body[0].weight)
        and extractor.body[1].running_mean.abs().max() == 0
    )


def test_classifier_training_leaves_the_extractor_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("src.training.ROOT", tmp_path)
    network, train, val = tiny_network(), images(40), images(12, seed=1)
    before = copy.deepcopy(network.state_dict())
    nb.train_classifier("test", network, train, val, config(fc_epochs=3, fc_lr=0.1), CPU)
    changed = {
        name for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"fc.weight", "fc.bias"}


# --- trainings


@pytest.mark.parametrize(
    "method", ["train_cross_entropy", "train_triplet", "train_joint", "train_batch_hard"]
)
def test_each_training_learns_what_it_is_for(method, monkeypatch, tmp_path):
    monkeypatch.setattr("src.training.ROOT", tmp_path)
    network, train, val = tiny_network(), images(90), images(30, seed=1)
    before = copy.deepcopy(network.state_dict())
    settings = config(
        image_sizes=(32,) * 4, hard_sizes=(32,) * 4, lr=0.02, hard_lr=0.02, batch_size=12
    )
    history = getattr(nb, method)(network, train, val, settings, CPU)
    changed = {
        name.split(".")[0]
        for name, value in network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    alone = method in ("train_triplet", "train_batch_hard")
    assert changed == ({"extractor"} if alone else {"extractor", "fc"})
    score = history.column("val_right_order" if alone else "val_accuracy")
    assert score[history.best_epoch - 1] >= 0.9
    if method == "train_joint":
        for row in history.epochs:
            assert row["train_loss"] == pytest.approx(
                row["train_triplet"] + row["train_cross_entropy"], abs=1e-5
            )
            assert row["val_loss"] == pytest.approx(
                row["val_triplet"] + row["val_cross_entropy"], abs=1e-5
            )


@pytest.mark.parametrize("backbone", backbones.BACKBONES)
def test_the_gpu_networks_take_a_training_step_on_the_cpu(backbone, monkeypatch, tmp_path):
    """At a small size, in the gpu profile's precision: nothing of it may break where no GPU is at hand."""
    monkeypatch.setattr("src.training.ROOT", tmp_path)
    settings = nb.Config(
        **asdict(nb.CONFIGS["gpu"]) | dict(backbone=backbone, image_sizes=(32,), batch_size=6)
    )
    network = nb.make_network(settings, GPU_ON_CPU, pretrained=False)
    assert (
        network.extractor.name == backbone
        and network.fc.in_features == network.extractor.feature_size
    )
    history = nb.train_joint(network, images(12), images(6), settings, GPU_ON_CPU)
    assert all(math.isfinite(value) for value in history.epochs[0].values())


def test_only_the_fully_connected_layer_is_new():
    network = nb.make_network(nb.CONFIGS["cpu"], CPU)
    reference = backbones.load_backbone("efficientnet_lite0")
    ours, theirs = network.extractor.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert network.fc.out_features == 2 and network.fc.weight.std() < 0.02


def test_same_seed_gives_the_same_network():
    first, second = (nb.make_network(nb.CONFIGS["smoke"], CPU).fc.weight for _ in range(2))
    assert torch.equal(first, second)


# --- measuring


def test_features_do_not_depend_on_the_batch_or_the_mode():
    network, (x, _) = tiny_network().train(), images(10)
    whole = nb.extract_features(network.extractor, x, 32, config(), CPU)
    parts = nb.extract_features(network.extractor, x, 32, config(), CPU, batch_size=3)
    assert torch.allclose(whole, parts, atol=1e-6) and network.extractor.training


def test_neighbour_vote_by_hand():
    references = torch.tensor([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]])
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    assert nb.neighbour_vote(torch.tensor([[0.0], [1.05]]), references, labels, 3).tolist() == [
        0,
        1,
    ]


def test_principal_components_find_the_long_axis():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator) * torch.tensor([10.0, 1.0, 0.1])
    points, share = nb.principal_components(x)
    assert points.shape == (500, 2) and share > 0.99
    assert abs(torch.corrcoef(torch.stack([points[:, 0], x[:, 0]]))[0, 1]) > 0.99


def test_every_field_of_the_config_is_explained():
    from tools.notebooks import read

    source = next(
        cell.source for cell in read("transfer_learning").cells if "class Config" in cell.source
    )
    lines = {line.split(":")[0].strip(): line for line in source.splitlines()}
    assert all("#" in lines[field.name] for field in fields(nb.Config))
    assert set(nb.CONFIGS) == {"smoke", "demo", "cpu", "gpu"}
