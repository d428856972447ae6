"""The drawn images: reproducible, valid, and with something to learn in them."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from src import standin


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "coco"
    standin.write_coco(folder, n_train=10, n_val=4, seed=3)
    return folder


def test_cifar_shapes_order_and_determinism():
    images, labels = standin.draw_cifar(6, seed=5)
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 6 + [1] * 6
    fewer, _ = standin.draw_cifar(2, seed=5)
    np.testing.assert_array_equal(fewer, images[[0, 1, 6, 7]])
    assert not np.array_equal(standin.draw_cifar(2, seed=6)[0], fewer)
    assert len(np.unique(images.reshape(12, -1), axis=0)) == 12


def _gradient_features(images: np.ndarray) -> np.ndarray:
    """Edge energy in 4 directions on an 8 x 8 grid: sees shape rather than colour, (N, 256)."""
    grey = images.mean(axis=3)
    dy, dx = np.gradient(grey, axis=(1, 2))
    angle = np.arctan2(dy, dx) % np.pi
    bins = [
        np.hypot(dx, dy) * (np.minimum(abs(angle - t), np.pi - abs(angle - t)) < np.pi / 8)
        for t in np.arange(4) * np.pi / 4
    ]
    return np.sqrt(
        np.stack(bins, 1)
        .reshape(len(images), 4, 8, 4, 8, 4)
        .mean(axis=(3, 5))
        .reshape(len(images), -1)
    )


def test_cifar_is_learnable_but_not_by_mean_colour():
    train, y = standin.draw_cifar(150, seed=0)
    test, y_test = standin.draw_cifar(75, seed=1)

    def accuracy(features) -> float:
        a, b = features(train), features(test)
        centre, spread = a.mean(axis=0), a.std(axis=0) + 1e-9
        a, b = (a - centre) / spread, (b - centre) / spread
        weight = np.linalg.solve(a.T @ a + 50 * np.eye(a.shape[1]), a.T @ (2 * y - 1))
        return np.mean((b @ weight > 0) == y_test)

    assert accuracy(_gradient_features) > 0.9
    assert accuracy(lambda images: images.mean(axis=(1, 2))) < 0.9


def test_coco_files_agree_with_the_annotations(scenes, capsys):
    for split, n in (("train2017", 10), ("val2017", 4)):
        coco = COCO(str(scenes / "annotations" / f"instances_{split}.json"))
        assert len(coco.imgs) == len(list((scenes / split).glob("*.jpg"))) == n
        for info in coco.imgs.values():
            with Image.open(scenes / split / info["file_name"]) as image:
                assert image.size == (info["width"], info["height"])
        assert all(coco.getAnnIds(imgIds=i) for i in coco.imgs)


def test_coco_masks_agree_with_polygons_boxes_and_areas(scenes, capsys):
    coco = COCO(str(scenes / "annotations" / "instances_train2017.json"))
    for annotation in coco.anns.values():
        mask, info = coco.annToMask(annotation), coco.imgs[annotation["image_id"]]
        assert mask.shape == (info["height"], info["width"])
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.1, abs=25)
        x, y, width, height = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask)))
        assert (x, y, x + width, y + height) == pytest.approx(
            (
                annotation["bbox"][0],
                annotation["bbox"][1],
                annotation["bbox"][0] + annotation["bbox"][2],
                annotation["bbox"][1] + annotation["bbox"][3],
            ),
            abs=2,
        )


def test_coco_objects_are_painted_where_their_masks_are(scenes, capsys):
    """Colours differ more across an object's outline than between halves of its surroundings."""
    coco = COCO(str(scenes / "annotations" / "instances_train2017.json"))
    differences = []
    for annotation in coco.anns.values():
        image = np.asarray(
            Image.open(scenes / "train2017" / coco.imgs[annotation["image_id"]]["file_name"]), float
        )
        inside = coco.annToMask(annotation).astype(bool)
        x, y, width, height = (int(v) for v in annotation["bbox"])
        box = np.zeros_like(inside)
        box[y : y + height, x : x + width] = True
        outside = box & ~inside
        if outside.sum() > 50:
            differences.append(
                np.abs(image[inside].mean(axis=0) - image[outside].mean(axis=0)).max()
            )
    assert np.median(differences) > 25


def test_coco_entries_have_known_categories_and_ids_of_their_own(scenes):
    document = json.loads((scenes / "annotations" / "instances_train2017.json").read_text())
    assert len({entry["supercategory"] for entry in document["categories"]}) == 6
    assert {entry["category_id"] for entry in document["annotations"]} <= {
        entry["id"] for entry in document["categories"]
    }
    ids = [entry["id"] for entry in document["annotations"]]
    assert len(set(ids)) == len(ids)


def test_coco_and_photos_are_deterministic(scenes, tmp_path):
    standin.write_coco(tmp_path / "coco", n_train=10, n_val=4, seed=3)
    for file in sorted(path for path in scenes.rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "coco" / file.relative_to(scenes)).read_bytes()
    standin.write_photos(tmp_path / "a", 2, 64, seed=0)
    standin.write_photos(tmp_path / "b", 2, 64, seed=0)
    for name in ("0000.jpg", "0001.jpg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def _spectral_slope(grey: np.ndarray) -> float:
    """Slope of log amplitude against log frequency of a square image."""
    axis = np.fft.fftfreq(len(grey))
    frequency = np.hypot(axis[:, None], axis[None, :])
    used = (frequency > 0.02) & (frequency < 0.3)
    amplitude = np.abs(np.fft.fft2(grey - grey.mean()))
    return np.polyfit(np.log(frequency[used]), np.log(amplitude[used] + 1e-9), 1)[0]


def test_natural_noise_falls_as_one_over_f():
    noise = standin._natural_noise(np.random.default_rng(0), 128, 128)
    assert noise.shape == (128, 128, 3)
    assert _spectral_slope(noise.mean(axis=2)) == pytest.approx(-1, abs=0.1)


def test_photos_have_a_falling_spectrum(tmp_path):
    standin.write_photos(tmp_path / "photos", 4, 128, seed=1)
    photos = [
        np.asarray(Image.open(file).convert("L"), float)
        for file in sorted((tmp_path / "photos").iterdir())
    ]
    assert [photo.shape for photo in photos] == [(128, 128)] * 4 and min(
        photo.std() for photo in photos
    ) > 10
    assert -1.8 < np.mean([_spectral_slope(photo) for photo in photos]) < -0.7
