"""Objects of COCO: which are used, how they are cut out, seen, and turned into features."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from src import ProjectError, backbones, objects
from src.data import Source
from src.device import Runtime
from tools.notebooks import definitions

CPU = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def nb():
    return definitions("deformable_convolution")


# --- which objects are used


def rectangle(left, top, width, height):
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def annotation(number, box, segmentation=None, **new):
    return {
        "id": number,
        "image_id": 1,
        "category_id": 3,
        "segmentation": rectangle(*box) if segmentation is None else segmentation,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
    } | new


GOOD = annotation(1, (30, 10, 60, 40))


def coco_folder(folder, annotations, image=True):
    """A COCO folder with two images of 100x80 pixels."""
    categories = [
        (3, "car", "vehicle"),
        (4, "cat", "animal"),
        (5, "dining table", "furniture"),
        (6, "traffic light", "outdoor"),
    ]
    keys = ("id", "name", "supercategory")
    document = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 80} for n in (1, 2)],
        "categories": [dict(zip(keys, category)) for category in categories],
        "annotations": annotations,
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    (folder / "val2017").mkdir()
    for n in (1, 2) if image else ():
        Image.new("RGB", (100, 80), (200, 100, 50)).save(folder / "val2017" / f"{n}.png")
    return Source("MS COCO", "HW3_DATA", folder)


def collect(nb, source, **new):
    config = nb.replace(nb.CONFIGS["smoke"], images=None, **new)
    return objects.collect("val2017", source, config, nb.CLASSES, nb.why_left_out)


def test_objects_are_collected_with_their_classes_and_photos(nb, tmp_path):
    other = annotation(2, (10, 10, 40, 60), category_id=4, image_id=2)
    found = collect(nb, coco_folder(tmp_path, [GOOD, other]))
    side = int(objects.STORED * nb.CONFIGS["smoke"].crop_side)
    assert found.crops.shape == (2, 4, side, side) and found.crops.dtype == torch.uint8
    assert found.classes == ("animal", "vehicle") and found.labels.tolist() == [1, 0]
    assert found.photos.tolist() == [1, 2] and not found.left_out
    middle = found.crops[0, :, side // 2, side // 2]
    assert middle.tolist() == [200, 100, 50, 255]
    inside = float((found.crops[0, 3] > 127).float().mean())
    assert inside == pytest.approx(60 * 40 / (objects.ROOM * objects.CONTEXT * 60) ** 2, rel=0.08)


RUNS = {"size": [80, 100], "counts": [10, 7990]}
TRIANGLE = [[30, 10, 90, 10, 31, 12]]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (annotation(2, (30, 10, 60, 40), RUNS, iscrowd=1), "crowd"),
        (annotation(2, (30, 10, 60, 40), category_id=5), "another class"),
        (annotation(2, (30, 10, 60, 40), category_id=6), "another class"),
        (annotation(2, (30, 20, 23, 60)), "small"),
        (annotation(2, (30, 20, 47, 47)), "small"),
        (annotation(2, (30, 20, 0, 40)), "no proper outline"),
        (annotation(2, (30, 10, 60, 40), [[30, 10, 90, 50]]), "no proper outline"),
        (annotation(2, (30, 10, 60, 40), []), "no proper outline"),
        (annotation(2, (30, 10, 60, 40), bbox=[30, math.nan, 60, 40]), "no proper outline"),
        (annotation(2, (30, 10, 60, 40), TRIANGLE), "thin or hidden"),
    ],
)
def test_what_is_not_used_is_counted_by_reason(nb, tmp_path, bad, reason):
    bad = bad | {"image_id": 2}
    found = collect(nb, coco_folder(tmp_path / "one", [GOOD, bad]))
    assert len(found) == 1 and found.left_out == {reason: 1}
    with pytest.raises(ProjectError, match=f"No object of val2017 can be used .*{reason}"):
        collect(nb, coco_folder(tmp_path / "two", [bad, bad | {"id": 3}]))


def test_an_object_behind_another_is_left_out(nb, tmp_path):
    """The second one takes more of the first one's box than the first does itself."""
    frame = [[0, 0, 90, 0, 90, 70, 0, 70, 0, 0], [80, 10, 10, 10, 10, 60, 80, 60, 80, 10]]
    first = annotation(1, (0, 0, 90, 70), rectangle(0, 0, 35, 70))
    second = annotation(2, (36, 0, 54, 70))
    found = collect(nb, coco_folder(tmp_path, [first, second]))
    assert found.left_out == {"behind another object": 1}
    assert len(found) == 1 and frame


def test_photos_that_are_missing_or_of_another_size_are_named(nb, tmp_path):
    with pytest.raises(ProjectError, match=r"val2017"):
        collect(nb, coco_folder(tmp_path / "none", [GOOD], image=False))
    source = coco_folder(tmp_path / "some", [GOOD])
    path = tmp_path / "some" / "val2017" / "1.png"
    Image.new("RGB", (90, 80)).save(path)
    with pytest.raises(ProjectError, match=r"1\.png is 90x80 pixels, its annotation says 100x80"):
        collect(nb, source)
    path.write_bytes(b"no image")
    with pytest.raises(ProjectError, match=r"cannot read the image .*1\.png"):
        collect(nb, source)


@pytest.mark.parametrize("orientation", [3, 6])
def test_photos_are_read_as_stored_because_their_outlines_are(tmp_path, orientation):
    """Whether turning would change the size (6) or only move the pixels (3)."""
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found = objects.read_photo(tmp_path / "a.png", {"width": 100, "height": 80})
    assert np.array_equal(found, pixels)


def test_classes_are_balanced_by_a_random_draw():
    names = ["a"] * 50 + ["b"] * 5 + ["c"] * 20
    drawn = objects.draw_balanced(names, 12, seed=0)
    assert drawn == sorted(set(drawn)) == objects.draw_balanced(names, 12, seed=0)
    assert [sum(names[i] == name for i in drawn) for name in "abc"] == [12, 5, 12]
    assert drawn != objects.draw_balanced(names, 12, seed=1)
    assert not objects.draw_balanced([], 12, seed=0)


def test_validation_photos_are_held_back_class_by_class():
    generator = torch.Generator().manual_seed(0)
    photos = torch.arange(300) // 3
    labels = torch.where(torch.rand(300, generator=generator) < 0.1, 1, 0)
    found = objects.Crops(torch.zeros(300, 4, 2, 2), labels, photos, ("a", "b"), {})
    train, val = objects.split_photos(found, 0.2, seed=0)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(300))
    assert not set(photos[train].tolist()) & set(photos[val].tolist())
    assert 15 <= len(photos[val].unique()) <= 25
    rare = labels[val].float().mean() / labels.float().mean()
    assert 0.6 < rare < 1.7 and set(labels[val].tolist()) == {0, 1}


# --- crops and views


def test_cut_out_at_the_border():
    """A box of 32x16 in the upper left corner, at the crop's own resolution of 112 pixels."""
    photo = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    mask = np.zeros((80, 90), np.uint8)
    mask[:16, :32] = 1
    crop = objects.cut_out(photo, mask, (0, 0, 32, 16), 112)  # 2.8 * 1.25 * 32
    assert crop.shape == (4, 112, 112) and crop.dtype == torch.uint8
    outside = torch.ones(112, 112, dtype=torch.bool)
    outside[48:, 40:] = False  # the centre (16, 8) lands in the middle, 56
    assert (crop[:3, outside] == objects.GREY).all() and not crop[3, outside].any()
    assert np.array_equal(crop[:3, 48:, 40:].permute(1, 2, 0).numpy(), photo[:64, :72])
    assert np.array_equal(crop[3, 48:, 40:].numpy(), 255 * mask[:64, :72])


@pytest.mark.parametrize(
    "box", [(50, 20, 32, 16), (20, 50, 16, 32), (500, 20, 32, 16), (0, 0, 120, 60)]
)
def test_cut_out_keeps_aspect_and_centre(box):
    photo, mask = np.zeros((80, 120, 3), np.uint8), np.zeros((80, 120), np.uint8)
    left, top, width, height = box
    mask[top : top + height, left : left + width] = 1
    side = 56
    crop = objects.cut_out(photo, mask, box, side)
    rows, columns = ((crop[3] > 127).any(dim=d).nonzero().flatten() for d in (1, 0))
    if left < 120:  # else the box lies outside of the photo, and there is nothing but grey
        scale = side / (objects.ROOM * objects.CONTEXT * max(width, height))
        assert abs(len(rows) - scale * height) <= 1 and abs(len(columns) - scale * width) <= 1
        for lines in (rows, columns):
            assert abs(float(lines.float().mean()) - 27.5) <= 0.6
    else:
        assert not len(rows) and (crop[:3] == objects.GREY).all()


def crop_with(*blocks, side=112):
    """Dark crops (n, 4, 112, 112) with a bright block (top, left, height, width) each.

    Seen at a side of 40 and a zoom of 1, they are their central part, pixel by pixel.
    """
    crops = torch.zeros(len(blocks), 4, side, side, dtype=torch.uint8)
    for crop, (top, left, height, width) in zip(crops, blocks):
        crop[:, 36 + top : 36 + top + height, 36 + left : 36 + left + width] = 255
    return crops


def picture(top, left, height=8, width=8):
    image = torch.zeros(40, 40)
    image[top : top + height, left : left + width] = 1
    return image


def see(crops, disc=False, **new):
    n = len(crops)
    numbers = dict(angle=0.0, zoom=1.0, mirror=1.0) | new
    shift = torch.tensor([numbers.pop("shift", (0.0, 0.0))]).expand(n, 2)
    numbers = {k: torch.as_tensor(v).float().expand(n) for k, v in numbers.items()}
    return objects.make_views(crops, 40, **numbers, shift=shift, disc=disc)


@pytest.mark.parametrize(
    "numbers, wanted",
    [
        (dict(), picture(2, 4)),
        (dict(angle=90.0), picture(4, 30)),  # clockwise: from upper left to upper right
        (dict(angle=-90.0), picture(28, 2)),
        (dict(angle=180.0), picture(30, 28)),
        (dict(mirror=-1.0), picture(2, 28)),
        (dict(shift=(0.25, 0.0)), picture(2, 14)),  # to the right
        (dict(shift=(0.0, 0.5)), picture(22, 4)),  # down
        (dict(angle=90.0, shift=(-0.25, 0.0)), picture(4, 20)),  # turned about its own centre
        (dict(mirror=-1.0, angle=90.0), picture(28, 30)),  # mirrored, then turned
    ],
)
def test_views_turn_move_and_mirror(numbers, wanted):
    images, masks = see(crop_with((2, 4, 8, 8)), **numbers)
    assert images.shape == (1, 3, 40, 40) and masks.shape == (1, 20, 20)
    assert torch.allclose(images[0], wanted.expand(3, -1, -1), atol=1e-3)
    assert torch.equal(masks[0], F.avg_pool2d(wanted[None], 2)[0] > 0.5), "the mask goes along"


def test_views_zoom_and_are_grey_outside():
    images, masks = see(crop_with((16, 16, 8, 8)), zoom=2.0)
    assert torch.allclose(images[0, :, 13:27, 13:27], torch.ones(()), atol=1e-3)
    assert images[0, :, :11].max() < 1e-3 and images[0, :, :, 29:].max() < 1e-3
    assert torch.equal(masks[0], picture(12, 12, 16, 16)[::2, ::2] > 0)
    white = torch.full((1, 4, 112, 112), 255, dtype=torch.uint8)
    images, masks = see(white, zoom=0.25)  # 160 pixels of a crop that has 112
    assert torch.allclose(images[0, :, :5], torch.tensor(objects.GREY / 255), atol=1e-4)
    assert not masks[0, 0].any() and masks[0, 10, 10]


def test_every_view_has_its_own_numbers():
    images, _ = see(crop_with((2, 4, 8, 8), (2, 4, 8, 8)), angle=torch.tensor([0.0, 90.0]))
    wanted = torch.stack([picture(2, 4), picture(4, 30)])
    assert torch.allclose(images[:, 0], wanted, atol=1e-3)


def test_a_disc_hides_the_corners_and_nothing_else():
    white = torch.full((1, 4, 112, 112), 255, dtype=torch.uint8)
    images, masks = see(white, disc=True)
    axis = (torch.arange(40) - 19.5) ** 2
    inside = axis + axis[:, None] < 20**2
    assert torch.allclose(images[0, 0][inside], torch.ones(()))
    assert torch.allclose(images[0, 0][~inside], torch.tensor(objects.GREY / 255))
    assert not masks[0, 0, 0] and masks[0, 10, 0]


def test_the_least_zoom_and_the_largest_shift_stay_within_the_crop(nb):
    """Otherwise a grey edge would give the jitter away."""
    config = nb.CPU
    reach = (0.5 + config.shift) / config.zoom[0]
    assert 2 * reach <= objects.ROOM + 1e-9
    white = torch.full((1, 4, 112, 112), 255, dtype=torch.uint8)
    for sign in (-1, 1):
        images, _ = see(white, zoom=config.zoom[0], shift=(sign * config.shift, 0.0))
        assert images.min() > 0.99


def test_numbers_keep_to_their_bounds_and_repeat():
    args = (3000, 7, 15.0, (0.5, 1.25), 0.2)
    numbers = objects.draw_numbers(*args)
    again, other = objects.draw_numbers(*args), objects.draw_numbers(3000, 8, *args[2:])
    assert all(torch.equal(numbers[k], again[k]) for k in numbers)
    assert not any(torch.equal(numbers[k], other[k]) for k in numbers)
    assert 14 < numbers["angle"].abs().max() <= 15
    assert 0.5 <= numbers["zoom"].min() < 0.51 and 1.24 < numbers["zoom"].max() <= 1.25
    middle = numbers["zoom"].log().mean().exp()
    assert middle == pytest.approx((0.5 * 1.25) ** 0.5, rel=0.03), "uniform in the logarithm"
    assert 0.19 < numbers["shift"].abs().max() <= 0.2 and numbers["shift"].shape == (3000, 2)
    assert abs(float(np.corrcoef(numbers["shift"].t())[0, 1])) < 0.1
    assert set(numbers["mirror"].tolist()) == {-1.0, 1.0}
    assert 0.4 < (numbers["mirror"] > 0).float().mean() < 0.6


# --- features and masks


def few_crops(n=6, side=144):
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (n, 4, side, side), generator=generator, dtype=torch.uint8)
    crops[:, 3] = 0
    crops[:, 3, 60:84, 60:84] = 255
    return objects.Crops(crops, torch.arange(n) % 2, torch.arange(n) // 2, ("a", "b"), {})


@pytest.fixture(scope="module")
def backbone():
    return backbones.load_backbone("efficientnet_lite0", pretrained=False).eval()


def test_prepared_views(nb, backbone):
    config = nb.replace(nb.CONFIGS["smoke"], views=3, test_views=2)
    crops = {role: few_crops(n) for role, n in (("train", 6), ("val", 4), ("test", 5))}
    sets = objects.prepare(backbone, crops, config, CPU, 15.0, config.zoom)
    assert len(sets["train"]) == 3 and [len(sets[r]) for r in ("val", "test")] == [8, 10]
    shapes = [tuple(level.shape) for level in sets["test"].levels]
    assert shapes == [(10, 40, 8, 8), (10, 112, 4, 4), (10, 1280, 2, 2)]
    assert all(level.dtype == torch.float16 for level in sets["test"].levels)
    assert sets["test"].photos.tolist() == 2 * crops["test"].photos.tolist()
    assert sets["test"].masks.dtype == torch.bool and sets["test"].masks.any()
    again = objects.prepare(backbone, crops, config, CPU, 15.0, config.zoom)
    for a, b in zip(sets["test"].levels, again["test"].levels):
        assert torch.equal(a, b), "test views are fixed"
    views = sets["test"].masks.view(2, 5, 32, 32)
    assert not torch.equal(views[0], views[1]), "two views of an object differ"
    assert sets["train"][0].digest_parts() != sets["train"][1].digest_parts()
    levels, masks, labels = sets["test"].batch(torch.tensor([1, 7]), CPU)
    assert [level.dtype for level in levels] == 3 * [torch.float32]
    assert torch.equal(masks[1], sets["test"].masks[7]) and labels.tolist() == [1, 0]


def test_only_a_disc_turns_the_test_views(nb, monkeypatch):
    seen = {}

    def extract(backbone, part, numbers, side, runtime, disc):
        seen.setdefault(disc, []).append(float(numbers["angle"].abs().max()))
        n = len(part)
        levels = [torch.zeros(n, 1, 1, 1)]
        return objects.Views(levels, torch.zeros(n, 1, 1).bool(), part.labels, part.photos)

    monkeypatch.setattr(objects, "extract", extract)
    config = nb.replace(nb.CONFIGS["smoke"], views=1, test_views=1)
    crops = {role: few_crops() for role in ("train", "val", "test")}
    objects.prepare(None, crops, config, CPU, 15.0, config.zoom)
    objects.prepare(None, crops, config, CPU, 180.0, (0.5, 2.0), disc=True)
    train, *fixed = seen[False]
    assert train > 0 and fixed == [0.0, 0.0]
    assert all(angle > 50 for angle in seen[True])


def test_the_deepest_map_is_what_the_network_pools(backbone):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (deepest,) = backbone.feature_maps(x, (32,))
    assert torch.allclose(deepest.mean(dim=(2, 3)), backbone(x), atol=1e-5)


def test_fresh_views_are_fresh_and_fixed_ones_fixed(nb):
    config = nb.CONFIGS["smoke"]
    views = objects.FreshViews({"train": few_crops(), "test": few_crops()}, 32, config, CPU)
    index = torch.arange(4)
    torch.manual_seed(0)
    first, second = views.random(index, 0), views.random(index, 0)
    torch.manual_seed(0)
    assert torch.equal(views.random(index, 0)[0], first[0])
    assert not torch.equal(first[0], second[0])
    assert first[0].shape == (4, 3, 32, 32) and first[1].shape == (4, 16, 16)
    fixed = views.fixed("test")
    assert torch.equal(fixed(index)[0], fixed(index)[0])
    assert torch.equal(fixed(index)[0][2:], fixed(index[2:])[0]), "whatever the batches"


@pytest.mark.parametrize("size, wanted", [((4, 4), (8, 8)), ((2, 3), (16, 12)), ((1, 1), (4, 4))])
def test_enlarging_is_bilinear_interpolation(size, wanted):
    maps = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found = objects.enlarge(maps, wanted)
    expected = F.interpolate(maps, size=wanted, mode="bilinear")
    assert torch.allclose(found, expected, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((f * weights).sum(), maps)[0] for f in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-12)
    assert objects.enlarge(maps, size) is maps


def test_mask_iou_by_hand():
    rows, columns, nothing = torch.zeros(3, 4, 4, dtype=torch.bool).unbind()
    rows[:2], columns[:, :2] = True, True
    found = torch.stack([rows, rows, rows, nothing, nothing])
    masks = torch.stack([rows, columns, ~rows, rows, nothing])
    wanted = torch.tensor([1.0, 4 / 12, 0.0, 0.0, 0.0])
    assert torch.allclose(objects.mask_iou(found, masks), wanted)


def test_shrinking_asks_for_half():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, :3] = True
    assert objects.shrink(mask, 4)[0].long().tolist() == [[1, 1, 0, 0]] * 2 + [[0] * 4] * 2
