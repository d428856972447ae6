"""Objects cut out of photos, their views to the pixel, draws, features, masks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from src import coco_views
from tools import notebooks

nb = notebooks.definitions("deformable_convolution")


# --- from photos to objects -----------------------------------------------------------------------
def test_cut_out_at_the_border():
    """A box of 32x16 near the upper left corner, at the crop's own resolution of 112 pixels."""
    photo = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    mask = np.zeros((80, 90), np.uint8)
    mask[2:18, 4:36] = 1
    crop = coco_views.cut_out(photo, mask, (4, 2, 32, 16), 112)  # 2.8 * 1.25 * 32
    outside = torch.ones(112, 112, dtype=torch.bool)
    outside[46:, 36:] = False  # the center (20, 10) lands in the middle, 56
    assert crop.dtype == torch.uint8 and (crop[:3, outside] == coco_views.GRAY).all()
    assert not crop[3, outside].any()
    assert np.array_equal(crop[:3, 46:, 36:].permute(1, 2, 0), photo[:66, :76])
    assert np.array_equal(crop[3, 46:, 36:], 255 * mask[:66, :76])


@pytest.mark.parametrize("orientation", [3, 6])
def test_photos_are_read_as_stored_because_their_outlines_are(tmp_path, orientation):
    """Whether turning would change the size (6) or only move the pixels (3)."""
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(coco_views.read_stored(tmp_path / "a.png", (80, 100)), pixels)
    assert coco_views.read_stored(tmp_path / "a.png", (100, 80)) is None
    assert coco_views.read_stored(tmp_path / "missing.png", (80, 100)) is None


def test_classes_are_balanced_by_a_random_draw():
    labels = [0] * 50 + [1] * 5 + [2] * 20
    drawn = coco_views.draw_balanced(labels, 12)
    assert drawn == sorted(set(drawn)) and drawn[:12] != list(range(12)), "not the first ones"
    assert np.bincount(np.array(labels)[drawn]).tolist() == [12, 5, 12]
    assert not coco_views.draw_balanced([], 12)


# --- from objects to views ------------------------------------------------------------------------
def crop_with(top, left, height=8, width=8):
    """A dark crop (1, 4, 112, 112) with a bright block; at a side of 40, its central part."""
    crop = torch.zeros(1, 4, 112, 112, dtype=torch.uint8)
    crop[..., 36 + top : 36 + top + height, 36 + left : 36 + left + width] = 255
    return crop


def picture(top, left, height=8, width=8):
    return crop_with(top, left, height, width)[0, 0, 36:76, 36:76] / 255


@pytest.mark.parametrize(
    "pose, wanted",
    [
        ((0, 1, 0, 0, 1), picture(2, 4)),
        ((90, 1, 0, 0, 1), picture(4, 30)),  # clockwise: from upper left to upper right
        ((-90, 1, 0, 0, 1), picture(28, 2)),
        ((0, 1, 0, 0, -1), picture(2, 28)),
        ((0, 1, 0.25, 0, 1), picture(2, 14)),  # to the right
        ((0, 1, 0, 0.5, 1), picture(22, 4)),  # down
        ((90, 1, -0.25, 0, 1), picture(4, 20)),  # turned about its own center
        ((90, 1, 0, 0, -1), picture(28, 30)),  # mirrored, then turned
    ],
)
def test_views_turn_move_and_mirror(pose, wanted):
    images, masks = coco_views.make_views(crop_with(2, 4), torch.tensor([pose]).float(), 40)
    assert torch.allclose(images[0], wanted.expand(3, -1, -1), atol=1e-3)
    assert torch.equal(masks[0], F.avg_pool2d(wanted[None], 2)[0] > 0.5), "the mask goes along"


def test_views_zoom_and_are_gray_outside():
    pose, white = torch.tensor([[0, 2.0, 0, 0, 1]]), torch.full((1, 4, 112, 112), 255).byte()
    _, masks = coco_views.make_views(crop_with(16, 16), pose, 40)
    assert torch.equal(masks[0], picture(12, 12, 16, 16)[::2, ::2] > 0)
    pose[0, 1] = 0.25  # 160 pixels of a crop that has 112
    (image,), masks = coco_views.make_views(white, pose, 40)
    assert (image[:, :5] - coco_views.GRAY / 255).abs().max() < 1e-4
    assert not masks[0, 0].any() and masks[0, 10, 10]
    pose[0, 1] = 1.0
    (image,), _ = coco_views.make_views(white, pose, 40, disc=True)
    axis = (torch.arange(40) - 19.5) ** 2
    assert torch.equal(image[0] > 0.9, axis + axis[:, None] < 20**2)


@pytest.mark.parametrize("config", nb.CONFIGS.values(), ids=nb.CONFIGS)
def test_poses_keep_to_their_bounds_and_the_views_to_their_crops(config):
    angle, zoom, shift = config.poses
    poses, other = (coco_views.draw_poses(3000, seed, *config.poses) for seed in (7, 8))
    assert not torch.equal(poses, other)
    assert 0.99 * angle < poses[:, 0].abs().max() <= angle
    assert zoom[0] <= poses[:, 1].min() and poses[:, 1].max() <= zoom[1] + 1e-6
    middle = poses[:, 1].log().mean().exp()
    assert middle == pytest.approx(math.sqrt(zoom[0] * zoom[1]), rel=0.03), "log-uniform"
    assert 0.99 * shift < poses[:, 2:4].abs().max() <= shift and abs(poses[:, 4].mean()) < 0.1
    # Otherwise a gray edge would give the jitter away.
    assert 2 * (0.5 + shift) / zoom[0] <= coco_views.ROOM + 1e-9


def test_views_come_object_by_object_then_view_by_view():
    n, generator = 40, torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (n, 4, 36, 36), generator=generator).byte()
    objects = coco_views.Objects(crops, torch.arange(n), torch.arange(n) // 2)
    poses = coco_views.draw_poses(2 * n, 0, 10.0, (0.5, 1.2), 0.2)
    views = coco_views.see(lambda images: [images, images[:, :1]], objects, poses, 16, "cpu")
    assert views.photos.tolist() == 2 * objects.photos.tolist()
    index = torch.tensor([3, n + 3, 70])  # 70: beyond the first batch
    images, masks = coco_views.make_views(crops[index % n], poses[index], 16)
    (maps, first), seen, labels = views.batch(index, "cpu")
    assert torch.allclose(maps, images, atol=1e-3) and first.shape[1] == 1
    assert torch.equal(seen, masks) and labels.tolist() == [3, 3, 30]


# --- masks ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, wanted", [((4, 4), (8, 8)), ((2, 3), (16, 12)), ((1, 1), (4, 4))])
def test_enlarging_is_bilinear_interpolation(size, wanted):
    maps = torch.randn(2, 3, *size)
    both = coco_views.enlarge(maps, wanted), F.interpolate(maps, wanted, mode="bilinear")
    assert torch.allclose(*both, atol=1e-5)


def test_masks_by_hand():
    rows, columns, nothing = torch.zeros(3, 4, 4, dtype=torch.bool).unbind()
    rows[:2], columns[:, :2] = True, True
    predicted, masks = torch.stack([rows, rows, nothing]), torch.stack([rows, columns, nothing])
    assert torch.allclose(coco_views.mask_iou(predicted, masks), torch.tensor([1.0, 1 / 3, 0.0]))
    corners = torch.zeros(4, 4, dtype=torch.bool)
    corners[1, 0] = corners[2, 3] = True
    boxes = coco_views.filled_box(torch.stack([corners, nothing]))
    assert boxes.sum(dim=2).tolist() == [[0, 4, 4, 0], [0, 0, 0, 0]]
    assert torch.equal(coco_views.mean_mask(torch.stack([rows, rows, columns])), rows)
    assert not coco_views.mean_mask(torch.stack([nothing, nothing])).any()
    half = torch.zeros(1, 8, 8, dtype=torch.bool)
    half[0, :4, :3] = True
    assert coco_views.shrink(half, 4)[0].sum(dim=1).tolist() == [2, 2, 0, 0]
