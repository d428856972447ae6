"""Stand-in images, drawn by our own code with a fixed seed for machines without data and network.

They let every notebook run from top to bottom; results on them say nothing about the real data.
CIFAR-like images and COCO-like scenes are mottled silhouettes in random poses, in the scenes with
their polygons, and the photos follow two statistics of natural images: an amplitude spectrum
that falls as 1/f (Field, "Relations between the statistics of natural images and the response
properties of cortical cells", 1987) and occlusion with power-law object sizes (Lee, Mumford and
Huang, "Occlusion models for natural images", 2001).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

VERSION = 2  # part of the cache folder's name: raise it whenever the written files change
_SIDE, _DRAWN = 32, 128  # CIFAR-like images are drawn larger and then reduced


# --- shared pieces --------------------------------------------------------------------------------
def _turn(degrees: float) -> np.ndarray:
    """Rotation of points (k, 2) @ matrix, shape (2, 2)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s], [s, c]])


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise of `cells` x `cells` bumps (2: a slope), around [-1, 1], (height, width, 1)."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]


def _natural_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Colour noise with a 1/f amplitude spectrum, most of it luminance; std about 1, (h, w, 3)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no constant part
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
    planes = np.fft.irfft2(spectrum, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    # luminance, red-blue, green-magenta
    mix = np.array([[1, 0.2, 0.1], [1, 0, -0.1], [1, -0.2, 0.1]])
    return np.einsum("cp,phw->hwc", mix, planes)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(20, 235) + rng.normal(0, 28, 3)


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0, 255).astype(np.uint8)


def _paint(rng: np.random.Generator, image: np.ndarray, outline: np.ndarray) -> None:
    """Paint the polygon `outline` (k, 2) into `image` (h, w, 3), shaded and mottled."""
    x0, y0 = np.maximum(np.floor(outline.min(axis=0)), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(outline.max(axis=0)) + 1, image.shape[1::-1]).astype(int)
    mask = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(mask).polygon((outline - (x0, y0)).ravel().tolist(), fill=1)
    fill = _colour(rng) + 30 * _clouds(rng, *mask.size[::-1], 2)
    fill = fill + rng.uniform(3, 25) * _clouds(rng, *mask.size[::-1], rng.integers(4, 24))
    np.copyto(image[y0:y1, x0:x1], fill, where=np.asarray(mask, bool)[..., None])


def _outline(numbers: str) -> np.ndarray:
    """Polygon (k, 2) in [-1, 1]^2 from "x y ..." in hundredths, y downwards."""
    return np.array(numbers.split(), float).reshape(-1, 2) / 100


_PERSON = "9 -99 18 -70 60 -9 30 -30 35 99 9 99 0 40 -9 99 -35 99 -30 -30 -60 -9 -18 -70 -9 -99"
_CAR = "-100 35 -95 -5 -55 -12 -30 -45 35 -45 95 0 100 35 70 35 50 58 30 35 -30 35 -50 58 -70 35"
_AIRPLANE = "0 -100 12 -30 95 20 95 35 12 12 8 65 38 95 -38 95 -8 65 -12 12 -95 35 -95 20 -12 -30"
_DOG = "-95 -35 -60 -75 -35 -30 50 -30 80 -70 65 20 70 75 50 75 42 25 -25 25 -30 75 -50 75 -62 -20"
_OBJECTS = [  # COCO's id, name and super-category, and a silhouette
    (1, "person", "person", _PERSON),
    (3, "car", "vehicle", _CAR),
    (5, "airplane", "vehicle", _AIRPLANE),
    (18, "dog", "animal", _DOG),
    (44, "bottle", "kitchen", "10 -100 10 -55 30 -30 30 100 -30 100 -30 -30 -10 -55"),
    (59, "pizza", "food", "20 -92 70 -60 0 100 -70 -60 -20 -92"),
    (62, "chair", "furniture", "-50 -100 -10 -100 -10 -10 50 -10 50 100 10 100 10 50 -50 50"),
]


# --- CIFAR-like airplanes and automobiles ---------------------------------------------------------
_PARTS = [  # of an airplane seen from above and of an automobile seen from the side
    (_AIRPLANE, "0 -100 9 -30 6 80 -6 80 -9 -30"),
    (_CAR, "-42 -14 -24 -38 30 -38 58 -12"),
]
_SKY = [(120, 170, 225), (85, 130, 200), (185, 205, 225), (240, 240, 242), (225, 165, 120)]
_GROUND = [(120, 120, 120), (95, 125, 70), (150, 140, 115), (80, 82, 88)]
_WALL = [(150, 110, 90), (70, 95, 60), (175, 170, 160), (110, 110, 118), (190, 205, 225)]


def _cifar_image(rng: np.random.Generator, label: int) -> np.ndarray:
    """One airplane (0) or automobile (1), now and then before the other's usual background."""
    aloft = (label == 0) == (rng.random() > 0.15)
    horizon = rng.uniform(0.6, 1.6) if aloft else rng.uniform(0.3, 0.7)
    row = np.linspace(0, 1, _DRAWN)[:, None, None]
    upper, lower = [
        palette[rng.integers(len(palette))]
        + rng.uniform(0, 50) * (row - 0.5)
        + rng.uniform(2, 28) * _clouds(rng, _DRAWN, _DRAWN, rng.integers(3, 14))
        for palette in (_SKY if aloft else _WALL, _GROUND)
    ]
    image = np.where(row < horizon, upper, lower)
    if label == 0:  # turned in its plane, seen at a slant from any side
        pose = _turn(rng.uniform(0, 360)) * (1, rng.uniform(0.4, 1)) @ _turn(rng.uniform(0, 360))
    else:  # driving to the left or to the right, turned a little towards us
        pose = _turn(rng.normal(0, 8)) * (rng.choice([-1, 1]) * rng.uniform(0.6, 1), 1)
    pose, centre = pose * rng.uniform(44, 62), _DRAWN / 2 + rng.normal(0, 6, 2)
    for part in _PARTS[label]:
        _paint(rng, image, _outline(part) @ pose + centre)
    small = np.asarray(Image.fromarray(_bytes(image)).reduce(_DRAWN // _SIDE), float)
    small = 128 + rng.uniform(0.6, 1.15) * (small - 128) + rng.normal(0, 12)
    return _bytes(small + rng.normal(0, rng.uniform(2, 10), small.shape))


def draw_cifar(n_per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw airplanes (label 0), then automobiles (label 1).

    Image i of a class is the same whatever `n_per_class` is.

    Returns:
        Images, uint8 (2 * n_per_class, 32, 32, 3), and labels, int64 (2 * n_per_class,).
    """
    labels = np.repeat(np.arange(2), n_per_class)
    numbers = np.tile(np.arange(n_per_class), 2)
    images = [_cifar_image(np.random.default_rng((seed, c, i)), c) for c, i in zip(labels, numbers)]
    return np.stack(images), labels


# --- COCO-format scenes ---------------------------------------------------------------------------
def _scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[dict]]:
    """A textured image (h, w, 3) with objects that do not overlap, and its annotations."""
    image = _colour(rng) + rng.uniform(8, 30) * _natural_noise(rng, height, width)
    annotations, taken = [], []
    for _ in range(rng.integers(6, 20)):
        radius = rng.uniform(12, 62)
        centre = rng.uniform(radius + 2, np.array([width, height]) - radius - 2)
        if any(np.hypot(*(centre - other)) < radius + r for other, r in taken):
            continue
        taken.append((centre, radius))
        category, _, _, silhouette = _OBJECTS[rng.integers(len(_OBJECTS))]
        outline = _outline(silhouette) * rng.uniform(0.75, 1, 2) * rng.choice([-1, 1], 2)
        outline = outline / np.linalg.norm(outline, axis=1).max() * radius
        outline = outline @ _turn(rng.uniform(0, 360))
        for share in (1, 0.55):  # a second tone inside
            _paint(rng, image, np.round(share * outline + centre, 2))
        outline = np.round(outline + centre, 2)
        (x, y), (x_next, y_next) = outline.T, np.roll(outline, -1, axis=0).T
        shape = {
            "segmentation": [outline.ravel().tolist()],
            "bbox": [x.min(), y.min(), np.ptp(x), np.ptp(y)],
            "area": abs((x * y_next - y * x_next).sum()) / 2,  # shoelace formula
        }
        annotations.append({"category_id": category, "iscrowd": 0} | shape)
    return image + rng.normal(0, 5, image.shape), annotations


def write_coco(folder: Path, n_train: int, n_val: int, seed: int) -> None:
    """Write scenes and their `annotations/instances_*.json` into the new folder `folder`."""
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": i, "name": name, "supercategory": s} for i, name, s, _ in _OBJECTS]
    for split, first, count in (("train2017", 1, n_train), ("val2017", n_train + 1, n_val)):
        (folder / split).mkdir()
        document = {"categories": categories, "images": [], "annotations": []}
        for number in range(first, first + count):
            rng = np.random.default_rng((seed, number))
            height, width = rng.integers(200, 321, 2).tolist()
            image, objects = _scene(rng, height, width)
            name = f"{number:012d}.jpg"
            Image.fromarray(_bytes(image)).save(folder / split / name, quality=92)
            info = {"id": number, "file_name": name, "width": width, "height": height}
            document["images"].append(info)
            for i, entry in enumerate(objects):
                document["annotations"].append({"id": 100 * number + i, "image_id": number} | entry)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


# --- photo-like images ----------------------------------------------------------------------------
def _photo(rng: np.random.Generator, side: int) -> np.ndarray:
    """1/f colour noise under shaded discs and polygons, radii of density r^-3, (side, side, 3)."""
    image = _colour(rng) + rng.uniform(15, 40) * _natural_noise(rng, side, side)
    for _ in range(rng.integers(40, 160)):
        radius = 0.025 * side / np.sqrt(rng.uniform(0.004, 1))
        corners = rng.choice([3, 4, 5, 6, 24])
        uneven = rng.uniform(-0.3, 0.3, corners) * (corners < 24)
        angles = 2 * np.pi * (np.arange(corners) + uneven) / corners
        outline = np.stack([np.cos(angles), rng.uniform(0.4, 1) * np.sin(angles)], axis=1)
        outline = radius * outline @ _turn(rng.uniform(0, 360)) + rng.uniform(0, side, 2)
        _paint(rng, image, outline)
    return image + rng.normal(0, 3, image.shape)


def write_photos(folder: Path, n: int, side: int, seed: int) -> None:
    """Write `n` square photo-like JPEGs of `side` pixels into the new folder `folder`."""
    folder.mkdir(parents=True)
    for i in range(n):
        photo = _photo(np.random.default_rng((seed, i)), side)
        Image.fromarray(_bytes(photo)).save(folder / f"{i:04d}.jpg", quality=92)
