"""The comparison's networks, losses, loop, swap and objects' rules; views of objects; plots."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from src import coco_views, offset_plots, run, train
from tools import notebooks

nb = notebooks.definitions("deformable_convolution")
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
    maps[:, 0] = torch.nn.functional.avg_pool2d(masks.float()[:, None], 2)[:, 0]
    maps[torch.arange(n), 1 + labels] = maps[:, 0]
    return coco_views.Views([maps.half()], masks, labels, torch.arange(n))


# --- networks and training ------------------------------------------------------------------------
@pytest.mark.parametrize("key", nb.VARIANTS)
def test_heads_differ_in_the_sampling_layer_alone(key):
    torch.manual_seed(0)
    channels = [4, 6, 8] if key in nb.DEEP else [4]
    head = nb.Head(CONFIG, channels, *nb.VARIANTS[key]).train()
    maps = [torch.randn(3, c, 8 // 2**i, 8 // 2**i) for i, c in enumerate(channels)]
    logits, foreground = head(maps)
    assert logits.shape == (3, len(nb.NAMES)) and foreground.shape == (3, 8, 8)
    (logits.sum() + foreground.sum()).backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)
    other = nb.Head(CONFIG, channels, *nb.VARIANTS["ordinary_1"])
    common = [
        name for name, _ in other.named_parameters() if not name.startswith(("layers", "norms"))
    ]
    assert common == [
        n for n, _ in head.named_parameters() if not n.startswith(("layers", "norms"))
    ]


def test_losses_of_right_wrong_and_empty_masks():
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:2, :2] = True
    foreground = torch.where(masks, 20.0, -20.0)
    foreground[1] *= -1
    scores = nb.losses(torch.eye(3, 7) * 20, foreground, masks, torch.tensor([0, 2, 2]))
    assert scores["mask_iou"].tolist() == [1, 0, 0] and scores["accuracy"].tolist() == [1, 0, 1]
    assert scores["pixel_accuracy"].tolist() == [1, 0, 1]
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
    if not reason:
        table = {"supercategory": "furniture", "name": "dining table"}
        assert nb.why_left_out(annotation, table, mask, [mask]) == "another class"
        hidden = mask.copy()
        hidden[:60, :45] = 0
        assert nb.why_left_out(annotation | {"bbox": [0, 0, 50, 60]}, animal, hidden, [mask]) in (
            "thin or hidden",
            "behind another object",
        )


# --- views ----------------------------------------------------------------------------------------
def crop(side=64):
    """An object right of and below the middle, red on blue."""
    photo, mask = np.zeros((200, 200, 3), np.uint8), np.zeros((200, 200), np.uint8)
    photo[..., 2] = 255
    mask[80:120, 70:130] = 1
    mask[80:90, 120:130] = 0  # so that no symmetry is left
    photo[mask > 0] = (255, 0, 0)
    return torch.as_tensor(np.asarray(coco_views.cut_out(photo, mask, (70, 80, 60, 40), side)))[
        None
    ]


def look(angle=0.0, zoom=1.0, x=0.0, y=0.0, mirror=1.0, **options):
    return coco_views.make_views(crop(), torch.tensor([[angle, zoom, x, y, mirror]]), 64, **options)


def center(mask):
    return mask[0].nonzero().float().mean(dim=0)


@pytest.mark.parametrize(
    "pose",
    [
        {},
        {"angle": 40.0},
        {"zoom": 0.6},
        {"x": 0.15, "y": -0.1},
        {"mirror": -1.0},
        {"angle": 90.0, "mirror": -1.0},
    ],
)
def test_the_mask_stays_on_the_object(pose):
    images, masks = look(**pose)
    red = torch.nn.functional.avg_pool2d(images[:, :1] - images[:, 2:], 2)[:, 0] > 0
    assert coco_views.mask_iou(red, masks) > 0.9 and masks.any()


def test_poses_move_the_object_as_they_say():
    still = look()[1]
    moved = center(look(x=0.125, y=-0.125)[1]) - center(still)
    assert torch.allclose(moved, torch.tensor([-4.0, 4.0]), atol=0.7)  # down, right, of 32
    assert look(zoom=1.3)[1].sum() / still.sum() == pytest.approx(1.69, rel=0.1)
    assert coco_views.mask_iou(look(mirror=-1.0)[1], still.flip(2)) > 0.9
    clockwise = torch.rot90(still, -1, (1, 2))
    assert coco_views.mask_iou(look(angle=90.0)[1], clockwise) > 0.9
    corners = look(disc=True)[0][..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.std() < 0.01


def test_masks():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:6, 1:4] = True
    assert (
        coco_views.filled_box(masks)[0].equal(masks[0])
        and not coco_views.filled_box(masks)[1].any()
    )
    assert coco_views.mask_iou(masks, masks).tolist() == [1, 0]
    assert coco_views.shrink(masks, 4)[0].sum() == 4 or coco_views.shrink(masks, 4)[0].any()
    assert coco_views.mean_mask(masks).shape == (8, 8)
    x = torch.rand(2, 3, 4, 4)
    wanted = torch.nn.functional.interpolate(x, (8, 6), mode="bilinear")
    assert torch.allclose(coco_views.enlarge(x, (8, 6)), wanted, atol=1e-5)


def test_no_photo_is_in_two_splits_and_damaged_ones_are_left_out(tmp_path):
    from src import data

    source = data.find(data.COCO, "smoke")
    coco, paths = data.coco(source, "train2017", 12)
    first = next(iter(paths))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    objects, left_out = coco_views.collect(
        coco, paths | {first: broken}, nb.LABELS, nb.why_left_out, 5, 64
    )
    assert first not in objects.photos.tolist() and sum(left_out.values()) > 0
    assert objects.labels.bincount().max() <= 5
    again, val = data.split(objects.photos, 0.3, 0, labels=objects.labels)
    assert not set(objects.photos[again].tolist()) & set(objects.photos[val].tolist())


# --- plots ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("angle, zoom", [(0.0, 1.0), (30.0, 1.0), (-60.0, 1.7), (0.0, 0.5)])
def test_a_known_turn_and_zoom_is_read_off(angle, zoom):
    turn = torch.tensor(angle).deg2rad()
    matrix = zoom * torch.tensor([[turn.cos(), turn.sin()], [-turn.sin(), turn.cos()]])  # y, x
    field = (
        (offset_plots.TAPS @ matrix.t() - offset_plots.TAPS)
        .reshape(1, 18, 1, 1)
        .expand(1, 18, 4, 4)
    )
    inside = torch.zeros(2, 4, 4, dtype=torch.bool)
    inside[0, 1:3, 1:3] = True
    fit = offset_plots.fitted_map(torch.cat([field, field]), inside)
    assert (
        abs(fit[0]) == pytest.approx(zoom, abs=1e-4) and abs(abs(fit[0].angle()) - abs(turn)) < 1e-4
    )
    assert fit[1].isnan()


@pytest.mark.parametrize("mask", [torch.zeros, torch.ones])
def test_pictures_hold_for_every_mask(mask):
    for n in (1, 5):
        fig = offset_plots.pictures(
            torch.rand(n, 3, 16, 16), mask(n, 8, 8).bool(), ["x"] * n, torch.randn(n, 18, 8, 8)
        )
        plt.close(fig)
