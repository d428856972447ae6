"""The comparison: networks, losses, loop, swap, which objects are used, what is shown."""

import copy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src import ProjectError, coco_views, data, offset_plots, run, train
from tools import notebooks

nb = notebooks.definitions("deformable_convolution")
SAMPLING = ("layers", "norms")
MEASURES = ("mask_iou", "pixel_accuracy", "pixel_cross_entropy", "accuracy", "cross_entropy")
CONFIG = nb.Config(width=8, epochs=3, views=2, seeds=(0, 1), batch_size=8)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path)
    return run.Run("toy", "cpu", CONFIG, None, torch.device("cpu"))


def toy_views(n=24, classes=7):
    """Maps whose first channel is the mask and whose next ones name the class."""
    g, masks = torch.Generator().manual_seed(0), torch.zeros(n, 16, 16, dtype=torch.bool)
    labels = torch.arange(n) % classes
    for mask in masks:
        y, x = torch.randint(8, (2,), generator=g).tolist()
        mask[y : y + 8, x : x + 8] = True
    maps = torch.zeros(n, 1 + classes, 8, 8)
    maps[:, 0] = F.avg_pool2d(masks.float()[:, None], 2)[:, 0]
    maps[torch.arange(n), 1 + labels] = maps[:, 0]
    return coco_views.Views([maps.half()], masks, labels, torch.arange(n))


# --- networks and training ------------------------------------------------------------------------
def head_of(key, **changes):
    torch.manual_seed(0)
    channels = [4, 6, 8] if key in nb.DEEP else [4]
    return nb.Head(nb.replace(CONFIG, **changes), channels, *nb.VARIANTS[key]), [
        torch.randn(3, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(channels)
    ]


@pytest.mark.parametrize("key", nb.VARIANTS)
def test_heads_differ_in_the_sampling_layer_alone(key):
    head, maps = head_of(key)
    logits, foreground = head.train()(maps)
    assert logits.shape == (3, len(nb.NAMES)) and foreground.shape == (3, 8, 8)
    (logits.sum() + foreground.sum()).backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)
    other, _ = head_of("ordinary_1")
    common, others = (
        {name: p.shape for name, p in x.named_parameters() if name.split(".")[0] not in SAMPLING}
        for x in (head, other)
    )
    assert common.keys() >= others.keys() and (key in nb.DEEP or common == others)


@pytest.mark.parametrize("points", [1, 9, 25])
def test_all_kinds_start_as_the_ordinary_one_and_have_their_points(points):
    """With zero offsets the three kinds are the same function of the same weights."""
    ordinary, maps = head_of(f"ordinary_{points}")
    for kind in ("static", "deformable"):
        other, _ = head_of(f"{kind}_{points}")
        missing = other.load_state_dict(ordinary.state_dict(), strict=False)
        assert not missing.unexpected_keys and len(missing.missing_keys) == 2  # the branch
        layer = other.layers[0]
        assert layer.offset_branch.weight.requires_grad == (kind == "deformable")
        assert layer.weight[0, 0].numel() == ordinary.layers[0].weight[0, 0].numel() == points
        for a, b in zip(other.eval()(maps), ordinary.eval()(maps)):
            assert torch.allclose(a, b, atol=1e-5)


def test_the_controls_are_what_they_are_called():
    assert len(head_of("three_deformable_layers")[0].layers) == 3
    x = torch.zeros(1, 8, 9, 9)
    x[..., 0, 0] = 1
    for key, sees_all in (("fixed_pyramid", False), ("global_context", True)):
        (layer,) = head_of(key)[0].layers
        reached = layer(x).abs().sum((0, 1)) > 0
        assert reached.all() if sees_all else reached.nonzero().sum() == 28, "dilated by 1, 2, 4"
    (layer,) = head_of("modulation_alone")[0].layers
    torch.nn.init.normal_(layer.offset_branch.weight)
    offset, mask = layer.offsets_and_mask(torch.randn(1, 8, 9, 9))
    assert not offset.any() and mask.std() > 0.1


def test_losses_of_right_wrong_and_empty_masks():
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:2, :2] = True
    foreground = torch.where(masks, 20.0, -20.0)
    foreground[1] *= -1
    scores = nb.losses(torch.eye(3, 7) * 20, foreground, masks, torch.tensor([0, 2, 2]))
    assert scores["mask_iou"].tolist() == [1, 0, 0] and scores["accuracy"].tolist() == [1, 0, 1]
    assert scores["pixel_accuracy"].tolist() == [1, 0, 1]
    even = nb.losses(torch.zeros(1, 7), torch.zeros(1, 2, 2), masks[:1], torch.tensor([0]))
    assert even["loss"].item() == pytest.approx(np.log(7) + np.log(2) + 0.5)  # Dice: 1 - 2 * 4 / 16
    assert scores["loss"][0] < 0.01 and scores["loss"].isfinite().all() and scores["loss"][1] > 20


def test_the_loop_learns_and_the_swap_swaps(toy):
    views = toy_views()
    both = coco_views.Views(
        [views.maps[0].repeat(2, 1, 1, 1)],
        *(torch.cat([x] * 2) for x in (views.masks, views.labels, views.photos)),
    )
    sets = {"train": both, "val": views}
    trainings = nb.train_head("toy", sets, toy, 0.02, nb.Head, [8], "deformable", 3, 1)
    losses = trainings[0].history.column("train_loss")
    assert len(trainings) == 2 and losses[-1] < losses[0]
    fields = [nb.offsets_of(training.network, views, toy) for training in trainings]
    own, given = (nb.score(trainings, views, toy, x) for x in (None, fields))
    assert own["mask_iou"].shape == (2, 24) and np.allclose(own["mask_iou"], given["mask_iou"])
    far = nb.score(trainings, views, toy, [100 * torch.ones_like(field) for field in fields])
    assert not np.allclose(own["pixel_cross_entropy"], far["pixel_cross_entropy"])
    assert nb.score(trainings, views, toy, count=5)["accuracy"].shape == (2, 5)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, ""),
        ({"iscrowd": 1}, "crowd"),
        ({"bbox": [0, 0, 20, 60]}, "small"),
        ({"bbox": [0, 0, 40, 40]}, "small"),
        ({"bbox": [0, 0, 100, 100]}, "thin or hidden"),
    ],
)
def test_objects_that_are_left_out(change, reason):
    mask = np.zeros((120, 120), np.uint8)
    mask[:60, :50] = 1
    annotation = {"iscrowd": 0, "bbox": [0, 0, 50, 60]} | change
    animal = {"supercategory": "animal", "name": "dog"}
    assert nb.why_left_out(annotation, animal, mask, [mask]) == reason
    other = {"supercategory": "outdoor", "name": "bench"}
    table = {"supercategory": "furniture", "name": "dining table"}
    if not reason:
        for category in (other, table):
            assert nb.why_left_out(annotation, category, mask, [mask]) == "another class"
        behind, front = mask.copy(), mask.copy()
        behind[:, 22:], front[:, :22] = 0, 0
        reasons = [nb.why_left_out(annotation, animal, x, [behind, front]) for x in (behind, front)]
        assert reasons == ["behind another object", ""]


def test_no_photo_is_in_two_splits_and_damaged_ones_are_left_out(tmp_path):
    coco, paths = data.coco(data.find(data.COCO, "smoke"), "train2017", 12)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    first, rest = min(paths), (nb.LABELS, nb.why_left_out, 1000, 64)
    whole, _ = coco_views.collect(coco, paths, *rest)
    objects, left_out = coco_views.collect(coco, paths | {first: broken}, *rest)
    lost = (whole.photos == first).sum()
    assert left_out["unreadable photo, or of another size"] == lost == len(whole) - len(objects) > 0
    few, _ = coco_views.collect(coco, paths, nb.LABELS, nb.why_left_out, 2, 64)
    assert few.labels.bincount().max() == 2 and few.crops.shape[1:] == (4, 144, 144)
    with pytest.raises(ProjectError, match="No object of 1 photos"):
        coco_views.collect(coco, {first: broken}, *rest)
    train_index, val_index = data.split(whole.photos, 0.3, 0, whole.labels)
    assert not set(whole.photos[train_index].tolist()) & set(whole.photos[val_index].tolist())


# --- what is shown --------------------------------------------------------------------------------
def cell_with(text):
    (cell,) = (c for c in notebooks.read("deformable_convolution").cells if text in c.source)
    return cell.source


@pytest.mark.parametrize("value", [0.0, 1.0, None])
@pytest.mark.parametrize("seeds", [1, 3])
def test_tables_figures_and_answers_hold_for_every_outcome(toy, value, seeds, capsys):
    """All wrong, all right, or random; one photo or several; one seed or three."""
    n, random = 6, np.random.default_rng(0)
    names = [f"{role}{name}" for role in ("", "train_") for name in MEASURES]
    space = vars(nb) | {"run": toy, "config": CONFIG, "trained": {}, "scores": {}}
    space["photos"] = np.arange(n) // 2 if value is None else np.zeros(n)
    swaps = [f"swap_{way}" for way in ("own", "other", "mean", "none")]
    for key in (*nb.VARIANTS, "linear_probe", "mean_mask", "filled_box", "majority", *swaps):
        rows = random.random((len(names), seeds, n))
        rows = rows if value is None else np.full_like(rows, value)
        space["scores"][key] = dict(zip(names, rows)) | {"train_seconds": [1.0], "test_seconds": []}
    space["scores"] |= {"chance": {"accuracy": torch.ones(n)}, "deep_linear_probe": {}}
    for text in (
        "def estimate",
        "MEASURES = ",
        "panels = ",
        "PAIRS = ",
        "least = ",
        "def by_points",
    ):
        exec(cell_with(text), space)
    text = capsys.readouterr().out
    assert len(space["metrics"]) < 60 and "nan" not in text
    assert space["metrics"]["mask_iou_gain"].unit == "percentage points"
    assert space["by_points"]("mask_iou").count(", ") == 6


def test_the_fine_tuned_network_starts_as_the_pretrained_one(monkeypatch):
    resnet = nb.backbones.load("resnet18", pretrained=False)
    monkeypatch.setattr(nb.backbones, "load", lambda name: copy.deepcopy(resnet))
    x = torch.rand(2, 3, 64, 64)
    for layer, count in ((torch.nn.Conv2d, 0), (nb.DeformConv2d, 2)):
        head = nb.fine_tuned(CONFIG, layer).eval()
        wanted = resnet.eval().feature_maps(x, (16,))[0]
        features = head.reduce[0][:-1]((x - resnet.mean) / resnet.std)
        assert torch.allclose(features, wanted, atol=1e-3) and head([x])[1].shape == (2, 4, 4)
        assert sum(type(m) is nb.DeformConv2d for m in head.modules()) == count


# --- plots ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("angle, zoom", [(0.0, 1.0), (30.0, 1.0), (-60.0, 1.7), (0.0, 0.5)])
def test_a_known_turn_and_zoom_is_read_off(angle, zoom):
    """The convention is that of the views: rows, which come first, grow downwards."""
    turn = torch.tensor(angle).deg2rad()
    matrix = zoom * torch.tensor([[turn.cos(), turn.sin()], [-turn.sin(), turn.cos()]])  # y, x
    moves = (offset_plots.TAPS @ matrix.t() - offset_plots.TAPS).view(1, 18, 1, 1)
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[0, 1:3, 1:3] = True
    fields = torch.where(inside[0], moves, 100.0).expand(2, -1, -1, -1)
    one, none = offset_plots.fitted_map(fields, inside)
    assert abs(one) == pytest.approx(zoom, abs=1e-4) and abs(one.angle() - turn) < 1e-4
    assert none.isnan()


@pytest.mark.parametrize("mask", [torch.zeros, torch.ones])
def test_pictures_hold_for_every_mask(mask):
    for n in (1, 5):
        fig = offset_plots.pictures(
            torch.rand(n, 3, 16, 16), mask(n, 8, 8).bool(), ["x"] * n, torch.randn(n, 18, 8, 8)
        )
        plt.close(fig)
