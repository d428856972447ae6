"""Stand-in images, drawn by our own code with a fixed seed for machines without data and network.

They let every notebook run from top to bottom; results on them say nothing about the real data.
CIFAR-like images are small 3-D models in random poses, COCO-like scenes are random 2-D silhouettes
with their polygons, and the photos follow two statistics of natural images: an amplitude spectrum
that falls as 1/f (Field, "Relations between the statistics of natural images and the response
properties of cortical cells", 1987) and occlusion with power-law object sizes (Lee, Mumford and
Huang, "Occlusion models for natural images", 2001).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1  # part of the cache folder's name: raise it whenever the written files change
_SIDE, _DRAWN = 32, 128  # CIFAR-like images are drawn larger and then reduced
_LIGHT = np.array([0.35, -0.45, 0.82])  # towards the light; x points right, y into the image, z up


# --- shared pieces --------------------------------------------------------------------------------
def _rotation(axis: int, degrees: float) -> np.ndarray:
    """Right-handed rotation about axis 0, 1 or 2, shape (3, 3)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise of `cells` x `cells` bumps (2: a slope), around [-1, 1], (height, width, 1)."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]


def _natural_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Colour noise with a 1/f amplitude spectrum, most of it luminance; std about 1, (h, w, 3)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no constant part
    planes = np.fft.irfft2(
        np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency, s=(height, width)
    )
    planes /= planes.std(axis=(1, 2), keepdims=True)
    mix = np.array(
        [[1, 0.2, 0.1], [1, 0, -0.1], [1, -0.2, 0.1]]
    )  # luminance, red-blue, green-magenta
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


# --- CIFAR-like airplanes and automobiles ---------------------------------------------------------
def _render(
    canvas: Image.Image,
    faces: list,
    rotation: np.ndarray,
    scale: float,
    centre: np.ndarray,
    solid: bool,
) -> None:
    """Draw shaded `faces` [(polygon (k, 3), colour (3,))].

    In the order of depth, or (`solid`) of the list without back faces.
    """
    sizes = np.array([len(polygon) for polygon, _ in faces])
    starts = np.cumsum(sizes) - sizes
    points = np.concatenate([polygon for polygon, _ in faces]) @ rotation.T
    middles = np.add.reduceat(points, starts) / sizes[:, None]
    normals = np.cross(points[starts + 1] - points[starts], points[starts + 2] - points[starts])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    if solid:  # outward is away from the origin, which lies inside the model
        normals *= np.sign((normals * middles).sum(axis=1, keepdims=True))
        order = np.flatnonzero(normals[:, 1] < 0)
    else:  # thin plates are seen from both sides
        normals *= -np.sign(normals[:, 1:2] + 1e-9)
        order = np.argsort(-middles[:, 1])
    shades = 0.55 + 0.55 * np.maximum(normals @ _LIGHT, 0)
    colours = _bytes(np.array([colour for _, colour in faces]) * shades[:, None]).tolist()
    flat = centre + points[:, ::2] * (1, -1) * scale / (
        1 + 0.15 * points[:, 1:2]
    )  # mild perspective
    draw = ImageDraw.Draw(canvas)
    for i in order:
        draw.polygon(
            flat[starts[i] : starts[i] + sizes[i]].ravel().tolist(), fill=tuple(colours[i])
        )


def _tube(rings: list, colours: list) -> list:
    """Faces between rings (x, y, z, radius) around the x axis, one colour for each of the sides."""
    angles = 2 * np.pi * np.arange(len(colours) + 1) / len(colours)
    circle = np.stack([0 * angles, np.cos(angles), np.sin(angles)], axis=1)
    lines = [np.array(ring[:3]) + ring[3] * circle for ring in rings]
    return [
        ((p[j], p[j + 1], q[j + 1], q[j]), colour)
        for p, q in zip(lines, lines[1:])
        for j, colour in enumerate(colours)
    ]


def _airplane(rng: np.random.Generator) -> list:
    """Faces of an airliner, light airplane or jet along x, nose at +1."""
    kind, r, rise = rng.integers(3), rng.uniform(0.09, 0.14), rng.uniform(0, 0.12)
    body = np.array(
        [(235, 235, 238), (200, 205, 212), (150, 155, 160), (90, 95, 100), _colour(rng)][
            rng.integers(5)
        ]
    )
    accent, metal = rng.integers(20, 255, 3), body * rng.uniform(0.65, 0.95)
    sweep, chord, tip, span, z = [
        (rng.uniform(0.3, 0.6), 0.34, 0.12, rng.uniform(0.8, 1.05), -0.6 * r),
        (rng.uniform(-0.03, 0.06), 0.28, 0.2, rng.uniform(0.85, 1.1), 0.9 * r),
        (rng.uniform(0.55, 0.8), 0.75, 0.26, rng.uniform(0.45, 0.65), 0),
    ][kind]
    stripe = accent if rng.random() < 0.4 else body
    faces = _tube(
        [
            (1, 0, 0, 0.01),
            (0.93, 0, 0, r * 0.55),
            (0.75, 0, 0, r),
            (-0.35, 0, 0, r),
            (-0.8, 0, r * 0.35, r * 0.55),
            (-1, 0, r * 0.5, r * 0.15),
        ],
        [stripe, body, body, stripe, body * 0.8, body * 0.7, body * 0.7, body * 0.8],
    )
    for j in (9, 10):  # cockpit windows on the upper faces behind the nose
        faces[j] = (faces[j][0], (45, 55, 70))
    for side in (-1, 1):  # wing, tailplane, engines ahead of the wing
        for x, width, back, root, end, z0, z1 in (
            (0.3, span, sweep, chord, tip, z, z + rise),
            (-0.7, 0.38 * span, 0.05 + sweep / 3, 0.27, 0.16, r / 2, r / 2 + rise),
        ):
            faces.append(
                (
                    (
                        (x, 0, z0),
                        (x - back, side * width, z1),
                        (x - back - end, side * width, z1),
                        (x - root, 0, z0),
                    ),
                    metal,
                )
            )
        for y in (0.35, 0.62)[: rng.integers(1, 3) * (kind == 0)]:
            x = 0.35 - sweep * y / span
            faces += _tube(
                [(x, side * y, z - 0.06, 0.055), (x - 0.2, side * y, z - 0.06, 0.04)],
                [metal * 0.7] * 5,
            )
    top = r + rng.uniform(0.3, 0.42)
    return faces + [
        (((-0.62, 0, r * 0.7), (-0.85, 0, top), (-1, 0, top), (-0.98, 0, r * 0.6)), accent)
    ]


def _automobile(rng: np.random.Generator) -> list:
    """Faces of a car along x, front at +1: body, cabin, windows, lights, wheels."""
    paint = (*_PAINTS, _colour(rng))[rng.integers(6)]
    half, belt, roof = rng.uniform(0.36, 0.44), rng.uniform(0.02, 0.12), rng.uniform(0.36, 0.6)
    rear, front = (
        rng.choice([-0.97, -0.8, -0.65]),
        rng.uniform(0.3, 0.55),
    )  # van or estate, hatchback, saloon
    rear, front = (
        (rear, rear + rng.uniform(0.05, 0.25)),
        (front, front - rng.uniform(0.25, 0.4)),
    )  # at belt, at roof
    glass, faces = np.array([60, 75, 90]) * rng.uniform(0.5, 1.6), []
    for x0, x1, z0, z1, h1 in (
        ((-0.97, 0.98), (-1, 1), -0.32, belt - 0.04, half),
        ((rear[0], front[0]), (rear[1], front[1]), belt - 0.05, roof, 0.8 * half),
    ):
        line = [(x0[0], z0, half), (x0[1], z0, half), (x1[1], z1, h1), (x1[0], z1, h1)]
        faces += [([(x, side * h, z) for x, z, h in line], paint) for side in (-1, 1)]
        faces += [
            (((a, -g, b), (a, g, b), (c, h, d), (c, -h, d)), paint)
            for (a, b, g), (c, d, h) in zip(line, line[1:] + line[:1])
        ]

    def pane(left: tuple, right: tuple, y_left: float, y_right: float) -> tuple:
        """A window between two slanted pillars (x at belt, x at roof), just outside the cabin."""
        corners = [
            (left, y_left, 0.1),
            (right, y_right, 0.1),
            (right, y_right, 0.86),
            (left, y_left, 0.86),
        ]
        return [
            (x[0] + t * (x[1] - x[0]), y * half * (1.01 - 0.2 * t), belt + t * (roof - belt))
            for x, y, t in corners
        ], glass

    middle = ((front[0] + rear[0]) / 2, (front[1] + rear[1]) / 2)

    def shifted(pillar: tuple, by: float) -> tuple:
        return pillar[0] + by, pillar[1] + by

    for side in (-1, 1):
        faces += [
            pane(shifted(a, 0.07), shifted(b, -0.05), side, side)
            for a, b in ((rear, middle), (middle, front))
        ]
    faces += [
        pane(shifted(x, by), shifted(x, by), -0.88, 0.88)
        for x, by in ((front, 0.012), (rear, -0.012))
    ]
    faces += [
        (
            [
                (x, (y + u) * half, v)
                for u, v in ((-0.2, -0.12), (0.2, -0.12), (0.2, -0.02), (-0.2, -0.02))
            ],
            colour,
        )
        for x, colour in ((1.005, (250, 245, 205)), (-1.005, (190, 20, 20)))
        for y in (-0.72, 0.72)
    ]
    angles, radius = 2 * np.pi * np.arange(14) / 14, rng.uniform(0.17, 0.22)
    rim = np.stack([np.cos(angles), 0 * angles, np.sin(angles)], axis=1)
    return faces + [
        ((x, side * (half + 0.01), -0.32) + share * radius * rim, colour)
        for side in (-1, 1)
        for x in (-0.58, 0.6)
        for share, colour in ((1, (28, 28, 30)), (0.55, (165, 165, 170)))
    ]


_PAINTS = [(190, 25, 30), (235, 235, 235), (40, 42, 48), (170, 175, 180), (30, 60, 150)]
_SKY = [
    (120, 170, 225),
    (85, 130, 200),
    (185, 205, 225),
    (240, 240, 242),
    (225, 165, 120),
    (60, 80, 130),
]
_GROUND = [(120, 120, 120), (95, 125, 70), (150, 140, 115), (80, 82, 88)]
_WALL = [
    (150, 110, 90),
    (70, 95, 60),
    (175, 170, 160),
    (110, 110, 118),
    (190, 205, 225),
    (235, 235, 235),
]


def _cifar_image(rng: np.random.Generator, label: int) -> np.ndarray:
    """One airplane (0) or automobile (1), now and then before the other's usual background."""
    aloft = (label == 0) == (rng.random() > 0.15)
    horizon = (
        (1.2 if rng.random() < 0.65 else rng.uniform(0.6, 0.95)) if aloft else rng.uniform(0.3, 0.7)
    )
    row, column, _ = np.mgrid[:_SIDE, :_SIDE, :1] / _SIDE
    upper, lower = [
        palette[rng.integers(len(palette))]
        + rng.normal(0, 12, 3)
        + rng.uniform(0, 50) * (row - 0.5)
        + rng.uniform(2, 28) * _clouds(rng, _SIDE, _SIDE, rng.integers(3, 14))
        for palette in (_SKY if aloft else _WALL, _GROUND)
    ]
    backdrop = _bytes(
        np.where(row < horizon + rng.uniform(-0.15, 0.15) * (column - 0.5), upper, lower)
    )
    canvas = Image.fromarray(backdrop).resize((_DRAWN, _DRAWN), Image.Resampling.BILINEAR)
    centre, scale = _DRAWN / 2 + rng.normal(0, 6, 2), rng.uniform(44, 62)
    if label == 0:
        pose = (
            _rotation(0, rng.normal(0, 30))
            @ _rotation(1, rng.normal(0, 15))
            @ _rotation(2, rng.uniform(0, 360))
        )
        _render(
            canvas,
            _airplane(rng),
            pose @ _rotation(0, rng.normal(0, 20)),
            scale,
            centre,
            solid=False,
        )
    else:
        pose = _rotation(0, rng.uniform(3, 24)) @ _rotation(
            2, rng.choice([0, 180]) + rng.normal(0, 38)
        )
        shadow = np.array([(-1, 0.25), (1, 0.6)]) * scale + centre
        ImageDraw.Draw(canvas).ellipse(
            shadow.ravel().tolist(), fill=tuple((backdrop[-1, 0] // 3).tolist())
        )
        _render(
            canvas,
            _automobile(rng),
            _rotation(1, rng.normal(0, 3)) @ pose,
            scale,
            centre,
            solid=True,
        )
    small = np.asarray(canvas.reduce(_DRAWN // _SIDE), float)
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
def _outline(numbers: str, mirrored: bool = False) -> np.ndarray:
    """Polygon (k, 2) in [-1, 1]^2 from "x y ..." in hundredths; `mirrored` adds the left half."""
    points = np.array(numbers.split(), float).reshape(-1, 2) / 100
    return np.concatenate([points, points[::-1] * (-1, 1)]) if mirrored else points


_OBJECTS = [  # COCO's id, name and super-category, and a silhouette
    (
        1,
        "person",
        "person",
        _outline("12 -100 18 -85 10 -68 35 -60 55 -10 42 -2 25 -35 22 10 30 95 10 100 2 30", True),
    ),
    (
        3,
        "car",
        "vehicle",
        _outline(
            "-100 30 -95 -5 -55 -12 -30 -45 35 -45 60 -10 95 0 100 30 75 30 68 48 50 52 38 45 "
            "32 30 -35 30 -42 45 -55 52 -72 45 -78 30"
        ),
    ),
    (
        5,
        "airplane",
        "vehicle",
        _outline("3 -100 10 -80 12 -30 95 20 95 35 12 12 8 65 38 88 38 98 2 88", True),
    ),
    (
        18,
        "dog",
        "animal",
        _outline(
            "-95 -35 -70 -60 -55 -75 -50 -55 -35 -30 50 -30 75 -70 85 -65 68 -10 65 20 70 75 "
            "50 75 42 25 -20 25 -25 75 -45 75 -50 5 -62 -20 -90 -22"
        ),
    ),
    (44, "bottle", "kitchen", _outline("10 -100 10 -55 30 -30 30 100", True)),
    (59, "pizza", "food", _outline("20 -92 55 -78 70 -60 2 100", True)),
    (
        62,
        "chair",
        "furniture",
        _outline("-50 -100 -30 -100 -25 -10 50 -10 50 100 34 100 32 22 -28 22 -32 100 -50 100"),
    ),
]


def _scene(
    rng: np.random.Generator, height: int, width: int, crowded: bool
) -> tuple[np.ndarray, list]:
    """A textured image (h, w, 3) with objects that do not overlap, and its annotations."""
    image = _colour(rng) + rng.uniform(8, 30) * _natural_noise(rng, height, width)
    annotations, taken = [], []
    for _ in range(rng.integers(6, 20)):
        radius = rng.uniform(12, 62)
        centre = rng.uniform(radius + 2, np.array([width, height]) - radius - (2, 22))
        if any(np.hypot(*(centre - other)) < radius + r for other, r in taken):
            continue
        taken.append((centre, radius))
        category, _, _, outline = _OBJECTS[rng.integers(len(_OBJECTS))]
        outline = outline * rng.uniform(0.75, 1, 2) * rng.choice([-1, 1], 2) + rng.normal(
            0, 0.02, outline.shape
        )
        outline = (
            outline
            / np.linalg.norm(outline, axis=1).max()
            * radius
            @ _rotation(2, rng.uniform(0, 360))[:2, :2]
        )
        for share in (1, 0.55):  # a second tone inside
            _paint(rng, image, np.round(share * outline + centre, 2))
        outline = np.round(outline + centre, 2)
        (x, y), (x_next, y_next) = outline.T, np.roll(outline, -1, axis=0).T
        annotations.append(
            {
                "category_id": category,
                "iscrowd": 0,
                "segmentation": [outline.ravel().tolist()],
                "bbox": [x.min(), y.min(), np.ptp(x), np.ptp(y)],
                "area": abs((x * y_next - y * x_next).sum()) / 2,
            }
        )  # shoelace formula
    if (
        crowded
    ):  # a row of people with one run-length mask: column by column, the first run counts zeros
        crowd = Image.new("L", (width, height))
        for x in range(12, width - 12, 14):
            outline = _OBJECTS[0][3] * 9 + (x, height - 11)
            _paint(rng, image, outline)
            ImageDraw.Draw(crowd).polygon(outline.ravel().tolist(), fill=1)
        flat = np.asarray(crowd).ravel(order="F").astype(int)
        runs = np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=2)), prepend=0)
        left, top, right, bottom = crowd.getbbox()
        annotations.append(
            {
                "category_id": 1,
                "iscrowd": 1,
                "area": int(flat.sum()),
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": {"counts": runs.tolist(), "size": [height, width]},
            }
        )
    return image + rng.normal(0, 5, image.shape), annotations


def write_coco(folder: Path, n_train: int, n_val: int, seed: int) -> None:
    """Write scenes and their `annotations/instances_*.json` into the new folder `folder`."""
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (
        ("train2017", range(1, n_train + 1)),
        ("val2017", range(n_train + 1, n_train + n_val + 1)),
    ):
        (folder / split).mkdir()
        document = {
            "info": {"description": "stand-in scenes drawn by code"},
            "images": [],
            "annotations": [],
            "licenses": [{"id": 1, "name": "drawn by this project's code", "url": ""}],
            "categories": [
                {"id": i, "name": name, "supercategory": group} for i, name, group, _ in _OBJECTS
            ],
        }
        for number in numbers:
            rng = np.random.default_rng((seed, number))
            height, width = rng.integers(200, 321, 2).tolist()
            image, objects = _scene(rng, height, width, crowded=number % 10 == 0)
            name = f"{number:012d}.jpg"
            Image.fromarray(_bytes(image)).save(folder / split / name, quality=92)
            document["images"].append(
                {"id": number, "file_name": name, "width": width, "height": height, "license": 1}
            )
            document["annotations"] += [
                {"id": 100 * number + i, "image_id": number, **entry}
                for i, entry in enumerate(objects)
            ]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


# --- photo-like images ----------------------------------------------------------------------------
def _photo(rng: np.random.Generator, side: int) -> np.ndarray:
    """1/f colour noise under shaded discs and polygons, radii of density r^-3, (side, side, 3)."""
    image = _colour(rng) + rng.uniform(15, 40) * _natural_noise(rng, side, side)
    for _ in range(rng.integers(40, 160)):
        radius = 0.025 * side / np.sqrt(rng.uniform(0.004, 1))
        corners = rng.choice([3, 4, 5, 6, 24])
        angles = (
            2
            * np.pi
            * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners) * (corners < 24))
            / corners
        )
        outline = np.stack([np.cos(angles), rng.uniform(0.4, 1) * np.sin(angles)], axis=1)
        _paint(
            rng,
            image,
            radius * outline @ _rotation(2, rng.uniform(0, 360))[:2, :2] + rng.uniform(0, side, 2),
        )
    return image + rng.normal(0, 3, image.shape)


def write_photos(folder: Path, n: int, side: int, seed: int) -> None:
    """Write `n` square photo-like JPEGs of `side` pixels into the new folder `folder`."""
    folder.mkdir(parents=True)
    for i in range(n):
        photo = _photo(np.random.default_rng((seed, i)), side)
        Image.fromarray(_bytes(photo)).save(folder / f"{i:04d}.jpg", quality=92)
