"""The drawn images: the same for everybody, valid, and with something to learn in them."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from src import standin


def test_cifar_is_the_same_for_everybody_and_no_image_comes_twice():
    (images, labels), (others, _) = (standin.draw_cifar(6, seed) for seed in (5, 4))
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 6 + [1] * 6
    np.testing.assert_array_equal(images, standin.draw_cifar(6, seed=5)[0])
    assert len(np.unique([*images, *others], axis=0)) == 24


def test_scenes_agree_with_their_annotations():
    folder, contrasts = Path(standin.coco_folder().name), []
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "instances_val2017.json")
    assert len(coco.imgs) == len(os.listdir(folder / "val2017")) == 40
    assert len({category["supercategory"] for category in coco.cats.values()}) == 6
    for annotation in coco.anns.values():
        info, mask = coco.imgs[annotation["image_id"]], coco.annToMask(annotation).astype(bool)
        image = np.asarray(Image.open(folder / "val2017" / info["file_name"]), float)
        assert image.shape[:2] == mask.shape == (info["height"], info["width"])
        x, y, width, height = np.round(annotation["bbox"]).astype(int)
        assert mask[y : y + height, x : x + width].sum() > 0.95 * mask.sum() > 0.1 * width * height
        contrasts.append(np.abs(image[mask].mean(axis=0) - image.mean(axis=(0, 1))).max())
    assert np.median(contrasts) > 25  # an object is painted where its mask is


def test_every_program_draws_scenes_of_its_own_and_all_are_the_same():
    """So programs that start together cannot disturb each other, and no folder must be writable."""
    folder = standin.coco_folder()
    standin.coco_folder.cache_clear()
    other = Path(standin.coco_folder().name)
    path = Path(folder.name, "train2017", "000000000007.jpg")
    assert path.read_bytes() == (other / "train2017" / path.name).read_bytes()
    folder.cleanup()
    assert other.is_dir()
