"""Drawn images for machines without data and network, from fixed seeds.

Silhouettes in random poses and colors under coarse grain. Every notebook runs on them and has
something to learn from them; no result on them counts.
"""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# COCO's id: name, super-category, and the corners x y x y ... in hundredths of the radius
OBJECTS = {
    1: "person person 9 -99 18 -70 60 -9 30 -30 35 93 9 93 0 40 -9 93 -35 93 -30 -30 -60 -9 -18 -7",
    3: "car vehicle -90 35 -86 -5 -50 -12 -27 -45 32 -45 86 0 90 35 63 50 45 35 -45 35 -63 50",
    5: "airplane vehicle 0 -99 12 -30 92 20 92 35 12 12 35 92 -35 92 -12 12 -92 35 -92 20 -12 -30",
    18: "dog animal -85 -32 -54 -68 -32 -27 45 -27 72 -63 59 18 63 68 45 68 38 23 -27 23 -45 68",
    44: "bottle kitchen 10 -94 10 -52 28 -28 28 94 -28 94 -28 -28 -10 -52 -10 -94",
    59: "pizza food 20 -92 70 -60 0 99 -70 -60 -20 -92",
    62: "chair furniture -45 -88 -9 -88 -9 -9 45 -9 45 88 9 88 9 45 -45 45",
}
CELL = 107  # pixels; a scene is 2 x 3 cells with an object in each


def _outline(rng, category, radius, turn):
    """An object's corners (k, 2) around 0, within `radius` pixels: squeezed, then turned."""
    corners = np.array(OBJECTS[category].split()[2:], float).reshape(-1, 2)
    corners *= radius * rng.uniform(0.007, 0.01, 2)
    return (corners.view(complex) * np.exp(1j * turn)).view(float)


def _paint(rng, height, width, outlines):
    """Plain objects on a plain ground, under grain of 4 pixels."""
    image = Image.new("RGB", (width, height), tuple(rng.integers(30, 225, 3)))
    for outline in outlines:
        ImageDraw.Draw(image).polygon(outline.ravel().tolist(), tuple(rng.integers(0, 256, 3)))
    grain = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    grain = Image.fromarray(grain).resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image, grain, rng.uniform(0.1, 0.3))


def draw_cifar(per_class, seed):
    """Draw airplanes at any angle (label 0), then automobiles on their wheels (label 1).

    Gives images (2 * per_class, 32, 32, 3) uint8 and labels (2 * per_class,) int64.
    """
    rng, images = np.random.default_rng(seed), []
    for category, tilt in ((5, np.pi), (3, 0.25)):
        for _ in range(per_class):
            outline = _outline(rng, category, rng.uniform(22, 32), rng.uniform(-tilt, tilt))
            images.append(_paint(rng, 64, 64, [outline + rng.normal(32, 3, 2)]).reduce(2))
    return np.stack(images), np.repeat([0, 1], per_class)


def draw_scene(number):
    """Draw six objects that do not overlap; the image, and COCO's annotations of them."""
    rng, annotations, outlines = np.random.default_rng(number), [], []
    for cell in np.ndindex(3, 2):
        radius, category = rng.uniform(28, CELL / 2), int(rng.choice(list(OBJECTS)))
        outline = _outline(rng, category, radius, rng.uniform(-np.pi, np.pi))
        outline += CELL * np.array(cell) + rng.uniform(radius, CELL - radius, 2)
        outlines.append(outline)
        annotations.append(
            {
                "id": 10 * number + len(outlines),
                "image_id": number,
                "category_id": category,
                "iscrowd": 0,
                "segmentation": [outline.ravel().tolist()],
                "bbox": [*outline.min(axis=0), *np.ptp(outline, axis=0)],
            }
        )
    return _paint(rng, 2 * CELL, 3 * CELL, outlines), annotations


@functools.cache
def coco_folder():
    """Draw scenes into a folder laid out as COCO, which goes when the program ends."""
    folder = tempfile.TemporaryDirectory(prefix="standin-")
    keys = "id", "name", "supercategory"
    categories = [dict(zip(keys, (number, *text.split()))) for number, text in OBJECTS.items()]
    for split, numbers in (("train2017", range(1, 81)), ("val2017", range(81, 121))):
        path, images, objects = Path(folder.name, split), [], []
        path.mkdir()
        for number in numbers:
            image, annotations = draw_scene(number)
            name = f"{number:012d}.jpg"
            image.save(path / name)
            size = {"width": image.width, "height": image.height}
            images.append({"id": number, "file_name": name} | size)
            objects += annotations
        content = {"images": images, "annotations": objects, "categories": categories}
        path = path.with_name(f"instances_{split}.json")
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder
